"""Convolutional attention: equality with convolutions, the paper's scores, effects of the options."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tower_checks import (
    assert_close,
    assert_rejected,
    perturb,
)

from clipwright.pipeline.towers.attention_conv import AttentionConv, AttentionConvConfig, QuadraticAttention
from clipwright.pipeline.towers.base import parameter_count

MAP = (5, 8)
SMALL = {"image_size": 24, "patch": 4, "dim": 10, "depth": 2, "ln_eps": 1e-4}


def attention(dim: int = 6, grid: tuple[int, int] = MAP, **fields) -> QuadraticAttention:
    torch.manual_seed(0)
    return QuadraticAttention(AttentionConvConfig(name="x", dim=dim, **fields), grid).double()


def maps(dim: int = 6, grid: tuple[int, int] = MAP, dtype: torch.dtype = torch.double) -> torch.Tensor:
    return torch.randn(2, dim, *grid, dtype=torch.double, generator=torch.Generator().manual_seed(1)).to(dtype)


def on_maps(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def convolution(kernel: int, dim: int = 6, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(2)
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, bias=bias).double()


def check_convolution(kernel: int, change=lambda attn: None, **fields) -> None:
    attn, conv, x = attention(kernel=kernel, **fields), convolution(kernel), maps()
    attn.copy_convolution(conv)
    change(attn)
    assert_close(on_maps(attn, x), conv(x))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(
    "fields",
    [{}, {"learnable": True}, {"width": "precision"}, {"content_dim": 4}],
    ids=lambda f: "-".join(f) or "fixed",
)
def test_attention_equals_the_convolution(kernel, fields):
    check_convolution(kernel, **fields)


def negated_offsets(attn: QuadraticAttention) -> None:
    attn.offsets = -attn.offsets  # δ = q − k


def shuffled_heads(attn: QuadraticAttention) -> None:
    attn.centres = attn.centres.roll(1, 0)


def rows_for_columns(attn: QuadraticAttention) -> None:
    attn.centres = attn.centres.flip(1)


def wider_heads(attn: QuadraticAttention) -> None:
    attn.spreads = attn.spreads / 2


@pytest.mark.parametrize("change", [negated_offsets, shuffled_heads, rows_for_columns, wider_heads])
@pytest.mark.parametrize("kernel", [3, 5])
def test_comparison_detects_wrong_positions(kernel, change):
    with pytest.raises(AssertionError, match="not close"):
        check_convolution(kernel, change)


def test_comparison_detects_a_missing_border():
    with pytest.raises(AssertionError, match="not close"):
        check_convolution(3, border="inside")


def test_float32_error_is_below_one_in_100_000():
    attn, conv, x = attention(kernel=5).float(), convolution(5).float(), maps(dtype=torch.float32)
    attn.copy_convolution(conv)
    torch.testing.assert_close(on_maps(attn, x), conv(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [3, 5])
def test_error_decreases_with_alpha(kernel):
    conv, x = convolution(kernel), maps()
    for alpha, low, high in ((5, 1e-3, 0.3), (10, 1e-5, 3e-3), (20, 1e-10, 3e-7), (50, 0.0, 1e-13)):
        attn = attention(kernel=kernel, alpha=alpha)
        attn.copy_convolution(conv)
        error = (on_maps(attn, x) - conv(x)).abs().max().item()
        assert low <= error < high, alpha


@pytest.mark.parametrize("kernel", [3, 5])
def test_interior_equals_the_convolution_without_a_border(kernel):
    attn, conv, x = attention(kernel=kernel, border="inside"), convolution(kernel, bias=False), maps()
    attn.copy_convolution(conv)
    cut = kernel // 2
    inside = (..., slice(cut, -cut), slice(cut, -cut))
    assert_close(on_maps(attn, x)[inside], conv(x)[inside])
    assert (on_maps(attn, x) - conv(x)).abs().max() > 1e-2


def reference_attention(attn: QuadraticAttention, x: torch.Tensor, fields: dict) -> torch.Tensor:
    """Computes the paper's equation query by query: v·r_δ with v = −α(1, −2Δ), and the content terms."""
    height, width = x.shape[2:]
    pad, dim = attn.pad, x.shape[1]
    y = torch.zeros_like(x)
    for b in range(len(x)):
        for i in range(height):
            for j in range(width):
                total = attn.out.bias.clone()
                for h in range(attn.heads):
                    scores, values = [], []
                    for r in range(-pad, height + pad):
                        for c in range(-pad, width + pad):
                            inside = 0 <= r < height and 0 <= c < width
                            key = x[b, :, r, c] if inside else torch.zeros(dim, dtype=x.dtype)
                            scores.append(reference_score(attn, h, x[b, :, i, j], key, (r - i, c - j), fields))
                            values.append(key)
                    mixed = torch.stack(scores).softmax(0) @ torch.stack(values)
                    total = total + attn.out.weight[:, h * dim : (h + 1) * dim] @ mixed
                y[b, :, i, j] = total
    return y


