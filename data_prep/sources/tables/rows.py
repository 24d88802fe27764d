"""Where the rows of a csv file begin and end, line by line: for rows of several lines, and to name a bad line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipwright.data_prep.sources.tables.base import unreadable
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import shown

MAX_QUOTED_LINES = 100  # of one field
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class Dialect:
    """How the rows of a file are written. Without `quote`, no character has a meaning but delimiter and line end."""

    delimiter: bytes
    quote: bytes  # may be empty
    header: int  # number of columns, 0 while the header is read

    def describe(self) -> str:
        return {b"\t": "tab"}.get(self.delimiter, f"'{self.delimiter.decode()}'")


@dataclass
class Row:
    """A row of a file: where its first line begins and its last one ends, in bytes, and its number of fields."""

    start: int
    stop: int
    fields: int
    lines: int


def split_fields(line: bytes, dialect: Dialect) -> list[bytes]:
    """Returns the fields of a complete row without quotes around them."""
    fields: list[bytes] = []
    position = 0
    quote = dialect.quote
    while True:
        end = _field_end(line, position, dialect)
        assert end is not None
        text = line[position:end]
        if quote and text.startswith(quote):
            text = text[1:-1] if text.endswith(quote) else text[1:]
            text = text.replace(quote * 2, quote)
        fields.append(text)
        if end >= len(line):
            return fields
        position = end + 1


def find_rows(data: bytes, dialect: Dialect, path: Path, first_line: int, *, final: bool) -> Iterator[Row]:
    """Yields the complete rows of `data`, without blank lines. A row that is still open at the end is left out.

    Raises E_TABLE with the line's number for a row with another number of fields than the header, and for a quoted
    field that spans lines and does not close properly: with a delimiter or line end after its quote, within
    MAX_QUOTED_LINES, and before the end of the file if `final`.
    """
    number = first_line - 1
    start = 0
    fields = 0
    opened = 0  # line in which the open quoted field began, or 0
    row_line = first_line
    for begin, end, after in _lines(data):
        number += 1
        line = data[begin:end]
        if not opened:
            if not line:
                continue
            start, row_line, fields, position = begin, number, 0, 0
        else:
            closed = _closing_quote(line, 0, dialect.quote)
            if closed is None:
                if number - opened >= MAX_QUOTED_LINES:
                    raise _unclosed(
                        path, opened, f"it is still open {format_count(MAX_QUOTED_LINES, 'line')} later", dialect
                    )
                continue
            if line[closed : closed + 1] not in (b"", dialect.delimiter):
                raise _unclosed(path, opened, f"text follows the quote that closes it in line {number}", dialect)
            fields += 1
            opened = 0
            position = closed + 1 if closed < len(line) else len(line) + 1
        while position <= len(line):
            field_end = _field_end(line, position, dialect)
            if field_end is None:
                opened = number
                break
            fields += 1
            position = field_end + 1
        if opened:
            continue
        if dialect.header and fields != dialect.header:
            raise _ragged(path, row_line, fields, dialect, line)
        yield Row(start, after, fields, number - row_line + 1)
    if opened and final:
        raise _unclosed(path, opened, "the file ends inside it", dialect)


def _lines(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields begin and end of each line, and the end of its line end."""
    begin = 0
    if b"\r" in data:
        for match in _LINE_END.finditer(data):
            yield begin, match.start(), match.end()
            begin = match.end()
    else:
        while (end := data.find(b"\n", begin)) >= 0:
            yield begin, end, end + 1
            begin = end + 1
    if begin < len(data):
        yield begin, len(data), len(data)


def _field_end(line: bytes, position: int, dialect: Dialect) -> int | None:
    """Returns where the field that begins at `position` ends, or None if it is quoted and open at the line's end."""
    if dialect.quote and line.startswith(dialect.quote, position):
        closed = _closing_quote(line, position + 1, dialect.quote)
        if closed is None:
            return None
        position = closed
    end = line.find(dialect.delimiter, position)
    return len(line) if end < 0 else end


def _closing_quote(line: bytes, position: int, quote: bytes) -> int | None:
    """Returns the position after the quote that closes a field; two in a row stand for one and do not close it."""
    while (found := line.find(quote, position)) >= 0:
        if not line.startswith(quote, found + 1):
            return found + 1
        position = found + 2
    return None


def _unclosed(path: Path, line: int, reason: str, dialect: Dialect) -> ClipwrightError:
    quote = dialect.quote.decode()
    return unreadable(
        f"{path}, line {line}",
        reason,
        f"write {quote}{quote} for {quote} inside a quoted field; if the file has no quoting, set source.quote=none",
        "a quoted field does not close",
    )


def _ragged(path: Path, line: int, fields: int, dialect: Dialect, text: bytes) -> ClipwrightError:
    if fields > dialect.header and dialect.quote:
        fix = f"put fields that contain {dialect.describe()} in quotes ({dialect.quote.decode()})"
    elif not dialect.quote and b'"' in text:
        fix = "if the file has quoted fields, set 'source.quote=\"'"
    else:
        fix = "correct the line, or set source.delimiter if another character separates the fields"
    return unreadable(
        f"{path}, line {line}",
        f"{format_count(fields, 'field')} separated by {dialect.describe()}, {dialect.header} in the header: "
        + shown(text.decode("utf-8", "replace"), 80),
        fix,
        "a row has another number of fields than the header",
    )
