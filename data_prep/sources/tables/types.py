"""Types of columns: one type for a column of several files, and numbers among the text of a csv file."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from clipwright.data_prep.sources.tables.base import TableFile, compute, is_bytes, is_list, is_text

_BOOLEANS = {"lower": ("true", "false"), "title": ("True", "False")}
MISSING_NUMBERS = ("nan", "NaN")  # in a column of numbers
EXACT_IN_FLOAT64 = 2**53


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a column without its encoding: no dictionaries, views, large offsets or extensions."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if is_text(kind):
        return pa.string()
    if is_bytes(kind) and not pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if is_list(kind) and not pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def common_type(name: str, files: Sequence[TableFile]) -> pa.DataType:
    """Returns the type that holds a column of all files: equal types, missing ones, integers and floats; else text."""
    with_column = [file for file in files if name in file.types]
    common = pa.null()
    for file in with_column:
        common = _common(common, file.types[name])
    has_integers = any(pa.types.is_integer(file.types[name]) for file in with_column)
    if pa.types.is_floating(common) and has_integers:
        integers = [file for file in with_column if pa.types.is_integer(file.types[name])]
        if not all(file.fits_float(name) for file in integers):
            return pa.string()
    return common


def _common(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    if first.equals(second) or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if is_list(first) and is_list(second):
        inner = _common(first.value_type, second.value_type)
        return pa.string() if pa.types.is_string(inner) and not is_text(first.value_type) else pa.list_(inner)
    numbers = [pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (first, second)]
    if not all(numbers):
        return pa.string()
    if pa.types.is_integer(first) and pa.types.is_integer(second):
        unsigned = pa.types.is_uint64(first) or pa.types.is_uint64(second)
        return pa.string() if unsigned else pa.int64()
    return pa.float64()


class TypeGuess:
    """The type of a text column: a number only if each value is written as that number is, so that nothing is lost.

    `007`, `1.50` and `1e5` stay text. Empty cells are missing values.
    """

    def __init__(self) -> None:
        self._candidates = ["lower", "title", "int", "float"]
        self._seen = False
        self._large = False

    def update(self, cells: pa.Array) -> None:
        """Narrows the guess by some cells (binary)."""
        if not self._candidates:
            return
        try:
            text = cells.cast(pa.string())
        except pa.ArrowInvalid:  # not UTF-8
            self._seen = True
            self._candidates = []
            return
        unmissing = compute.invert(compute.is_in(text, value_set=pa.array(["", *MISSING_NUMBERS])))
        text = text.filter(unmissing)
        if len(text) == 0:
            return
        self._seen = True
        self._candidates = [kind for kind in self._candidates if self._fits(kind, text)]

    @property
    def type(self) -> pa.DataType:
        if not self._seen:
            return pa.null()
        if not self._candidates:
            return pa.string()
        return {"lower": pa.bool_(), "title": pa.bool_(), "int": pa.int64(), "float": pa.float64()}[self._candidates[0]]

    @property
    def fits_float(self) -> bool:
        return not self._large

    def _fits(self, kind: str, text: pa.Array) -> bool:
        if kind in _BOOLEANS:
            return compute.all(compute.is_in(text, value_set=pa.array(_BOOLEANS[kind]))).as_py()
        try:
            numbers = text.cast(pa.int64() if kind == "int" else pa.float64())
        except pa.ArrowInvalid:
            return False
        same = compute.equal(numbers.cast(pa.string()), text)
        if kind == "int":
            limits = compute.min_max(numbers)
            self._large |= max(limits["max"].as_py(), -limits["min"].as_py()) > EXACT_IN_FLOAT64
            return compute.all(same).as_py()
        # Arrow writes 1.0 as 1, and 1e-05 as 0.00001.
        return all(repr(float(value)) == value for value in text.filter(compute.invert(same)).to_pylist())
