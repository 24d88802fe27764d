"""The kinds of values in many lines of JSON at once, where pyarrow can tell them: several times faster than parsing."""

from __future__ import annotations

import pyarrow as pa
from pyarrow import json

from clipwright.data_prep.sources.json_columns import LIST
from clipwright.data_prep.sources.tables.base import compute
from clipwright.data_prep.sources.tables.types import EXACT_IN_FLOAT64


def kinds_of_lines(data: bytes, rows: int) -> dict[str, str] | None:
    """Returns what `json_columns.kind_of` finds for each name in `rows` lines with one object each.

    None if the lines have to be parsed one by one: malformed, of mixed types, or with numbers beyond float64.
    """
    try:
        table = json.read_json(
            pa.BufferReader(data), read_options=json.ReadOptions(use_threads=False, block_size=len(data) + 1)
        )
    except pa.ArrowException:
        return None
    if table.num_rows != rows:
        return None
    kinds: dict[str, str] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = _kind(column.combine_chunks())
        if kind is None:
            return None
        kinds[name] = kind
    return kinds


def _kind(column: pa.Array) -> str | None:
    kind = column.type
    if pa.types.is_null(kind):
        return ""
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        limits = compute.min_max(column)
        largest = max(abs(limits[side].as_py() or 0) for side in ("min", "max"))
        if not largest <= EXACT_IN_FLOAT64:
            return None
        return "int" if pa.types.is_integer(kind) else "float"
    if pa.types.is_list(kind) and not pa.types.is_nested(kind.value_type):
        inner = _kind(column.flatten())
        return None if inner is None else LIST + inner
    return "text"  # objects, lists of them, and texts, some of which pyarrow takes for dates
