"""The JSON members of tars that others made, as typed columns of a sidecar."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from clipwright.pipeline.core.files import canonical_json

CAPTIONS = ("caption", "captions")  # never columns: a sample's captions are looked for there
MOST = 256  # names in a dataset; of more, the objects stay whole, as text in one column
WHOLE = "json"

# What was seen under each name: "" (nothing but null), bool, int, big (an int that no float64 is sure to hold), float,
# text, or list: before one of them. None: too many names.
Kinds = dict[str, str] | None
_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "big": pa.int64(), "float": pa.float64()}


def parse(data: bytes) -> Any:
    """A JSON text; numbers that JSON does not know, NaN and Infinity, are null. Raises ValueError, RecursionError."""
    return json.loads(data, parse_constant=lambda _: None, parse_float=_finite)


def text_of(about: dict[str, Any]) -> str:
    """An object without its captions, as canonical JSON in valid UTF-8; empty if nothing is left."""
    left = {name: value for name, value in about.items() if name not in CAPTIONS}
    return canonical_json(left).encode("utf-8", "replace").decode() if left else ""


def kinds_of(texts: Iterable[str]) -> Kinds:
    """What stands under each name of some objects, as `text_of` gives them."""
    found: dict[str, str] = {}
    for text in texts:
        for name, value in (json.loads(text) if text else {}).items():
            found[name] = _common(found.get(name, ""), _kind(value))
            if len(found) > MOST:
                return None
    return found


def together(parts: Iterable[Kinds]) -> Kinds:
    """What stands under each name in all of some parts."""
    found: dict[str, str] = {}
    for part in parts:
        for name, kind in (part or {}).items():
            found[name] = _common(found.get(name, ""), kind)
        if part is None or len(found) > MOST:
            return None
    return found


def schema_of(kinds: Kinds) -> pa.Schema:
    """Columns sorted by name. Objects, lists of lists and values of several kinds are text, all but texts as JSON."""
    if kinds is None:
        return pa.schema([(WHOLE, pa.string())])
    return pa.schema([(name, _type(kinds[name])) for name in sorted(kinds)])


def row_of(text: str, kinds: Kinds) -> dict[str, Any]:
    """An object as a row of that schema."""
    if kinds is None:
        return {WHOLE: text or None}
    return {name: _cast(value, kinds[name]) for name, value in (json.loads(text) if text else {}).items()}


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _kind(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= 2**53 else "big" if -(2**63) <= value < 2**63 else "text"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        inner = ""
        for item in value:
            inner = _common(inner, _kind(item))
        return f"list:{inner}"
    return "text"


def _common(one: str, other: str) -> str:
    """The kind that holds both."""
    if one == other or not one or not other:
        return one or other
    if one.startswith("list:") and other.startswith("list:"):
        return f"list:{_common(one[5:], other[5:])}"
    pair = {one, other}
    return "float" if pair == {"int", "float"} else "big" if pair == {"int", "big"} else "text"


def _type(kind: str) -> pa.DataType:
    return pa.list_(_type(kind[5:])) if kind.startswith("list:") else _TYPES.get(kind, pa.string())


def _cast(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind.startswith("list:"):
        return [_cast(item, kind[5:]) for item in value]
    if kind == "float":
        return float(value)
    return value if kind != "text" or isinstance(value, str) else canonical_json(value)
