"""ViT: forward pass against a reference and transformers' SigLIP, parameter counts, initialization."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tower_checks import (
    WRONG_ATTENTION,
    assert_close,
    perturb,
)

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.vit import ViT, ViTConfig

SMALL = {"image_size": 24, "patch": 8, "dim": 12, "depth": 2, "heads": 3, "ln_eps": 1e-4}


def build(**fields) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(name="x", **fields))


def reference_vit(tower: ViT, config: ViTConfig, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes pooled and tokens from the equations, patch by patch."""
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
        x = x + block.mlp.fc2(reference_act(config, z))
    y = norm(tower.norm, x)
    if config.pool == "cls":
        return y[:, 0], y[:, 1:]
    if config.pool == "mean":
        return norm(tower.norm, x.mean(dim=1)), y
    pooled = reference_attention_pool(tower, config, y)
    z = tower.attention_pool.mlp.fc1(norm(tower.attention_pool.norm, pooled))
    return pooled + tower.attention_pool.mlp.fc2(reference_act(config, z)), y


def reference_act(config: ViTConfig, z: torch.Tensor) -> torch.Tensor:
    if config.act == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    if config.act == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + torch.erf(z / 2**0.5))


def reference_attention_pool(tower: ViT, config: ViTConfig, y: torch.Tensor) -> torch.Tensor:
    """Attention of the learned query over the normalized tokens, one sample and one head at a time."""
    pool, d, size = tower.attention_pool, config.dim, config.dim // config.heads
    k, v = (y @ w.T + b for w, b in zip(pool.kv.weight.split(d), pool.kv.bias.split(d), strict=True))
    q = pool.q.weight @ pool.query + pool.q.bias
    rows = []
    for s in range(len(y)):
        heads = []
        for h in range(config.heads):
            part = slice(h * size, (h + 1) * size)
            weights = (k[s, :, part] @ q[part] / size**0.5).softmax(dim=0)
            heads.append(weights @ v[s, :, part])
        rows.append(pool.out(torch.cat(heads)))
    return torch.stack(rows)


VARIANTS = {
    "cls": {},
    "mean": {"pool": "mean"},
    "clip": {"pre_norm": True, "patch_bias": False, "act": "quick_gelu", "init": "clip"},
    "siglip": {"pool": "attention", "act": "gelu_tanh", "mlp_ratio": 1.7},
}


def perturbed(config: ViTConfig) -> ViT:
    torch.manual_seed(0)
    return perturb(ViT(config).double())


def check_against_reference(tower: ViT, config: ViTConfig) -> None:
    images = torch.randn(2, 3, 24, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    out = tower(images)
    pooled, tokens = reference_vit(tower, config, images)
    assert_close(out.pooled, pooled)
    assert_close(out.tokens, tokens)
    assert out.grid == (3, 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_matches_reference(variant):
    config = ViTConfig(name="x", **SMALL, **VARIANTS[variant])
    check_against_reference(perturbed(config), config)


@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_comparison_detects_wrong_attention(variant, wrong, monkeypatch):
    config = ViTConfig(name="x", **SMALL, **VARIANTS[variant])
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(perturbed(config), config)


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("cls", {"act": "gelu_tanh"}),
        ("cls", {"act": "quick_gelu"}),
        ("clip", {"act": "gelu"}),
        ("siglip", {"act": "gelu"}),
        ("cls", {"ln_eps": 1e-6}),
        ("siglip", {"ln_eps": 1e-5}),
    ],
)
def test_comparison_detects_a_wrong_activation_or_eps(variant, wrong):
    right = ViTConfig(name="x", **SMALL, **VARIANTS[variant])
    tower = perturbed(dataclasses.replace(right, **wrong))
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(tower, right)


@pytest.mark.parametrize("shape", [(32, 8, 36, 2, 3, 72), (30, 10, 24, 1, 4, 89)])
def test_attention_pooling_matches_transformers(shape):
    """Weights of transformers' model, copied by name, give its pooled output and its tokens."""
    size, patch, dim, depth, heads, hidden = shape
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    peer = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=size,
            patch_size=patch,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=hidden,
        )
    ).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p += 0.1 * torch.randn_like(p)
    variant = {"mlp_ratio": hidden / dim, "act": "gelu_tanh", "pool": "attention"}
    tower = build(image_size=size, patch=patch, dim=dim, depth=depth, heads=heads, **variant).eval()
    tower.load_state_dict(from_siglip(peer.state_dict(), depth), strict=True)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours, theirs = tower(images), peer(images)
    torch.testing.assert_close(ours.pooled, theirs.pooler_output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.tokens, theirs.last_hidden_state, atol=2e-5, rtol=1e-5)


