"""Skipped tests: every reason is listed in allowed-skips.txt, and every listed reason is used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


def skip_reasons(path: Path) -> Iterator[str]:
    """Yields the reason of each `pytest.skip(REASON)` and `pytest.mark.skipif(…, reason=REASON)` in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            arguments = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            if node.func.attr in ("skip", "importorskip", "xfail"):
                arguments += node.args[:1]
            elif node.func.attr != "skipif":
                continue
            assert arguments, f"{path}:{node.lineno}: a skip without a reason"
            for argument in arguments:
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: the reason is not a literal text"
                yield str(argument.value)


def test_allowed_skips_are_exactly_the_reasons_that_tests_name() -> None:
    used = {reason for path in TESTS.rglob("*.py") if path.name != Path(__file__).name for reason in skip_reasons(path)}
    allowed = set((TESTS / "allowed-skips.txt").read_text(encoding="utf-8").splitlines())
    assert used == allowed
