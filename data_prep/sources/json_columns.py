"""JSON members of foreign tars as typed columns of a sidecar."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from clipwright.pipeline.core.files import canonical_json

MAX_COLUMNS = 256  # a dataset with more names keeps each object as JSON text in one column
OBJECT_COLUMN = "json"
_EXACT_IN_FLOAT64 = 2**53

# The kind of the values under each name: "" (only null), bool, int, big (an integer that float64 may not represent),
# float, text, or list: followed by one of these. None instead of a dictionary: there are too many names.
Kinds = dict[str, str] | None
_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "big": pa.int64(), "float": pa.float64()}
LIST = "list:"


def metadata_text(metadata: dict[str, Any]) -> str:
    """Returns an object as canonical JSON in valid UTF-8, or an empty text for an empty object."""
    return canonical_json(metadata).encode("utf-8", "replace").decode() if metadata else ""


def kinds_of(texts: Iterable[str]) -> Kinds:
    """Returns the kind of each name over some objects, which are texts made by `metadata_text`."""
    kinds: dict[str, str] = {}
    for text in texts:
        for name, value in _object(text).items():
            kinds[name] = common_kind(kinds.get(name, ""), kind_of(value))
            if len(kinds) > MAX_COLUMNS:
                return None
    return kinds


def combine(all_kinds: Iterable[Kinds]) -> Kinds:
    """Returns the kind of each name over several results of `kinds_of`."""
    combined: dict[str, str] = {}
    for kinds in all_kinds:
        if kinds is None:
            return None
        for name, kind in kinds.items():
            combined[name] = common_kind(combined.get(name, ""), kind)
        if len(combined) > MAX_COLUMNS:
            return None
    return combined


def schema_of(kinds: Kinds) -> pa.Schema:
    """Returns the columns, sorted by name. Objects, nested lists and values of mixed kinds become text columns.

    In a text column, strings are stored as they are and all other values as JSON.
    """
    if kinds is None:
        return pa.schema([(OBJECT_COLUMN, pa.string())])
    return pa.schema([(name, type_of(kinds[name])) for name in sorted(kinds)])


def row_of(text: str, kinds: Kinds) -> dict[str, Any]:
    """Returns an object as a row of that schema."""
    if kinds is None:
        return {OBJECT_COLUMN: text or None}
    return {name: _cast(value, kinds[name]) for name, value in _object(text).items()}


def _object(text: str) -> dict[str, Any]:
    return json.loads(text) if text else {}


def kind_of(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= _EXACT_IN_FLOAT64:
            return "int"
        return "big" if -(2**63) <= value < 2**63 else "text"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        item_kind = ""
        for item in value:
            item_kind = common_kind(item_kind, kind_of(item))
        return f"{LIST}{item_kind}"
    return "text"


def common_kind(first: str, second: str) -> str:
    """Returns the kind that holds values of both kinds."""
    if first == second or not first or not second:
        return first or second
    if first.startswith(LIST) and second.startswith(LIST):
        return LIST + common_kind(first.removeprefix(LIST), second.removeprefix(LIST))
    pair = {first, second}
    if pair == {"int", "float"}:
        return "float"
    return "big" if pair == {"int", "big"} else "text"


def type_of(kind: str) -> pa.DataType:
    if kind.startswith(LIST):
        return pa.list_(type_of(kind.removeprefix(LIST)))
    return _TYPES.get(kind, pa.string())


def _cast(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind.startswith(LIST):
        return [_cast(item, kind.removeprefix(LIST)) for item in value]
    if kind == "float":
        return float(value)
    if kind == "text" and not isinstance(value, str):
        return canonical_json(value)
    return value
