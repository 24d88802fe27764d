"""CLIP's ResNet: blocks against references and torch's multi-head attention, parameter counts, initialization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tower_checks import (
    WRONG_ATTENTION,
    assert_close,
    assert_rejected,
    randomize,
    reference_batch_norm,
)

from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.clip_resnet import AttentionPool, Bottleneck, CLIPResNet, CLIPResNetConfig


def build(**fields) -> CLIPResNet:
    torch.manual_seed(0)
    return CLIPResNet(CLIPResNetConfig(name="x", **fields))


def reference_conv_norm(layer: torch.nn.Module, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    weight = layer.conv.weight
    return reference_batch_norm(layer.norm, F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2))


def reference_average(x: torch.Tensor) -> torch.Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


@pytest.mark.parametrize(("dim", "stride"), [(12, 1), (16, 1), (12, 2), (16, 2)])
def test_bottleneck_averages_instead_of_striding(dim, stride):
    block = Bottleneck(dim, 4, stride)
    randomize(block)
    x = torch.randn(2, dim, 6, 6, dtype=torch.double)
    y = reference_conv_norm(block.conv1, x).relu()
    y = reference_conv_norm(block.conv2, y).relu()
    y = reference_conv_norm(block.conv3, reference_average(y) if stride == 2 else y)
    shortcut = reference_average(x) if stride == 2 else x
    if stride == 2 or dim != 16:
        shortcut = reference_conv_norm(block.shortcut[1], shortcut)
    assert_close(block(x), (y + shortcut).relu())


def test_attention_pool_matches_reference():
    pool = AttentionPool(12, 5, heads=3, tokens=4)
    randomize(pool)
    grid = torch.randn(2, 4, 12, dtype=torch.double)
    expected = []
    for tokens in grid:
        x = torch.stack([tokens.mean(0), *tokens]) + pool.pos_embed
        query, heads = pool.q(x[0]), []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            scores = torch.stack([query[part] @ pool.k(row)[part] / 2 for row in x])
            heads.append(sum(w * pool.v(row)[part] for w, row in zip(scores.softmax(0), x, strict=True)))
        expected.append(pool.out(torch.cat(heads)))
    assert_close(pool(grid), torch.stack(expected))


def test_attention_pool_matches_the_original():
    """openai/CLIP calls torch's multi_head_attention_forward with separate projections, tokens as the first axis."""
    pool = AttentionPool(12, 5, heads=3, tokens=4)
    randomize(pool)
    grid = torch.randn(2, 4, 12, dtype=torch.double)
    x = grid.permute(1, 0, 2)
    x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0) + pool.pos_embed[:, None]
    y, _ = F.multi_head_attention_forward(
        query=x[:1],
        key=x,
        value=x,
        embed_dim_to_check=12,
        num_heads=3,
        q_proj_weight=pool.q.weight,
        k_proj_weight=pool.k.weight,
        v_proj_weight=pool.v.weight,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q.bias, pool.k.bias, pool.v.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.out.weight,
        out_proj_bias=pool.out.bias,
        use_separate_proj_weight=True,
        training=False,
        need_weights=False,
    )
    assert_close(pool(grid), y[0])


