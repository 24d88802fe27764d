"""Published variants: exact parameter counts, and multiply-adds within 0.5 % of the reference counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, parameter_count
from clipwright.pipeline.towers.count import multiply_adds

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
ROWS = [row for row in PUBLISHED if row["variant"] in IMAGE_TOWERS.entries]


def meta_tower(row: dict[str, Any], **fields: Any) -> ImageTower:
    with torch.device("meta"):
        return IMAGE_TOWERS.build(IMAGE_TOWERS.preset(row["variant"], image_size=row["image_size"], **fields))


def row_id(row: dict[str, Any]) -> str:
    return f"{row['variant']}-{row['image_size']}"


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_published_costs(row):
    tower = meta_tower(row)
    count = parameter_count(tower)
    if row["params_features"] is None:  # the tower's pool contains CLIP's projection
        assert count == row["params_visual_with_projection"] and tower.feature_dim == row["embed_dim"]
    else:
        assert count == row["params_features"] and tower.feature_dim == row["feature_dim"]
        with_projection = row.get("params_visual_with_projection", count)
        assert with_projection == count + tower.feature_dim * row.get("embed_dim", 0)
    gmacs = multiply_adds(tower) / 1e9
    assert gmacs == pytest.approx(row["gmacs_counted"], rel=5e-3)


@pytest.mark.parametrize("row", [row for row in ROWS if "gmacs_counted_stride_pw" in row], ids=row_id)
def test_published_costs_with_pointwise_stride(row):
    tower = meta_tower(row, stride="pw")
    assert parameter_count(tower) == row["params_features"]
    assert multiply_adds(tower) / 1e9 == pytest.approx(row["gmacs_counted_stride_pw"], rel=5e-3)
    assert multiply_adds(tower) / 1e9 == pytest.approx(row["gmacs"], rel=4e-2)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("coatnet_nano", {"dims": (32, 32, 32, 32), "depths": (2, 3, 2, 2)}),  # blocks differ in stride only
        ("swin_nano", {"window": 5, "pad": True}),
        ("cvt_nano", {}),
        ("clip_rn_nano", {"layers": (3, 1, 2, 1)}),
        ("deit_nano", {"drop_path": 0.0}),
    ],
)
def test_repeated_blocks_are_counted(name, fields):
    towers = []
    for _ in range(2):
        with torch.device("meta"):
            towers.append(IMAGE_TOWERS.build(IMAGE_TOWERS.preset(name, **fields)).eval())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        towers[0](torch.empty(1, 3, towers[0].image_size, towers[0].image_size, device="meta"))
    assert multiply_adds(towers[1]) == counter.get_total_flops() // 2


def test_attention_products_are_counted():
    """The cost of scores and weighted sums grows with the square of the number of tokens."""
    row = {"variant": "vit_base_patch32", "image_size": 224}
    tower = meta_tower(row)
    d, depth, n = 768, 12, 49 + 1
    patches = 3 * 32**2 * d * (n - 1)
    assert multiply_adds(tower) == patches + depth * (12 * n * d**2 + 2 * n**2 * d)
