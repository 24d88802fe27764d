"""Swin: forward pass against dense attention with explicit rules; windows, masks, tables, parameter counts."""

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
)

from clipwright.pipeline.towers.base import IMAGE_TOWERS, parameter_count
from clipwright.pipeline.towers.count import multiply_adds
from clipwright.pipeline.towers.layers import Activation
from clipwright.pipeline.towers.swin import PatchMerging, Swin, SwinConfig, WindowAttention, window_mask

TINY = {"image_size": 64, "dim": 8, "depths": (2, 2, 1, 1), "heads": (1, 2, 2, 4), "window": 4}
VARIANTS = {
    "even window": TINY,
    "odd window": {**TINY, "image_size": 96, "depths": (2, 2, 3, 2), "window": 3},
    "a window larger than a grid": {**TINY, "image_size": 32, "window": 4, "act": "gelu_tanh", "ln_eps": 1e-3},
    "padded": {**TINY, "depths": (2, 3, 2, 2), "window": 3, "pad": True},
    "padded by more than the shift": {**TINY, "image_size": 32, "depths": (2, 2, 2, 2), "window": 5, "pad": True},
}


def build(**fields) -> Swin:
    torch.manual_seed(0)
    return Swin(SwinConfig(name="x", **fields))


def reference_attention(
    attn: WindowAttention, tokens: torch.Tensor, side: int, window: int, shifted: bool
) -> torch.Tensor:
    """Attention over the full map with −inf between cells of different windows: no roll, no partition, no padding.

    Windows shifted by s cells start at s − M, s, s + M, ...: cell y is in window ⌊(y − s)/M⌋.
    """
    m = min(window, side)
    s = m // 2 if shifted and side > window else 0
    y, x = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]  # query minus key
    ids = (y - s) // m * side + (x - s) // m
    same = ids[:, None] == ids[None, :]
    table = attn.relative_table.view(2 * m - 1, 2 * m - 1, attn.heads)
    out = []
    for h, (q, k, v) in enumerate(
        zip(*(part.chunk(attn.heads, dim=2) for part in attn.qkv(tokens).chunk(3, dim=2)), strict=True)
    ):
        bias = torch.full(same.shape, float("-inf"), dtype=tokens.dtype)
        bias[same] = table[dy[same] + m - 1, dx[same] + m - 1, h]
        scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5 + bias
        out.append(scores.softmax(dim=2) @ v)
    return attn.out(torch.cat(out, dim=2))