def from_siglip(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    out = {
        "pos_embed": state["embeddings.position_embedding.weight"],
        "attention_pool.query": state["head.probe"][0, 0],
    }

    def move(to: str, *origins: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{to}.{kind}"] = torch.cat([state[f"{name}.{kind}"] for name in origins])

    move("patch_embed", "embeddings.patch_embedding")
    move("norm", "post_layernorm")
    for i in range(depth):
        own, layer = f"blocks.{i}", f"encoder.layers.{i}"
        move(f"{own}.attn.qkv", *(f"{layer}.self_attn.{part}_proj" for part in "qkv"))
        move(f"{own}.attn.out", f"{layer}.self_attn.out_proj")
        for to, name in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2",) * 2):
            move(f"{own}.{to}", f"{layer}.{name}")
    for to, name in (("norm", "layernorm"), ("out", "attention.out_proj"), ("mlp.fc1",) * 2, ("mlp.fc2",) * 2):
        move(f"attention_pool.{to}", f"head.{name}")
    for kind in ("weight", "bias"):
        q, k, v = state[f"head.attention.in_proj_{kind}"].chunk(3)
        out |= {f"attention_pool.q.{kind}": q, f"attention_pool.kv.{kind}": torch.cat([k, v])}
    return out


@pytest.mark.parametrize(("size", "p", "d", "depth", "heads"), [(40, 8, 36, 3, 6), (30, 10, 20, 1, 2)])
@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
@pytest.mark.parametrize("clip", [False, True])
def test_parameter_count_formula(size, p, d, depth, heads, pool, clip):
    variant = {"pre_norm": True, "patch_bias": False} if clip else {}
    tower = build(image_size=size, patch=p, dim=d, depth=depth, heads=heads, pool=pool, **variant)
    n, c = (size // p) ** 2, int(pool == "cls")
    patch = 3 * p * p * d + (2 * d if clip else d)  # CLIP: no bias, a norm before the blocks
    head = d + 4 * d * d + 4 * d + 2 * d + 8 * d * d + 5 * d if pool == "attention" else 0
    assert parameter_count(tower) == patch + c * d + (n + c) * d + depth * (12 * d * d + 13 * d) + 2 * d + head


# Published presets outside published.json: the parameter counts of transformers' models of these sizes.
PARAMETERS_OUTSIDE_TABLE = {
    "vit_small_patch32": 22_493_952,
    "vit_base_patch8": 85_807_872,
    "vit_large_patch32": 305_510_400,
    "clip_vit_l14_336": 303_507_456,
    "siglip_vit_b16": 92_884_224,
    "siglip_vit_l16": 315_956_224,
    "siglip_vit_so400m14": 427_680_704,
}


@pytest.mark.parametrize("name", PARAMETERS_OUTSIDE_TABLE)
def test_parameter_counts_of_presets_outside_the_table(name):
    with torch.device("meta"):
        assert parameter_count(IMAGE_TOWERS.build(IMAGE_TOWERS.preset(name))) == PARAMETERS_OUTSIDE_TABLE[name]


def test_clip_presets_differ_from_vit_presets():
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


def test_class_token_ignores_patch_order_without_positions():
    tower = build(**SMALL).double()
    with torch.no_grad():
        tower.pos_embed.zero_()
    x = torch.randn(1, 3, 24, 24, dtype=torch.double)
    torch.testing.assert_close(tower(x.roll(8, dims=3)).pooled, tower(x).pooled, atol=1e-12, rtol=1e-12)


def test_heads_must_divide_dim():
    with pytest.raises(ClipwrightError) as caught:
        build(**{**SMALL, "heads": 5})
    assert caught.value.code == "E_CONFIG_VALUE" and "heads" in str(caught.value)


def test_pixels_outside_the_patches():
    """SigLIP's so400m takes 384 pixels in patches of 14: with `drop_rest`, pixels that fill no patch are ignored."""
    tower, cropped = build(**{**SMALL, "image_size": 29, "drop_rest": True}).eval(), build(**SMALL).eval()
    assert tower.grid == cropped.grid == (3, 3)
    cropped.load_state_dict(tower.state_dict(), strict=True)
    images = torch.randn(2, 3, 29, 29)
    changed = images.clone()
    changed[:, :, 24:] = changed[:, :, :, 24:] = 9.0
    with torch.no_grad():
        assert torch.equal(tower(images).tokens, tower(changed).tokens)
        torch.testing.assert_close(tower(images).pooled, cropped(images[:, :, :24, :24]).pooled, atol=1e-6, rtol=1e-6)
    for fields in ({"image_size": 29}, {"image_size": 7, "drop_rest": True}):
        with pytest.raises(ClipwrightError) as caught:
            build(**{**SMALL, **fields})
        assert caught.value.code == "E_CONFIG_VALUE" and "image_size" in caught.value.where
