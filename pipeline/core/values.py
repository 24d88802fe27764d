"""Config values as they were written, read by the type of their field.

An override, and a plain scalar of a YAML file, is kept as `Raw` text until its field is known. Text fields keep what
was written; number fields take any notation of a number; so `no`, `1e-3`, `08` or `12:30` never depend on the rules of
a YAML version.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from clipwright.pipeline.core.written_yaml import Raw, YamlMistake, parse_yaml

NULL = ("null", "Null", "NULL", "~")
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
MAX_INTEGER = 2**63 - 1

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_DECIMAL_INTEGER = re.compile(rf"[+-]?{_DIGITS}")
_PREFIXED_INTEGER = re.compile(r"[+-]?0(?:x[0-9a-f_]+|o[0-7_]+|b[01_]+)", re.IGNORECASE)
_NUMBER = re.compile(rf"[+-]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:e[+-]?[0-9]+)?", re.IGNORECASE)
_NOT_FINITE = re.compile(r"[+-]?\.?(?:nan|inf|infinity)", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")  # what a field of any type takes for a number


class ValueMismatch(ValueError):
    """A value does not have the type of its field; the message says what it is instead."""


def read_value(hint: Any, value: Any) -> Any:
    """Returns `value`, as written or as a Python value, as what a field of type `hint` holds: no `Raw` is left in it.

    Raises ValueMismatch for text that is no number, list or mapping where the field is one. Other limits are left to
    validation.
    """
    hint = bare_type(hint)
    origin = get_origin(hint)
    if is_union(hint):
        return _read_union(get_args(hint), value)
    if origin is Literal:
        return _read_literal(get_args(hint), value)
    if origin in (list, tuple, set, frozenset):
        return _read_list(hint, value)
    if origin is dict or hint is dict:
        return _read_mapping(get_args(hint), value)
    if dataclasses.is_dataclass(hint):
        return _read_section(hint, value)
    if hint in (bool, int, float):
        return _read_number(hint, value)
    if hint is type(None):
        return None if isinstance(value, Raw) and value in NULL else plain(value)
    return plain(value) if hint is str else read_any(value)


def _read_number(kind: type[Any], value: Any) -> Any:
    if isinstance(value, str):
        return {bool: read_bool, int: read_integer, float: read_float}[kind](value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) != (kind is bool) or value is None:
        raise ValueMismatch("is not true or false" if kind is bool else "is not a number")
    return value


def read_bool(text: str) -> bool:
    """Reads `true`, `yes`, `on`, `1` and their opposites, in upper or lower case."""
    word = text.strip().lower()
    if word not in TRUE + FALSE:
        raise ValueMismatch("is not true or false")
    return word in TRUE


def read_integer(text: str) -> int:
    """Reads a whole number: 1000, 1_000, 1e3, 0x3e8; leading zeros do not make it octal."""
    word = text.strip()
    if _DECIMAL_INTEGER.fullmatch(word) and len(word) < 30:
        number = int(word)
    elif _PREFIXED_INTEGER.fullmatch(word) and len(word) < 80:
        try:
            number = int(word, 0)
        except ValueError:  # such as 0x_
            raise ValueMismatch("is not an integer") from None
    elif _NUMBER.fullmatch(word):
        exact = Decimal(word.replace("_", ""))
        if exact.adjusted() > 30 or len(word) > 80:
            raise ValueMismatch("is too large")
        if exact != exact.to_integral_value():
            raise ValueMismatch("is not an integer")
        number = int(exact)
    else:
        raise ValueMismatch("is not an integer")
    if abs(number) > MAX_INTEGER:
        raise ValueMismatch("is too large")
    return number


def read_float(text: str) -> float:
    """Reads a finite number: 0.001, 1e-3, .5, 1., 1_000."""
    word = text.strip()
    if _NOT_FINITE.fullmatch(word):
        raise ValueMismatch("is not a finite number")
    if _NUMBER.fullmatch(word):
        number = float(word.replace("_", ""))
    elif _PREFIXED_INTEGER.fullmatch(word):
        number = float(read_integer(word))
    else:
        raise ValueMismatch("is not a number")
    if number in (float("inf"), float("-inf")):
        raise ValueMismatch("is too large")
    return number


def read_any(value: Any) -> Any:
    """Reads a value of a field of any type: null, true, false, a list, a mapping, a number that keeps its digits.

    Everything else stays text: 007, 1e3, 12:30, no.
    """
    if isinstance(value, dict):
        return {str(key): read_any(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [read_any(item) for item in value]
    if not isinstance(value, Raw):
        return value
    if value[:1] in ("[", "{", '"', "'"):
        return read_any(parse_flow(value))
    if value in NULL:
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if _PLAIN_NUMBER.fullmatch(value):
        number = float(value) if "." in value else int(value)
        if abs(number) <= MAX_INTEGER:
            return number
    return str(value)


def plain(value: Any) -> Any:
    """Returns `value` with `Raw` text as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return str(value) if isinstance(value, str) else value


