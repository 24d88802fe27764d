"""Captions of rendered scenes in English and Korean: the same sentences in both, selected by the same draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scene:
    """What a caption may describe: indices into a grammar's words, and a count. `place` is None for several objects."""

    colour: int
    shape: int
    size: int
    count: int
    place: int | None


@dataclass(frozen=True)
class Grammar:
    """The words and sentences of a language. `single` and `several` hold the same sentences in every language.

    `forms` returns the text for each name in braces, inflected for its place in the sentence.
    """

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    places: tuple[str, ...]  # top left to bottom right, row by row
    single: tuple[str, ...]
    several: tuple[str, ...]
    forms: Callable[[Grammar, Scene], dict[str, str]]

    def place(self, scene: Scene) -> str | None:
        return None if scene.place is None else self.places[scene.place]

    def describe(self, scene: Scene, u: np.ndarray) -> list[str]:
        """Returns two or three different captions of a scene. Each names color and shape. `u` are uniform draws."""
        templates = self.single if scene.count == 1 else self.several
        captions = 3 if u[len(templates)] < 0.5 else 2
        order = np.argsort(u[: len(templates)], kind="stable")[:captions]
        words = self.forms(self, scene)
        return [templates[i].format_map(words) for i in order]


def place_of(x: float, y: float) -> int:
    """Returns the cell of a 3 × 3 grid, row by row, that holds (x, y); x to the right and y down, in [0, 1]."""
    return 3 * _third(y) + _third(x)


def _third(position: float) -> int:
    if position < 0.4:
        return 0
    return 2 if position > 0.6 else 1


def _english(grammar: Grammar, scene: Scene) -> dict[str, str]:
    colour, shape = grammar.colours[scene.colour], grammar.shapes[scene.shape]
    size, place = grammar.sizes[scene.size], grammar.place(scene) or ""
    return {
        "colour": colour,
        "size": size,
        "shape": shape,
        "shapes": f"{shape}s" if shape != "cross" else "crosses",
        "number": ("one", "two", "three")[scene.count - 1],
        "place": f"in the {place}" if place == "centre" or " " in place else f"on the {place}",
        "a_colour": f"an {colour}" if colour[0] in "aeiou" else f"a {colour}",
    }


def _korean(grammar: Grammar, scene: Scene) -> dict[str, str]:
    colour, shape = grammar.colours[scene.colour], grammar.shapes[scene.shape]
    size = grammar.sizes[scene.size]
    return {
        "colour": colour,
        "colour_noun": colour if colour.endswith("색") else f"{colour}색",
        "size": f"{size} 크기의" if size == "중간" else size,
        "size_predicate": f"{size}인" if size == "중간" else size,
        "shape": shape,
        "shape_subject": shape + particle(shape, "이", "가"),
        "shape_topic": shape + particle(shape, "은", "는"),
        "number": ("한", "두", "세")[scene.count - 1],
        "place": grammar.place(scene) or "",
    }


def particle(noun: str, after_consonant: str, after_vowel: str) -> str:
    """Returns the form of a particle after a Hangul noun. Syllables are U+AC00 + 28·(initial, vowel) + final."""
    assert "가" <= noun[-1] <= "힣", noun
    return after_consonant if (ord(noun[-1]) - ord("가")) % 28 else after_vowel


ENGLISH = Grammar(
    colours=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"),
    shapes=("circle", "square", "triangle", "star", "heart", "cross"),
    sizes=("small", "medium", "large"),
    places=("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
    single=(
        "{a_colour} {shape}",
        "a {size} {colour} {shape}",
        "a photo of {a_colour} {shape}",
        "a picture of a {size} {colour} {shape}",
        "{a_colour} {shape} {place}",
        "there is a {size} {colour} {shape} {place}",
        "one {colour} {shape}",
        "a {shape} that is {colour}",
        "the {shape} is {colour}",
        "{a_colour} {shape} of {size} size",
    ),
    several=(
        "{number} {colour} {shapes}",
        "{number} {size} {colour} {shapes}",
        "a photo of {number} {colour} {shapes}",
        "there are {number} {colour} {shapes}",
        "a group of {number} {size} {colour} {shapes}",
        "{number} {shapes} that are {colour}",
        "the {number} {shapes} are {colour}",
    ),
    forms=_english,
)

KOREAN = Grammar(
    colours=("빨간", "주황", "노란", "초록", "파란", "보라", "분홍", "갈색"),
    shapes=("원", "정사각형", "삼각형", "별", "하트", "십자가"),
    sizes=("작은", "중간", "큰"),
    places=("왼쪽 위", "위쪽", "오른쪽 위", "왼쪽", "가운데", "오른쪽", "왼쪽 아래", "아래쪽", "오른쪽 아래"),
    single=(
        "{colour} {shape}",
        "{size} {colour} {shape}",
        "{colour} {shape} 사진",
        "{size} {colour} {shape} 그림",
        "{place}에 있는 {colour} {shape}",
        "{place}에 {size} {colour} {shape_subject} 있다",
        "{colour} {shape} {number} 개",
        "{colour_noun}인 {shape}",
        "{shape_topic} {colour_noun}이다",
        "크기가 {size_predicate} {colour} {shape}",
    ),
    several=(
        "{colour} {shape} {number} 개",
        "{size} {colour} {shape} {number} 개",
        "{colour} {shape} {number} 개가 있는 사진",
        "{colour} {shape_subject} {number} 개 있다",
        "모여 있는 {size} {colour} {shape} {number} 개",
        "{colour_noun}인 {shape} {number} 개",
        "{shape} {number} 개는 {colour_noun}이다",
    ),
    forms=_korean,
)

# The columns use the words of the first grammar.
GRAMMARS = {"en": (ENGLISH,), "ko": (KOREAN,), "both": (ENGLISH, KOREAN)}
