"""Captions of rendered scenes in English and Korean: the same sentences, drawn alike, in each language's own words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scene:
    """What a caption may tell, as numbers: indices into a grammar's words; `place` is None when there are several."""

    colour: int
    shape: int
    size: int
    count: int
    place: int | None


@dataclass(frozen=True)
class Grammar:
    """A language's words and sentences; `single` and `several` hold the same sentences in every language's.

    `forms` gives what stands for each name in braces: words in the form that their neighbours ask for.
    """

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    places: tuple[str, ...]  # top left to bottom right, line by line
    single: tuple[str, ...]
    several: tuple[str, ...]
    forms: Callable[[Grammar, Scene], dict[str, str]]

    def place(self, scene: Scene) -> str | None:
        return None if scene.place is None else self.places[scene.place]

    def describe(self, scene: Scene, u: np.ndarray) -> list[str]:
        """Two or three different captions of a scene; each names colour and shape. `u`: uniform draws."""
        templates = self.single if scene.count == 1 else self.several
        order = np.argsort(u[: len(templates)], kind="stable")[: 2 + int(u[len(templates)] < 0.5)]
        words = self.forms(self, scene)
        return [templates[i].format_map(words) for i in order]


def place_of(x: float, y: float) -> int:
    """The ninth of the picture that an object stands in, line by line; x to the right and y down, in [0, 1]."""
    column, line = (0 if v < 0.4 else 2 if v > 0.6 else 1 for v in (x, y))
    return 3 * line + column


def _english(grammar: Grammar, scene: Scene) -> dict[str, str]:
    colour, shape = grammar.colours[scene.colour], grammar.shapes[scene.shape]
    size, where = grammar.sizes[scene.size], grammar.place(scene) or ""
    return {
        "colour": colour,
        "size": size,
        "shape": shape,
        "shapes": f"{shape}s" if shape != "cross" else "crosses",
        "number": ("one", "two", "three")[scene.count - 1],
        "place": f"in the {where}" if where == "centre" or " " in where else f"on the {where}",
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
    """The form of a particle that follows a Hangul noun: syllables are U+AC00 + 28·(initial, vowel) + final."""
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

# The first grammar's words stand in the columns.
GRAMMARS = {"en": (ENGLISH,), "ko": (KOREAN,), "both": (ENGLISH, KOREAN)}
