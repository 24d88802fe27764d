"""Tables for a terminal: at most as wide as the terminal, 80 cells where stdout is not one."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Mapping, Sequence

from clipwright.pipeline.core.streams import escape_controls, result_stream

WIDTH = 80  # cells, if stdout is not a terminal
MIN_FOLDED = 16  # cells that a folded column has at least
GAP = "  "
_COLORS = {"green": "32", "yellow": "33", "red": "1;31", "dim": "2"}


class StyledText(str):
    """Text with escape sequences of our own; cells from outside are escaped in it."""


def display_width(text: str) -> int:
    """Returns the terminal cells that `text` takes: two for a wide letter (한), none for a combining mark."""
    cells = 0
    for letter in text:
        if unicodedata.combining(letter):
            continue
        cells += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
    return cells


def table_width() -> int:
    """Returns the cells that a table may take."""
    stream = result_stream()
    return shutil.get_terminal_size((WIDTH, 24)).columns if stream.isatty() else WIDTH


def shorten_to(text: str, cells: int) -> str:
    """Returns `text` in at most `cells` terminal cells; of a longer one the start and …"""
    if display_width(text) <= cells:
        return text
    return f"{_head(text, cells - 1)}…"


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns rows of equal length as lines; the first row has the titles.

    The first `left` columns are text: aligned left and, if the table is too wide, folded. The others are numbers,
    aligned right. If that is not enough, the last columns are left out, and a last line names them.
    """
    cells = [[" ".join(escape_controls(cell).split("\n")) for cell in row] for row in rows]
    columns = [list(column) for column in zip(*cells, strict=True)]
    limit, shown = table_width(), len(columns)
    widths = _fit([max(map(display_width, column)) for column in columns], left, limit)
    while widths is None:
        shown -= 1
        widths = _fit([max(map(display_width, column)) for column in columns[:shown]], left, limit)
    lines: list[str] = []
    for row in cells:
        lines += _lines(row[:shown], widths, left)
    if shown < len(columns):
        lines.append(f"not shown: {', '.join(cells[0][shown:])}; --json has all columns")
    return "\n".join(lines)


def _fit(natural: list[int], left: int, limit: int) -> list[int] | None:
    """Returns the width of each column, at most `limit` in all with gaps; None if the numbers alone are wider."""
    excess = sum(natural) + len(GAP) * (len(natural) - 1) - limit
    widths = list(natural)
    while excess > 0:
        # The widest text column is folded first, down to the next one.
        foldable = [i for i in range(min(left, len(widths))) if widths[i] > MIN_FOLDED]
        if not foldable:
            return widths if len(widths) == 1 else None
        widest = max(foldable, key=lambda i: widths[i])
        widths[widest] -= 1
        excess -= 1
    return widths


def _lines(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    folded = [
        _fold(cell, width) if i < left else [cell] for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines: list[str] = []
    for number in range(max(map(len, folded))):
        parts: list[str] = []
        for i, (cell, width) in enumerate(zip(folded, widths, strict=True)):
            text = cell[number] if number < len(cell) else ""
            padding = " " * (width - display_width(text))
            parts.append(text + padding if i < left else padding + text)
        lines.append(GAP.join(parts).rstrip())
    return lines


def _fold(text: str, width: int) -> list[str]:
    """Returns `text` as lines of at most `width` cells, broken at spaces where possible."""
    if display_width(text) <= width:
        return [text]
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if display_width(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while display_width(word) > width:
            head = _head(word, width)
            lines.append(head)
            word = word[len(head) :]
        line = word
    return [*lines, line] if line else lines


def _head(text: str, cells: int) -> str:
    """Returns the longest start of `text` that takes at most `cells` cells; at least one letter."""
    end = 0
    while end < len(text) and display_width(text[: end + 1]) <= cells:
        end += 1
    return text[: max(end, 1)]


def wrap(titles: Sequence[str], rows: Sequence[Sequence[str]], below: str, styles: Mapping[str, str]) -> StyledText:
    """Returns a table of text columns whose last column stands below the row, after the word `below`.

    styles: color of each value of the first column, on a terminal.
    """
    texts = [[" ".join(escape_controls(cell).split()) for cell in row] for row in rows]
    upper = [list(titles), *(row[:-1] for row in texts)]
    natural = [max(map(display_width, column)) for column in zip(*upper, strict=True)]
    limit = table_width()
    widths = _fit(natural, len(titles), limit) or natural
    in_color = result_stream().isatty()
    lines = _lines(upper[0], widths, len(titles))
    indent = " " * (widths[0] + len(GAP))
    for row in texts:
        own = _lines(row[:-1], widths, len(titles))
        if row[-1]:
            own += [f"{indent}{line}" for line in _fold(f"{below}: {row[-1]}", limit - len(indent))]
        color = _COLORS.get(styles.get(row[0], ""))
        if in_color and color is not None and own[0].startswith(row[0]):
            own[0] = f"\x1b[{color}m{row[0]}\x1b[0m{own[0][len(row[0]) :]}"
        lines += own
    return StyledText("\n".join(lines))