@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
def test_comparison_detects_wrong_attention(wrong, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_attention_pool_matches_reference()


@pytest.mark.parametrize(
    ("change", "value"), [("eps", 1e-6), ("pool", torch.nn.MaxPool2d(2)), ("shortcut", torch.nn.AvgPool2d(2))]
)
def test_comparison_detects_a_wrong_bottleneck(change, value, monkeypatch):
    forward = Bottleneck.forward

    def modified_forward(block, x):
        if change == "eps":
            block.conv2.norm.eps = value
        elif change == "pool":
            block.pool = value
        else:  # without its convolution
            block.shortcut = value
        return forward(block, x)

    monkeypatch.setattr(Bottleneck, "forward", modified_forward)
    with pytest.raises(AssertionError, match="not close"):
        test_bottleneck_averages_instead_of_striding(16, 2)


@pytest.mark.parametrize(("stem_stride", "last_stride", "side"), [(4, 2, 2), (4, 1, 4), (2, 2, 4), (2, 1, 8)])
def test_tower_matches_its_parts(stem_stride, last_stride, side):
    tower = build(
        image_size=64, planes=(8, 8, 8, 12), layers=(1, 2, 1, 1), stem_stride=stem_stride, last_stride=last_stride
    )
    randomize(tower)
    x = images = torch.randn(1, 3, 64, 64, dtype=torch.double)
    for i, stride in ((0, 2), (2, 1), (4, 1)):
        x = reference_conv_norm(tower.stem[i], x, stride).relu()
    x = reference_average(x) if stem_stride == 4 else x
    for stage in tower.stages:
        x = stage(x)
    tokens = x.flatten(2).transpose(1, 2)
    out = tower(images)
    assert_close(out.tokens, tokens)
    assert_close(out.pooled, tower.pool(tokens))
    assert out.grid == (side, side) and tower.token_dim == 48 and tower.feature_dim == 1024


def expected_parameters(config: CLIPResNetConfig) -> int:
    w, c = config.planes[0], config.planes[0]
    total = 27 * w // 2 + 9 * (w // 2) ** 2 + 9 * w * w // 2 + 2 * (w // 2 + w // 2 + w)
    for p, depth in zip(config.planes, config.layers, strict=True):
        for i in range(depth):
            total += c * p + 9 * p * p + 4 * p * p + 2 * (p + p + 4 * p)
            total += c * 4 * p + 8 * p if i == 0 else 0
            c = 4 * p
    side = config.image_size // (4 * config.stem_stride * config.last_stride)
    return total + (side**2 + 1) * c + 3 * (c * c + c) + c * config.out_dim + config.out_dim


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 96, "layers": (1, 2, 1, 3), "planes": (6, 9, 12, 6), "last_stride": 1, "out_dim": 7},
        {"image_size": 32, "layers": (2, 1, 1, 1), "planes": (4, 6, 4, 8), "stem_stride": 2, "out_dim": 11},
    ],
)
def test_parameter_count_formula(fields):
    assert parameter_count(build(**fields)) == expected_parameters(CLIPResNetConfig(name="x", **fields))


def test_published_presets_need_no_projection():
    rn50, rn101 = (IMAGE_TOWERS.preset(name) for name in ("clip_rn50", "clip_rn101"))
    assert (rn50.projection, rn50.out_dim, rn101.projection, rn101.out_dim) == ("none", 1024, "none", 512)
    with torch.device("meta"):
        assert parameter_count(IMAGE_TOWERS.build(rn101)) == 56_259_936
        assert IMAGE_TOWERS.build(rn50).pool.heads == 32


@pytest.mark.parametrize("size", [48, 64, 96])
def test_nano_supports_small_images(size):
    torch.manual_seed(0)
    tower = IMAGE_TOWERS.build(IMAGE_TOWERS.preset("clip_rn_nano", image_size=size))
    assert tower(torch.randn(2, 3, size, size)).grid == (size // 16, size // 16)


@pytest.mark.parametrize(("size", "stem_stride", "last_stride"), [(48, 4, 2), (24, 4, 1), (72, 2, 2), (60, 2, 1)])
def test_unsupported_image_size_is_rejected(size, stem_stride, last_stride):
    error = assert_rejected(lambda: build(image_size=size, stem_stride=stem_stride, last_stride=last_stride))
    assert f"multiple of {4 * stem_stride * last_stride}" in error.found


def test_initialization():
    tower = build(image_size=64)
    pool, dim = tower.pool, 2048
    assert pool.pos_embed.std().item() == pytest.approx(dim**-0.5, rel=0.15)
    for linear in (pool.q, pool.k, pool.v, pool.out):
        assert linear.weight.std().item() == pytest.approx(dim**-0.5, rel=0.05)
        assert linear.bias.abs().max() == 0
    block = tower.stages[1][1]
    x = torch.randn(1, 512, 4, 4)
    assert torch.equal(block(x), x.relu()), "the last norm's scale starts at 0, so a block starts as its shortcut"
