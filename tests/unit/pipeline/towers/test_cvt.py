"""CvT: forward pass against loops over taps and heads; keys, class token, score scale, parameter counts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from tower_checks import (
    assert_close,
    assert_rejected,
    randomize,
    reference_batch_norm,
)

from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.count import multiply_adds
from clipwright.pipeline.towers.cvt import ConvAttention, ConvProjection, CvT, CvTConfig
from clipwright.pipeline.towers.layers import Activation, Attention

TINY = {"image_size": 48, "dims": (6, 8, 12), "depths": (1, 2, 3), "heads": (1, 2, 3)}
VARIANTS = {
    "scale by width": TINY,  # grids 12, 6 and 3: an odd one too
    "scale by head": {**TINY, "score_scale": "head", "act": "gelu_tanh", "ln_eps": 1e-3},
    "erf": {**TINY, "image_size": 32, "act": "gelu"},
}


def build(**fields) -> CvT:
    torch.manual_seed(0)
    return CvT(CvTConfig(name="x", **fields))


def reference_conv(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """Convolves tap by tap; a weight (C, 1, k, k) for C input channels is depthwise."""
    k, depthwise = weight.shape[2], weight.shape[1] == 1 < x.shape[1]
    height, width = ((side + 2 * padding - k) // stride + 1 for side in x.shape[2:])
    x, y = F.pad(x, (padding,) * 4), 0
    for i in range(k):
        for j in range(k):
            cells = x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            cells = cells[:, :, :height, :width]
            tap = weight[:, :, i, j]
            y = y + (cells * tap.view(1, -1, 1, 1) if depthwise else torch.einsum("bchw,oc->bohw", cells, tap))
    return y


def reference_projection(
    layer: ConvProjection, tokens: torch.Tensor, side: int, prefix: int, stride: int
) -> torch.Tensor:
    """Projects map tokens by convolution, batch norm and matrix, and the first `prefix` tokens by the matrix only."""
    x = tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, side, side)
    y = reference_batch_norm(layer.norm, reference_conv(x, layer.conv.weight, stride, 1))
    y = torch.cat([tokens[:, :prefix], y.flatten(2).transpose(1, 2)], dim=1)
    return y @ layer.linear.weight.T + layer.linear.bias


def reference_attention(attn: ConvAttention, x: torch.Tensor, side: int, prefix: int, score_scale: str) -> torch.Tensor:
    q = reference_projection(attn.q, x, side, prefix, 1)
    k = reference_projection(attn.k, x, side, prefix, 2)
    v = reference_projection(attn.v, x, side, prefix, 2)
    size, out = x.shape[2] // attn.heads, []
    for h in range(attn.heads):
        part = slice(h * size, h * size + size)
        scores = torch.einsum("bik,bjk->bij", q[..., part], k[..., part])
        scores = scores / (x.shape[2] if score_scale == "dim" else size) ** 0.5
        out.append(torch.einsum("bij,bjk->bik", scores.softmax(dim=2), v[..., part]))
    return attn.out(torch.cat(out, dim=2))


def reference_cvt(tower: CvT, config: CvTConfig, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes pooled and tokens from the equations."""
    norm = lambda layer, x: F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, config.ln_eps)  # noqa: E731
    maps, side, x = images, config.image_size, images
    for i, (stage, stride, padding) in enumerate(zip(tower.stages, (4, 2, 2), (2, 1, 1), strict=True)):
        assert stage.embed.weight.shape[2:] == ((7, 7) if i == 0 else (3, 3))
        maps = reference_conv(maps, stage.embed.weight, stride, padding) + stage.embed.bias.view(1, -1, 1, 1)
        side, prefix = side // stride, int(i == 2)
        x = norm(stage.norm, maps.flatten(2).transpose(1, 2))
        if prefix:
            x = torch.cat([stage.cls_token.expand(len(x), 1, -1), x], dim=1)
        for block in stage.blocks:
            x = x + reference_attention(block.attn, norm(block.norm1, x), side, prefix, config.score_scale)
            z = block.mlp.fc1(norm(block.norm2, x))
            z = {
                "quick_gelu": z * torch.sigmoid(1.702 * z),
                "gelu": F.gelu(z),
                "gelu_tanh": F.gelu(z, approximate="tanh"),
            }[config.act]
            x = x + block.mlp.fc2(z)
        maps = x.transpose(1, 2).reshape(len(x), -1, side, side) if not prefix else maps
    x = norm(tower.norm, x)
    return x[:, 0], x[:, 1:]


