"""The error line, and errors that travel to another process."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from output_checks import check_error, never_seen

from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.core.errors import CODES, ClipwrightError

FULL = ClipwrightError("E_INPUT", "the file is missing", where="a.csv", found="no such file", fix="check the path")


def test_the_line_has_four_segments_and_skips_empty_ones() -> None:
    assert str(FULL) == "error[E_INPUT]: the file is missing — a.csv — no such file — check the path"
    short = ClipwrightError("E_USAGE", "no command\nis given", fix="see clipwright --help")
    assert str(short) == "error[E_USAGE]: no command is given — see clipwright --help"


@pytest.mark.parametrize("travel", ["pickle", "json"])
def test_an_error_survives_the_way_to_another_process(travel: str) -> None:
    if travel == "pickle":
        copy = pickle.loads(pickle.dumps(FULL))
    else:
        copy = ClipwrightError.from_dict(json.loads(json.dumps(FULL.to_dict())))
    assert type(copy) is ClipwrightError
    assert copy.to_dict() == FULL.to_dict() and str(copy) == str(FULL) and copy.exit_code == 3


def test_the_docs_list_every_code() -> None:
    text = (Path(__file__).resolve().parents[4] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = [f"| `{code}` | {exit_code} | {meaning} |" for code, (exit_code, meaning) in CODES.items()]
    assert [line for line in text.splitlines() if line.startswith("| `E_")] == table


def test_codes_and_flags_that_no_test_uses_are_found() -> None:
    """`pytest` without arguments fails if a code is missing, see tests/conftest.py."""
    everything = set(CODES) | {f"{verb} {flag}" for verb in COMMANDS for flag in ("--json", "--quiet")}
    assert never_seen(everything) == []
    assert never_seen(everything - {"E_TABLE", "E_STOPPED", "train --json"}) == ["E_TABLE", "train --json"]


@pytest.mark.parametrize(
    ("code", "stderr"),
    [
        (3, ""),
        (3, "Traceback\nValueError: x"),
        (3, "error[E_INPUT]: x — y — do z\na line of a library"),
        (2, "error[E_INPUT]: x — y — do z"),
        (3, "error[E_NO_SUCH_CODE]: x — y — do z"),
        (3, "error[E_INPUT]: without culprit — do z"),
        (3, "error[E_INPUT]: x\x1b[31m — y — do z"),
    ],
)
def test_output_of_failed_commands_is_checked(code: int, stderr: str) -> None:
    check_error([], 3, "error[E_INPUT]: x — y — do z")
    with pytest.raises(AssertionError):
        check_error([], code, stderr)
