"""CoAtNet: blocks against the paper's formulas, identities of relative attention, parameter counts, initialization."""

from __future__ import annotations

from collections.abc import Callable

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
from clipwright.pipeline.towers.coatnet import CoAtNet, CoAtNetConfig, MBConv
from clipwright.pipeline.towers.count import multiply_adds
from clipwright.pipeline.towers.layers import Activation
from clipwright.pipeline.towers.relative_attention import RelativeAttention, RelativeBlock, resize_relative_table


def build(**fields) -> CoAtNet:
    torch.manual_seed(0)
    return CoAtNet(CoAtNetConfig(name="x", **fields))


def reference_pool(x: torch.Tensor, pool: str) -> torch.Tensor:
    b, c, h, w = x.shape
    y = torch.empty(b, c, h // 2, w // 2, dtype=x.dtype)
    for i in range(h // 2):
        for j in range(w // 2):
            low = 1 if pool == "max3" else 0
            cell = x[:, :, max(2 * i - low, 0) : 2 * i + 2, max(2 * j - low, 0) : 2 * j + 2].flatten(2)
            y[:, :, i, j] = cell.mean(2) if pool == "avg2" else cell.amax(2)
    return y


def reference_attention(attn: RelativeAttention, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Computes softmax(q·k/√32) query by query, with the table's scalar w[i−j] added before or after it."""
    (height, width), out = grid, attn.out.in_features
    q, k, v = attn.qkv(x).split(out, dim=2)
    y = torch.zeros_like(q)
    for s in range(len(x)):
        for h in range(out // 32):
            part = slice(32 * h, 32 * h + 32)
            for i in range(height * width):
                scores = k[s, :, part] @ q[s, i, part] / 32**0.5
                w = torch.zeros_like(scores)
                if attn.relative != "none":
                    table = attn.relative_table[h].view(2 * height - 1, 2 * width - 1)
                    for j in range(height * width):
                        w[j] = table[i // width - j // width + height - 1, i % width - j % width + width - 1]
                weights = (scores + w).softmax(0) if attn.relative == "pre" else scores.softmax(0) + w
                y[s, i, part] = weights @ v[s, :, part]
    return attn.out(y)


def check_attention(relative: str, change: Callable[[RelativeAttention], None] = lambda attn: None) -> None:
    """Compares the attention that `change` modified with the reference of the unmodified one."""
    attn = RelativeAttention(20, 64, (2, 3), relative)
    randomize(attn)
    x = torch.randn(2, 6, 20, dtype=torch.double)
    slow = reference_attention(attn, x, (2, 3))
    change(attn)
    assert_close(attn(x), slow)


@pytest.mark.parametrize("relative", ["pre", "post", "none"])
def test_relative_attention_matches_reference(relative):
    check_attention(relative)


@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
@pytest.mark.parametrize("relative", ["pre", "post", "none"])
def test_comparison_detects_wrong_attention(relative, wrong, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    with pytest.raises(AssertionError, match="not close"):
        check_attention(relative)


def transposed_index(attn: RelativeAttention) -> None:
    attn.relative_index = attn.relative_index.T


def other_position(attn: RelativeAttention) -> None:
    attn.relative = "post" if attn.relative == "pre" else "pre"


@pytest.mark.parametrize("change", [transposed_index, other_position])
@pytest.mark.parametrize("relative", ["pre", "post"])
def test_comparison_detects_a_wrong_table(relative, change):
    with pytest.raises(AssertionError, match="not close"):
        check_attention(relative, change)


def attentions_with_table(table: torch.Tensor | float) -> dict[str, RelativeAttention]:
    """Returns all three kinds with equal projections and the given table."""
    out = {}
    for relative in ("pre", "post", "none"):
        out[relative] = RelativeAttention(32, 64, (3, 3), relative)
        randomize(out[relative])
        if relative != "none":
            with torch.no_grad():
                out[relative].relative_table.copy_(torch.as_tensor(table, dtype=torch.double))
    for relative in ("pre", "post"):
        out[relative].load_state_dict(out["none"].state_dict(), strict=False)
    return out


def test_all_kinds_agree_with_a_zero_table():
    x, attn = torch.randn(2, 9, 32, dtype=torch.double), attentions_with_table(0.0)
    assert_close(attn["pre"](x), attn["none"](x))
    assert_close(attn["post"](x), attn["none"](x))


def test_constant_table_cancels_in_the_softmax_or_adds_the_sum_of_values():
    x, attn = torch.randn(2, 9, 32, dtype=torch.double), attentions_with_table(0.7)
    assert_close(attn["pre"](x), attn["none"](x))
    values = attn["none"].qkv(x)[..., 128:].sum(dim=1, keepdim=True)
    assert_close(attn["post"](x), attn["none"](x) + 0.7 * values @ attn["none"].out.weight.T)


def test_post_without_queries_is_a_zero_padded_convolution():
    """With Q = 0 the softmax is 1/(h·w), which w = kernel − 1/(h·w) cancels."""
    side, heads = 5, 2
    attn = RelativeAttention(16, 64, (side, side), "post")
    randomize(attn)
    kernel = torch.randn(heads, 3, 3, dtype=torch.double)
    table = torch.zeros(heads, 2 * side - 1, 2 * side - 1, dtype=torch.double)
    # The table's offset is query − key, a convolution's is key − query: rotated by 180°.
    table[:, side - 2 : side + 1, side - 2 : side + 1] = kernel.flip(1, 2)
    with torch.no_grad():
        attn.qkv.weight[:64] = 0
        attn.qkv.bias[:64] = 0
        attn.relative_table.copy_((table - 1 / side**2).flatten(1))
    x = torch.randn(2, side * side, 16, dtype=torch.double)
    values = attn.qkv(x)[..., 128:].transpose(1, 2).unflatten(2, (side, side))
    conv = F.conv2d(values, kernel.repeat_interleave(32, dim=0)[:, None], padding=1, groups=64)
    assert_close(attn(x), attn.out(conv.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("stride", ["dw", "pw"])
@pytest.mark.parametrize(("dim", "out", "pool"), [(8, 12, "max2"), (12, 12, "avg2"), (8, 12, "max3"), (12, 12, None)])
def test_mbconv_matches_formula(dim, out, pool, stride):
    check_mbconv(dim, out, pool, stride)


def wrong_act(block: MBConv) -> None:
    block.act.name = "gelu_tanh"


def wrong_eps(block: MBConv) -> None:
    block.norm.eps = 1e-3


def other_stride(block: MBConv) -> None:
    block.expand.stride, block.depthwise.stride = block.depthwise.stride, block.expand.stride


def other_pool(block: MBConv) -> None:
    block.shortcut[0] = torch.nn.AvgPool2d(2)


@pytest.mark.parametrize("change", [wrong_act, wrong_eps, other_stride, other_pool])
@pytest.mark.parametrize("stride", ["dw", "pw"])
def test_comparison_detects_a_wrong_mbconv(stride, change):
    with pytest.raises(AssertionError, match="not close"):
        check_mbconv(8, 12, "max2", stride, change)


def check_mbconv(dim, out, pool, stride, change=lambda block: None) -> None:
    block = MBConv(dim, out, pool, stride)
    randomize(block)
    x = torch.randn(2, dim, 6, 6, dtype=torch.double)
    y = torch.einsum("bchw,mc->bmhw", reference_batch_norm(block.norm, x), block.expand.weight[:, :, 0, 0])
    if pool and stride == "pw":
        y = y[:, :, ::2, ::2]
    y = F.gelu(reference_batch_norm(block.norm_expand, y))
    padded, wide = F.pad(y, (1, 1, 1, 1)), torch.zeros_like(y)
    for i in range(3):
        for j in range(3):
            weight = block.depthwise.weight[:, 0, i, j].view(1, -1, 1, 1)
            wide = wide + weight * padded[:, :, i : i + y.shape[2], j : j + y.shape[3]]
    if pool and stride == "dw":
        wide = wide[:, :, ::2, ::2]
    y = F.gelu(reference_batch_norm(block.norm_depthwise, wide))
    se = block.squeeze
    z = y.mean(dim=(2, 3)) @ se.fc1.weight[:, :, 0, 0].T + se.fc1.bias
    z = (z * torch.sigmoid(z)) @ se.fc2.weight[:, :, 0, 0].T + se.fc2.bias
    y = y * torch.sigmoid(z)[:, :, None, None]
    y = torch.einsum("bmhw,om->bohw", y, block.project.weight[:, :, 0, 0]) + block.project.bias.view(1, -1, 1, 1)
    shortcut = reference_pool(x, pool) if pool else x
    if pool and dim != out:
        shortcut = block.shortcut[1](shortcut)
    assert len(block.shortcut) == (2 if pool and dim != out else 1 if pool else 0)
    assert se.fc1.out_channels == out // 4
    change(block)
    assert_close(block(x), shortcut + y)


@pytest.mark.parametrize("pool", ["max2", "avg2", "max3", None])
def test_relative_block_matches_formula(pool):
    check_relative_block(pool)


def wrong_mlp(block: RelativeBlock) -> None:
    block.mlp.act.name = "gelu_tanh"


def wrong_ln_eps(block: RelativeBlock) -> None:
    block.norm1.eps = 1e-3


def wrong_pool(block: RelativeBlock) -> None:
    block.pool = torch.nn.AvgPool2d(2)


@pytest.mark.parametrize("change", [wrong_mlp, wrong_ln_eps, wrong_pool])
def test_comparison_detects_a_wrong_relative_block(change):
    with pytest.raises(AssertionError, match="not close"):
        check_relative_block("max2", change)


def check_relative_block(pool, change=lambda block: None) -> None:
    dim = 16 if pool else 32
    grid = (2, 2) if pool else (4, 4)
    block = RelativeBlock(dim, 32, grid, pool, "pre")
    randomize(block)
    x = torch.randn(2, dim, 4, 4, dtype=torch.double)
    tokens = lambda m: m.flatten(2).transpose(1, 2)  # noqa: E731
    y = F.layer_norm(x.permute(0, 2, 3, 1), (dim,), block.norm1.weight, block.norm1.bias, 1e-6).permute(0, 3, 1, 2)
    shortcut = block.shortcut[1](reference_pool(x, pool)) if pool else x
    y = tokens(shortcut) + reference_attention(block.attn, tokens(reference_pool(y, pool) if pool else y), grid)
    z = F.layer_norm(y, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(z)))
    change(block)
    assert_close(block(x), y.transpose(1, 2).unflatten(2, grid))


def expected_parameters(config: CoAtNetConfig) -> int:
    """Counts parameters block by block."""
    total = 27 * config.stem + 2 * config.stem + 9 * config.stem**2
    c, side = config.stem, config.image_size // 2
    for kind, o, depth in zip(config.layout, config.dims, config.depths, strict=True):
        side //= 2
        for i in range(depth):
            if kind == "C":
                m, r = 4 * o, o // 4
                total += 2 * c + c * m + 2 * m + 9 * m + 2 * m + (2 * m * r + r + m) + m * o + o
            else:
                table = 0 if config.relative == "none" else (2 * side - 1) ** 2 * o // 32
                total += 2 * c + 3 * (c * o + o) + table + o * o + o + 2 * o + 8 * o * o + 5 * o
            total += c * o + o if i == 0 and c != o else 0
            c = o
    return total + 2 * c


@pytest.mark.parametrize("layout", ["CCTT", "CCCT", "CTTT", "CCCC"])
@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 96, "stem": 10, "dims": (12, 32, 32, 96), "depths": (2, 1, 3, 1), "relative": "post"},
        {"image_size": 32, "stem": 12, "dims": (12, 64, 32, 32), "depths": (1, 2, 1, 2), "relative": "none"},
    ],
)
def test_parameter_count_formula(layout, fields):
    tower = build(layout=layout, **fields)
    assert parameter_count(tower) == expected_parameters(CoAtNetConfig(name="x", layout=layout, **fields))
    assert tower(torch.randn(2, 3, tower.image_size, tower.image_size)).pooled.isfinite().all()


# Dai et al. 2021, tables 4 and 5, at 224: millions of parameters; 10⁹ multiply-adds with the stride in W1.
@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [("coatnet_0", 25, 4.2), ("coatnet_1", 42, 8.4), ("coatnet_2", 75, 15.7), ("coatnet_3", 168, 34.7)],
)
def test_costs_are_close_to_the_paper(name, millions, billions):
    with torch.device("meta"):
        tower = IMAGE_TOWERS.build(IMAGE_TOWERS.preset(name, stride="pw"))
    params, gmacs = parameter_count(tower), multiply_adds(tower) / 1e9
    head = 1000 * IMAGE_TOWERS.preset(name).dims[-1] + 1000
    assert (params + head) / 1e6 == pytest.approx(millions, rel=0.03)
    assert gmacs == pytest.approx(billions, rel=0.04)


@pytest.mark.parametrize("variant", range(5))
@pytest.mark.parametrize("layout", ["ccct", "cttt", "cccc"])
def test_every_variant_has_every_layout(variant, layout):
    one, other = (IMAGE_TOWERS.preset(f"coatnet_{variant}{end}") for end in ("", f"_{layout}"))
    assert (one.layout, other.layout) == ("CCTT", layout.upper())
    assert (one.stem, one.dims, one.depths) == (other.stem, other.dims, other.depths)
    with torch.device("meta"):
        for config in (one, other):
            assert parameter_count(IMAGE_TOWERS.build(config)) == expected_parameters(config)


def test_activation_and_eps_reach_every_layer():
    tower = build(image_size=32, stem=8, dims=(8, 16, 32, 32), depths=(1, 1, 1, 1), act="gelu_tanh", ln_eps=1e-3)
    names = [m.name for m in tower.modules() if isinstance(m, Activation)]
    assert names == ["gelu_tanh"] * 5  # stem, two MBConvs, two MLPs
    assert {m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}


def test_stem_matches_formula():
    tower = build(image_size=32, stem=6, dims=(8, 16, 32, 32), depths=(1, 1, 1, 1))
    randomize(tower)
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    padded, y = F.pad(x, (1, 1, 1, 1)), torch.zeros(2, 6, 16, 16, dtype=torch.double)
    for i in range(3):
        for j in range(3):
            y += torch.einsum(
                "bchw,oc->bohw", padded[:, :, i : i + 32 : 2, j : j + 32 : 2], tower.stem[0].weight[:, :, i, j]
            )
    y = reference_batch_norm(tower.stem[1], y)
    padded, z = F.pad(0.5 * y * (1 + torch.erf(y / 2**0.5)), (1, 1, 1, 1)), torch.zeros_like(y)
    for i in range(3):
        for j in range(3):
            z += torch.einsum("bchw,oc->bohw", padded[:, :, i : i + 16, j : j + 16], tower.stem[3].weight[:, :, i, j])
    assert_close(tower.stem(x), z)


def test_final_norm_precedes_the_mean():
    tower = build(image_size=64, stem=8, dims=(8, 16, 32, 64), depths=(1, 1, 1, 1)).eval()
    out = tower(torch.randn(2, 3, 64, 64))
    assert torch.equal(out.pooled, out.tokens.mean(dim=1)) and out.grid == (2, 2)
    normalized = (out.tokens - tower.norm.bias) / tower.norm.weight
    torch.testing.assert_close(normalized.mean(dim=2), torch.zeros(2, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("relative", ["pre", "post"])
def test_initialization(relative):
    tower = build(image_size=224, relative=relative)
    mbconv, block = tower.stages[1][1], tower.stages[2][0]
    std = lambda t: t.std().item()  # noqa: E731
    assert std(tower.stem[0].weight) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    assert std(mbconv.expand.weight) == pytest.approx((2 / 768) ** 0.5, rel=0.1)
    assert std(mbconv.depthwise.weight) == pytest.approx((2 / 9) ** 0.5, rel=0.1)  # fan_out counts one group
    assert std(mbconv.project.weight) == pytest.approx((2 / 192) ** 0.5, rel=0.1)
    assert mbconv.project.bias.abs().max() == 0 and mbconv.squeeze.fc1.bias.abs().max() == 0
    for matrix in block.attn.qkv.weight.split(384):
        assert matrix.abs().max().item() == pytest.approx((6 / (192 + 384)) ** 0.5, rel=0.02)
    assert block.attn.qkv.bias.abs().max() == 0
    assert std(block.mlp.fc2.bias) == pytest.approx(1e-6, rel=0.15)
    table = block.attn.relative_table
    assert table.shape == (12, 27**2)
    assert std(table) == pytest.approx(0.02, rel=0.1) if relative == "pre" else table.abs().max() == 0


def test_drop_path_rises_over_all_blocks():
    tower = build(image_size=32, stem=8, dims=(8, 16, 32, 32), depths=(1, 2, 1, 1), drop_path=0.4)
    rates = [block.drop_path.rate for stage in tower.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_tables_are_resized_bilinearly_around_their_center():
    ramp = torch.arange(7.0).repeat(7, 1)[None].repeat(2, 1, 1)
    out = resize_relative_table(ramp.flatten(1), 15 * 15).view(2, 15, 15)
    assert out[0, 7, 7].item() == pytest.approx(3.0, abs=1e-5)
    assert torch.allclose(out[0, 4, 3:12], ((torch.arange(3, 12) + 0.5) * 7 / 15 - 0.5), atol=1e-5)


def test_heads_must_divide_stage_width():
    error = assert_rejected(lambda: build(image_size=64, dims=(8, 16, 40, 64)))
    assert error.where == "dims: 40"


@pytest.mark.parametrize("size", [16, 48, 80, 200])
def test_unsupported_image_size_is_rejected(size):
    error = assert_rejected(lambda: build(image_size=size))
    assert "multiple of 32" in error.found
