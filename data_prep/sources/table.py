"""Source `table`: csv, tsv, jsonl or parquet files with captions, and images as bytes or paths."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipwright.data_prep.sources.base import SOURCES, Record, Source, SourceConfig, read_image
from clipwright.data_prep.sources.table_files import TableFile, find_files, open_file
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.registry import configclass

BATCH_ROWS = 64  # read at a time: two batches of photos fit in memory


@configclass
class TableConfig(SourceConfig):
    """A table of pairs. All columns besides image and caption are kept with their types."""

    path: str | list[str]
    """Table file, glob, or list of both; csv, tsv, jsonl and parquet are read."""
    image: str = "image"
    """Column with the images: bytes, structs {bytes, path}, or paths."""
    caption: str = "caption"
    """Column with a text or a list of texts, or a template over columns such as `a photo of a {class_name}`."""
    root: str | None = None
    """Folder that image paths are relative to and may not leave; null uses the table's folder."""
    where: dict[str, Any] = field(default_factory=dict)
    """Row filter: column → required value, or list of allowed values."""


class TableSource(Source):
    """Rows of one or more tables, read by row group. See TableConfig."""

    def __init__(self, config: TableConfig) -> None:
        self.image = config.image
        self.caption = config.caption
        self.where = dict(config.where)
        self.root = None if config.root is None else Path(config.root).resolve()
        self.template = _parse_template(config.caption) if "{" in config.caption else None
        self.files = _open_all(config)
        first = self.files[0]
        caption_columns = [name for _, name in self.template if name] if self.template else [self.caption]
        for column in (self.image, *caption_columns, *self.where):
            _check_column(column, first)
        _check_image_type(first.schema.field(self.image), first)
        dropped = {self.image} if self.template else {self.image, self.caption}
        self._kept = [column for column in first.schema if column.name not in dropped]
        self.columns = pa.schema(self._kept)
        self._selected = [_select_rows(file, self.where) for file in self.files]
        self._starts = np.cumsum([0, *(len(rows) for rows in self._selected)])
        self.count = int(self._starts[-1])

    def identity(self) -> dict[str, Any]:
        return {
            "name": "table",
            "image": self.image,
            "caption": self.caption,
            "where": self.where,
            "root": None if self.root is None else self.root.name,
            "files": [{"name": file.name, "sha256": file.sha256} for file in self.files],
        }

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        plan_rows = np.asarray(rows, dtype=np.int64)
        file_numbers = np.searchsorted(self._starts, plan_rows, side="right") - 1
        for number in np.unique(file_numbers):
            rows_in_file = plan_rows[file_numbers == number]
            file_rows = self._selected[number][rows_in_file - self._starts[number]]
            yield from self._read_file(self.files[number], rows_in_file, file_rows)

    def _read_file(self, file: TableFile, rows: np.ndarray, file_rows: np.ndarray) -> Iterator[Record]:
        """Yields plan rows `rows`, which are the rows `file_rows` of a file."""
        with file.open() as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            for group in np.unique(np.searchsorted(starts, file_rows, side="right") - 1):
                in_group = (file_rows >= starts[group]) & (file_rows < starts[group + 1])
                group_rows = rows[in_group]
                group_file_rows = file_rows[in_group]
                positions = group_file_rows - starts[group]
                batch_start = 0
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[int(group)]):
                    in_batch = (positions >= batch_start) & (positions < batch_start + batch.num_rows)
                    if in_batch.any():
                        taken = batch.take(pa.array(positions[in_batch] - batch_start))
                        yield from self._records(file, taken, group_rows[in_batch], group_file_rows[in_batch])
                    batch_start += batch.num_rows
                    if batch_start > positions[-1]:
                        break

    def _records(
        self, file: TableFile, batch: pa.RecordBatch, rows: np.ndarray, file_rows: np.ndarray
    ) -> Iterator[Record]:
        columns = batch.select([column.name for column in self._kept])
        columns = pa.RecordBatch.from_arrays(columns.columns, schema=self.columns)
        images = batch.column(self.image)
        captions = self._captions(batch)
        root = self.root or file.folder
        for i, (row, file_row) in enumerate(zip(rows.tolist(), file_rows.tolist(), strict=True)):
            value = images[i].as_py()
            path = value
            if isinstance(value, dict):
                path = value.get("path")
                data = value.get("bytes")
                value = path if data is None else data
            image, reject = _read_image(value, root)
            source_key = path if isinstance(path, str) else None
            yield Record(row, image, captions[i], columns.slice(i, 1), f"{file.name}#{file_row}", source_key, reject)

    def _captions(self, batch: pa.RecordBatch) -> list[list[str | bytes | None]]:
        if self.template is None:
            return [_texts(value) for value in _values(batch.column(self.caption))]
        names = {name for _, name in self.template if name}
        values = {name: _values(batch.column(name)) for name in names}
        captions: list[list[str | bytes | None]] = []
        for i in range(batch.num_rows):
            row = {name: values[name][i] for name in names}
            captions.append([_fill(self.template, row)])
        return captions


