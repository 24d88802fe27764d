"""ViT against a literal forward pass, count formula and init."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.vit import ViT, ViTConfig

SMALL = {"image_size": 24, "patch": 8, "dim": 12, "depth": 2, "heads": 3, "ln_eps": 1e-4}


def build(**fields) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(name="x", **fields))


def slow_vit(tower: ViT, config: ViTConfig, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled and tokens by the equations, patch by patch."""
    p, g, d = config.patch, config.image_size // config.patch, config.dim
    rows = []
    for i in range(g):
        for j in range(g):
            patch = images[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
            rows.append(torch.einsum("bchw,dchw->bd", patch, tower.patch_embed.weight))
            if config.patch_bias:
                rows[-1] = rows[-1] + tower.patch_embed.bias
    if config.pool == "cls":
        rows.insert(0, tower.cls_token.expand(len(images), d))
    x = torch.stack(rows, dim=1) + tower.pos_embed
    norm = lambda layer, x: F.layer_norm(x, (d,), layer.weight, layer.bias, config.ln_eps)  # noqa: E731
    if config.pre_norm:
        x = norm(tower.norm_pre, x)
    for block in tower.blocks:
        q, k, v = block.attn.qkv(norm(block.norm1, x)).split(d, dim=2)
        heads = []
        for h in range(config.heads):
            s = slice(h * d // config.heads, (h + 1) * d // config.heads)
            scores = torch.einsum("bik,bjk->bij", q[..., s], k[..., s]) / (d / config.heads) ** 0.5
            heads.append(torch.einsum("bij,bjk->bik", scores.softmax(dim=2), v[..., s]))
        x = x + block.attn.out(torch.cat(heads, dim=2))
        z = block.mlp.fc1(norm(block.norm2, x))
        z = z * torch.sigmoid(1.702 * z) if config.act == "quick_gelu" else F.gelu(z)
        x = x + block.mlp.fc2(z)
    y = norm(tower.norm, x)
    return (y[:, 0], y[:, 1:]) if config.pool == "cls" else (norm(tower.norm, x.mean(dim=1)), y)


@pytest.mark.parametrize(
    "fields",
    [{}, {"pool": "mean"}, {"pre_norm": True, "patch_bias": False, "act": "quick_gelu", "init": "clip"}],
    ids=["cls", "mean", "clip"],
)
def test_forward_is_the_literal_one(fields):
    config = ViTConfig(name="x", **SMALL, **fields)
    torch.manual_seed(0)
    tower = ViT(config).double()
    with torch.no_grad():
        for p in tower.parameters():
            p += 0.1 * torch.randn_like(p)
    images = torch.randn(2, 3, 24, 24, dtype=torch.double)
    out = tower(images)
    pooled, tokens = slow_vit(tower, config, images)
    torch.testing.assert_close(out.pooled, pooled, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(out.tokens, tokens, atol=1e-10, rtol=1e-10)
    assert out.grid == (3, 3)


@pytest.mark.parametrize(("size", "p", "d", "depth", "heads"), [(40, 8, 36, 3, 6), (30, 10, 20, 1, 2)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("clip", [False, True])
def test_count_formula(size, p, d, depth, heads, pool, clip):
    form = {"pre_norm": True, "patch_bias": False} if clip else {}
    tower = build(image_size=size, patch=p, dim=d, depth=depth, heads=heads, pool=pool, **form)
    n, c = (size // p) ** 2, int(pool == "cls")
    patch = 3 * p * p * d + (2 * d if clip else d)  # CLIP: no bias, a norm before the blocks
    assert parameter_count(tower) == patch + c * d + (n + c) * d + depth * (12 * d * d + 13 * d) + 2 * d


def test_pre_norm_and_patch_bias_are_clips():
    clip, plain = (IMAGE_TOWERS.preset(name) for name in ("clip_vit_b16", "vit_base_patch16"))
    assert (clip.act, clip.ln_eps, clip.patch_bias, clip.pre_norm) == ("quick_gelu", 1e-5, False, True)
    assert (plain.act, plain.ln_eps, plain.patch_bias, plain.pre_norm) == ("gelu", 1e-6, True, False)
    assert (clip.dim // clip.heads, IMAGE_TOWERS.preset("vit_huge_patch14").dim // 16) == (64, 80)


def test_jax_init():
    tower = build(image_size=64, patch=8, dim=192, depth=2, heads=3)
    block = tower.blocks[0]
    assert tower.patch_embed.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.15)
    assert tower.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    assert tower.cls_token.abs().max() == 0 and tower.patch_embed.bias.abs().max() == 0
    for matrix in (*block.attn.qkv.weight.split(192), block.attn.out.weight):  # q, k, v each bounded as 192 × 192
        assert matrix.abs().max().item() == pytest.approx((6 / 384) ** 0.5, rel=0.02)
    assert block.mlp.fc1.weight.abs().max().item() == pytest.approx((6 / 960) ** 0.5, rel=0.02)
    assert block.mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.15)
    assert block.attn.qkv.bias.abs().max() == 0 and block.attn.out.bias.abs().max() == 0


@pytest.mark.parametrize("init", ["clip", "official"])
def test_clip_init(init):
    d, depth = 192, 3
    tower = build(image_size=64, patch=8, dim=d, depth=depth, heads=3, init=init)
    block = tower.blocks[-1]
    assert tower.pos_embed.std().item() == pytest.approx(d**-0.5, rel=0.15)
    assert tower.cls_token.std().item() == pytest.approx(d**-0.5, rel=0.15)
    std = {
        "clip": (d**-0.5, d**-0.5 * (2 * depth) ** -0.5, (2 * d) ** -0.5, d**-0.5 * (2 * depth) ** -0.5),
        # Uniform with bound b has std b/√3: Xavier over the fused matrix; Linear's own bound is 1/√fan_in.
        "official": ((2 / (4 * d)) ** 0.5, (3 * d) ** -0.5, (3 * d) ** -0.5, (12 * d) ** -0.5),
    }[init]
    matrices = (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2)
    assert [m.weight.std().item() for m in matrices] == pytest.approx(std, rel=0.05)
    assert block.attn.qkv.bias.abs().max() == 0 and block.attn.out.bias.abs().max() == 0


def test_drop_path_rises_over_the_blocks_and_acts_in_training_only():
    tower = build(**{**SMALL, "depth": 3}, drop_path=0.5)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])
    x = torch.randn(2, 3, 24, 24)
    assert not torch.equal(tower(x.repeat(8, 1, 1, 1)).pooled, tower(x.repeat(8, 1, 1, 1)).pooled)
    tower.eval()
    assert torch.equal(tower(x).pooled, tower(x).pooled)


def test_without_positions_the_class_token_ignores_the_order_of_patches():
    tower = build(**SMALL).double()
    with torch.no_grad():
        tower.pos_embed.zero_()
    x = torch.randn(1, 3, 24, 24, dtype=torch.double)
    torch.testing.assert_close(tower(x.roll(8, dims=3)).pooled, tower(x).pooled, atol=1e-12, rtol=1e-12)


def test_heads_must_divide_dim():
    with pytest.raises(ClipwrightError) as caught:
        build(**{**SMALL, "heads": 5})
    assert caught.value.code == "E_CONFIG_VALUE" and "heads" in str(caught.value)
