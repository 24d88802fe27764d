"""ConvNeXt: forward pass against a reference and transformers, relation to attention, parameter counts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tower_checks import (
    assert_close,
    assert_rejected,
    randomize,
)

from clipwright.pipeline.towers import layers
from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.convnext import Block, ConvNeXt, ConvNeXtConfig

SMALL = {"image_size": 64, "dims": (6, 10, 8, 12), "depths": (1, 2, 1, 1), "ln_eps": 1e-3}
PUBLISHED = {
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
    "convnext_xlarge": ((256, 512, 1024, 2048), (3, 3, 27, 3)),
}


def build(**fields) -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(ConvNeXtConfig(name="x", **fields))


def reference_norm(norm: nn.LayerNorm, x: torch.Tensor, eps: float, over: str = "channels") -> torch.Tensor:
    """Normalizes the last axis at each position; over `map` is the mistake of one mean for the full map."""
    axes = (-1,) if over == "channels" else tuple(range(1, x.ndim))
    x = x - x.mean(dim=axes, keepdim=True)
    return x / ((x**2).mean(dim=axes, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def reference_cells(conv: nn.Conv2d, x: torch.Tensor, size: int) -> torch.Tensor:
    """Convolves (B, H, W, C) with kernel and stride `size`, cell by cell."""
    b, h, w, _ = x.shape
    y = x.new_zeros(b, h // size, w // size, conv.out_channels)
    for i in range(h // size):
        for j in range(w // size):
            cell = x[:, size * i : size * (i + 1), size * j : size * (j + 1)]
            y[:, i, j] = torch.einsum("bhwc,ochw->bo", cell, conv.weight) + conv.bias
    return y


def reference_depthwise(conv: nn.Conv2d, x: torch.Tensor, flip: bool = False) -> torch.Tensor:
    """Adds 7×7 weighted taps of (B, H, W, C), with zeros outside the map."""
    h, w = x.shape[1:3]
    padded, y = F.pad(x, (0, 0, 3, 3, 3, 3)), conv.bias.expand_as(x)
    kernel = conv.weight[:, 0].flip(1, 2) if flip else conv.weight[:, 0]
    for i in range(7):
        for j in range(7):
            y = y + kernel[:, i, j] * padded[:, i : i + h, j : j + w]
    return y


def reference_convnext(
    tower: ConvNeXt, images: torch.Tensor, eps: float = 1e-3, gelu: str = "none", mistake: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes pooled and tokens from the equations, on maps (B, H, W, C)."""
    over = "map" if mistake == "norm over the map" else "channels"
    act = lambda z: F.gelu(z, approximate=gelu)  # noqa: E731
    x = images.permute(0, 2, 3, 1)
    for i, stage in enumerate(tower.stages):
        if i == 0:
            x = reference_norm(stage[1], reference_cells(stage[0], x, 4), eps, over)
        else:
            x = reference_cells(stage[1], reference_norm(stage[0], x, eps, over), 2)
        for block in stage[2:]:
            y = reference_depthwise(block.depthwise, x, mistake == "kernel rotated")
            y = reference_norm(block.norm, act(y) if mistake == "activation before the norm" else y, eps, over)
            y = act(y @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
            x = y * (1 if mistake == "no layer scale" else block.scale) + (0 if mistake == "no residual" else x)
    tokens = x.flatten(1, 2)
    normalized = reference_norm(tower.norm, tokens, eps)
    if mistake == "norm before the mean":
        return normalized.mean(dim=1), normalized
    return reference_norm(tower.norm, tokens.mean(dim=1), eps), normalized


def compare(act: str = "gelu", **reference) -> None:
    tower = build(**SMALL, act=act)
    randomize(tower, 0.4)
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    out = tower(images)
    pooled, tokens = reference_convnext(tower, images, **reference)
    assert_close(out.pooled, pooled)
    assert_close(out.tokens, tokens)
    assert out.grid == (2, 2)


@pytest.mark.parametrize(("act", "gelu"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_forward_matches_reference(act, gelu):
    compare(act, gelu=gelu)


@pytest.mark.parametrize(
    "reference",
    [
        {"gelu": "tanh"},
        {"eps": 1e-6},
        {"mistake": "norm over the map"},
        {"mistake": "kernel rotated"},
        {"mistake": "activation before the norm"},
        {"mistake": "no layer scale"},
        {"mistake": "no residual"},
        {"mistake": "norm before the mean"},
    ],
    ids=str,
)
def test_comparison_detects_mistakes(reference):
    with pytest.raises(AssertionError, match="not close"):
        compare(**reference)


def test_forward_matches_transformers():
    from transformers import ConvNextConfig as TheirConfig
    from transformers import ConvNextModel

    tower = build(**{**SMALL, "ln_eps": 1e-6})
    theirs = ConvNextModel(
        TheirConfig(hidden_sizes=list(SMALL["dims"]), depths=list(SMALL["depths"]), image_size=64, layer_norm_eps=1e-6)
    )
    randomize(theirs, 0.4)
    own = [*(name for name, _ in tower.named_parameters() if not name.startswith("norm.")), "norm.weight", "norm.bias"]
    state = {}
    for name in own:
        words = name.split(".")
        if words[0] == "norm":
            key = f"layernorm.{words[1]}"
        elif words[1] == "0" and words[2] in "01":
            key = f"embeddings.{('patch_embeddings', 'layernorm')[int(words[2])]}.{words[3]}"
        elif words[2] in "01":
            key = f"encoder.stages.{words[1]}.downsampling_layer.{words[2]}.{words[3]}"
        else:
            inner = {
                "depthwise": "dwconv",
                "norm": "layernorm",
                "mlp.fc1": "pwconv1",
                "mlp.fc2": "pwconv2",
                "scale": "layer_scale_parameter",
            }
            part = ".".join(words[3:]).removesuffix(".weight").removesuffix(".bias")
            tail = "" if part == "scale" else f".{words[-1]}"
            key = f"encoder.stages.{words[1]}.layers.{int(words[2]) - 2}.{inner[part]}{tail}"
        state[name] = theirs.get_parameter(key)
    tower.double().eval().load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    assert_close(tower(images).pooled, theirs(images).pooler_output)


def test_pointwise_convolution_equals_a_linear_layer():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40)
    maps = torch.randn(2, 24, 5, 7)
    as_conv = F.conv2d(maps, linear.weight[:, :, None, None], linear.bias)
    torch.testing.assert_close(linear(maps.permute(0, 2, 3, 1)), as_conv.permute(0, 2, 3, 1), atol=1e-6, rtol=0)


def test_depthwise_convolution_equals_static_attention():
    """A[q, k] = w[k − q], one head per channel, not normalized, independent of the input; values are not projected."""
    dim, height, width = 3, 6, 9
    conv = build(**{**SMALL, "dims": (dim, 4, 4, 4)}).stages[0][2].depthwise
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    attention = torch.zeros(dim, height * width, height * width)
    for q in range(height * width):
        for k in range(height * width):
            dy, dx = k // width - q // width, k % width - q % width
            if abs(dy) <= 3 and abs(dx) <= 3:
                attention[:, q, k] = conv.weight[:, 0, dy + 3, dx + 3]
    x = torch.randn(2, dim, height, width)
    y = torch.einsum("cqk,bck->bcq", attention, x.flatten(2)) + conv.bias[:, None]
    torch.testing.assert_close(conv(x).flatten(2), y, atol=1e-5, rtol=0)


def test_block_with_identity_kernel_equals_the_mlp_half_of_a_transformer_layer():
    dim = 16
    block = Block(dim, "gelu", ln_eps=1e-6, drop_path=0.0)
    half = nn.TransformerEncoderLayer(
        dim, 1, 4 * dim, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    randomize(block, 0.4)
    half.double()
    with torch.no_grad():
        block.depthwise.weight.zero_()
        block.depthwise.weight[:, 0, 3, 3] = 1
        block.depthwise.bias.zero_()
        block.scale.fill_(1)
        half.self_attn.out_proj.weight.zero_()  # the first half adds nothing
        half.self_attn.out_proj.bias.zero_()
    half.norm2.load_state_dict(block.norm.state_dict())
    half.linear1.load_state_dict(block.mlp.fc1.state_dict())
    half.linear2.load_state_dict(block.mlp.fc2.state_dict())
    x = torch.randn(2, dim, 4, 5, dtype=torch.double)
    assert_close(block(x).flatten(2).transpose(1, 2), half(x.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("dim", [20, 48])
def test_block_replaces_attention_matrices_with_a_kernel_per_channel(dim):
    assert parameter_count(Block(dim, "gelu", 1e-6, 0.0)) == 8 * dim**2 + 58 * dim
    assert parameter_count(layers.Block(dim, heads=2)) == 12 * dim**2 + 13 * dim


def expected_parameters(dims: tuple[int, ...], depths: tuple[int, ...]) -> int:
    total = 51 * dims[0] + 2 * dims[-1] + sum(d * (8 * c * c + 58 * c) for c, d in zip(dims, depths, strict=True))
    return total + sum(2 * a + 4 * a * b + b for a, b in pairwise(dims))


@pytest.mark.parametrize(
    ("dims", "depths"), [((6, 10, 8, 12), (1, 2, 1, 3)), ((5, 5, 9, 4), (2, 1, 4, 1)), *PUBLISHED.values()]
)
def test_parameter_count_formula(dims, depths):
    with torch.device("meta"):
        assert parameter_count(build(image_size=96, dims=dims, depths=depths)) == expected_parameters(dims, depths)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_match_published(name, published):
    config = IMAGE_TOWERS.preset(name)
    assert (config.dims, config.depths) == PUBLISHED[name]
    assert (config.image_size, config.act, config.ln_eps) == (224, "gelu", 1e-6)
    if (name, 224) in published:  # convnext_large is not listed
        assert expected_parameters(config.dims, config.depths) == published[name, 224]["params_features"]


def test_initialization():
    tower = build(image_size=64, dims=(32, 64, 96, 128), depths=(1, 1, 2, 1))
    for module in tower.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias.abs().max() == 0
        elif isinstance(module, Block):
            assert torch.equal(module.scale, torch.full_like(module.scale, 1e-6))
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_drop_path_rises_over_all_blocks_and_drops_the_branch_only():
    tower = build(**SMALL, drop_path=0.4)
    blocks = [block for stage in tower.stages for block in stage if isinstance(block, Block)]
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block = blocks[-1]
    randomize(block, 0.4)
    x = torch.randn(32, 12, 3, 3, dtype=torch.double)
    branch, seen = block(x) - x, block.train()(x) - x
    dropped = seen.abs().amax(dim=(1, 2, 3)) < 1e-9
    assert 0 < dropped.sum() < 32
    assert_close(seen[~dropped], branch[~dropped] / 0.6)


@pytest.mark.parametrize("size", [16, 48, 80, 200])
def test_unsupported_image_size_is_rejected(size):
    error = assert_rejected(lambda: build(image_size=size))
    assert "multiple of 32" in error.found
