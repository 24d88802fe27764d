"""Fixtures of the tower tests: published costs, and tests without shape checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shape_checks import no_shape_checks


@pytest.fixture(scope="session")
def published() -> dict[tuple[str, int], dict[str, Any]]:
    """Returns (variant, image size) → its row of published.json, from the authors' papers or code.

    params_features: trainable parameters without classifier and projection. gmacs: 10⁹ multiply-adds as published.
    gmacs_counted: those of convolutions, matrix products and both attention products.
    """
    rows = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    return {(row["variant"], row["image_size"]): row for row in rows}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns shape checks off: torch.compile cannot trace them."""
    with no_shape_checks():
        yield
