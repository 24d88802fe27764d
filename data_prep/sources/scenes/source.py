"""Source `scenes`: rendered images of colored shapes with captions from a grammar. Needs no input.

Row i is a pure function of (seed, split, i): all its draws come from one Philox stream keyed by them, and pixels are
computed with exactly rounded arithmetic only (no sine, no sum of variable order), so every machine renders the same
image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipwright.data_prep.sources.base import SOURCES, Record, Source, SourceConfig
from clipwright.data_prep.sources.scenes import drawing
from clipwright.data_prep.sources.scenes.grammar import ENGLISH, GRAMMARS, Grammar, Scene, place_of
from clipwright.pipeline.core.registry import configclass

HELD_OUT_PAIRS = 10
BATCH_ROWS = 32  # rendered at a time: their pixels fit in a core's cache
PARAMETER_WORDS = 64  # 64-bit words at the start of a row's stream, for everything except noise and specks


@configclass
class ScenesConfig(SourceConfig):
    """Rendered images of colored shapes. Ten of the 48 pairs of color and shape, drawn by `seed`, are held out."""

    count: Annotated[int, Field(ge=1)] = 20_000
    """Number of images."""
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    """Side of an image in pixels."""
    seed: int = 0
    """Seed of everything that is drawn, including the held-out pairs."""
    split: Literal["train", "test"] = "train"
    """train or test: different images for the same seed."""
    combinations: Literal["train", "held_out", "all"] = "train"
    """Pairs of color and shape that are shown: train (not held out), held_out or all."""
    language: Literal["en", "ko", "both"] = "en"
    """Language of the captions: English, Korean, or every caption in both."""
    difficulty: Literal["easy", "normal", "hard"] = "normal"
    """easy: large single objects on plain backgrounds; hard: small, faded, rotated objects among specks."""


class ScenesSource(Source):
    """Rendered scenes. See ScenesConfig."""

    distinct = True  # every image has its own noise
    columns = pa.schema(
        [
            ("colour", pa.string()),
            ("shape", pa.string()),
            ("count", pa.int32()),
            ("size", pa.string()),
            ("position", pa.string()),  # null if there are several objects
            ("held_out", pa.bool_()),
        ]
    )

    def __init__(self, config: ScenesConfig) -> None:
        self.count = config.count
        self.image_size = config.image_size
        self.seed = config.seed
        self.split = config.split
        self.combinations = config.combinations
        self.language = config.language
        self.difficulty = config.difficulty
        self.held_out = held_out(config.seed)
        pairs = _all_pairs()
        if config.combinations == "train":
            pairs = [pair for pair in pairs if pair not in self.held_out]
        elif config.combinations == "held_out":
            pairs = [pair for pair in pairs if pair in self.held_out]
        self._pairs = np.array(pairs)

    def identity(self) -> dict[str, Any]:
        fields = ("count", "image_size", "seed", "split", "combinations", "language", "difficulty")
        return {"name": "scenes", **{name: getattr(self, name) for name in fields}}

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        for start in range(0, len(rows), BATCH_ROWS):
            yield from self._batch([int(row) for row in rows[start : start + BATCH_ROWS]])

    def _batch(self, rows: list[int]) -> Iterator[Record]:
        look = drawing.LOOKS[self.difficulty]
        noise = drawing.noise_words(self.image_size)
        words = PARAMETER_WORDS + noise + look.specks * drawing.SPECK
        key = f"{self.split} {self.seed}"
        random_words = np.stack([stream(key, row, words) for row in rows])
        parameters, noise_part, speck_part = np.split(random_words, [PARAMETER_WORDS, PARAMETER_WORDS + noise], axis=1)
        u = uniform(parameters)
        pair = self._pairs[(u[:, 0] * len(self._pairs)).astype(np.int64)]
        colour, shape = pair[:, 0], pair[:, 1]
        # Models learn shape last, and from single objects, so most images show one object.
        count = 1 + (u[:, 1] >= look.single).astype(np.int64) + (u[:, 1] >= look.double)
        size = (u[:, 2] * (4 - count)).astype(np.int64)  # more objects have to be smaller
        centers = drawing.place(look, count, size, u[:, 3:12])
        objects = drawing.Objects(shape, colour, size, count, centers)
        specks = uniform(speck_part).reshape(len(rows), look.specks, drawing.SPECK)
        images = drawing.draw(look, self.image_size, objects, u[:, 12:48], noise_part, specks)
        scenes: list[Scene] = []
        for i in range(len(rows)):
            place = place_of(*centers[i, 0]) if count[i] == 1 else None
            scenes.append(Scene(int(colour[i]), int(shape[i]), int(size[i]), int(count[i]), place))
        grammars = GRAMMARS[self.language]
        columns = self._columns(grammars[0], scenes)
        for i, row in enumerate(rows):
            captions: list[str | bytes | None] = []
            for grammar in grammars:
                captions.extend(grammar.describe(scenes[i], u[i, 48:]))
            yield Record(row, images[i], captions, columns.slice(i, 1), f"scenes#{row}")

    def _columns(self, grammar: Grammar, scenes: list[Scene]) -> pa.RecordBatch:
        values = [
            [grammar.colours[scene.colour] for scene in scenes],
            [grammar.shapes[scene.shape] for scene in scenes],
            [scene.count for scene in scenes],
            [grammar.sizes[scene.size] for scene in scenes],
            [grammar.place(scene) for scene in scenes],
            [(scene.colour, scene.shape) in self.held_out for scene in scenes],
        ]
        return pa.RecordBatch.from_arrays(
            [pa.array(v, f.type) for v, f in zip(values, self.columns, strict=True)], schema=self.columns
        )


def stream(key: str, row: int, words: int) -> np.ndarray:
    """Returns `words` random uint64 (Philox) of row `row`, a function of key and row only."""
    digest = np.frombuffer(hashlib.sha256(f"clipwright scenes {key}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Philox(key=digest, counter=np.array([0, 0, 0, row], dtype=np.uint64)).random_raw(words)


def uniform(words: np.ndarray) -> np.ndarray:
    """Returns the top 53 bits of each word as a number in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def held_out(seed: int) -> frozenset[tuple[int, int]]:
    """Returns ten (color, shape) pairs drawn by `seed`, at most two of any color or shape, so that each is learned."""
    pairs = _all_pairs()
    order = np.argsort(stream(f"held out {seed}", 0, len(pairs)))
    chosen: list[tuple[int, int]] = []
    for index in order:
        colour, shape = pairs[index]
        same_colour = sum(other == colour for other, _ in chosen)
        same_shape = sum(other == shape for _, other in chosen)
        if len(chosen) < HELD_OUT_PAIRS and same_colour < 2 and same_shape < 2:
            chosen.append((colour, shape))
    assert len(chosen) == HELD_OUT_PAIRS
    return frozenset(chosen)


def _all_pairs() -> list[tuple[int, int]]:
    return [(colour, shape) for colour in range(len(ENGLISH.colours)) for shape in range(len(ENGLISH.shapes))]


SOURCES.add(ScenesConfig, ScenesSource, {"scenes": {}})