def reference_swin(tower: Swin, config: SwinConfig, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes pooled and tokens from the equations, cell by cell."""
    norm = lambda layer, x: F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, config.ln_eps)  # noqa: E731
    side = config.image_size // 4
    rows = []
    for i in range(side):
        for j in range(side):
            patch = images[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            rows.append(torch.einsum("bchw,dchw->bd", patch, tower.patch_embed.weight) + tower.patch_embed.bias)
    x = norm(tower.patch_norm, torch.stack(rows, dim=1))
    for i, (stage, depth) in enumerate(zip(tower.stages, config.depths, strict=True)):
        for j in range(depth):
            block = stage[j]
            x = x + reference_attention(block.attn, norm(block.norm1, x), side, config.window, shifted=j % 2 == 1)
            z = block.mlp.fc1(norm(block.norm2, x))
            x = x + block.mlp.fc2(F.gelu(z, approximate="tanh" if config.act == "gelu_tanh" else "none"))
        if i < 3:
            cells = []
            for y in range(0, side, 2):
                for c in range(0, side, 2):
                    phases = [(y, c), (y + 1, c), (y, c + 1), (y + 1, c + 1)]
                    cells.append(torch.cat([x[:, row * side + column] for row, column in phases], dim=1))
            x = norm(stage[depth].norm, torch.stack(cells, dim=1)) @ stage[depth].reduction.weight.T
            side //= 2
    tokens = norm(tower.norm, x)
    return tokens.mean(dim=1), tokens


@cache
def reference_case(variant: str) -> tuple[Swin, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Returns a tower with random parameters, images, and the reference outputs."""
    tower, config = build(**VARIANTS[variant]), SwinConfig(name="x", **VARIANTS[variant])
    randomize(tower)
    images = torch.randn(2, 3, tower.image_size, tower.image_size, dtype=torch.double)
    with torch.no_grad():
        return tower, images, reference_swin(tower, config, images)


def compare(tower: Swin, images: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.no_grad():
        out = tower(images)
    assert_close(out.pooled, expected[0])
    assert_close(out.tokens, expected[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_matches_reference(variant):
    compare(*reference_case(variant))


def other_activation(tower: Swin, _: pytest.MonkeyPatch) -> None:
    for block in blocks(tower):
        block.mlp.act = Activation("gelu_tanh")


def other_eps(tower: Swin, _: pytest.MonkeyPatch) -> None:
    for layer in tower.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.eps = 1e-6


def changed_attention(change: Callable) -> Callable:
    """Returns a mutation of the call of scaled_dot_product_attention."""
    attend = F.scaled_dot_product_attention

    def mutate(_: Swin, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: change(attend, q, k, v, attn_mask))

    return mutate


def mask_off(tower: Swin, _: pytest.MonkeyPatch) -> None:
    for block in blocks(tower):
        if block.attn.masked:
            block.attn.mask.zero_()


def shift_back(tower: Swin, _: pytest.MonkeyPatch) -> None:
    for block in blocks(tower):
        block.attn.shift *= -1


def transpose_index(tower: Swin, _: pytest.MonkeyPatch) -> None:
    for block in blocks(tower):
        block.attn.relative_index = block.attn.relative_index.T.contiguous()


def columns_first(tower: Swin, _: pytest.MonkeyPatch) -> None:
    """Merges cells in the order (0,0), (0,1), (1,0), (1,1)."""
    for stage in list(tower.stages)[:3]:
        merging = stage[-1]
        for p in (merging.norm.weight, merging.norm.bias, merging.reduction.weight):
            p.data = p.data.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2)


def blocks(tower: Swin) -> list:
    return [layer for stage in tower.stages for layer in stage if not isinstance(layer, PatchMerging)]


@pytest.mark.parametrize("variant", ["even window", "padded"])
@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(other_activation, id="other GELU"),
        pytest.param(other_eps, id="eps of the norms"),
        pytest.param(changed_attention(lambda f, q, k, v, m: f(q, k, v, m, scale=1 / 8)), id="score scale"),
        pytest.param(changed_attention(lambda f, q, k, v, m: f(q, v, k, m)), id="swapped k and v"),
        pytest.param(changed_attention(lambda f, q, k, v, m: f(q, k, v, m.clamp(max=0))), id="no bias above 0"),
        pytest.param(mask_off, id="no mask"),
        pytest.param(shift_back, id="shift in the other direction"),
        pytest.param(transpose_index, id="offsets from key to query"),
        pytest.param(columns_first, id="cells merged by columns"),
    ],
)
def test_comparison_detects_mistakes(mutate, variant, monkeypatch):
    tower, images, expected = reference_case(variant)
    tower = deepcopy(tower)
    mutate(tower, monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare(tower, images, expected)


def pass_values_through(attn: WindowAttention, table: float) -> None:
    """Sets queries and keys to 0, values and output to the identity, and one bias for all offsets."""
    attn.double()
    dim = attn.out.in_features
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.cat([torch.zeros(2 * dim, dim), torch.eye(dim)]))
        attn.out.weight.copy_(torch.eye(dim))
        attn.qkv.bias.zero_()
        attn.out.bias.zero_()
        attn.relative_table.fill_(table)


def receptive_field(shift: bool, **fields) -> torch.Tensor:
    """Returns [ya, xa, yb, xb]: whether output cell a depends on input cell b; default: 4×4 windows, 8×8 map."""
    attn = WindowAttention(6, 2, **{"side": 8, "window": 4, **fields}, shift=shift)
    randomize(attn)
    n = attn.side**2
    x = torch.randn(1, n, 6, dtype=torch.double)
    with torch.no_grad():
        before, out = attn(x), torch.zeros(n, n, dtype=torch.bool)
        for b in range(n):
            changed = x.clone()
            changed[0, b] += 1
            out[:, b] = (attn(changed) != before)[0].any(dim=1)
    return out.view(attn.side, attn.side, attn.side, attn.side)


def test_shifted_windows_cross_window_borders_without_wrapping():
    for shift, starts in ((False, (0, 4)), (True, (-2, 2, 6))):
        expected = torch.zeros(8, 8, 8, 8, dtype=torch.bool)
        for y in starts:
            for x in starts:
                rows, columns = slice(max(y, 0), y + 4), slice(max(x, 0), x + 4)
                expected[rows, columns, rows, columns] = True
        assert torch.equal(receptive_field(shift), expected)
    assert expected[3, 3, 4, 4] and not expected[0, 0, 7, 7] and not expected[0, 3, 7, 3]


def test_window_that_covers_the_map_is_never_shifted():
    for window in (4, 7):
        attn = WindowAttention(6, 2, 4, window, shift=True)
        assert attn.shift == 0 and attn.window == 4 and not attn.masked
        assert attn.relative_table.shape == (49, 2)
        assert receptive_field(True, side=4, window=window).all()


@pytest.mark.parametrize("shift", [False, True])
def test_padding_is_never_attended_to(shift):
    """With equal scores and values passed through, a map of ones stays one: no zero enters a mean."""
    attn = WindowAttention(6, 2, 7, 4, shift=shift)
    assert attn.padded == 8
    assert torch.equal(receptive_field(shift, side=7), receptive_field(shift)[:7, :7, :7, :7])
    pass_values_through(attn, table=0.0)
    ones = torch.ones(2, 49, 6, dtype=torch.double)
    assert_close(attn(ones), ones)


def test_roll_is_undone():
    """With values passed through and cells that attend only to themselves, shifted attention returns its input."""
    attn = WindowAttention(6, 2, 6, 3, shift=True)
    pass_values_through(attn, table=-1e9)
    with torch.no_grad():
        attn.relative_table[attn.relative_index[0, 0]] = 0  # offset 0
    x = torch.randn(2, 36, 6, dtype=torch.double)
    assert_close(attn(x), x)


@pytest.mark.parametrize(("side", "window"), [(8, 4), (9, 3), (14, 7)])
def test_mask_matches_the_nine_regions_of_the_original(side, window):
    s = window // 2
    label = torch.zeros(side, side)
    cuts = [slice(0, side - window), slice(side - window, side - s), slice(side - s, side)]
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            label[rows, columns] = 3 * i + j
    expected = []
    for y in range(0, side, window):
        for x in range(0, side, window):
            flat = label[y : y + window, x : x + window].flatten()
            expected.append((flat[:, None] != flat[None]) * -1.0)
    mask = window_mask(side, side, window, s)
    assert torch.equal(mask.clamp(min=-1), torch.stack(expected))
    assert mask.diagonal(dim1=1, dim2=2).eq(0).all() and set(mask.unique().tolist()) == {0.0, float("-inf")}


def test_infinite_mask_equals_minus_100_for_typical_scores():
    tower, images = build(**TINY).eval(), torch.randn(2, 3, 64, 64)
    pooled = tower(images).pooled
    for block in blocks(tower):
        if block.attn.masked:
            block.attn.mask.clamp_(min=-100)
    assert (tower(images).pooled - pooled).abs().max() < 1e-6


def test_merging_varies_the_row_fastest():
    """Cells 1, 2, 3, 4 of a 2×2 map in the order (0,0), (1,0), (0,1), (1,1), normalized, then a matrix without bias."""
    merging = PatchMerging(1, 2, 1e-5).double()
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(4)[:2])
        cells = torch.tensor(
            [[[1.0], [3.0], [2.0], [4.0]]], dtype=torch.double
        )  # row-major: (0,0), (0,1), (1,0), (1,1)
        normalized = F.layer_norm(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.double), (4,), eps=1e-5)
        assert_close(merging(cells), normalized[None, None, :2])
    assert merging.reduction.bias is None