def reference_score(attn, h, query, key, delta, fields) -> torch.Tensor:
    d = torch.tensor(delta, dtype=query.dtype)
    r = torch.cat([(d @ d)[None], d])
    if fields.get("width") == "precision":
        precision = attn.spreads[h] @ attn.spreads[h].T
        score = -(d @ precision @ d) + 2 * attn.centres[h] @ precision @ d
    else:
        v = -(attn.spreads[h] ** 2) * torch.cat([torch.ones(1, dtype=d.dtype), -2 * attn.centres[h]])
        score = v @ r
    if width := fields.get("content_dim"):
        part = slice(h * width, (h + 1) * width)
        q, k = attn.query.weight[part] @ query, attn.key.weight[part] @ key
        score = score + q @ k + q @ (r @ attn.position[h]) + attn.key_bias[h] @ k
    return score


def check_scores(fields: dict) -> None:
    attn = attention(dim=4, grid=(2, 3), alpha=1.0, learnable=True, **fields)
    perturb(attn, 0.2)
    x = maps(4, (2, 3))
    assert_close(on_maps(attn, x), reference_attention(attn, x, fields))


OPTIONS = [{}, {"border": "inside"}, {"width": "precision"}, {"content_dim": 3}, {"kernel": 1, "content_dim": 2}]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_scores_match_the_paper(fields):
    check_scores(fields)


def test_comparison_detects_scaled_scores(monkeypatch):
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, scale, **k: attend(*a, **k))
    with pytest.raises(AssertionError, match="not close"):
        check_scores({"content_dim": 3})


def test_comparison_detects_an_unsquared_width(monkeypatch):
    scores = QuadraticAttention.scores
    monkeypatch.setattr(QuadraticAttention, "scores", lambda self: scores(self) * 1.01)
    with pytest.raises(AssertionError, match="not close"):
        check_scores({})


def test_head_order_does_not_matter():
    attn, x = attention(learnable=True, alpha=2.0), maps()
    perturb(attn, 0.2)
    before, order = on_maps(attn, x), torch.randperm(9)
    with torch.no_grad():
        attn.centres.copy_(attn.centres[order])
        attn.spreads.copy_(attn.spreads[order])
        attn.out.weight.copy_(attn.out.weight.unflatten(1, (9, 6))[:, order].flatten(1))
    assert_close(on_maps(attn, x), before)


@pytest.mark.parametrize("width", ["isotropic", "precision"])
@pytest.mark.parametrize("border", ["zero", "inside"])
def test_alpha_zero_is_the_mean_filter(border, width):
    attn, x = attention(alpha=0.0, border=border, width=width), maps()
    cells = MAP[0] * MAP[1] if border == "inside" else (MAP[0] + 2) * (MAP[1] + 2)
    mean = x.sum(dim=(2, 3)) / cells
    expected = mean.repeat(1, 9) @ attn.out.weight.T + attn.out.bias
    assert_close(on_maps(attn, x), expected[:, :, None, None].expand(-1, -1, *MAP))


def test_interior_is_translation_equivariant():
    attn = attention(border="inside")
    x = maps()
    moved = on_maps(attn, x.roll(1, dims=3))
    assert_close(moved[..., 1:-1, 2:-1], on_maps(attn, x)[..., 1:-1, 1:-2])


@pytest.mark.parametrize("width", ["isotropic", "precision"])
@pytest.mark.parametrize("border", ["zero", "inside"])
def test_weights_sum_to_one_and_centers_and_widths_receive_gradient(width, border):
    attn = attention(learnable=True, alpha=2.0, width=width, border=border)
    weights = attn.scores().softmax(dim=2)
    assert_close(weights.sum(dim=2), torch.ones(9, MAP[0] * MAP[1], dtype=torch.double))
    (on_maps(attn, maps()) ** 2).sum().backward()
    for parameter in (attn.centres, attn.spreads):
        assert (parameter.grad.view(9, -1).abs().amax(dim=1) > 0).all()


def test_precision_may_be_anisotropic_and_stays_positive():
    attn = attention(learnable=True, width="precision", alpha=1.0)
    perturb(attn, 0.2)
    precision = attn.spreads @ attn.spreads.transpose(1, 2)
    assert (torch.linalg.eigvalsh(precision) >= 0).all() and precision[:, 0, 1].abs().max() > 0.01
    assert attn.scores().max() <= 0


def test_fixed_positions_are_neither_parameters_nor_saved():
    names = {name for name, _ in attention().named_parameters()}
    assert names == {"out.weight", "out.bias"} == set(attention().state_dict())
    assert {"centres", "spreads"} <= set(attention(learnable=True).state_dict())


