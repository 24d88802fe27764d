"""DeiT: forward pass against a reference, parameter counts, initialization, token order."""

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

from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.deit import DeiT, DeiTConfig

SMALL = {"image_size": 24, "patch": 8, "dim": 12, "depth": 2, "heads": 3, "ln_eps": 1e-4, "drop_path": 0.0}


def build(**fields) -> DeiT:
    torch.manual_seed(0)
    return DeiT(DeiTConfig(name="x", **fields))


def perturbed(config: DeiTConfig) -> DeiT:
    torch.manual_seed(0)
    return perturb(DeiT(config).double())


def reference_deit(tower: DeiT, config: DeiTConfig, image: torch.Tensor) -> torch.Tensor:
    """Computes all output tokens of one image, in the order class, distillation, patches."""
    p, d, size = config.patch, config.dim, config.dim // config.heads
    rows = [tower.prefix_tokens[0], tower.prefix_tokens[1]] if config.distilled else [tower.prefix_tokens[0]]
    for i in range(config.image_size // p):
        for j in range(config.image_size // p):
            patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            rows.append((tower.patch_embed.weight * patch).sum(dim=(1, 2, 3)) + tower.patch_embed.bias)
    x = torch.stack([row + tower.pos_embed[n] for n, row in enumerate(rows)])
    for block in tower.blocks:
        z = reference_layer_norm(block.norm1, x, config.ln_eps)
        q, k, v = (
            z @ w.T + b for w, b in zip(block.attn.qkv.weight.split(d), block.attn.qkv.bias.split(d), strict=True)
        )
        heads = []
        for h in range(config.heads):
            s = slice(h * size, (h + 1) * size)
            heads.append((q[:, s] @ k[:, s].T / size**0.5).softmax(dim=1) @ v[:, s])
        x = x + torch.cat(heads, dim=1) @ block.attn.out.weight.T + block.attn.out.bias
        z = reference_layer_norm(block.norm2, x, config.ln_eps) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        x = x + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return reference_layer_norm(tower.norm, x, config.ln_eps)


def check_against_reference(tower: DeiT, config: DeiTConfig) -> None:
    images = torch.randn(2, 3, 24, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    out = tower(images)
    tokens = torch.stack([reference_deit(tower, config, image) for image in images])
    assert_close(out.pooled, tokens[:, 0])
    if config.distilled:
        assert_close(out.extra["dist"], tokens[:, 1])
    else:
        assert out.extra == {}
    assert_close(out.tokens, tokens[:, 2 if config.distilled else 1 :])
    assert out.grid == (3, 3)


@pytest.mark.parametrize("distilled", [False, True])
def test_forward_matches_reference(distilled):
    config = DeiTConfig(name="x", distilled=distilled, **SMALL)
    check_against_reference(perturbed(config), config)


@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
def test_comparison_detects_wrong_attention(wrong, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    config = DeiTConfig(name="x", distilled=True, **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(perturbed(config), config)


@pytest.mark.parametrize("wrong", [{"act": "gelu_tanh"}, {"act": "quick_gelu"}, {"ln_eps": 1e-6}])
def test_comparison_detects_a_wrong_activation_or_eps(wrong):
    right = DeiTConfig(name="x", distilled=True, **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(perturbed(dataclasses.replace(right, **wrong)), right)


def test_comparison_detects_swapped_tokens():
    config = DeiTConfig(name="x", distilled=True, **SMALL)
    tower = perturbed(config)
    forward = tower.forward

    def swapped(images):
        out = forward(images)
        return out._replace(pooled=out.extra["dist"], extra={"dist": out.pooled})

    tower.forward = swapped
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(tower, config)


def test_parameter_count_of_the_small_distilled_preset():
    """published.json does not list it."""
    with torch.device("meta"):
        tower = IMAGE_TOWERS.build(IMAGE_TOWERS.preset("deit_small_distilled_patch16"))
    assert parameter_count(tower) == 21_666_432


@pytest.mark.parametrize(("size", "p", "d", "depth", "heads"), [(40, 8, 36, 3, 6), (30, 10, 20, 1, 2)])
@pytest.mark.parametrize("distilled", [False, True])
def test_parameter_count_formula(size, p, d, depth, heads, distilled):
    tower = build(image_size=size, patch=p, dim=d, depth=depth, heads=heads, distilled=distilled)
    n, c = (size // p) ** 2, 2 if distilled else 1
    assert parameter_count(tower) == 3 * p * p * d + d + c * d + (n + c) * d + depth * (12 * d * d + 13 * d) + 2 * d


def test_initialization():
    tower = build(image_size=64, patch=8, dim=192, depth=2, heads=3, distilled=True)
    block = tower.blocks[0]
    drawn = (tower.pos_embed, tower.prefix_tokens, *(m.weight for m in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2)))
    for tensor in drawn:
        assert tensor.mean().item() == pytest.approx(0, abs=0.004)
        assert tensor.std().item() == pytest.approx(0.02, rel=0.15)
    assert all(m.bias.abs().max() == 0 for m in (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2))


def test_drop_path_rises_over_the_blocks_to_a_tenth():
    tower = build(**{k: v for k, v in SMALL.items() if k != "drop_path"} | {"depth": 3})
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.05, 0.1])


def test_resizing_keeps_both_tokens_and_their_positions():
    small, large = (build(**SMALL | {"image_size": size}, distilled=True) for size in (24, 40))
    state = large.resized(small.state_dict())
    large.load_state_dict(state, strict=True)
    assert state["pos_embed"].shape == (2 + 25, 12)
    assert torch.equal(state["pos_embed"][:2], small.pos_embed[:2])
    assert torch.equal(state["prefix_tokens"], small.prefix_tokens)


@pytest.mark.parametrize(("field", "value"), [("heads", 5), ("image_size", 28)])
def test_invalid_shapes_are_rejected(field, value):
    assert_rejected(lambda: build(**SMALL | {field: value}), str(value))
