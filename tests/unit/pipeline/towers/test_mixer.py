"""MLP-Mixer: forward pass against a reference, symmetries, parameter counts, initialization, fixed image size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tower_checks import (
    assert_close,
    assert_rejected,
    randomize,
    reference_layer_norm,
)

from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.mixer import Mixer, MixerConfig

SMALL = {
    "image_size": 12,
    "patch": 4,
    "dim": 10,
    "depth": 2,
    "tokens_dim": 7,
    "channels_dim": 13,
    "ln_eps": 1e-3,
}
# patch, C, blocks, D_S and D_C; published.json lists only s16, b32 and b16.
PUBLISHED = {
    "mixer_s32": (32, 512, 8, 256, 2048),
    "mixer_s16": (16, 512, 8, 256, 2048),
    "mixer_b32": (32, 768, 12, 384, 3072),
    "mixer_b16": (16, 768, 12, 384, 3072),
    "mixer_l32": (32, 1024, 24, 512, 4096),
    "mixer_l16": (16, 1024, 24, 512, 4096),
    "mixer_h14": (14, 1280, 32, 640, 5120),
}


def build(**fields) -> Mixer:
    torch.manual_seed(0)
    return Mixer(MixerConfig(name="x", **fields))


def reference_mixer(
    tower: Mixer, images: torch.Tensor, eps: float = 1e-3, gelu: str = "none", mistake: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes pooled and tokens from the equations, channel by channel and then token by token."""

    def mlp(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(x @ layer.fc1.weight.T + layer.fc1.bias, approximate=gelu)
        return hidden @ layer.fc2.weight.T + layer.fc2.bias

    conv, p = tower.patch_embed, tower.patch_embed.kernel_size[0]
    side = images.shape[2] // p
    cells = [images[:, :, p * (n // side) :, p * (n % side) :][:, :, :p, :p] for n in range(side**2)]
    if mistake == "columns first":
        cells = [cells[side * (n % side) + n // side] for n in range(side**2)]
    x = torch.stack([torch.einsum("bchw,ochw->bo", cell, conv.weight) + conv.bias for cell in cells], dim=1)
    for block in tower.blocks:
        y = reference_layer_norm(block.norm1, x, eps)
        mixed = torch.stack([mlp(block.mlp_tokens, y[:, :, c]) for c in range(x.shape[2])], dim=2)
        u = x + mixed
        y = reference_layer_norm(block.norm2, x if mistake == "both halves from the input" else u, eps)
        mixed = torch.stack([mlp(block.mlp_channels, y[:, n]) for n in range(x.shape[1])], dim=1)
        x = mixed if mistake == "no residual" else u + mixed
    tokens = reference_layer_norm(tower.norm, x, eps)
    if mistake == "mean before norm":
        return reference_layer_norm(tower.norm, x.mean(dim=1), eps), tokens
    return tokens.mean(dim=1), tokens


def compare(act: str = "gelu", **reference) -> None:
    tower = build(**SMALL, act=act)
    randomize(tower, 0.4)
    images = torch.randn(2, 3, 12, 12, dtype=torch.double)
    out = tower(images)
    pooled, tokens = reference_mixer(tower, images, **reference)
    assert_close(out.pooled, pooled)
    assert_close(out.tokens, tokens)
    assert out.grid == (3, 3)


@pytest.mark.parametrize(("act", "gelu"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_forward_matches_reference(act, gelu):
    compare(act, gelu=gelu)


@pytest.mark.parametrize(
    "reference",
    [
        {"gelu": "tanh"},
        {"eps": 1e-6},
        {"mistake": "columns first"},
        {"mistake": "both halves from the input"},
        {"mistake": "no residual"},
        {"mistake": "mean before norm"},
    ],
    ids=str,
)
def test_comparison_detects_mistakes(reference):
    with pytest.raises(AssertionError, match="not close"):
        compare(**reference)


@pytest.mark.parametrize("permute_norm", [True, False])
def test_token_mixing_commutes_with_permuting_channels_and_norm(permute_norm):
    block = build(**SMALL).blocks[0]
    randomize(block, 0.4)
    order = torch.randperm(10)
    x = torch.randn(2, 9, 10, dtype=torch.double)
    mix = lambda x: block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2)  # noqa: E731
    y = mix(x)[..., order]
    with torch.no_grad():
        if permute_norm:
            block.norm1.weight.copy_(block.norm1.weight[order])
            block.norm1.bias.copy_(block.norm1.bias[order])
    assert torch.allclose(mix(x[..., order]), y, atol=1e-10) is permute_norm


def test_patch_order_matters():
    tower = build(**SMALL)
    randomize(tower, 0.4)
    images = torch.randn(1, 3, 12, 12, dtype=torch.double)
    assert not torch.allclose(tower(images.roll(4, dims=3)).pooled, tower(images).pooled, atol=1e-3)


def test_channel_mixing_acts_on_each_token_separately():
    """Without token mixing, a changed token changes only its own output."""
    block = build(**SMALL).blocks[0]
    randomize(block, 0.4)
    x = torch.randn(1, 9, 10, dtype=torch.double)
    other = x.clone()
    other[:, 4] = torch.randn(10, dtype=torch.double)
    with torch.no_grad():
        block.mlp_tokens.fc2.weight.zero_()
    moved = (block(x) - block(other)).abs().amax(dim=(0, 2))
    assert moved[4] > 1e-3 and moved[[0, 1, 2, 3, 5, 6, 7, 8]].max() == 0


def expected_parameters(size: int, patch: int, c: int, depth: int, d_s: int, d_c: int) -> int:
    s = (size // patch) ** 2
    return 3 * patch**2 * c + c + depth * (4 * c + 2 * s * d_s + d_s + s + 2 * c * d_c + d_c + c) + 2 * c


@pytest.mark.parametrize(
    "row", [(40, 8, 12, 3, 5, 20), (30, 10, 9, 1, 11, 6), *((224, *row) for row in PUBLISHED.values())]
)
def test_parameter_count_formula(row):
    size, patch, dim, depth, d_s, d_c = row
    with torch.device("meta"):
        tower = build(image_size=size, patch=patch, dim=dim, depth=depth, tokens_dim=d_s, channels_dim=d_c)
    assert parameter_count(tower) == expected_parameters(*row)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_match_published(name, published):
    config = IMAGE_TOWERS.preset(name)
    assert (config.patch, config.dim, config.depth, config.tokens_dim, config.channels_dim) == PUBLISHED[name]
    assert (config.image_size, config.act, config.ln_eps) == (224, "gelu", 1e-6)
    if (name, 224) in published:
        assert expected_parameters(224, *PUBLISHED[name]) == published[name, 224]["params_features"]


def test_initialization_is_lecun_normal():
    tower = build(image_size=64, patch=4, dim=128, depth=1, tokens_dim=96, channels_dim=200)
    block = tower.blocks[0]
    fan_in = {
        tower.patch_embed: 48,
        block.mlp_tokens.fc1: 256,
        block.mlp_tokens.fc2: 96,
        block.mlp_channels.fc1: 128,
        block.mlp_channels.fc2: 200,
    }
    for layer, n in fan_in.items():
        assert layer.weight.std().item() == pytest.approx(n**-0.5, rel=0.1)
        assert abs(layer.weight.mean().item()) < 0.1 * n**-0.5
        assert layer.bias.abs().max() == 0


def test_drop_path_rises_over_the_blocks_and_acts_in_training_only():
    tower = build(**{**SMALL, "depth": 3}, drop_path=0.5)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])
    x = torch.randn(1, 3, 12, 12).expand(16, -1, -1, -1)
    assert tower(x).pooled.std(dim=0).max() > 1e-3
    torch.testing.assert_close(tower.eval()(x).pooled.std(dim=0), torch.zeros(10), atol=1e-6, rtol=0)


def test_weights_support_one_image_size():
    small, large = build(**SMALL), build(**{**SMALL, "image_size": 16})
    state = small.state_dict()
    assert small.resized(state) is state
    error = assert_rejected(lambda: large.resized(state))
    assert error.where == "image_size: 16"
    assert error.found == "16 tokens, the weights expect 9"


@pytest.mark.parametrize("size", [0, 3, 14])
def test_unsupported_image_size_is_rejected(size):
    error = assert_rejected(lambda: build(**{**SMALL, "image_size": size}))
    assert "multiple of 4" in error.found
