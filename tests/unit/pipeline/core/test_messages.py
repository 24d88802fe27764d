"""Counts and durations in messages, and that every message writes its counts with `format_count`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipwright.pipeline.core.messages import format_count, format_duration

ROOT = Path(__file__).resolve().parents[4]
SOURCES = [
    ROOT / "clipwright" / "cli.py",
    *(p for top in ("pipeline", "data_prep", "eval") for p in ROOT.glob(f"{top}/**/*.py")),
]
# Words ending in s that may follow a value which is not a count. Any other one needs format_count.
VERBS = "is has was does goes holds names leaves starts takes contains exists follows lists occurs needs"
OTHERS = "this its less as shows states counts sets"
UNITS = "ms s times slots radians"
NOT_NOUNS = set(f"{VERBS} {OTHERS} {UNITS}".split())


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("shard",), "0 shards"),
        (1, ("shard",), "1 shard"),
        (1204, ("image",), "1,204 images"),
        (1, ("query", "queries"), "1 query"),
        (2, ("query", "queries"), "2 queries"),
    ],
)
def test_format_count(count: int, words: tuple[str, ...], text: str) -> None:
    assert format_count(count, *words) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (148, "2m28s"), (3600, "1h00m"), (90_960, "25h16m")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def uncounted(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of each value in an f-string that a plural noun follows: `{rows} rows`, `{n} new images`."""
    tree = ast.parse(source)
    plurals = {f"{word}s" for word in re.findall(r"format_count\([^'\"]+['\"](?:\w+ )?(\w+)['\"]\)", source)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        before = ""
        for value, after in zip(node.values, [*node.values[1:], None], strict=True):
            if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
                words = re.match(r" ([A-Za-z]+)(?: ([A-Za-z]+))?\b(?![=/])", after.value)
                counted = isinstance(value.value, ast.Call) and ast.unparse(value.value.func) == "format_count"
                counted = counted or ast.unparse(value.value) == "share"  # a word: most, some
                if words and not counted and not before.endswith((" x ", "× ")):
                    first_is_noun = words[1].endswith("s") and words[1].lower() not in NOT_NOUNS
                    if first_is_noun or (words[2] in plurals and words[1] != "between"):
                        yield node.lineno, f"{{{ast.unparse(value.value)}}}{words[0]}"
            before = value.value if isinstance(value, ast.Constant) else ""


def test_counts_are_found() -> None:
    found = [
        'f"{rows} rows"',
        'f"{len(x):,} classes in"',
        'format_count(n, "image"); f"{n} new images"',
    ]
    fine = [
        "f\"{format_count(rows, 'row')}\"",
        'f"{name} is"',
        'f"{a} x {b} pixels"',
        'f"{host} slots={n}"',
        'f"{t} s"',
    ]
    assert all(list(uncounted(text)) for text in found)
    assert not any(list(uncounted(text)) for text in fine)


def test_messages_write_counts_with_format_count() -> None:
    found = [f"{p.relative_to(ROOT)}:{line}: {text}" for p in SOURCES for line, text in uncounted(p.read_text("utf-8"))]
    assert found == []


def test_pages_write_counts_with_format_count() -> None:
    for page in [*ROOT.glob("pipeline/**/*.html"), *ROOT.glob("data_prep/**/*.html"), *ROOT.glob("eval/**/*.html")]:
        followed = re.findall(r"\}\} (?:rejected |new )?([a-z]+s)\b", page.read_text(encoding="utf-8"))
        assert set(followed) <= NOT_NOUNS, page
