"""ConvMixer: forward pass against a reference in training and eval mode, relation to attention, parameter counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tower_checks import (
    assert_close,
    assert_rejected,
    randomize,
)

from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.convmixer import ConvMixer, ConvMixerConfig

SMALL = {"image_size": 20, "patch": 4, "dim": 6, "depth": 2, "kernel": 3}
# width, depth, kernel, patch, activation, image size; published.json does not list the last two.
PUBLISHED = {
    "convmixer_1536_20_k9_p7": (1536, 20, 9, 7, "gelu", 224),
    "convmixer_768_32_k7_p7": (768, 32, 7, 7, "relu", 224),
    "convmixer_1024_20_k9_p14": (1024, 20, 9, 14, "gelu", 224),
    "convmixer_256_8_k7_p2": (256, 8, 7, 2, "gelu", 32),
}
ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp(min=0),
    "identity": lambda x: x,
}


def build(**fields) -> ConvMixer:
    torch.manual_seed(0)
    return ConvMixer(ConvMixerConfig(name="x", **fields))


def static_attention(conv: nn.Conv2d, grid: tuple[int, int]) -> torch.Tensor:
    """Returns a depthwise convolution as matrices (C, N, N): A[q, k] = w[k − q], zero outside the kernel."""
    height, width = grid
    reach = conv.kernel_size[0] // 2
    maps = conv.weight.new_zeros(conv.out_channels, height * width, height * width)
    for q in range(height * width):
        for k in range(height * width):
            dy, dx = k // width - q // width, k % width - q % width
            if abs(dy) <= reach and abs(dx) <= reach:
                maps[:, q, k] = conv.weight[:, 0, dy + reach, dx + reach]
    return maps


def reference_norm(bn: nn.BatchNorm2d, x: torch.Tensor, training: bool, eps: float) -> torch.Tensor:
    """Normalizes each channel of (B, N, C) by its batch statistics in training, else by the running statistics."""
    mean, var = bn.running_mean, bn.running_var
    if training:
        mean, var = x.mean(dim=(0, 1)), x.var(dim=(0, 1), unbiased=False)
    return (x - mean) / (var + eps).sqrt() * bn.weight + bn.bias


def reference_convmixer(
    tower: ConvMixer, images: torch.Tensor, act: str = "gelu", *, training: bool = False, eps=1e-5, mistake: str = ""
) -> torch.Tensor:
    """Computes tokens (B, N, C) from the equations."""

    def act_norm(layer: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if mistake == "norm before activation":
            return ACTS[act](reference_norm(layer[1], x, training, eps))
        return reference_norm(layer[1], ACTS[act](x), training, eps)

    conv, p = tower.patch_embed, tower.patch_embed.kernel_size[0]
    side = images.shape[2] // p
    cells = [images[:, :, p * (n // side) :, p * (n % side) :][:, :, :p, :p] for n in range(side**2)]
    x = torch.stack([torch.einsum("bchw,ochw->bo", cell, conv.weight) + conv.bias for cell in cells], dim=1)
    x = act_norm(tower.norm, x)
    for block in tower.blocks:
        maps = static_attention(block.depthwise, (side, side))
        if mistake == "kernel rotated":
            maps = maps.transpose(1, 2)
        y = act_norm(block.norm1, torch.einsum("cqk,bkc->bqc", maps, x) + block.depthwise.bias)
        if mistake == "residual around the pointwise half":
            x = y + act_norm(block.norm2, y @ block.pointwise.weight[:, :, 0, 0].T + block.pointwise.bias)
            continue
        z = x + y
        out = act_norm(block.norm2, z @ block.pointwise.weight[:, :, 0, 0].T + block.pointwise.bias)
        x = x + out if mistake == "residual around the block" else out
    return x


def compare(config: dict | None = None, **reference) -> None:
    tower = build(**SMALL, **(config or {}))
    randomize(tower, 0.4)
    images = torch.randn(3, 3, 20, 20, dtype=torch.double)
    tower.train(reference.get("training", False))
    out = tower(images)
    tokens = reference_convmixer(tower, images, **reference)
    assert_close(out.tokens, tokens)
    assert_close(out.pooled, tokens.mean(dim=1))
    assert out.grid == (5, 5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu"])
def test_forward_matches_reference(act, training):
    compare({"act": act}, act=act, training=training)


@pytest.mark.parametrize(
    "reference",
    [
        {"act": "gelu_tanh"},
        {"act": "relu"},
        {"act": "identity"},
        {"eps": 1e-3},
        {"mistake": "norm before activation"},
        {"mistake": "kernel rotated"},
        {"mistake": "residual around the pointwise half"},
        {"mistake": "residual around the block"},
    ],
    ids=str,
)
def test_comparison_detects_mistakes(reference):
    with pytest.raises(AssertionError, match="not close"):
        compare(**reference)


def test_comparison_detects_running_instead_of_batch_statistics():
    tower = build(**SMALL)
    randomize(tower, 0.4)
    images = torch.randn(3, 3, 20, 20, dtype=torch.double)
    assert not torch.allclose(tower.train()(images).tokens, reference_convmixer(tower, images), atol=1e-3)


def test_block_is_static_attention_and_a_linear_layer():
    """On a map that is not square, in float32."""
    block = build(**{**SMALL, "kernel": 5}).blocks[0]
    x = torch.randn(2, 6, 4, 7)
    maps = static_attention(block.depthwise, (4, 7))
    spatial = torch.einsum("cqk,bck->bcq", maps, x.flatten(2)) + block.depthwise.bias[:, None]
    torch.testing.assert_close(block.depthwise(x).flatten(2), spatial, atol=1e-5, rtol=0)
    linear = nn.Linear(6, 6)
    linear.load_state_dict(
        {"weight": block.pointwise.weight.detach()[:, :, 0, 0], "bias": block.pointwise.bias.detach()}
    )
    tokens = linear(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(block.pointwise(x).flatten(2).transpose(1, 2), tokens, atol=1e-6, rtol=0)


def test_residual_spans_the_depthwise_half_only():
    block = build(**SMALL).blocks[0].eval()
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        block.norm1[1].weight.zero_()  # the depthwise branch adds nothing
        alone = block.norm2(block.pointwise(x))
        torch.testing.assert_close(block(x), alone)
        block.norm2[1].weight.zero_()  # nothing passes without the pointwise half
        assert block(x).abs().max() == 0


def expected_parameters(dim: int, depth: int, kernel: int, patch: int) -> int:
    return 3 * patch**2 * dim + 3 * dim + depth * (dim**2 + (kernel**2 + 6) * dim)


@pytest.mark.parametrize(
    ("dim", "depth", "kernel", "patch", "size"),
    [(10, 3, 5, 6, 24), (7, 1, 1, 4, 20), *((*row[:4], row[5]) for row in PUBLISHED.values())],
)
def test_parameter_count_formula(dim, depth, kernel, patch, size):
    with torch.device("meta"):
        tower = build(image_size=size, patch=patch, dim=dim, depth=depth, kernel=kernel)
    assert parameter_count(tower) == expected_parameters(dim, depth, kernel, patch)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_match_published(name, published):
    config = IMAGE_TOWERS.preset(name)
    assert (config.dim, config.depth, config.kernel, config.patch, config.act, config.image_size) == PUBLISHED[name]
    if (name, 224) in published:
        row = published[name, 224]
        assert expected_parameters(*PUBLISHED[name][:4]) == row["params_features"] and config.act == row["activation"]


def test_initialization_is_pytorchs_default():
    """Kaiming-uniform with a = √5: weights and biases uniform within ±1/√fan_in."""
    tower = build(image_size=32, patch=4, dim=256, depth=1, kernel=7)
    block = tower.blocks[0]
    for conv, fan_in in ((tower.patch_embed, 48), (block.depthwise, 49), (block.pointwise, 256)):
        for p in (conv.weight, conv.bias):
            assert p.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.05)
            assert p.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.15)
    for norm in (tower.norm[1], block.norm1[1], block.norm2[1]):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)


def test_drop_path_rises_over_blocks_and_drops_the_depthwise_branch():
    tower = build(**{**SMALL, "depth": 3}, drop_path=0.5)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])
    block = tower.blocks[-1]
    for layer in (block.norm1, block.norm2):
        layer.eval()
    x = torch.randn(32, 6, 5, 5)
    y, without = block(x), block.norm2(block.pointwise(x))
    kept = block.norm2(block.pointwise(x + 2 * block.norm1(block.depthwise(x))))
    error = lambda z: (y - z).abs().amax(dim=(1, 2, 3))  # noqa: E731
    dropped = error(without) < 1e-5
    assert 0 < dropped.sum() < 32 and (error(kept)[~dropped] < 1e-5).all()


@pytest.mark.parametrize("kernel", [0, -3, 2, 8])
def test_even_kernel_is_rejected(kernel):
    error = assert_rejected(lambda: build(**{**SMALL, "kernel": kernel}))
    assert error.where == f"kernel: {kernel}"


@pytest.mark.parametrize("size", [3, 18, 21])
def test_unsupported_image_size_is_rejected(size):
    error = assert_rejected(lambda: build(**{**SMALL, "image_size": size}))
    assert "multiple of 4" in error.found
