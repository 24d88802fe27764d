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

from clipwright.data_prep import drawing
from clipwright.data_prep.sources.base import SOURCES, Record, Source, SourceConfig
from clipwright.pipeline.core.registry import configclass

SIZES = ("small", "medium", "large")
NUMBERS = ("one", "two", "three")
HELD_OUT = 10
BATCH = 32  # pictures drawn at a time: their planes stay in a core's cache
PARAMETERS = 64  # 64-bit words of a row's stream kept for everything but pixel noise

SINGLE = (
    "{a:colour} {colour} {shape}",
    "{a:size} {size} {colour} {shape}",
    "a photo of {a:colour} {colour} {shape}",
    "a picture of {a:size} {size} {colour} {shape}",
    "{a:colour} {colour} {shape} {place}",
    "there is {a:size} {size} {colour} {shape} {place}",
    "one {colour} {shape}",
    "a {shape} that is {colour}",
    "the {shape} is {colour}",
    "{a:colour} {colour} {shape} of {size} size",
)
SEVERAL = (
    "{number} {colour} {shapes}",
    "{number} {size} {colour} {shapes}",
    "a photo of {number} {colour} {shapes}",
    "there are {number} {colour} {shapes}",
    "a group of {number} {size} {colour} {shapes}",
    "{number} {shapes} that are {colour}",
    "the {number} {shapes} are {colour}",
)


@configclass
class ScenesConfig(SourceConfig):
    """`count` pictures of `image_size` pixels a side.

    A set of 10 of the 48 pairs of colour and shape, drawn by `seed`, is held out: `combinations` says which pairs are
    shown. `split` gives other pictures of the same seed.
    """

    count: Annotated[int, Field(ge=1)] = 20_000
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    seed: int = 0
    split: Literal["train", "test"] = "train"
    combinations: Literal["train", "held_out", "all"] = "train"


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
        self.held_out = held_out(config.seed)
        pairs = [(c, s) for c in range(len(drawing.COLOURS)) for s in range(len(drawing.SHAPES))]
        wanted = {"train": (False,), "held_out": (True,), "all": (False, True)}[config.combinations]
        self._pairs = np.array([pair for pair in pairs if (pair in self.held_out) in wanted])

    def identity(self) -> dict[str, Any]:
        fields = ("count", "image_size", "seed", "split", "combinations")
        return {"name": "scenes", **{name: getattr(self, name) for name in fields}}

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        for start in range(0, len(rows), BATCH):
            yield from self._batch([int(row) for row in rows[start : start + BATCH]])

    def _batch(self, rows: list[int]) -> Iterator[Record]:
        noise = drawing.noise_words(self.image_size)
        words = np.stack([stream(f"{self.split} {self.seed}", row, PARAMETERS + noise) for row in rows])
        # 53 bits of each word as a number in [0, 1).
        u = (words[:, :PARAMETERS] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        pair = self._pairs[(u[:, 0] * len(self._pairs)).astype(np.int64)]
        colour, shape = pair[:, 0], pair[:, 1]
        # Shape is learnt last and from single objects, so most pictures show one.
        count = 1 + (u[:, 1] >= 0.7).astype(np.int64) + (u[:, 1] >= 0.9)
        size = (u[:, 2] * (4 - count)).astype(np.int64)  # the more there are, the smaller they must be
        centres = drawing.place(count, size, u[:, 3:12])
        pictures = drawing.draw(
            self.image_size, shape, colour, size, count, centres, u[:, 12:48], words[:, PARAMETERS:]
        )
        where = [position(*centres[i, 0]) if count[i] == 1 else None for i in range(len(rows))]
        names = [drawing.COLOURS[c] for c in colour], [drawing.SHAPES[s] for s in shape], [SIZES[s] for s in size]
        held = [(int(c), int(s)) in self.held_out for c, s in pair]
        values = [names[0], names[1], count.astype(np.int32), names[2], where, held]
        columns = pa.RecordBatch.from_arrays(
            [pa.array(v, f.type) for v, f in zip(values, self.columns, strict=True)], schema=self.columns
        )
        for i, row in enumerate(rows):
            captions = describe(names[0][i], names[1][i], names[2][i], int(count[i]), where[i], u[i, 48:])
            yield Record(row, pictures[i], captions, columns.slice(i, 1), f"scenes#{row}")


def stream(key: str, row: int, words: int) -> np.ndarray:
    """`words` random uint64 of row `row`, by Philox: a function of key and row alone."""
    digest = np.frombuffer(hashlib.sha256(f"clipwright scenes {key}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Philox(key=digest, counter=np.array([0, 0, 0, row], dtype=np.uint64)).random_raw(words)


def held_out(seed: int) -> frozenset[tuple[int, int]]:
    """Ten (colour, shape) pairs, drawn by `seed`, at most two of any colour or shape, so that each stays known."""
    pairs = [(c, s) for c in range(len(drawing.COLOURS)) for s in range(len(drawing.SHAPES))]
    order = np.argsort(stream(f"held out {seed}", 0, len(pairs)))
    chosen: list[tuple[int, int]] = []
    for colour, shape in (pairs[i] for i in order):
        crowded = sum(c == colour for c, _ in chosen) == 2 or sum(s == shape for _, s in chosen) == 2
        if len(chosen) < HELD_OUT and not crowded:
            chosen.append((colour, shape))
    assert len(chosen) == HELD_OUT
    return frozenset(chosen)


def position(x: float, y: float) -> str:
    """Where a single object stands, in words; x to the right and y down, in [0, 1]."""
    column = "left" if x < 0.4 else "right" if x > 0.6 else ""
    line = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    return f"{line} {column}".strip() or "centre"


def describe(
    colour: str, shape: str, size: str, count: int, where: str | None, u: np.ndarray
) -> list[str | bytes | None]:
    """Two or three different captions of a scene; each names colour and shape. `u`: uniform draws."""
    templates = SINGLE if count == 1 else SEVERAL
    order = np.argsort(u[: len(templates)], kind="stable")[: 2 + int(u[len(templates)] < 0.5)]
    words = {
        "colour": colour,
        "size": size,
        "shape": shape,
        "shapes": f"{shape}s" if shape != "cross" else "crosses",
        "number": NUMBERS[count - 1],
        "place": f"in the {where}" if where in ("centre", None) or " " in where else f"on the {where}",
        "a:colour": "an" if colour[0] in "aeiou" else "a",
        "a:size": "an" if size[0] in "aeiou" else "a",
    }
    return [_fill(templates[i], words) for i in order]


def _fill(template: str, words: dict[str, str]) -> str:
    for name, word in words.items():
        template = template.replace(f"{{{name}}}", word)
    return template


SOURCES.add(ScenesConfig, ScenesSource, {"scenes": {}})
