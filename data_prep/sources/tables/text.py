"""Text files as UTF-8, in blocks of complete rows that can be read in any order."""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa

from clipwright.data_prep.sources.encodings import byte_order_mark, likely_encoding
from clipwright.data_prep.sources.tables.base import unreadable
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count

BLOCK_BYTES = 1 << 18
MAX_ROW_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 16
_PACK = pa.Codec("zstd")
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def count_lines(data: bytes) -> int:
    """Returns the number of lines; the last one may lack its line end."""
    ends = data.count(b"\n")
    if b"\r" in data:
        ends += data.count(b"\r") - data.count(b"\r\n")
    return ends + (not data.endswith((b"\n", b"\r")))


def last_line_end(data: bytes) -> int:
    """Returns the end of the last complete line, or 0."""
    end = data.rfind(b"\n") + 1
    # The last byte may be the first half of a line end.
    return end or data.rfind(b"\r", 0, len(data) - 1) + 1


class TextReader:
    """Reads a text file as UTF-8 without its byte order mark, which decides the encoding if there is one.

    `plain` tells that the bytes are those of the file, from `offset` on.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self.path = path
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        self._file = cast(BinaryIO, opener(path, "rb"))
        try:
            marked, self.offset = byte_order_mark(self._file.read(4))
            self._file.seek(self.offset)
        except _DAMAGED as error:
            self._file.close()
            raise _damaged(path, error) from None
        self.encoding = marked or encoding
        is_utf8 = self.encoding in ("utf-8", "utf-8-sig", "ascii")
        self.plain = is_utf8 and path.suffix.lower() != ".gz"
        self._decoder = None if is_utf8 else codecs.getincrementaldecoder(self.encoding)()

    def __enter__(self) -> TextReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Returns the next about `size` bytes; nothing at the end. Raises E_TABLE for bytes of another encoding."""
        while True:
            try:
                data = self._file.read(size)
            except _DAMAGED as error:
                raise _damaged(self.path, error) from None
            if self._decoder is None:
                return data
            try:
                decoded = self._decoder.decode(data, final=not data).encode()
            except UnicodeError as error:
                sample = data[max(0, getattr(error, "start", 0) - 64) :]
                raise wrong_encoding(self.path, self.encoding, sample, str(error)) from None
            if decoded or not data:
                return decoded


class TextBlocks:
    """Complete rows of a text file, in blocks; row numbers start at 0 and line numbers at 1.

    Blocks of a plain UTF-8 file are read from the file. Those of a compressed file, or of another encoding, are kept
    in memory, compressed.
    """

    def __init__(self, path: Path, *, plain: bool) -> None:
        self.path = path
        self.rows = 0
        self._starts = array("q")  # first row of each block
        self._lines = array("q")  # number of its first line
        self._offsets = array("q")
        self._sizes = array("q")
        self._packed: list[bytes] | None = None if plain else []
        self._stamp = _stamp(path.stat())

    def add(self, data: bytes, rows: int, offset: int, line: int) -> None:
        if not rows:
            return
        self._starts.append(self.rows)
        self._lines.append(line)
        self._offsets.append(offset)
        self._sizes.append(len(data))
        if self._packed is not None:
            self._packed.append(_PACK.compress(data, asbytes=True))
        self.rows += rows

    def __len__(self) -> int:
        return len(self._starts)

    def start(self, block: int) -> int:
        return self._starts[block]

    def first_line(self, block: int) -> int:
        return self._lines[block]

    def split(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Returns the blocks that hold the given rows (sorted), each with the rows' positions in it."""
        starts = np.frombuffer(self._starts, dtype=np.int64)
        blocks = np.searchsorted(starts, rows, side="right") - 1
        return [(int(block), rows[blocks == block] - starts[block]) for block in np.unique(blocks)]

    def read(self, block: int) -> bytes:
        """Returns the bytes of a block. Raises E_INPUT if the file has changed since it was opened."""
        if self._packed is not None:
            return _PACK.decompress(self._packed[block], self._sizes[block], asbytes=True)
        with self.path.open("rb") as file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise ClipwrightError(
                    "E_INPUT",
                    "a table changed while it was being read",
                    where=self.path,
                    found="its size or time of modification differs",
                    fix="do not modify the input during preparation, and run again with --fresh",
                )
            file.seek(self._offsets[block])
            return file.read(self._sizes[block])


@dataclass
class EncodingCheck:
    """Counts the lines that are not UTF-8, and tells a damaged line from a file in another encoding."""

    path: Path
    encoding: str
    lines: int = 0
    valid: int = 0  # lines with valid characters outside ASCII
    invalid: int = 0
    first_invalid: int = 0
    sample: bytearray = field(default_factory=bytearray)

    def update(self, data: bytes, line: int) -> None:
        """Checks complete lines, of which the first has the number `line`. Raises E_TABLE for UTF-16."""
        is_first = not self.lines
        self.lines += count_lines(data)
        if is_first and data.count(0) > len(data) // 8:
            raise wrong_encoding(self.path, self.encoding, data, f"line {line} has zero bytes")
        if data.isascii():
            return
        for number, text in enumerate(data.split(b"\n"), line):
            if text.isascii():
                continue
            try:
                text.decode()
                self.valid += 1
            except UnicodeDecodeError:
                self.invalid += 1
                self.first_invalid = self.first_invalid or number
                if len(self.sample) < _SAMPLE_BYTES:
                    self.sample += text + b"\n"

    def finish(self) -> list[str]:
        """Returns a note about damaged lines. Raises E_TABLE if the file has another encoding."""
        if not self.invalid:
            return []
        found = (
            f"{format_count(self.invalid, 'line')} not valid {self.encoding}, the first is line {self.first_invalid}"
        )
        # In another encoding, most lines that are not ASCII are damaged. A few damaged lines are rejected one by one.
        if self.invalid > self.valid and self.invalid > max(1, self.lines // 1000):
            raise wrong_encoding(self.path, self.encoding, bytes(self.sample), found)
        likely = likely_encoding(bytes(self.sample))
        return [f"{self.path.name}: {found} (it looks like {likely}); their captions are rejected"]


def wrong_encoding(path: Path, encoding: str, sample: bytes, found: str) -> ClipwrightError:
    likely = likely_encoding(sample)
    found += f"; it looks like {likely}"
    return unreadable(path, found, f"set source.encoding={likely}", f"the file is not {encoding} text")


def line_too_long(path: Path, line: int) -> ClipwrightError:
    limit = f"more than {MAX_ROW_BYTES >> 20} MiB without a line end"
    return unreadable(f"{path}, line {line}", limit, "check the file; large images belong in files or in parquet")


def _damaged(path: Path, error: BaseException) -> ClipwrightError:
    return unreadable(path, f"the compressed data is damaged: {error}", "check the file, or decompress it")


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
