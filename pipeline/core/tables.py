"""Tables for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def width(text: str) -> int:
    """How many cells of a terminal `text` takes: two for a wide letter (한), none for a mark upon another."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length as lines; the first `left` columns stand left, the others right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [(" " * (wide - width(cell)), cell) for cell, wide in zip(row, widths, strict=True)]
        lines.append("  ".join(cell + gap if i < left else gap + cell for i, (gap, cell) in enumerate(cells)).rstrip())
    return "\n".join(lines)
