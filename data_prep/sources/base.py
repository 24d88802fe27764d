"""The contract of a source: image-text pairs as numbered rows that any worker can read in any order."""

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
from clipwright.pipeline.core.text import shown

# A caption as the source holds it: text, bytes that may not be valid UTF-8, nothing, or (E_CAP code, detail) if it
# cannot be read.
Caption = str | bytes | tuple[str, str] | None

NO_CAPTIONS = "none"  # value of `source.caption` for images that have no captions


@configclass
class SourceConfig:
    """Fields of every source."""

    name: str
    """Name of the source."""


@dataclass(frozen=True)
class Record:
    """One plan row as its source holds it.

    `image` is the original bytes, or pixels uint8 (H, W, 3) if there are no bytes, or None, with the (E_IMG code,
    detail) in `reject`. `captions` are not normalized yet. `columns` is one row of the source's typed columns.
    `source` is the row's location relative to the input's root; `source_key` is the image's name in the input, if any.
    """

    row: int
    image: bytes | np.ndarray | None
    captions: Sequence[Caption]
    columns: pa.RecordBatch
    source: str
    source_key: str | None = None
    reject: tuple[str, str] | None = None


class Source(ABC):
    """Rows 0 to count - 1 of image-text pairs.

    A source is pickled and sent to workers, so it holds plain values, not its config, whose class is made at run time.
    `columns` is the schema of the user's columns besides image and captions. `captioned` is False if the images are
    stored without captions (`source.caption=none`): `captions` of every record is empty then. `distinct` promises that
    no two rows have the same image, which saves the pass that looks for duplicates. `notes` are lines for the user
    about input that is not used.
    """

    count: int
    columns: pa.Schema
    captioned: bool = True
    distinct: bool = False
    notes: Sequence[str] = ()

    def scan(self, *, quiet: bool = False) -> None:  # noqa: B027  most sources have nothing to scan
        """Reads the input once, for whatever takes long enough to need a progress bar.

        `identity` requires a scan; `columns` and `notes` may be incomplete without it. Rows can be read without it.
        """

    def scan_result(self) -> dict[str, Any] | None:
        """Returns what `scan` learned as JSON, for other processes of the same job, or None if there is nothing."""
        return None

    def load_scan(self, result: dict[str, Any]) -> bool:
        """Uses a `scan_result` instead of scanning. Returns False if sizes or times of the input have changed.

        Keys are not restored: the plan holds them.
        """
        return False

    def keys(self) -> np.ndarray | None:
        """Returns the keys of all rows (S32, empty without an image) if `scan` computed them, else None."""
        return None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns what determines the rows: settings, and files by name and content hash, never by location."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        """Yields the given plan rows, which are sorted. Keeps only a few images in memory."""


class PathError(ValueError):
    """A path that is not followed; `args[0]` is the reason."""


def open_inside(root: Path, name: str, *, walked: bool = False) -> io.FileIO:
    """Opens a regular file under `root`, which must be resolved. Raises PathError if it is missing or leaves `root`.

    `walked` means that `name` comes from a walk that follows no links, so that only the file itself may be a link.
    This saves most of the system calls.
    """
    path = f"{root}/{name}"
    try:
        if not walked or os.path.islink(path):  # noqa: PTH114  a Path costs as much as the call
            target = (root / name).resolve(strict=True)
            if not target.is_relative_to(root):
                raise PathError(f"'{shown(name)}' leaves the root")
            path = str(target)
        # O_NONBLOCK: opening a pipe must not block.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise PathError(f"'{shown(name)}' is not a regular file")
    except PathError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise PathError(f"'{shown(name)}': {getattr(error, 'strerror', None) or error}") from None
    return io.FileIO(handle)


def read_inside(root: Path, name: str, *, walked: bool = False) -> bytes:
    """Returns the bytes of a regular file under `root`. Raises PathError."""
    with open_inside(root, name, walked=walked) as file:
        try:
            return file.readall()
        except OSError as error:
            raise PathError(f"'{shown(name)}': {error.strerror}") from None


def read_image(root: Path, name: str, *, walked: bool = False) -> tuple[bytes | None, tuple[str, str] | None]:
    """Returns `image` and `reject` of a Record for an image file."""
    try:
        data = read_inside(root, name, walked=walked)
    except PathError as error:
        return None, ("E_IMG_PATH", str(error))
    if not data:
        return None, ("E_IMG_EMPTY", "0 bytes")
    return data, None


SOURCES: Registry[Source] = Registry("source", "clipwright.data_prep.sources")
