"""Table files of JSON: one object per line, an array of objects, or a file of COCO annotations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipwright.data_prep.sources import json_columns
from clipwright.data_prep.sources.tables.base import (
    Batch,
    ColumnPath,
    TableFile,
    WrittenFloat,
    as_text,
    as_written,
    follow,
    unreadable,
)
from clipwright.data_prep.sources.tables.documents import document_rows
from clipwright.data_prep.sources.tables.json_kinds import kinds_of_lines
from clipwright.data_prep.sources.tables.text import (
    BLOCK_BYTES,
    MAX_ROW_BYTES,
    EncodingCheck,
    TextBlocks,
    TextReader,
    line_too_long,
)
from clipwright.pipeline.core.text import shown

MAX_DOCUMENT_BYTES = 1 << 30
_LINES = (".jsonl", ".ndjson")
_HEAD_BYTES = 1 << 20
_SAMPLE_ROWS = 1000  # of which the fields of nested objects are found


class JsonTable(TableFile):
    """A file of JSON objects. The types of the columns are those of `data index`: mixed ones become text."""

    def __init__(self, path: Path, *, encoding: str) -> None:
        self.path = path
        self._kinds: dict[str, str] = {}
        self._sample: list[dict[str, Any]] = []
        self._check = EncodingCheck(path, encoding)
        with TextReader(path, encoding) as reader:
            head = reader.read(_HEAD_BYTES)
            while len(head) < _HEAD_BYTES and (more := reader.read(_HEAD_BYTES)):
                head += more
            if not head.strip():
                raise unreadable(path, "the file is empty", "check the file")
            is_document = _is_document(path, head)
            self._blocks = TextBlocks(path, plain=reader.plain and not is_document)
            if is_document:
                self._read_document(reader, head)
            else:
                self._read_lines(reader, head)
        self.rows = self._blocks.rows
        self.names = list(self._kinds)
        self._left_out: set[str] = set()
        self._as_one = len(self.names) > json_columns.MAX_COLUMNS
        self.types = {name: json_columns.type_of(kind) if kind else pa.null() for name, kind in self._kinds.items()}
        if self._as_one:
            self.types = {json_columns.OBJECT_COLUMN: pa.string()}
        self._nested = {name: _nested_type([row.get(name) for row in self._sample]) for name in self.names}
        self.notes = [*self._notes, *self._check.finish()]
        del self._sample, self._check

    _notes: list[str] = []  # noqa: RUF012  replaced, never changed

    def nested_type(self, name: str) -> pa.DataType:
        return self._nested[name]

    def fits_float(self, name: str) -> bool:
        return self._kinds.get(name) != "big"

    def leave_out(self, names: set[str]) -> None:
        self._left_out = names

    def batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        for block, positions in self._blocks.split(rows):
            lines = _rows_of(self._blocks.read(block))
            objects = [self._row(lines[position], block) for position in positions.tolist()]
            yield self._blocks.start(block) + positions, JsonBatch(objects, self._left_out)

    def column(self, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        chunks: list[pa.Array] = []
        for block in range(len(self._blocks)):
            objects = [self._row(line, block) for line in _rows_of(self._blocks.read(block))]
            chunks.append(JsonBatch(objects, self._left_out).column(name, kind))
        return pa.chunked_array(chunks, kind)

    def _row(self, text: bytes, block: int) -> dict[str, Any]:
        try:
            value = _parse(text)
            assert isinstance(value, dict)
        except (ValueError, RecursionError, AssertionError) as error:
            where = f"{self.path}, after line {self._blocks.first_line(block)}"
            raise unreadable(where, f"{error}: {_start(text)}", "correct the line", "a line is not JSON") from None
        return value

    def _read_lines(self, reader: TextReader, buffer: bytes) -> None:
        offset, line = reader.offset, 1
        final = False
        while buffer or not final:
            cut = len(buffer) if final else buffer.rfind(b"\n") + 1
            if cut:
                self._add_block(buffer[:cut], offset, line)
                line += buffer.count(b"\n", 0, cut)
                offset += cut
                buffer = buffer[cut:]
            if len(buffer) > MAX_ROW_BYTES:
                raise line_too_long(self.path, line)
            more = b"" if final else reader.read(BLOCK_BYTES)
            final = not more
            buffer += more

    def _add_block(self, data: bytes, offset: int, line: int) -> None:
        self._check.update(data, line)
        lines = len(_rows_of(data))
        kinds = kinds_of_lines(data, lines) if len(self._sample) >= _SAMPLE_ROWS else None
        if kinds is not None:
            self._add_kinds(kinds)
            self._blocks.add(data, lines, offset, line)
            return
        rows = 0
        for number, text in enumerate(data.split(b"\n"), line):
            if not text.strip():
                continue
            rows += 1
            try:
                value = _parse(text)
            except (ValueError, RecursionError) as error:
                fix = "correct the line; a file that is one JSON value must end in .json"
                raise unreadable(
                    f"{self.path}, line {number}",
                    f"{error}: {_start(text)}",
                    fix,
                    "a line is not JSON",
                ) from None
            if not isinstance(value, dict):
                found = f"a {type(value).__name__}: {_start(text)}"
                fix = 'write one object per line, such as {"image": "a.jpg", "caption": "a cat"}'
                raise unreadable(f"{self.path}, line {number}", found, fix, "a line is not a JSON object")
            self._add_object(value)
        self._blocks.add(data, rows, offset, line)

    def _add_object(self, value: dict[str, Any]) -> None:
        if len(self._sample) < _SAMPLE_ROWS:
            self._sample.append(value)
        self._add_kinds({name: json_columns.kind_of(item) for name, item in value.items()})

    def _add_kinds(self, kinds: dict[str, str]) -> None:
        for name, kind in kinds.items():
            known = self._kinds.get(name)
            if known is None and len(self._kinds) > json_columns.MAX_COLUMNS:
                return
            if kind != known:
                self._kinds[name] = json_columns.common_kind(known or "", kind)

    def _read_document(self, reader: TextReader, head: bytes) -> None:
        parts, size = [head], len(head)
        while more := reader.read(1 << 20):
            parts.append(more)
            size += len(more)
            if size > MAX_DOCUMENT_BYTES:
                limit = f"it is one JSON value of more than {MAX_DOCUMENT_BYTES >> 30} GiB"
                raise unreadable(self.path, limit, "write it as jsonl: one object per line")
        data = b"".join(parts)
        self._check.update(data, 1)
        rows, self._notes = document_rows(self.path, data.decode("utf-8", "surrogateescape"), _parse)
        block: list[bytes] = []
        size = 0
        for text in rows:
            line = text.encode("utf-8", "surrogateescape")
            block.append(line)
            size += len(line) + 1
            if size >= BLOCK_BYTES:
                self._add_rows(block)
                block, size = [], 0
        self._add_rows(block)

    def _add_rows(self, lines: list[bytes]) -> None:
        for line in lines:
            self._add_object(_parse(line))
        self._blocks.add(b"".join(line + b"\n" for line in lines), len(lines), 0, 0)


class JsonBatch(Batch):
    """Rows as parsed objects."""

    def __init__(self, objects: list[dict[str, Any]], left_out: set[str]) -> None:
        self._objects = objects
        self._left_out = left_out

    def values(self, path: ColumnPath) -> list[Any]:
        name, *fields = path
        return [as_written(follow(value.get(name), tuple(fields))) for value in self._objects]

    def column(self, name: str, kind: pa.DataType) -> pa.Array:
        if name == json_columns.OBJECT_COLUMN and all(name not in value for value in self._objects):
            rest = [{key: item for key, item in value.items() if key not in self._left_out} for value in self._objects]
            return pa.array([as_text(value) for value in rest], pa.string())
        return pa.array([_cast(value.get(name), kind) for value in self._objects], kind)


def _cast(value: Any, kind: pa.DataType) -> Any:
    """Returns a value as its column stores it."""
    if value is None or pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind):
        return [_cast(item, kind.value_type) for item in value] if isinstance(value, list) else None
    if pa.types.is_string(kind):
        return as_text(value)
    if pa.types.is_floating(kind):
        return float(value)
    return value


def _start(text: bytes) -> str:
    return shown(text.decode("utf-8", "replace"), 80)


def _rows_of(block: bytes) -> list[bytes]:
    return [line for line in block.split(b"\n") if line.strip()]


def _parse(text: bytes | str) -> Any:
    """Parses JSON; NaN, infinities and numbers beyond float64 become null. Raises ValueError, RecursionError."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    return json.loads(text, parse_constant=lambda _: None, parse_float=_parse_float)


