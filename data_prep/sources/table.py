"""Source `table`: csv, tsv, jsonl or parquet files with images as bytes or paths, and captions."""

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
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.registry import configclass

# Small enough that a batch of photos fits in memory beside the next one.
BATCH = 64


@configclass
class TableConfig(SourceConfig):
    """Where the table is and which columns hold what.

    `path`: one file, a glob or a list of them. `image`: a column of bytes, of structs {bytes, path}, or of paths
    under `root` (default: the table's folder). `caption`: a column of text or of lists of text, or a template over
    columns, `a photo of a {class_name}`. `where`: column → value, or list of values, that a row must have. All other
    columns are kept, with their types.
    """

    path: str | list[str]
    image: str = "image"
    caption: str = "caption"
    root: str | None = None
    where: dict[str, Any] = field(default_factory=dict)


class TableSource(Source):
    """Rows of tables, read by row group; see TableConfig."""

    def __init__(self, config: TableConfig) -> None:
        self.image, self.caption, self.where = config.image, config.caption, dict(config.where)
        self.root = None if config.root is None else Path(config.root).resolve()
        self.template = _parse_template(config.caption) if "{" in config.caption else None
        self.files = _open_all(config)
        first = self.files[0]
        fields = [name for _, name in self.template if name] if self.template else [self.caption]
        for column in (self.image, *fields, *self.where):
            _check_column(column, first)
        _check_image(first.schema.field(self.image), first)
        dropped = {self.image} if self.template else {self.image, self.caption}
        self._kept = [column for column in first.schema if column.name not in dropped]
        self.columns = pa.schema(self._kept)
        self._selected = [_select(file, self.where) for file in self.files]
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
        wanted = np.asarray(rows, dtype=np.int64)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        for index in np.unique(owner):
            mine = wanted[owner == index]
            places = self._selected[index][mine - self._starts[index]]
            yield from self._read_file(self.files[index], mine, places)

    def _read_file(self, file: TableFile, rows: np.ndarray, places: np.ndarray) -> Iterator[Record]:
        with file.open() as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            for group in np.unique(np.searchsorted(starts, places, side="right") - 1):
                inside = (places >= starts[group]) & (places < starts[group + 1])
                group_rows, left = rows[inside], places[inside] - starts[group]
                seen = 0
                for batch in table.iter_batches(BATCH, row_groups=[int(group)]):
                    here = (left >= seen) & (left < seen + batch.num_rows)
                    if here.any():
                        taken = batch.take(pa.array(left[here] - seen))
                        yield from self._records(file, taken, group_rows[here], places[inside][here])
                    seen += batch.num_rows
                    if seen > left[-1]:
                        break

    def _records(
        self, file: TableFile, batch: pa.RecordBatch, rows: np.ndarray, places: np.ndarray
    ) -> Iterator[Record]:
        columns = batch.select([column.name for column in self._kept])
        columns = pa.RecordBatch.from_arrays(columns.columns, schema=self.columns)
        images = batch.column(self.image)
        captions = self._captions(batch)
        root = self.root or file.folder
        for i, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
            value = images[i].as_py()
            path = value.get("path") if isinstance(value, dict) else value
            value = value.get("bytes") if isinstance(value, dict) and value.get("bytes") is not None else path
            source, name = f"{file.name}#{place}", path if isinstance(path, str) else None
            image, reject = _image(value, root)
            yield Record(row, image, captions[i], columns.slice(i, 1), source, name, reject)

    def _captions(self, batch: pa.RecordBatch) -> list[list[str | bytes | None]]:
        if self.template is None:
            return [_texts(value) for value in _values(batch.column(self.caption))]
        names = {name for _, name in self.template if name}
        values = {name: _values(batch.column(name)) for name in names}
        made: list[list[str | bytes | None]] = []
        for i in range(batch.num_rows):
            row = {name: values[name][i] for name in names}
            made.append([_fill(self.template, row)])
        return made


