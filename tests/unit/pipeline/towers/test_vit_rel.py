"""ViT_REL: forward pass against a reference, parameter counts, initialization, resized tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tower_checks import (
    WRONG_ATTENTION,
    assert_close,
    assert_rejected,
    perturb,
    reference_layer_norm,
)

from clipwright.pipeline.towers.base import parameter_count
from clipwright.pipeline.towers.vit_rel import ViTRel, ViTRelConfig

SMALL = {"image_size": 24, "patch": 8, "dim": 64, "depth": 2, "ln_eps": 1e-4}


def build(**fields) -> ViTRel:
    torch.manual_seed(0)
    return ViTRel(ViTRelConfig(name="x", **fields))


def perturbed(config: ViTRelConfig) -> ViTRel:
    torch.manual_seed(0)
    return perturb(ViTRel(config).double())


def reference_attention(attn: torch.nn.Module, x: torch.Tensor, relative: str, side: int) -> torch.Tensor:
    """Attention of one image, query by query, with heads of width 32."""
    d = x.shape[1]
    q, k, v = (x @ w.T + b for w, b in zip(attn.qkv.weight.split(d), attn.qkv.bias.split(d), strict=True))
    y = torch.zeros_like(x)
    for h in range(d // 32):
        part = slice(32 * h, 32 * h + 32)
        for i in range(side * side):
            scores = k[:, part] @ q[i, part] / 32**0.5
            w = torch.zeros_like(scores)
            if relative != "none":
                table = attn.relative_table[h].view(2 * side - 1, 2 * side - 1)
                for j in range(side * side):
                    w[j] = table[i // side - j // side + side - 1, i % side - j % side + side - 1]
            weights = (scores + w).softmax(0) if relative == "pre" else scores.softmax(0) + w
            y[i, part] = weights @ v[:, part]
    return y @ attn.out.weight.T + attn.out.bias


def reference_vit_rel(tower: ViTRel, config: ViTRelConfig, image: torch.Tensor) -> torch.Tensor:
    """Computes the normalized tokens of one image."""
    p, side = config.patch, config.image_size // config.patch
    rows = []
    for i in range(side):
        for j in range(side):
            patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            rows.append((tower.patch_embed.weight * patch).sum(dim=(1, 2, 3)) + tower.patch_embed.bias)
    x = torch.stack(rows)
    for block in tower.blocks:
        x = x + reference_attention(
            block.attn, reference_layer_norm(block.norm1, x, config.ln_eps), config.relative, side
        )
        z = reference_layer_norm(block.norm2, x, config.ln_eps) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        x = x + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return reference_layer_norm(tower.norm, x, config.ln_eps)


def check_against_reference(tower: ViTRel, config: ViTRelConfig) -> None:
    images = torch.randn(2, 3, 24, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    out = tower(images)
    tokens = torch.stack([reference_vit_rel(tower, config, image) for image in images])
    assert_close(out.tokens, tokens)
    assert_close(out.pooled, tokens.mean(dim=1))
    assert out.grid == (3, 3)


@pytest.mark.parametrize("relative", ["pre", "post", "none"])
def test_forward_matches_reference(relative):
    config = ViTRelConfig(name="x", relative=relative, **SMALL)
    check_against_reference(perturbed(config), config)


@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
def test_comparison_detects_wrong_attention(wrong, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    config = ViTRelConfig(name="x", **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(perturbed(config), config)


@pytest.mark.parametrize("wrong", [{"act": "gelu_tanh"}, {"ln_eps": 1e-6}, {"relative": "post"}])
def test_comparison_detects_a_wrong_activation_eps_or_table(wrong):
    right = ViTRelConfig(name="x", **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(perturbed(dataclasses.replace(right, **wrong)), right)


@pytest.mark.parametrize(("size", "p", "d", "depth"), [(40, 8, 96, 3), (30, 10, 32, 1)])
@pytest.mark.parametrize("relative", ["pre", "post", "none"])
def test_parameter_count_formula(size, p, d, depth, relative):
    tower = build(image_size=size, patch=p, dim=d, depth=depth, relative=relative)
    g = size // p
    table = 0 if relative == "none" else (2 * g - 1) ** 2 * d // 32
    assert parameter_count(tower) == 3 * p * p * d + d + depth * (12 * d * d + 13 * d + table) + 2 * d


@pytest.mark.parametrize("relative", ["pre", "post"])
def test_initialization(relative):
    tower = build(image_size=64, patch=8, dim=192, depth=2, relative=relative)
    attn, mlp = tower.blocks[1].attn, tower.blocks[1].mlp
    assert tower.patch_embed.weight.std().item() == pytest.approx((2 / (64 * 192)) ** 0.5, rel=0.1)
    assert tower.patch_embed.bias.abs().max() == 0 and attn.qkv.bias.abs().max() == 0
    for matrix in (*attn.qkv.weight.split(192), attn.out.weight):
        assert matrix.abs().max().item() == pytest.approx((6 / 384) ** 0.5, rel=0.02)
    assert mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.15)
    std = attn.relative_table.std().item()
    assert std == pytest.approx(0.02, rel=0.15) if relative == "pre" else std == 0


def test_drop_path_rises_over_blocks():
    tower = build(**{**SMALL, "depth": 3}, drop_path=0.5)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])


def test_tables_are_resized_bilinearly():
    small, large = build(**SMALL), build(**{**SMALL, "image_size": 40})
    state = large.resized(small.state_dict())
    large.load_state_dict(state, strict=True)
    name = "blocks.1.attn.relative_table"
    wanted = F.interpolate(small.state_dict()[name].view(1, 2, 5, 5), size=(9, 9), mode="bilinear").view(2, 81)
    assert torch.equal(state[name], wanted)


@pytest.mark.parametrize(("field", "value"), [("dim", 48), ("image_size", 28)])
def test_invalid_shapes_are_rejected(field, value):
    error = assert_rejected(lambda: build(**SMALL | {field: value}))
    assert error.where == f"{field}: {value}"
