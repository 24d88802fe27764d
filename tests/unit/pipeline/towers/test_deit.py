"""DeiT against a literal forward pass, count formula, init and token order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.deit import DeiT, DeiTConfig

SMALL = {"image_size": 24, "patch": 8, "dim": 12, "depth": 2, "heads": 3, "ln_eps": 1e-4, "drop_path": 0.0}


def build(**fields) -> DeiT:
    torch.manual_seed(0)
    return DeiT(DeiTConfig(name="x", **fields))


def perturbed(config: DeiTConfig) -> DeiT:
    torch.manual_seed(0)
    tower = DeiT(config).double()
    with torch.no_grad():
        for p in tower.parameters():
            p += 0.1 * torch.randn_like(p)
    return tower


def slow_norm(layer: torch.nn.LayerNorm, x: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def slow_deit(tower: DeiT, config: DeiTConfig, image: torch.Tensor) -> torch.Tensor:
    """Every output token of one image, tokens in the order class, distillation, patches."""
    p, d, size = config.patch, config.dim, config.dim // config.heads
    rows = [tower.prefix_tokens[0], tower.prefix_tokens[1]] if config.distilled else [tower.prefix_tokens[0]]
    for i in range(config.image_size // p):
        for j in range(config.image_size // p):
            patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
            rows.append((tower.patch_embed.weight * patch).sum(dim=(1, 2, 3)) + tower.patch_embed.bias)
    x = torch.stack([row + tower.pos_embed[n] for n, row in enumerate(rows)])
    for block in tower.blocks:
        z = slow_norm(block.norm1, x, config.ln_eps)
        q, k, v = (
            z @ w.T + b for w, b in zip(block.attn.qkv.weight.split(d), block.attn.qkv.bias.split(d), strict=True)
        )
        heads = []
        for h in range(config.heads):
            s = slice(h * size, (h + 1) * size)
            heads.append((q[:, s] @ k[:, s].T / size**0.5).softmax(dim=1) @ v[:, s])
        x = x + torch.cat(heads, dim=1) @ block.attn.out.weight.T + block.attn.out.bias
        z = slow_norm(block.norm2, x, config.ln_eps) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        x = x + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return slow_norm(tower.norm, x, config.ln_eps)


def check_against_the_literal_form(tower: DeiT, config: DeiTConfig) -> None:
    images = torch.randn(2, 3, 24, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    out = tower(images)
    tokens = torch.stack([slow_deit(tower, config, image) for image in images])
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)  # noqa: E731
    close(out.pooled, tokens[:, 0])
    if config.distilled:
        close(out.extra["dist"], tokens[:, 1])
    else:
        assert out.extra == {}
    close(out.tokens, tokens[:, 2 if config.distilled else 1 :])
    assert out.grid == (3, 3)


@pytest.mark.parametrize("distilled", [False, True])
def test_forward_is_the_literal_one(distilled):
    config = DeiTConfig(name="x", distilled=distilled, **SMALL)
    check_against_the_literal_form(perturbed(config), config)


attend = F.scaled_dot_product_attention


def swapped_kv(q, k, v, *rest, **named):
    return attend(q, v, k, *rest, **named)


def unscaled(q, k, v, *rest, **named):
    return attend(q, k, v, *rest, **named, scale=1.0)


@pytest.mark.parametrize("wrong", [swapped_kv, unscaled])
def test_the_comparison_notices_wrong_attention(wrong, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    config = DeiTConfig(name="x", distilled=True, **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_the_literal_form(perturbed(config), config)


@pytest.mark.parametrize("wrong", [{"act": "gelu_tanh"}, {"act": "quick_gelu"}, {"ln_eps": 1e-6}])
def test_the_comparison_notices_a_wrong_activation_or_eps(wrong):
    right = DeiTConfig(name="x", distilled=True, **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_against_the_literal_form(perturbed(dataclasses.replace(right, **wrong)), right)


def test_the_comparison_notices_swapped_tokens():
    config = DeiTConfig(name="x", distilled=True, **SMALL)
    tower = perturbed(config)
    forward = tower.forward

    def swapped(images):
        out = forward(images)
        return out._replace(pooled=out.extra["dist"], extra={"dist": out.pooled})

    tower.forward = swapped
    with pytest.raises(AssertionError, match="not close"):
        check_against_the_literal_form(tower, config)


def test_count_of_the_distilled_small_one():
    """Not in published.json."""
    with torch.device("meta"):
        tower = IMAGE_TOWERS.build(IMAGE_TOWERS.preset("deit_small_distilled_patch16"))
    assert parameter_count(tower) == 21_666_432


@pytest.mark.parametrize(("size", "p", "d", "depth", "heads"), [(40, 8, 36, 3, 6), (30, 10, 20, 1, 2)])
@pytest.mark.parametrize("distilled", [False, True])
def test_count_formula(size, p, d, depth, heads, distilled):
    tower = build(image_size=size, patch=p, dim=d, depth=depth, heads=heads, distilled=distilled)
    n, c = (size // p) ** 2, 2 if distilled else 1
    assert parameter_count(tower) == 3 * p * p * d + d + c * d + (n + c) * d + depth * (12 * d * d + 13 * d) + 2 * d


def test_init():
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


def test_another_size_keeps_both_tokens_and_their_positions():
    small, large = (build(**SMALL | {"image_size": size}, distilled=True) for size in (24, 40))
    state = large.resized(small.state_dict())
    large.load_state_dict(state, strict=True)
    assert state["pos_embed"].shape == (2 + 25, 12)
    assert torch.equal(state["pos_embed"][:2], small.pos_embed[:2])
    assert torch.equal(state["prefix_tokens"], small.prefix_tokens)


@pytest.mark.parametrize(("field", "value"), [("heads", 5), ("image_size", 28)])
def test_illegal_shapes_are_refused(field, value):
    with pytest.raises(ClipwrightError) as caught:
        build(**SMALL | {field: value})
    assert caught.value.code == "E_CONFIG_VALUE" and str(value) in str(caught.value)