def expected_parameters(config: SwinConfig) -> int:
    total, side = 48 * config.dim + 3 * config.dim + 2 * 8 * config.dim, config.image_size // 4
    for i, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        c, m = config.dim * 2**i, min(config.window, side // 2**i)
        total += depth * (12 * c * c + 13 * c + (2 * m - 1) ** 2 * heads)
        total += 8 * c * c + 8 * c if i < 3 else 0
    return total


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 160, "dim": 6, "depths": (1, 3, 2, 1), "heads": (3, 2, 6, 1), "window": 5},
        {"image_size": 96, "dim": 10, "depths": (2, 1, 1, 3), "heads": (1, 5, 4, 8), "window": 7, "pad": True},
    ],
)
def test_parameter_count_formula(fields):
    assert parameter_count(build(**fields)) == expected_parameters(SwinConfig(name="x", **fields))


# Not in published.json: parameters from the formula; the paper gives 197M with a head of 1000 classes, and these GMACs.
@pytest.mark.parametrize(
    ("name", "count", "gmacs"), [("swin_large_window7", 194_995_476, 34.5), ("swin_large_window12", 195_198_516, 103.9)]
)
def test_costs_of_published_variants_outside_the_table(name, count, gmacs):
    config = IMAGE_TOWERS.preset(name)
    with torch.device("meta"):
        tower = IMAGE_TOWERS.build(config)
    assert parameter_count(tower) == count == expected_parameters(config)
    assert multiply_adds(tower) / 1e9 == pytest.approx(gmacs, rel=0.04)


