"""Source `scenes`: rendered pictures of coloured shapes with captions from a grammar, made without any input.

Row i is a pure function of (seed, split, i): all its draws come from one Philox stream keyed by them, and pixels are
made with exact arithmetic only (no sine, no sum whose order could change), so every machine makes the same picture.
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

HELD_OUT = 10
BATCH = 32  # pictures drawn at a time: their planes stay in a core's cache
PARAMETERS = 64  # 64-bit words of a row's stream kept for everything but pixel noise


@configclass
class ScenesConfig(SourceConfig):
    """`count` pictures of `image_size` pixels a side.

    A set of 10 of the 48 pairs of colour and shape, drawn by `seed`, is held out: `combinations` says which pairs are
    shown. `split` gives other pictures of the same seed. `language: both` writes every caption in English and Korean.
    `difficulty`: easy has large single objects on plain grounds; hard has small ones, faded, turned and among specks.
    """

    count: Annotated[int, Field(ge=1)] = 20_000
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    seed: int = 0
    split: Literal["train", "test"] = "train"
    combinations: Literal["train", "held_out", "all"] = "train"
    language: Literal["en", "ko", "both"] = "en"
    difficulty: Literal["easy", "normal", "hard"] = "normal"


class ScenesSource(Source):
    """Rendered scenes; see ScenesConfig."""

    distinct = True  # every picture has its own noise
    columns = pa.schema(
        [
            ("colour", pa.string()),
            ("shape", pa.string()),
            ("count", pa.int32()),
            ("size", pa.string()),
            ("position", pa.string()),  # null when there are several
            ("held_out", pa.bool_()),
        ]
    )

    def __init__(self, config: ScenesConfig) -> None:
        self.count, self.image_size, self.seed = config.count, config.image_size, config.seed
        self.split, self.combinations = config.split, config.combinations
        self.language, self.difficulty = config.language, config.difficulty
        self.held_out = held_out(config.seed)
        pairs = [(c, s) for c in range(len(ENGLISH.colours)) for s in range(len(ENGLISH.shapes))]
        wanted = {"train": (False,), "held_out": (True,), "all": (False, True)}[config.combinations]
        self._pairs = np.array([pair for pair in pairs if (pair in self.held_out) in wanted])

    def identity(self) -> dict[str, Any]:
        fields = ("count", "image_size", "seed", "split", "combinations", "language", "difficulty")
        return {"name": "scenes", **{name: getattr(self, name) for name in fields}}

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        for start in range(0, len(rows), BATCH):
            yield from self._batch([int(row) for row in rows[start : start + BATCH]])

    def _batch(self, rows: list[int]) -> Iterator[Record]:
        look = drawing.LOOKS[self.difficulty]
        noise, specks = drawing.noise_words(self.image_size), look.specks * drawing.SPECK
        key = f"{self.split} {self.seed}"
        words = np.stack([stream(key, row, PARAMETERS + noise + specks) for row in rows])
        drawn, grain, scattered = np.split(words, [PARAMETERS, PARAMETERS + noise], axis=1)
        u = uniform(drawn)
        pair = self._pairs[(u[:, 0] * len(self._pairs)).astype(np.int64)]
        colour, shape = pair[:, 0], pair[:, 1]
        # Shape is learnt last and from single objects, so most pictures show one.
        count = 1 + (u[:, 1] >= look.single).astype(np.int64) + (u[:, 1] >= look.double)
        size = (u[:, 2] * (4 - count)).astype(np.int64)  # the more there are, the smaller they must be
        centres = drawing.place(look, count, size, u[:, 3:12])
        objects = drawing.Objects(shape, colour, size, count, centres)
        distractors = uniform(scattered).reshape(len(rows), look.specks, drawing.SPECK)
        pictures = drawing.draw(look, self.image_size, objects, u[:, 12:48], grain, distractors)
        places = [place_of(*centres[i, 0]) if count[i] == 1 else None for i in range(len(rows))]
        told = (column.tolist() for column in (colour, shape, size, count))
        scenes = [Scene(*values) for values in zip(*told, places, strict=True)]
        grammars = GRAMMARS[self.language]
        columns = self._columns(grammars[0], scenes)
        for i, row in enumerate(rows):
            captions: list[str | bytes | None] = [
                text for grammar in grammars for text in grammar.describe(scenes[i], u[i, 48:])
            ]
            yield Record(row, pictures[i], captions, columns.slice(i, 1), f"scenes#{row}")

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
    """`words` random uint64 of row `row`, by Philox: a function of key and row alone."""
    digest = np.frombuffer(hashlib.sha256(f"clipwright scenes {key}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Philox(key=digest, counter=np.array([0, 0, 0, row], dtype=np.uint64)).random_raw(words)


def uniform(words: np.ndarray) -> np.ndarray:
    """53 bits of each word as a number in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def held_out(seed: int) -> frozenset[tuple[int, int]]:
    """Ten (colour, shape) pairs, drawn by `seed`, at most two of any colour or shape, so that each stays known."""
    pairs = [(c, s) for c in range(len(ENGLISH.colours)) for s in range(len(ENGLISH.shapes))]
    order = np.argsort(stream(f"held out {seed}", 0, len(pairs)))
    chosen: list[tuple[int, int]] = []
    for colour, shape in (pairs[i] for i in order):
        crowded = sum(c == colour for c, _ in chosen) == 2 or sum(s == shape for _, s in chosen) == 2
        if len(chosen) < HELD_OUT and not crowded:
            chosen.append((colour, shape))
    assert len(chosen) == HELD_OUT
    return frozenset(chosen)


SOURCES.add(ScenesConfig, ScenesSource, {"scenes": {}})
