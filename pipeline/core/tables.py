"""Tables for a terminal: `align` for figures, `wrap` for columns of text."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping, Sequence


def display_width(text: str) -> int:
    """Returns the terminal cells that `text` takes: two for a wide letter (한), none for a combining mark."""
    cells = 0
    for letter in text:
        if unicodedata.combining(letter):
            continue
        cells += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
    return cells


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns rows of equal length as lines; the first `left` columns are aligned left, the others right."""
    widths = [max(display_width(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            padding = " " * (widths[i] - display_width(cell))
            cells.append(cell + padding if i < left else padding + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def wrap(titles: Sequence[str], rows: Sequence[Sequence[str]], fixed: int, styles: Mapping[str, str]) -> str:
    """Returns a table of text columns, folded to the width of the terminal; elsewhere one line per row.

    The first `fixed` columns are never folded. `styles`: rich's style for each value of the first column.
    """
    from rich.console import Console  # noqa: PLC0415  costs 60 ms that most commands need not pay
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, title in enumerate(titles):
        table.add_column(title, no_wrap=i < fixed, overflow="fold")
    for first, *others in rows:
        table.add_row(Text(first, styles.get(first, "")), *(Text(" ".join(cell.split())) for cell in others))
    width = None if sys.stdout.isatty() else 10_000
    console = Console(file=sys.stdout, width=width, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