def _open_all(config: TableConfig) -> list[TableFile]:
    # CSV text is read as bytes: a caption that is not UTF-8 rejects its row, not the file.
    as_bytes = () if "{" in config.caption else (config.caption,)
    files = [open_file(path, as_text=(config.image,), as_bytes=as_bytes) for path in find_files(config.path)]
    first = files[0]
    for file in files[1:]:
        if file.schema.equals(first.schema):
            continue
        columns = {(column.name, str(column.type)) for column in file.schema}
        first_columns = {(column.name, str(column.type)) for column in first.schema}
        names = sorted({name for name, _ in columns ^ first_columns}) or ["the order of columns"]
        raise ClipwrightError(
            "E_TABLE",
            "the tables have different columns",
            where=file.path,
            found=f"it differs from {first.name} in {', '.join(names)}",
            fix="give tables with equal column names and types, or prepare them separately",
        )
    return files


def _check_column(name: str, file: TableFile) -> None:
    occurrences = file.schema.names.count(name)
    if occurrences == 1:
        return
    raise ClipwrightError(
        "E_COLUMN",
        f"the table has {format_count(occurrences, 'column')} of this name"
        if occurrences
        else "the table has no such column",
        where=f"{file.path}: {name}",
        found=f"its columns are {', '.join(file.schema.names)}",
        fix=nearest(name, file.schema.names)
        or "set source.image, source.caption and source.where to columns of the table",
    )


def _check_image_type(column: pa.Field, file: TableFile) -> None:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        readable = bool(names & {"bytes", "path"})
    else:
        readable = _is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind)
    if not readable:
        raise ClipwrightError(
            "E_COLUMN",
            "the column does not hold images",
            where=f"{file.path}: {column.name}",
            found=f"its type is {kind} (allowed: bytes, a path, or a struct of bytes and path)",
            fix="set source.image to the column with the images",
        )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _select_rows(file: TableFile, where: dict[str, Any]) -> np.ndarray:
    """Returns the numbers of the file's rows that match `where`."""
    if not where:
        return np.arange(file.rows, dtype=np.int64)
    with file.open() as opened:
        table = opened.read(columns=list(where))
    keep = np.ones(table.num_rows, dtype=bool)
    for column, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        try:
            allowed = pa.array(values).cast(table.schema.field(column).type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the value does not fit the column's type",
                where=f"source.where.{column}",
                found=f"{wanted!r} for a column of type {table.schema.field(column).type}: {error}",
                fix="give a value, or a list of values, of that type",
            ) from None
        keep &= pc.is_in(table[column], value_set=allowed).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    return np.flatnonzero(keep)


def _read_image(value: object, root: Path) -> tuple[bytes | None, tuple[str, str] | None]:
    """Returns `image` and `reject` of a Record for a cell of the image column."""
    if value is None:
        return None, ("E_IMG_EMPTY", "no image in this row")
    if isinstance(value, bytes):
        return (value, None) if value else (None, ("E_IMG_EMPTY", "0 bytes"))
    return read_image(root, str(value))


def _values(column: pa.Array) -> list[Any]:
    """Returns the Python values of a column; text that is not valid UTF-8 as bytes."""
    kind = column.type
    if not (_is_text(kind) or _is_bytes(kind) or pa.types.is_nested(kind)):
        column = column.cast(pa.string())  # numbers and dates as Arrow formats them
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.binary() if _is_text(kind) else pa.list_(pa.binary())).to_pylist()


def _texts(value: object) -> list[str | bytes | None]:
    if value is None or isinstance(value, (str, bytes)):
        return [value]
    if isinstance(value, list):
        return [item if item is None or isinstance(item, (str, bytes)) else str(item) for item in value]
    return [str(value)]


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Splits a template into (text, column after it) pairs. Only `{column}` is allowed, no formats or attributes."""
    reason = ""
    fields = []
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        reason = str(error)
    for _, name, spec, conversion in fields:
        if not reason and (name == "" or spec or conversion):
            reason = f"{name!r} is not a plain column"
    if reason:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the caption template is malformed",
            where=f"source.caption: {template}",
            found=reason,
            fix="write {column} for a column, and {{ or }} for a literal brace",
        )
    return [(text, name) for text, name, _, _ in fields]


def _fill(template: list[tuple[str, str | None]], row: dict[str, Any]) -> str | bytes | None:
    """Fills the template with a row's values. Returns None if a value is missing, bytes if one is not UTF-8."""
    pieces: list[Any] = []
    for text, name in template:
        pieces.append(text)
        if name:
            pieces.append(row[name])
    if any(piece is None for piece in pieces):
        return None
    if any(isinstance(piece, bytes) for piece in pieces):
        return b"".join(piece if isinstance(piece, bytes) else str(piece).encode() for piece in pieces)
    return "".join(map(str, pieces))


SOURCES.add(TableConfig, TableSource, {"table": {}})