def _read_union(kinds: tuple[Any, ...], value: Any) -> Any:
    """Reads a value as the first alternative it fits; text is the last."""
    bare = {bare_type(kind): kind for kind in kinds}
    if value is None or (type(None) in bare and isinstance(value, Raw) and value in NULL):
        return None
    if str in bare and isinstance(value, str) and not isinstance(value, Raw):
        return value  # in quotes, or not from a file
    order = [kind for kind in bare if kind not in (str, type(None))]
    order.sort(key=lambda kind: get_origin(kind) is not Literal)
    mismatch: ValueMismatch | None = None
    for kind in order:
        try:
            found = read_value(kind, value)
        except ValueMismatch as error:
            mismatch = mismatch or error
            continue
        # `007` in a field that takes numbers and text is text.
        is_text = str in bare and isinstance(value, Raw) and kind in (int, float, bool) and str(found) != value
        if not is_text and (get_origin(kind) is not Literal or found in get_args(kind)):
            return found
    if str in bare or mismatch is None:
        return plain(value)
    raise mismatch


def _read_literal(options: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, str):
        for option in options:
            if isinstance(option, str) and option == value:
                return option
            if isinstance(option, int | bool):
                try:
                    if (read_bool if isinstance(option, bool) else read_integer)(value) == option:
                        return option
                except ValueMismatch:
                    continue
    return plain(value)


def _read_list(hint: Any, value: Any) -> Any:
    if isinstance(value, Raw):
        if not value.startswith("["):
            raise ValueMismatch("is not a list; write [a, b]")
        value = parse_flow(value)
    if not isinstance(value, list | tuple):
        if value is None or isinstance(value, str | dict):
            raise ValueMismatch("is not a list; write [a, b]")
        return value
    arguments = get_args(hint) or (Any,)
    kinds: Sequence[Any] = [arguments[0]] * len(value)
    if get_origin(hint) is tuple and Ellipsis not in arguments:
        kinds = arguments
        if len(kinds) != len(value):
            raise ValueMismatch(f"has the length {len(value)}, not {len(kinds)}")
    items = [item if is_choice(kind) else read_value(kind, item) for kind, item in zip(kinds, value, strict=True)]
    return items if isinstance(value, list) else tuple(items)


def _read_mapping(arguments: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, Raw):
        if not value.startswith("{"):
            raise ValueMismatch("is not a mapping; write {key: value}")
        value = parse_flow(value)
    if not isinstance(value, dict):
        raise ValueMismatch("is not a mapping; write {key: value}")
    kind = arguments[1] if len(arguments) == 2 else Any
    return {str(key): read_value(kind, item) for key, item in value.items()}


def _read_section(config: Any, value: Any) -> Any:
    """Reads the fields of an element of a list of sections; keys that do not exist are left to validation."""
    if isinstance(value, Raw) and value.startswith("{"):
        value = parse_flow(value)
    if not isinstance(value, dict):
        return plain(value)
    hints = get_type_hints(config, include_extras=True)
    return {str(key): read_value(hints.get(key, Any), item) for key, item in value.items()}


def parse_flow(text: str) -> Any:
    """Parses the list, mapping or quoted text of an override; plain scalars become `Raw`. Raises ValueMismatch."""
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, YamlMistake, RecursionError) as error:
        raise ValueMismatch(f"is not valid: {' '.join(str(error).split())}") from None


def bare_type(hint: Any) -> Any:
    """Returns a type without its `Annotated` constraints."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint


def is_union(hint: Any) -> bool:
    """Returns whether a type has alternatives."""
    return get_origin(hint) in (Union, types.UnionType)


def is_choice(hint: Any) -> bool:
    """Returns whether a type is a choice from a registry, whose fields depend on its name."""
    return any(hasattr(item, "registry") for item in getattr(hint, "__metadata__", ()))
