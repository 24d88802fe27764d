"""What a source of image-text pairs is: rows that any worker can read in any order, and a name for their content."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipwright.pipeline.core.registry import Registry, configclass


@configclass
class SourceConfig:
    """Fields every source has."""

    name: str


@dataclass(frozen=True)
class Record:
    """One plan row as its source holds it.

    `image` is the original bytes, or pixels uint8 (H, W, 3) where there are no bytes, or None with `reject` saying
    (E_IMG code, detail). `captions` are as found: str, bytes that are not valid UTF-8, or None. `columns` is one row
    of the source's typed columns; `source` says where the row lies, relative to the input's root; `source_key` is
    the name the image has in the input, if any.
    """

    row: int
    image: bytes | np.ndarray | None
    captions: list[str | bytes | None]
    columns: pa.RecordBatch
    source: str
    source_key: str | None = None
    reject: tuple[str, str] | None = None


class Source(ABC):
    """Rows 0 to count-1 of image-text pairs.

    It is pickled to workers, so it holds plain values: not its config, whose class is made at run time.
    `columns` is the schema of what a user keeps beside image and captions. `distinct` promises that no two rows
    hold the same image, which saves the pass that looks for duplicates.
    """

    count: int
    columns: pa.Schema
    distinct: bool = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the rows: settings, and files by name and content hash, never by where they lie."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        """The given plan rows, which are sorted, one after another; holds few images at a time."""


SOURCES: Registry[Source] = Registry("source", "clipwright.data_prep.sources")
