"""Captions of a table's rows: a column, a field inside its objects, or a template over columns."""

from __future__ import annotations

import re
import string
from typing import Any

import pyarrow as pa

from clipwright.data_prep.sources.base import Caption
from clipwright.data_prep.sources.tables.base import (
    Batch,
    ColumnPath,
    TableFile,
    find_column,
    is_bytes,
    is_list,
    is_text,
    text_fields,
    type_at,
)
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.text import listed, shown

_KEY = "source.caption"
_LIST_AS_TEXT = re.compile(r"""\[\s*["'].*["']\s*\]""", re.DOTALL)


class CaptionReader:
    """Reads the captions that `source.caption` describes. Raises E_CONFIG_VALUE for a malformed template."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._template = parse_template(text) if "{" in text or "}" in text else None
        self._names = [name for _, name in self._template if name] if self._template else [text]

    @property
    def names(self) -> list[str]:
        """The columns that a file must have, possibly with fields: `sentences.raw`."""
        return self._names

    @property
    def is_template(self) -> bool:
        return self._template is not None

    def paths(self, file: TableFile) -> list[ColumnPath]:
        return [find_column(name, file, _KEY) for name in self._names]

    def check(self, file: TableFile) -> None:
        """Raises E_COLUMN unless the columns of a file exist and hold texts, or without template lists of texts."""
        for name, path in zip(self._names, self.paths(file), strict=True):
            kind = type_at(file, path, _KEY)
            if _is_scalar(kind) or (not self.is_template and is_list(kind) and _is_words(kind.value_type)):
                continue
            fields = text_fields(kind, name)
            allowed = "one text" if self.is_template else "texts or lists of texts"
            found = f"its type is {shown(str(kind), 120)}"
            if fields and not self.is_template:
                found += f"; its texts are under {listed(fields)}"
            fix = f"set {_KEY} to a column of {allowed}"
            if fields:
                fix = f"set {_KEY}={fields[0]}" if not self.is_template else f"write {{{fields[0]}}}"
            raise ClipwrightError(
                "E_COLUMN", f"the column does not hold {allowed}", where=f"{file.path}: {name}", found=found, fix=fix
            )

    def read(self, batch: Batch, paths: list[ColumnPath]) -> list[list[Caption]]:
        """Returns the captions of each row."""
        columns = [batch.values(path) for path in paths]
        if self._template is None:
            return [_captions(value) for value in columns[0]]
        return [[self._fill(list(row))] for row in zip(*columns, strict=True)]

    def _fill(self, values: list[Any]) -> Caption:
        """Fills the template; bytes if a value is not UTF-8. A missing value makes the caption missing."""
        assert self._template is not None
        pieces: list[str | bytes] = []
        remaining = iter(values)
        for text, name in self._template:
            pieces.append(text)
            if not name:
                continue
            value = next(remaining)
            if value is None or value == "":
                return "E_CAP_EMPTY", f"no value in column {shown(name)}"
            if not isinstance(value, (str, bytes)):
                return "E_CAP_FILE", f"column {shown(name)} holds a {type(value).__name__}, expected one text"
            pieces.append(value)
        if any(isinstance(piece, bytes) for piece in pieces):
            return b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
        return "".join(str(piece) for piece in pieces)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Splits a template into (text, column after it) pairs. Only `{column}` is allowed, no formats or conversions."""
    reason = ""
    fields = []
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        reason = str(error)
    for _, name, spec, conversion in fields:
        if not reason and (name == "" or spec or conversion):
            reason = f"{name!r} is not a plain column"
    if not reason and not any(name for _, name, _, _ in fields):
        reason = "it names no column"
    if reason:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the caption template is malformed",
            where=f"source.caption: {shown(template)}",
            found=reason,
            fix="write {column} for a column, and {{ or }} for a literal brace",
        )
    return [(text, name) for text, name, _, _ in fields]


def list_notes(file: TableFile, texts: list[str]) -> list[str]:
    """Returns a note if captions are lists that were written as text, as pandas writes them to csv."""
    if not texts or not all(_LIST_AS_TEXT.fullmatch(text) for text in texts):
        return []
    example = shown(texts[0], 60)
    advice = "each is kept as one caption; for several captions per image, write the table as jsonl or parquet"
    return [f"{shown(file.name)}: the captions look like lists written as text ({example}); {advice}"]


def _captions(value: Any) -> list[Caption]:
    if value is None or isinstance(value, (str, bytes)):
        return [value]
    items = value if isinstance(value, list) else [value]
    return [item if item is None or isinstance(item, (str, bytes)) else _not_text(item) for item in items]


def _not_text(item: Any) -> tuple[str, str]:
    return "E_CAP_FILE", f"a {type(item).__name__} in place of a caption, expected a text or a list of texts"


def _is_words(kind: pa.DataType) -> bool:
    return is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)


def _is_scalar(kind: pa.DataType) -> bool:
    return _is_words(kind) or not pa.types.is_nested(kind)