def _open_all(config: TableConfig) -> list[TableFile]:
    # Text columns of csv are read as bytes: a caption that is not UTF-8 is that row's problem, not the file's.
    as_bytes = () if "{" in config.caption else (config.caption,)
    files = [open_file(path, as_text=(config.image,), as_bytes=as_bytes) for path in find_files(config.path)]
    first = files[0]
    for file in files[1:]:
        if file.schema.equals(first.schema):
            continue
        mine, theirs = ({(f.name, str(f.type)) for f in schema} for schema in (file.schema, first.schema))
        names = sorted({name for name, _ in mine ^ theirs}) or ["the order of columns"]
        raise ClipwrightError(
            "E_TABLE",
            "tables of different columns",
            where=file.path,
            found=f"it differs from {first.name} in {', '.join(names)}",
            fix="give tables of equal column names and types, or prepare them apart",
        )
    return files


def _check_column(name: str, file: TableFile) -> None:
    if file.schema.names.count(name) == 1:
        return
    again = name in file.schema.names
    raise ClipwrightError(
        "E_COLUMN",
        "a column that stands twice" if again else "no such column",
        where=f"{file.path}: {name}",
        found=f"the table has the columns {', '.join(file.schema.names)}",
        fix=nearest(name, file.schema.names) or "set source.image, source.caption and source.where to its columns",
    )


def _check_image(column: pa.Field, file: TableFile) -> None:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_struct(kind):
        if {kind.field(i).name for i in range(kind.num_fields)} & {"bytes", "path"}:
            return
    elif _is_text(kind) or _is_bytes(kind) or pa.types.is_null(kind):
        return
    raise ClipwrightError(
        "E_COLUMN",
        "a column that holds no images",
        where=f"{file.path}: {column.name}",
        found=f"its type is {kind}; bytes, a path, or a struct of bytes and path is read",
        fix="set source.image to the column with the images",
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _select(file: TableFile, where: dict[str, Any]) -> np.ndarray:
    """Numbers of the file's rows that meet `where`."""
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
                "a value that the column cannot hold",
                where=f"source.where.{column}",
                found=f"{wanted!r}, the column's type is {table.schema.field(column).type}: {error}",
                fix="give a value, or a list of values, of that type",
            ) from None
        keep &= pc.is_in(table[column], value_set=allowed).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    return np.flatnonzero(keep)


def _image(value: object, root: Path) -> tuple[bytes | None, tuple[str, str] | None]:
    if value is None:
        return None, ("E_IMG_EMPTY", "no image in this row")
    if isinstance(value, bytes):
        return (value, None) if value else (None, ("E_IMG_EMPTY", "0 bytes"))
    return read_image(root, str(value))


def _values(column: pa.Array) -> list[Any]:
    """Python values of a column; text that is not UTF-8 comes as bytes."""
    kind = column.type
    if not (_is_text(kind) or _is_bytes(kind) or pa.types.is_nested(kind)):
        column = column.cast(pa.string())  # numbers and dates as Arrow writes them
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.binary() if _is_text(kind) else pa.list_(pa.binary())).to_pylist()


def _texts(value: object) -> list[str | bytes | None]:
    if isinstance(value, (str, bytes)) or value is None:
        return [value]
    if isinstance(value, list):
        return [item if isinstance(item, (str, bytes)) or item is None else str(item) for item in value]
    return [str(value)]


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """A template as (text, column after it) pairs; only plain `{column}` is read, never a format or an attribute."""
    try:
        parts = list(string.Formatter().parse(template))
        odd = [name for _, name, spec, conversion in parts if name == "" or spec or conversion]
        reason = f"{odd[0]!r} is not a plain column" if odd else ""
    except ValueError as error:
        parts, reason = [], str(error)
    if reason:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "a caption template that cannot be read",
            where=f"source.caption: {template}",
            found=reason,
            fix="write {column} for a column and {{ or }} for a brace",
        )
    return [(text, name) for text, name, _, _ in parts]


def _fill(template: list[tuple[str, str | None]], row: dict[str, Any]) -> str | bytes | None:
    """The template with a row's values; None when one of them is missing, bytes when one is not UTF-8."""
    values = [row[name] for _, name in template if name]
    if any(value is None for value in values):
        return None
    if any(isinstance(value, bytes) for value in values):
        return b"".join(
            text.encode() + (v if isinstance(v := row[name] if name else "", bytes) else str(v).encode())
            for text, name in template
        )
    return "".join(text + (str(row[name]) if name else "") for text, name in template)


SOURCES.add(TableConfig, TableSource, {"table": {}})
