"""Echoed values are short and printable."""

from __future__ import annotations

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.text import listed, shorten, shown


def test_long_values_lose_their_middle_and_state_their_length() -> None:
    assert shorten("a" * 60, 60) == "a" * 60
    long = "start" + "x" * 19_000 + "end"
    text = shorten(long, 100)
    assert len(text) == 100 and text.startswith("startx") and text.endswith("xend") and "(19,008 characters)" in text
    assert shorten(text, 100) == text


def test_values_are_printable() -> None:
    assert shown("\x1b[31mred\nline é 분류") == "\\x1b[31mred\\nline é 분류"
    assert shown(b"\0") == "b'\\x00'" and shown("\udcff") == "\\udcff"
    assert listed(["a", "b"]) == "a, b"
    assert listed([f"c{i}" for i in range(1000)], 2) == "c0, c1 and 998 more"


def test_an_error_stays_readable_whatever_it_echoes() -> None:
    error = ClipwrightError("E_COLUMN", "what", where="w" * 9000, found="f" * 9000, fix="do this")
    assert len(str(error)) < 4100 and str(error).endswith("do this")
    assert ClipwrightError(*error.args).to_dict() == error.to_dict()
