"""Every published variant: parameters exact, multiply-adds within half a percent of those counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, parameter_count
from clipwright.pipeline.towers.count import multiply_adds

ROWS = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
ROWS = [row for row in ROWS if row["variant"] in IMAGE_TOWERS.entries]


def meta_tower(row: dict[str, Any], **fields: Any) -> ImageTower:
    with torch.device("meta"):
        return IMAGE_TOWERS.build(IMAGE_TOWERS.preset(row["variant"], image_size=row["image_size"], **fields))


def name(row: dict[str, Any]) -> str:
    return f"{row['variant']}-{row['image_size']}"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_published_figures(row):
    tower = meta_tower(row)
    count = parameter_count(tower)
    if row["params_features"] is None:  # the tower's pool holds CLIP's projection
        assert count == row["params_visual_with_projection"] and tower.feature_dim == row["embed_dim"]
    else:
        assert count == row["params_features"] and tower.feature_dim == row["feature_dim"]
        with_projection = row.get("params_visual_with_projection", count)
        assert with_projection == count + tower.feature_dim * row.get("embed_dim", 0)
    gmacs = multiply_adds(tower) / 1e9
    assert gmacs == pytest.approx(row["gmacs_counted"], rel=5e-3)


@pytest.mark.parametrize("row", [row for row in ROWS if "gmacs_counted_stride_pw" in row], ids=name)
def test_published_figures_of_the_other_stride(row):
    tower = meta_tower(row, stride="pw")
    assert parameter_count(tower) == row["params_features"]
    assert multiply_adds(tower) / 1e9 == pytest.approx(row["gmacs_counted_stride_pw"], rel=5e-3)
    assert multiply_adds(tower) / 1e9 == pytest.approx(row["gmacs"], rel=4e-2)


def test_counting_sees_the_cost_of_attention():
    """Tokens beyond the first 49 cost more than in proportion: scores and weighted sums grow with their square."""
    row = {"variant": "vit_base_patch32", "image_size": 224}
    tower = meta_tower(row)
    d, depth, n = 768, 12, 49 + 1
    patches = 3 * 32**2 * d * (n - 1)
    assert multiply_adds(tower) == patches + depth * (12 * n * d**2 + 2 * n**2 * d)