def test_initialization():
    tower = build(image_size=224, depths=(2, 1, 1, 1))
    block, merging = tower.stages[0][1], tower.stages[0][2]
    for linear in (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2, merging.reduction):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert abs(linear.weight.mean().item()) < 1e-3
        assert linear.bias is None or linear.bias.abs().max() == 0
    assert block.attn.relative_table.shape == (169, 3)
    assert block.attn.relative_table.std().item() == pytest.approx(0.02, rel=0.15)
    assert tower.patch_embed.weight.abs().max().item() == pytest.approx(48**-0.5, rel=0.02)  # Kaiming-uniform, a = √5
    assert block.norm1.eps == tower.norm.eps == 1e-5 and tower.no_weight_decay == ("relative_table",)


def test_drop_path_rises_over_all_blocks():
    tower = build(**{**TINY, "depths": (2, 1, 1, 1)}, drop_path=0.4)
    assert [block.drop_path.rate for block in blocks(tower)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_tables_are_resized_with_the_window_only():
    small, large = build(**TINY), build(**{**TINY, "image_size": 128})
    with torch.no_grad():
        ramp = torch.arange(7.0).repeat(7, 1).flatten()[:, None]  # rises with the column offset
        small.stages[0][0].attn.relative_table.copy_(ramp)
        small.stages[3][0].attn.relative_table.fill_(0.3)
    state = large.resized(small.state_dict())
    large.load_state_dict(state, strict=True)
    assert torch.equal(large.stages[0][0].attn.relative_table, small.stages[0][0].attn.relative_table)
    assert small.stages[3][0].attn.relative_table.shape == (9, 4)  # a 2×2 grid there, 4×4 in the large tower
    assert torch.allclose(large.stages[3][0].attn.relative_table, torch.full((49, 4), 0.3), atol=1e-6)
    wide = build(**{**TINY, "image_size": 128, "window": 8})
    wide.load_state_dict(wide.resized(small.state_dict()), strict=True)
    table = wide.stages[0][0].attn.relative_table.view(15, 15, 1)
    assert table[7, 7, 0].item() == pytest.approx(3, abs=1e-5), "offset 0 stays in the center"
    assert torch.allclose(table[4, 5:10, 0], (torch.arange(5, 10) + 0.5) * 7 / 15 - 0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "window", "found", "fix"),
    [
        (48, 4, "multiple of 32", "use 32 or 64"),
        (96, 4, "grid of 6×6 is neither a multiple of window 4", "use 64 or 128, or pad: true"),
        (384, 7, "grid of 96×96", "use 224 or 448, or pad: true"),
        (32, 7, "grid of 8×8", "use 224, or pad: true"),
    ],
)
def test_unsupported_image_size_is_rejected(size, window, found, fix):
    error = assert_rejected(lambda: build(**{**TINY, "image_size": size, "window": window}))
    assert error.where == f"image_size: {size}"
    assert found in error.found and error.fix == fix


def test_padding_supports_such_a_size():
    tower = build(**{**TINY, "image_size": 96, "pad": True})
    out = tower(torch.randn(2, 3, 96, 96))
    assert out.grid == (3, 3) and out.tokens.isfinite().all()
    out.tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_heads_must_divide_stage_width():
    error = assert_rejected(lambda: build(**{**TINY, "heads": (1, 3, 2, 4)}))
    assert error.where == "dim: 16"
