"""Table files parquet, read by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.sources.tables.base import (
    Batch,
    ColumnPath,
    TableFile,
    as_text,
    as_written,
    compute,
    follow,
    is_bytes,
    is_list,
    is_text,
    repeated_names,
    unique_names,
    unreadable,
)
from clipwright.data_prep.sources.tables.types import EXACT_IN_FLOAT64, plain_type

BATCH_ROWS = 64  # read at a time: two batches of photos fit in memory
_BUFFER_BYTES = 1 << 20


class ParquetTable(TableFile):
    """A parquet file. Raises E_TABLE if it cannot be read."""

    is_text = False

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                self.rows = file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, str(error)) from None
        self.names = unique_names(schema.names)
        self.repeated = repeated_names(schema.names)
        self.types = {name: plain_type(kind) for name, kind in zip(self.names, schema.types, strict=True)}

    def batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        with self._open() as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            for group in np.unique(np.searchsorted(starts, rows, side="right") - 1):
                group_rows = rows[(rows >= starts[group]) & (rows < starts[group + 1])]
                positions = group_rows - starts[group]
                batch_start = 0
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[int(group)]):
                    in_batch = (positions >= batch_start) & (positions < batch_start + batch.num_rows)
                    if in_batch.any():
                        taken = batch.take(pa.array(positions[in_batch] - batch_start))
                        yield group_rows[in_batch], ParquetBatch(taken, self.names)
                    batch_start += batch.num_rows
                    if batch_start > positions[-1]:
                        break

    def column(self, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        index = self.names.index(name)
        chunks: list[pa.Array] = []
        with self._open() as table:
            original = table.schema_arrow.names[index]
            position = table.schema_arrow.names[:index].count(original)
            for batch in table.iter_batches(columns=[original]):
                chunks.append(cast_column(batch.columns[position], kind))
        return pa.chunked_array(chunks, kind)

    def fits_float(self, name: str) -> bool:
        limits = compute.min_max(self.column(name, self.types[name]))
        largest = max(abs(limits[side].as_py() or 0) for side in ("min", "max"))
        return largest <= EXACT_IN_FLOAT64

    def _open(self) -> pq.ParquetFile:
        # Buffered: pages are read one by one, so that a row group of photos need not fit in memory.
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)


class ParquetBatch(Batch):
    """Rows as columns of the file's types."""

    def __init__(self, batch: pa.RecordBatch, names: list[str]) -> None:
        self._batch = batch
        self._names = names

    def values(self, path: ColumnPath) -> list[Any]:
        column = _plain(self._batch.columns[self._names.index(path[0])])
        kind = column.type
        if is_text(kind) or is_bytes(kind):
            return _python_values(column)
        if pa.types.is_nested(kind):
            return [as_written(follow(value, path[1:])) for value in _python_values(column)]
        if pa.types.is_floating(kind):
            column = compute.if_else(compute.is_nan(column), pa.scalar(None, kind), column)
        return column.cast(pa.string()).to_pylist()

    def column(self, name: str, kind: pa.DataType) -> pa.Array:
        if name not in self._names:
            return pa.nulls(self._batch.num_rows, kind)
        return cast_column(self._batch.columns[self._names.index(name)], kind)


def cast_column(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Returns a column as the type that `common_type` has found; as text, objects and lists are JSON."""
    column = _plain(column)
    if column.type.equals(kind):
        return column
    if not (pa.types.is_string(kind) and (pa.types.is_nested(column.type) or is_bytes(column.type))):
        try:
            return column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            pass
    values = _python_values(column)
    if pa.types.is_list(kind):
        values = [None if value is None else [as_text(item) for item in value] for value in values]
        return pa.array(values, pa.list_(pa.string())).cast(kind)
    return pa.array([_decoded(value) if isinstance(value, bytes) else as_text(value) for value in values], kind)


def _plain(column: pa.Array) -> pa.Array:
    """Returns a column without dictionaries, views and extensions."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = plain_type(column.type)
    return column if column.type.equals(kind) else column.cast(kind)


def _python_values(column: pa.Array) -> list[Any]:
    """Returns the Python values of a column; text that is not valid UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(_as_bytes(column.type)).to_pylist()


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if is_text(kind):
        return pa.binary()
    if is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(kind.field(i).name, _as_bytes(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
