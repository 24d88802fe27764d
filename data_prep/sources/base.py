"""What a source of image-text pairs is: rows that any worker can read in any order, and a name for their content."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipwright.pipeline.core.registry import Registry, configclass

# A caption as found: text, bytes that are not valid UTF-8, nothing, or (E_CAP code, detail) where it cannot be read.
Caption = str | bytes | tuple[str, str] | None


@configclass
class SourceConfig:
    """Fields every source has."""

    name: str


@dataclass(frozen=True)
class Record:
    """One plan row as its source holds it.

    `image` is the original bytes, or pixels uint8 (H, W, 3) where there are no bytes, or None with `reject` saying
    (E_IMG code, detail). `captions` are as found. `columns` is one row of the source's typed columns; `source` says
    where the row lies, relative to the input's root; `source_key` is the name the image has in the input, if any.
    """

    row: int
    image: bytes | np.ndarray | None
    captions: Sequence[Caption]
    columns: pa.RecordBatch
    source: str
    source_key: str | None = None
    reject: tuple[str, str] | None = None


class Source(ABC):
    """Rows 0 to count-1 of image-text pairs.

    It is pickled to workers, so it holds plain values: not its config, whose class is made at run time.
    `columns` is the schema of what a user keeps beside image and captions. `distinct` promises that no two rows
    hold the same image, which saves the pass that looks for duplicates. `notes` are lines for the user about input
    that is no row.
    """

    count: int
    columns: pa.Schema
    distinct: bool = False
    notes: Sequence[str] = ()

    def scan(self, *, quiet: bool = False) -> None:  # noqa: B027  most sources have nothing to scan
        """Reads, once, what takes long enough to need a progress bar; `columns` and `notes` may be known only then.

        It comes before `identity`; without it rows can be read, though perhaps without columns.
        """

    def scanned(self) -> dict[str, Any] | None:
        """What `scan` found, as JSON, for other processes of the same job; None where it found nothing."""
        return None

    def recall(self, found: dict[str, Any]) -> bool:
        """Takes what `scanned` gave in place of a scan; False where the input is not what it was, by sizes and times.

        The keys are then in the plan.
        """
        return False

    def keys(self) -> np.ndarray | None:
        """Keys of all rows (S32, empty without image) where `scan` has found them; else the plan reads the images."""
        return None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the rows: settings, and files by name and content hash, never by where they lie."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        """The given plan rows, which are sorted, one after another; holds few images at a time."""


class PathError(ValueError):
    """A path that is not followed; `args[0]` says why."""


def open_inside(root: Path, name: str, *, walked: bool = False) -> io.FileIO:
    """A plain file under `root`, which is resolved. Raises PathError if it is missing or leaves `root`.

    `walked`: found by a walk that follows no link, so that only the file itself may be one: a fraction of the calls.
    """
    path, flags = f"{root}/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not block
    try:
        if not walked or os.path.islink(path):  # noqa: PTH114  a Path costs as much as the call
            place = (root / name).resolve(strict=True)
            if not place.is_relative_to(root):
                raise PathError(f"{name!r} leaves the root")
            path = str(place)
        handle = os.open(path, flags | os.O_NOFOLLOW)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise PathError(f"{name!r} is not a plain file")
    except PathError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise PathError(f"{name!r}: {getattr(error, 'strerror', None) or error}") from None
    return io.FileIO(handle)


def read_inside(root: Path, name: str, *, walked: bool = False) -> bytes:
    """The bytes of a plain file under `root`. Raises PathError."""
    with open_inside(root, name, walked=walked) as file:
        try:
            return file.readall()
        except OSError as error:
            raise PathError(f"{name!r}: {error.strerror}") from None


def read_image(root: Path, name: str, *, walked: bool = False) -> tuple[bytes | None, tuple[str, str] | None]:
    """An image file's bytes, or None and why not, as a Record has them."""
    try:
        data = read_inside(root, name, walked=walked)
    except PathError as error:
        return None, ("E_IMG_PATH", str(error))
    return (data, None) if data else (None, ("E_IMG_EMPTY", "0 bytes"))


SOURCES: Registry[Source] = Registry("source", "clipwright.data_prep.sources")
