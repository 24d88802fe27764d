"""One file of a table: its columns and their types, and rows that can be read in any order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import canonical_json
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.text import listed, shown, valid_utf8

# Made at run time, so that type checkers do not see the functions.
compute = cast(Any, pyarrow.compute)

_USUAL_NAMES = {
    "source.image": (
        "image",
        "img",
        "filepath",
        "file_path",
        "image_path",
        "file_name",
        "filename",
        "file",
        "path",
        "jpg",
    ),
    "source.caption": ("caption", "captions", "title", "text", "txt", "sentence", "sentences", "raw", "description"),
}

ColumnPath = tuple[str, ...]  # a column, then names of fields inside its objects


class WrittenFloat(float):
    """A number that remembers how the file wrote it, for captions and names."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number


class Batch(ABC):
    """Some rows of a table file."""

    @abstractmethod
    def values(self, path: ColumnPath) -> list[Any]:
        """Returns one value per row: text, numbers as the file writes them, bytes, None if missing, lists and objects.

        Text that is not valid UTF-8 is returned as bytes.
        """

    @abstractmethod
    def column(self, name: str, kind: pa.DataType) -> pa.Array:
        """Returns a column of the batch with the given type, which `common_type` has found."""


class TableFile(ABC):
    """A table file. It is pickled and sent to workers.

    `names` are the columns, each once; `types` their types when they are stored as columns of a dataset. `is_text`
    tells that cells cannot hold bytes. `repeated` are names that the file gives to several columns. `notes` are lines
    for the user.
    """

    path: Path
    names: list[str]
    types: dict[str, pa.DataType]
    rows: int
    is_text: bool = True
    repeated: frozenset[str] = frozenset()
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent

    @abstractmethod
    def batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields the given rows, which are sorted, in batches: the numbers of the rows, and the rows."""

    @abstractmethod
    def column(self, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        """Returns a column of all rows."""

    def nested_type(self, name: str) -> pa.DataType:
        """Returns the type of a column with the fields of its objects."""
        return self.types[name]

    def fits_float(self, name: str) -> bool:
        """Whether float64 represents each value of an integer column exactly."""
        return True

    def leave_out(self, names: set[str]) -> None:  # noqa: B027  most formats keep each column by itself
        """Tells which columns are not stored as columns of a dataset."""


def unreadable(where: object, reason: str, fix: str = "", what: str = "the table cannot be read") -> ClipwrightError:
    return ClipwrightError(
        "E_TABLE",
        what,
        where=shown(str(where), 400),
        found=shown(reason, 600),
        fix=fix or "check the file, or write it again as csv, tsv, jsonl or parquet",
    )


def unique_names(names: Sequence[str]) -> list[str]:
    """Returns column names with `column_K` for an empty one and `NAME_2` for the second of a name."""
    unique: list[str] = []
    for number, name in enumerate(names, 1):
        base = name or f"column_{number}"
        candidate, copy = base, 1
        while candidate in unique or (candidate != name and candidate in names):
            copy += 1
            candidate = f"{base}_{copy}"
        unique.append(candidate)
    return unique


def repeated_names(names: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name in names if name and names.count(name) > 1)


def find_column(text: str, file: TableFile, key: str) -> ColumnPath:
    """Returns the column that `text` names, or a path `column.field` into its objects. Raises E_COLUMN."""
    parts = text.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in file.repeated:
            raise ClipwrightError(
                "E_COLUMN",
                "the table has several columns of this name",
                where=f"{file.path}: {shown(name)}",
                found=f"its columns are {listed(file.names)}",
                fix="give each column its own name",
            )
        if name in file.names:
            return (name, *parts[length:])
    raise ClipwrightError(
        "E_COLUMN",
        "the table has no such column",
        where=f"{file.path}: {shown(text)}",
        found=f"its columns are {listed(file.names)}",
        fix=nearest_column(text, file.names) or f"set {key}={usual_column(file.names, key) or 'COLUMN'}",
    )


def usual_column(names: Sequence[str], key: str) -> str:
    """Returns the column that other tools' tables use for `key` (open_clip, img2dataset, COCO), or an empty string."""
    folded = {name.strip().casefold(): name for name in names}
    return next((folded[name] for name in _USUAL_NAMES.get(key, ()) if name in folded), "")


def nearest_column(name: str, known: Sequence[str]) -> str:
    """As `nearest`, but upper and lower case and spaces at the ends count as equal."""
    folded = {candidate.strip().casefold(): candidate for candidate in known}
    same = folded.get(name.strip().casefold())
    return f"did you mean '{same}'?" if same else nearest(name, known)


def type_at(file: TableFile, path: ColumnPath, key: str) -> pa.DataType:
    """Returns the type under a path; a field of objects in a list is a list. Raises E_COLUMN for an unknown field."""
    kind = file.nested_type(path[0])
    lists = 0
    for depth, name in enumerate(path[1:], 1):
        while is_list(kind):
            kind = kind.value_type
            lists += 1
        fields = [] if not pa.types.is_struct(kind) else [kind.field(i).name for i in range(kind.num_fields)]
        if name not in fields:
            place = ".".join(path[:depth])
            raise ClipwrightError(
                "E_COLUMN",
                "the column has no such field",
                where=f"{file.path}: {shown('.'.join(path))}",
                found=f"the fields of {place} are {listed(fields)}" if fields else f"{place} is {kind}, without fields",
                fix=nearest_column(name, fields) or f"set {key} to a column, or to one of its fields",
            )
        kind = kind.field(name).type
    for _ in range(lists):
        kind = pa.list_(kind)
    return kind


def text_fields(kind: pa.DataType, prefix: str) -> list[str]:
    """Returns the paths under `prefix` that hold text, or a list of texts, inside objects or a list of objects."""
    lists = 0
    while is_list(kind):
        kind = kind.value_type
        lists += 1
    if not pa.types.is_struct(kind) or lists > 1:
        return []
    paths: list[str] = []
    for i in range(kind.num_fields):
        inner = kind.field(i)
        is_texts = is_list(inner.type) and is_text(inner.type.value_type) and not lists
        if is_text(inner.type) or is_texts:
            paths.append(f"{prefix}.{inner.name}")
        elif not lists:
            paths += text_fields(inner.type, f"{prefix}.{inner.name}")
    return paths


def follow(value: Any, fields: ColumnPath) -> Any:
    """Returns what stands under a path of fields; of a list of objects, the list of their fields."""
    if not fields:
        return value
    if isinstance(value, list):
        return [follow(item, fields) for item in value]
    if isinstance(value, dict):
        return follow(value.get(fields[0]), fields[1:])
    return None


def as_written(value: Any) -> Any:
    """Returns a value with numbers as text; a missing number is None."""
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, list):
        return [as_written(item) for item in value]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return value
    return value.text if isinstance(value, WrittenFloat) else str(value)


def as_text(value: Any) -> str | None:
    """Returns a value of any type as text of a text column: text as it is, objects and lists as JSON."""
    written = as_written(value)
    if isinstance(written, bytes):
        return None
    if isinstance(written, (dict, list)):
        try:
            return valid_utf8(canonical_json(value))
        except (TypeError, ValueError):
            return valid_utf8(str(value))
    return None if written is None else valid_utf8(written)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )
