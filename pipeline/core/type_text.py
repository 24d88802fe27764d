"""Type annotations of config fields in words, for the reference, for help and for errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from clipwright.pipeline.core.values import is_union
from clipwright.pipeline.core.written_yaml import inline_yaml

_NAMES: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "any",
    dict: "mapping",
}


def type_text(hint: Any) -> str:
    """Returns a type annotation as text: `integer ≥ 1`, `one of `a`, `b``, `list of text`, `number or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([type_text(arguments[0]), *_constraints(arguments[1:])])
    if origin is Literal:
        return "one of " + ", ".join(f"`{inline_yaml(value)}`" for value in arguments)
    if is_union(hint):
        return " or ".join(dict.fromkeys(type_text(argument) for argument in arguments))
    if origin in (list, tuple, set, frozenset):
        if origin is tuple and Ellipsis not in arguments:
            kinds = list(dict.fromkeys(type_text(argument) for argument in arguments))
            return f"list of {len(arguments)}: {', '.join(kinds)}"
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "sections"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _constraints(metadata: Iterable[Any]) -> Iterator[str]:
    """Yields the limits of a value, as annotated by pydantic's `Field`."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _constraints(item.metadata)
        elif isinstance(item, annotated_types.Ge):
            yield f"≥ {item.ge}"
        elif isinstance(item, annotated_types.Gt):
            yield f"> {item.gt}"
        elif isinstance(item, annotated_types.Le):
            yield f"≤ {item.le}"
        elif isinstance(item, annotated_types.Lt):
            yield f"< {item.lt}"
        elif isinstance(item, annotated_types.MultipleOf):
            yield f"a multiple of {item.multiple_of}"
        elif isinstance(item, annotated_types.MinLen):
            yield f"of at least {item.min_length}"
        elif isinstance(item, annotated_types.MaxLen):
            yield f"of at most {item.max_length}"
        elif getattr(item, "pattern", None) is not None:
            yield f"matching `{item.pattern}`"