def _parse_float(text: str) -> float | None:
    number = WrittenFloat(text)
    return number if math.isfinite(number) else None


def _is_document(path: Path, head: bytes) -> bool:
    """Whether the file is one JSON value, and not one per line."""
    start = head.lstrip()
    if start.startswith(b"["):
        return True
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in _LINES:
        return False
    line, end, rest = start.partition(b"\n")
    if not end or not rest.lstrip().startswith(b"{"):
        return True
    try:
        return not isinstance(_parse(line), dict)
    except (ValueError, RecursionError):
        return True


def _nested_type(values: list[Any]) -> pa.DataType:
    """Returns the type of JSON values with the fields of their objects. Lists win over text, and text over objects."""
    present = [value for value in values if value is not None]
    if any(isinstance(value, list) for value in present):
        items = [item for value in present for item in (value if isinstance(value, list) else [value])]
        return pa.list_(_nested_type(items))
    if any(isinstance(value, str) for value in present):
        return pa.string()
    objects = [value for value in present if isinstance(value, dict)]
    if objects:
        names = list({name: None for value in objects for name in value})
        return pa.struct([(name, _nested_type([value.get(name) for value in objects])) for name in names])
    if all(isinstance(value, bool) for value in present):
        return pa.bool_() if present else pa.null()
    return pa.float64()