@cache
def reference_case(variant: str) -> tuple[CvT, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Returns a tower with random parameters, images, and the reference outputs."""
    tower, config = build(**VARIANTS[variant]), CvTConfig(name="x", **VARIANTS[variant])
    randomize(tower, 0.5)
    images = torch.randn(2, 3, tower.image_size, tower.image_size, dtype=torch.double)
    with torch.no_grad():
        return tower, images, reference_cvt(tower, config, images)


def compare(tower: CvT, images: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.no_grad():
        out = tower(images)
    assert_close(out.pooled, expected[0])
    assert_close(out.tokens, expected[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_matches_reference(variant):
    compare(*reference_case(variant))


def each(kind: type, change: Callable) -> Callable:
    """Returns a mutation of every module of a kind."""

    def mutate(tower: CvT, _: pytest.MonkeyPatch) -> None:
        for module in tower.modules():
            if isinstance(module, kind):
                change(module)

    return mutate


def swap(attn: ConvAttention) -> None:
    attn.k, attn.v = attn.v, attn.k


def changed_attention(change: Callable) -> Callable:
    """Returns a mutation of the call of scaled_dot_product_attention."""
    right = F.scaled_dot_product_attention

    def mutate(_: CvT, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, scale: change(right, q, k, v, scale))

    return mutate


def convolved_class_token(_: CvT, patch: pytest.MonkeyPatch) -> None:
    """Adds the batch norm's shift to the class token."""
    right = ConvProjection.forward
    patch.setattr(ConvProjection, "forward", lambda self, cls, x: right(self, cls + self.norm.bias, x))


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(each(Activation, lambda m: setattr(m, "name", "gelu")), id="other GELU"),
        pytest.param(each(torch.nn.LayerNorm, lambda m: setattr(m, "eps", 1e-6)), id="eps of the layer norms"),
        pytest.param(each(torch.nn.BatchNorm2d, lambda m: setattr(m, "eps", 1e-6)), id="eps of the batch norms"),
        pytest.param(each(torch.nn.BatchNorm2d, lambda m: m.train()), id="statistics of the batch"),
        pytest.param(changed_attention(lambda f, q, k, v, scale: f(q, k, v)), id="score scale"),
        pytest.param(each(ConvAttention, swap), id="swapped k and v"),
        pytest.param(
            each(torch.nn.Conv2d, lambda m: setattr(m.weight, "data", m.weight.data.mT)), id="transposed kernels"
        ),
        pytest.param(convolved_class_token, id="class token through the norm"),
    ],
)
def test_comparison_detects_mistakes(mutate, monkeypatch):
    tower, images, expected = reference_case("scale by width")
    tower = deepcopy(tower)
    mutate(tower, monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare(tower, images, expected)


@pytest.mark.parametrize(("side", "prefix"), [(8, 0), (8, 1), (7, 0), (7, 1), (1, 1)])
def test_keys_and_values_are_downsampled(side, prefix, monkeypatch):
    """There are ⌈H/2⌉·⌈W/2⌉ keys and the class token, and as many queries as tokens."""
    seen = []
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv, scale: seen.append([t.shape for t in qkv]) or right(*qkv)
    )
    attn = ConvAttention(12, 3, side, prefix, "dim")
    x = torch.randn(2, side**2 + prefix, 12)
    assert attn(x).shape == x.shape
    keys = ((side + 1) // 2) ** 2 + prefix
    assert seen == [[(2, 3, side**2 + prefix, 4), (2, 3, keys, 4), (2, 3, keys, 4)]]


@pytest.mark.parametrize("prefix", [0, 1])
def test_identity_convolutions_give_plain_attention(prefix):
    """With kernels of 1 in the center, identity batch norms, stride 1 and scores scaled by the head width."""
    attn, plain = ConvAttention(12, 3, 5, prefix, "head"), Attention(12, 3)
    randomize(attn, 0.5), randomize(plain, 0.5)
    x = torch.randn(2, 25 + prefix, 12, dtype=torch.double)
    with torch.no_grad():
        for project, weight, bias in zip(
            (attn.q, attn.k, attn.v), plain.qkv.weight.chunk(3), plain.qkv.bias.chunk(3), strict=True
        ):
            project.conv.stride = (1, 1)
            project.conv.weight.zero_()
            project.conv.weight[:, :, 1, 1] = 1
            project.norm.running_mean.zero_(), project.norm.bias.zero_()
            project.norm.running_var.fill_(1 - project.norm.eps), project.norm.weight.fill_(1)
            project.linear.weight.copy_(weight), project.linear.bias.copy_(bias)
        plain.out.load_state_dict(attn.out.state_dict())
        assert_close(attn(x), plain(x))
        attn.scale = 12**-0.5
        assert not torch.allclose(attn(x), plain(x))


def test_linear_equals_the_papers_pointwise_convolution():
    layer = ConvProjection(6, 2)
    randomize(layer, 0.5)
    x = torch.randn(2, 6, 5, 5, dtype=torch.double)
    pointwise = F.conv2d(layer.norm(layer.conv(x)), layer.linear.weight[:, :, None, None], layer.linear.bias)
    assert_close(layer(x.new_empty(2, 0, 6), x), pointwise.flatten(2).transpose(1, 2))


def test_weights_support_every_multiple_of_16():
    small = build(**TINY).eval()
    for size in (16, 48, 80):
        other = build(**{**TINY, "image_size": size}).eval()
        other.load_state_dict(small.state_dict(), strict=True)
        out = other(torch.randn(1, 3, size, size))
        assert out.grid == (size // 16, size // 16) and out.tokens.isfinite().all()
        assert out.pooled.shape == (1, 12), "a batch of one keeps its axis"


def test_query_convolution_of_the_last_block_affects_tokens_only():
    tower = build(**TINY)
    images = torch.randn(2, 3, 48, 48)
    query_convolution = [
        key for key, _ in tower.named_parameters() if key.startswith("stages.2.blocks.2.attn.q.") and "lin" not in key
    ]
    for select, without_gradient in ((lambda out: out.pooled, query_convolution), (lambda out: out.tokens, [])):
        tower.zero_grad()
        select(tower(images)).square().mean(0)[..., 0].sum().backward()
        assert len(query_convolution) == 3
        assert [key for key, p in tower.named_parameters() if not p.grad.any()] == without_gradient


def expected_parameters(config: CvTConfig) -> int:
    total, previous = config.dims[-1] + 2 * config.dims[-1], 3
    for kernel, c, depth in zip((7, 3, 3), config.dims, config.depths, strict=True):
        total += kernel**2 * previous * c + 3 * c + depth * (12 * c * c + 46 * c)
        previous = c
    return total


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 16, "dims": (5, 9, 14), "depths": (2, 1, 3), "heads": (5, 3, 7)},
        {"image_size": 48, "dims": (12, 4, 6), "depths": (1, 3, 1), "heads": (2, 4, 1)},
    ],
)
def test_parameter_count_formula(fields):
    assert parameter_count(build(**fields)) == expected_parameters(CvTConfig(name="x", **fields))


