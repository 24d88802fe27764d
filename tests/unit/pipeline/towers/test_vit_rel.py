"""ViT_REL against a literal forward pass, count formula and init."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.base import parameter_count
from clipwright.pipeline.towers.vit_rel import ViTRel, ViTRelConfig

SMALL = {"image_size": 24, "patch": 8, "dim": 64, "depth": 2, "ln_eps": 1e-4}


def build(**fields) -> ViTRel:
    torch.manual_seed(0)
    return ViTRel(ViTRelConfig(name="x", **fields))


def perturbed(config: ViTRelConfig) -> ViTRel:
    torch.manual_seed(0)
    tower = ViTRel(config).double()
    with torch.no_grad():
        for p in tower.parameters():
            p += 0.1 * torch.randn_like(p)
    return tower


def slow_norm(layer: torch.nn.LayerNorm, x: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def slow_attention(attn: torch.nn.Module, x: torch.Tensor, relative: str, side: int) -> torch.Tensor:
    """Of one image, query by query; heads of 32."""
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


def slow_vit_rel(tower: ViTRel, config: ViTRelConfig, image: torch.Tensor) -> torch.Tensor:
    """The normed tokens of one image."""
    p, side = config.patch, config.image_size // config.patch
    rows = []
    for i in range(side):
        for j in range(side):
            patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            rows.append((tower.patch_embed.weight * patch).sum(dim=(1, 2, 3)) + tower.patch_embed.bias)
    x = torch.stack(rows)
    for block in tower.blocks:
        x = x + slow_attention(block.attn, slow_norm(block.norm1, x, config.ln_eps), config.relative, side)
        z = slow_norm(block.norm2, x, config.ln_eps) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        x = x + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return slow_norm(tower.norm, x, config.ln_eps)


def check_against_the_literal_form(tower: ViTRel, config: ViTRelConfig) -> None:
    images = torch.randn(2, 3, 24, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    out = tower(images)
    tokens = torch.stack([slow_vit_rel(tower, config, image) for image in images])
    torch.testing.assert_close(out.tokens, tokens, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(out.pooled, tokens.mean(dim=1), atol=1e-10, rtol=1e-10)
    assert out.grid == (3, 3)


@pytest.mark.parametrize("relative", ["pre", "post", "none"])
def test_forward_is_the_literal_one(relative):
    config = ViTRelConfig(name="x", relative=relative, **SMALL)
    check_against_the_literal_form(perturbed(config), config)


attend = F.scaled_dot_product_attention


def swapped_kv(q, k, v, *rest, **named):
    return attend(q, v, k, *rest, **named)


def unscaled(q, k, v, *rest, **named):
    return attend(q, k, v, *rest, **named, scale=1.0)


@pytest.mark.parametrize("wrong", [swapped_kv, unscaled])
def test_the_comparison_notices_wrong_attention(wrong, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    config = ViTRelConfig(name="x", **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_the_literal_form(perturbed(config), config)


@pytest.mark.parametrize("wrong", [{"act": "gelu_tanh"}, {"ln_eps": 1e-6}, {"relative": "post"}])
def test_the_comparison_notices_a_wrong_activation_eps_or_table(wrong):
    right = ViTRelConfig(name="x", **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_the_literal_form(perturbed(dataclasses.replace(right, **wrong)), right)


@pytest.mark.parametrize(("size", "p", "d", "depth"), [(40, 8, 96, 3), (30, 10, 32, 1)])
@pytest.mark.parametrize("relative", ["pre", "post", "none"])
def test_count_formula(size, p, d, depth, relative):
    tower = build(image_size=size, patch=p, dim=d, depth=depth, relative=relative)
    g = size // p
    table = 0 if relative == "none" else (2 * g - 1) ** 2 * d // 32
    assert parameter_count(tower) == 3 * p * p * d + d + depth * (12 * d * d + 13 * d + table) + 2 * d


@pytest.mark.parametrize("relative", ["pre", "post"])
def test_init(relative):
    tower = build(image_size=64, patch=8, dim=192, depth=2, relative=relative)
    attn, mlp = tower.blocks[1].attn, tower.blocks[1].mlp
    assert tower.patch_embed.weight.std().item() == pytest.approx((2 / (64 * 192)) ** 0.5, rel=0.1)
    assert tower.patch_embed.bias.abs().max() == 0 and attn.qkv.bias.abs().max() == 0
    for matrix in (*attn.qkv.weight.split(192), attn.out.weight):
        assert matrix.abs().max().item() == pytest.approx((6 / 384) ** 0.5, rel=0.02)
    assert mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.15)
    std = attn.relative_table.std().item()
    assert std == pytest.approx(0.02, rel=0.15) if relative == "pre" else std == 0


def test_drop_path_rises_over_the_blocks():
    tower = build(**{**SMALL, "depth": 3}, drop_path=0.5)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])


def test_another_size_resizes_the_tables_bilinearly():
    small, large = build(**SMALL), build(**{**SMALL, "image_size": 40})
    state = large.resized(small.state_dict())
    large.load_state_dict(state, strict=True)
    name = "blocks.1.attn.relative_table"
    wanted = F.interpolate(small.state_dict()[name].view(1, 2, 5, 5), size=(9, 9), mode="bilinear").view(2, 81)
    assert torch.equal(state[name], wanted)


@pytest.mark.parametrize(("field", "value"), [("dim", 48), ("image_size", 28)])
def test_illegal_shapes_are_refused(field, value):
    with pytest.raises(ClipwrightError) as caught:
        build(**SMALL | {field: value})
    assert caught.value.code == "E_CONFIG_VALUE" and f"{field}: {value}" in caught.value.where
