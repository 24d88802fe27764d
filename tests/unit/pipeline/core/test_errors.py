"""The error line, and errors that travel to another process."""

from __future__ import annotations

import json
import pickle

import pytest

from clipwright.pipeline.core.errors import ClipwrightError

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