@pytest.mark.parametrize(
    # Not in published.json: parameters from the formula; the paper gives 277M and 193.2, and for cvt_21 at 384 24.9.
    ("name", "size", "count", "gmacs"),
    [("cvt_w24", 384, 276_171_392, 193.2), ("cvt_21", 384, 31_237_696, 24.9)],
)
def test_costs_of_published_variants_outside_the_table(name, size, count, gmacs):
    config = IMAGE_TOWERS.preset(name, image_size=size)
    with torch.device("meta"):
        tower = IMAGE_TOWERS.build(config)
    assert parameter_count(tower) == count == expected_parameters(config)
    assert multiply_adds(tower) / 1e9 == pytest.approx(gmacs, rel=0.04)
    assert IMAGE_TOWERS.preset("cvt_w24").image_size == 384


def test_initialization():
    tower = build(image_size=32, dims=(64, 96, 192), depths=(1, 1, 2))
    block = tower.stages[2].blocks[0]
    for linear in (block.attn.q.linear, block.attn.v.linear, block.attn.out, block.mlp.fc1, block.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert abs(linear.weight.mean().item()) < 1e-3 and linear.bias.abs().max() == 0
    assert tower.stages[2].cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    # Convolutions keep Kaiming-uniform, a = √5: bound 1/√fan_in.
    assert block.attn.q.conv.weight.abs().max().item() == pytest.approx(1 / 3, rel=0.02)
    assert tower.stages[1].embed.weight.abs().max().item() == pytest.approx((9 * 64) ** -0.5, rel=0.02)
    assert block.attn.k.norm.weight.eq(1).all() and block.attn.k.norm.bias.eq(0).all()
    assert block.norm1.eps == tower.norm.eps == 1e-5 and block.mlp.act.name == "quick_gelu"
    assert [stage.cls_token is None for stage in tower.stages] == [True, True, False]


def test_drop_path_rises_over_the_last_stage_only():
    tower = build(**TINY, drop_path=0.4)
    rates = [[block.drop_path.rate for block in stage.blocks] for stage in tower.stages]
    assert rates == [[0], [0, 0], pytest.approx([0, 0.2, 0.4])]


def test_default_score_scale_is_the_published_one():
    assert build(**TINY).stages[2].blocks[0].attn.scale == 12**-0.5
    assert build(**TINY, score_scale="head").stages[2].blocks[0].attn.scale == 4**-0.5


@pytest.mark.parametrize("size", [0, 8, 40, 225])
def test_unsupported_image_size_is_rejected(size):
    error = assert_rejected(lambda: build(**{**TINY, "image_size": size}))
    assert "multiple of 16" in error.found


def test_heads_must_divide_stage_width():
    error = assert_rejected(lambda: build(**{**TINY, "heads": (1, 3, 3)}))
    assert error.where == "dims: 8"
