"""The figures that the towers' authors published, or that follow from their code, for tests to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def published() -> dict[tuple[str, int], dict[str, Any]]:
    """(variant, image size) → its row of published.json.

    params_features: trainable parameters without classifier and projection. gmacs: multiply-adds in units of 10⁹ as
    published; gmacs_counted: convolutions, matrix products and both attention products.
    """
    rows = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    return {(row["variant"], row["image_size"]): row for row in rows}
