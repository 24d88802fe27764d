"""Tables fit the width of the terminal, and 80 cells elsewhere."""

from __future__ import annotations

import sys

import pytest

from clipwright.pipeline.core.tables import StyledText, align, display_width, shorten_to, wrap


def test_display_width_counts_terminal_cells() -> None:
    assert [display_width(text) for text in ("abc", "한글", "e\u0301", "")] == [3, 4, 1, 0]


@pytest.mark.parametrize(("text", "cells", "short"), [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("한글이", 5, "한글…")])
def test_shorten_to(text: str, cells: int, short: str) -> None:
    assert shorten_to(text, cells) == short


def test_a_narrow_table_is_aligned() -> None:
    rows = [["name", "kind", "n"], ["빨간", "x", "1"], ["b", "long one", "1,000"]]
    assert align(rows, left=2).splitlines() == [
        "name  kind          n",
        "빨간  x             1",
        "b     long one  1,000",
    ]


def test_text_is_folded_at_spaces_and_between_letters_that_have_none() -> None:
    rows = [["rank", "caption", "n"], ["1", "a red circle " * 8, "10"], ["2", "빨간원" * 20, "2"]]
    lines = align(rows, left=2).splitlines()
    assert [display_width(line) <= 80 for line in lines] == [True] * len(lines) and len(lines) == 5
    assert lines[1].endswith("  10") and lines[3].endswith("   2")
    assert "".join(lines[1:3]).count("red") == 8 and "".join(lines[3:]).count("빨간원") >= 19
    assert lines[2].startswith(" " * 6)  # under its own column


def test_numbers_are_not_folded_and_columns_that_do_not_fit_are_named() -> None:
    rows = [["name", *(f"column_{i}" for i in range(8))], ["a" * 40, *(f"{10**9 + i:,}" for i in range(8))]]
    lines = align(rows, left=1).splitlines()
    assert all(display_width(line) <= 80 for line in lines)
    assert lines[0].split() == ["name", "column_0", "column_1", "column_2", "column_3"]
    assert "1,000,000,003" in lines[1] and "1,000,000,004" not in lines[1]
    assert lines[-1] == "not shown: column_4, column_5, column_6, column_7; --json has all columns"


def test_cells_are_data() -> None:
    lines = align([["a", "b"], ["x\x1b[31m\ny\u202e", "\x07"]], left=2).splitlines()
    assert lines[1].split("  ") == ["x\\x1b[31m y\\u202e", "\\x07"]


def test_a_row_has_its_remedy_below() -> None:
    rows = [["ok", "a", "fine", "", ""], ["FAIL", "b\x1b[0m", "found " * 12, "need " * 12, "do this"]]
    text = wrap(["", "check", "found", "need"], rows, below="fix", styles={"FAIL": "red"})
    lines = text.splitlines()
    assert isinstance(text, StyledText) and all(display_width(line) <= 80 for line in lines) and "\x1b" not in text
    assert lines[0].split() == ["check", "found", "need"] and lines[1].split() == ["ok", "a", "fine"]
    assert lines[2].startswith("FAIL  b\\x1b[0m") and lines[-1] == "      fix: do this"
    assert text.count("found") == 13 and text.count("need") == 13


def test_width_and_color_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, align([["a"], ["word " * 20]]).splitlines())) <= 40
    text = wrap(["", "check"], [["FAIL", "b", ""], ["ok", "c", ""]], below="fix", styles={"FAIL": "red"})
    assert text.splitlines()[1:] == ["\x1b[1;31mFAIL\x1b[0m  b", "ok    c"]