def reference_tower(tower: AttentionConv, config: AttentionConvConfig, images: torch.Tensor) -> torch.Tensor:
    """Computes the tower at α = 50 as a network of convolutions."""
    d, k = config.dim, config.kernel

    def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:  # over the channels of maps
        mean = x.mean(1, keepdim=True)
        scale = (((x - mean) ** 2).mean(1, keepdim=True) + config.ln_eps).sqrt()
        return (x - mean) / scale * layer.weight[:, None, None] + layer.bias[:, None, None]

    x = F.conv2d(images, tower.patch_embed.weight, tower.patch_embed.bias, config.patch)
    for block in tower.blocks:
        weight = block.attn.out.weight.view(d, k, k, d).permute(0, 3, 1, 2)
        x = x + F.conv2d(norm(block.norm1, x), weight, block.attn.out.bias, padding=k // 2)
        z = F.conv2d(norm(block.norm2, x), block.mlp.fc1.weight[:, :, None, None], block.mlp.fc1.bias)
        z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        x = x + F.conv2d(z, block.mlp.fc2.weight[:, :, None, None], block.mlp.fc2.bias)
    return norm(tower.norm, x)


def check_tower(tower: AttentionConv, config: AttentionConvConfig) -> None:
    images = torch.randn(2, 3, 24, 24, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    out = tower(images)
    expected = reference_tower(tower, config, images)
    assert_close(out.tokens, expected.flatten(2).transpose(1, 2))
    assert_close(out.pooled, expected.mean(dim=(2, 3)))
    assert out.grid == (6, 6)


def tower_of(config: AttentionConvConfig) -> AttentionConv:
    torch.manual_seed(0)
    tower = AttentionConv(config).double()
    perturb(tower, 0.2)
    return tower


@pytest.mark.parametrize("fields", [{}, {"kernel": 5}, {"width": "precision"}], ids=str)
def test_tower_equals_a_convolutional_network(fields):
    config = AttentionConvConfig(name="x", **SMALL, **fields)
    check_tower(tower_of(config), config)


@pytest.mark.parametrize(
    "wrong", [{"act": "gelu_tanh"}, {"ln_eps": 1e-6}, {"alpha": 5.0}, {"border": "inside"}], ids=str
)
def test_comparison_detects_a_wrong_tower(wrong):
    right = AttentionConvConfig(name="x", **SMALL)
    with pytest.raises(AssertionError, match="not close"):
        check_tower(tower_of(dataclasses.replace(right, **wrong)), right)


@pytest.mark.parametrize(("size", "p", "d", "depth", "k"), [(40, 8, 36, 3, 3), (30, 10, 20, 1, 5)])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("width", ["isotropic", "precision"])
@pytest.mark.parametrize("c", [0, 7])
def test_parameter_count_formula(size, p, d, depth, k, learnable, width, c):
    options = {"kernel": k, "learnable": learnable, "width": width, "content_dim": c}
    tower = AttentionConv(AttentionConvConfig(name="x", image_size=size, patch=p, dim=d, depth=depth, **options))
    places = k * k * (2 + (1 if width == "isotropic" else 4)) if learnable else 0
    content = k * k * (2 * d * c + c + 3 * c)
    block = k * k * d * d + d + places + content + 8 * d * d + 5 * d + 4 * d
    assert parameter_count(tower) == 3 * p * p * d + d + depth * block + 2 * d


def test_every_parameter_receives_gradient_with_every_option():
    for width in ("isotropic", "precision"):
        config = AttentionConvConfig(name="x", **SMALL, alpha=1.0, learnable=True, width=width, content_dim=3)
        tower = tower_of(config)
        (tower(torch.randn(2, 3, 24, 24, dtype=torch.double)).pooled * torch.linspace(-1, 1, 10)).sum().backward()
        for name, p in tower.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_initialization_is_a_convolution_without_content_terms():
    config = AttentionConvConfig(name="x", image_size=32, patch=8, dim=96, depth=1, content_dim=8)
    torch.manual_seed(0)
    tower = AttentionConv(config)
    attn = tower.blocks[0].attn
    assert attn.out.weight.std().item() == pytest.approx((9 * 96) ** -0.5, rel=0.15)
    assert tower.patch_embed.weight.std().item() == pytest.approx(192**-0.5, rel=0.15)
    assert tower.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx((6 / 480) ** 0.5, rel=0.02)
    assert attn.query.weight.abs().max() == 0 and attn.key_bias.abs().max() == 0 and attn.out.bias.abs().max() == 0
    assert attn.key.weight.abs().max() > 0 and attn.position.std().item() == pytest.approx(0.02, rel=0.2)
    assert attn.centres[0].tolist() == [-1, -1] and attn.centres[5].tolist() == [0, 1]


def test_weights_support_every_size():
    small, large = (AttentionConv(AttentionConvConfig(name="x", **SMALL | {"image_size": s})) for s in (24, 40))
    large.load_state_dict(large.resized(small.state_dict()), strict=True)


def test_drop_path_rises_over_blocks():
    tower = AttentionConv(AttentionConvConfig(name="x", **SMALL | {"depth": 3}, drop_path=0.5))
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])


@pytest.mark.parametrize(("field", "value"), [("kernel", 4), ("image_size", 27)])
def test_invalid_shapes_are_rejected(field, value):
    error = assert_rejected(lambda: AttentionConv(AttentionConvConfig(name="x", **SMALL | {field: value})))
    assert error.where == f"{field}: {value}"
