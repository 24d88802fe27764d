"""tests/soak.py names tests that exist."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SOAK = runpy.run_path(str(Path(__file__).with_name("soak.py")))


@pytest.mark.parametrize("name", SOAK["CLASSES"])
def test_soak_class_names_an_existing_test(name: str) -> None:
    path, _, test = SOAK["CLASSES"][name][0].partition("::")
    text = (SOAK["ROOT"] / path).read_text(encoding="utf-8")
    assert not test or f"def {test}(" in text
