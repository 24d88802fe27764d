"""Shared blocks: comparison with loops and closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tower_checks import reference_layer_norm

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.layers import (
    ACTIVATIONS,
    Attention,
    Block,
    BlockStack,
    DropPath,
    check_multiple,
    check_odd,
    drop_path_rates,
    resize_positions,
    sinusoidal_positions,
    split_qkv,
    to_map,
    to_tokens,
)
from clipwright.pipeline.towers.relative_attention import relative_index


def reference_attention(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """Computes attention for one query of one head of one sample at a time."""
    b, n, d = x.shape
    size = d // attn.heads
    q, k, v = (x @ w.T + c for w, c in zip(attn.qkv.weight.split(d), attn.qkv.bias.split(d), strict=True))
    y = torch.zeros_like(x)
    for s in range(b):
        for h in range(attn.heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(n):
                keys = range(i + 1) if attn.causal else range(n)
                scores = torch.stack([(q[s, i, part] * k[s, j, part]).sum() / size**0.5 for j in keys])
                weights = scores.exp() / scores.exp().sum()
                y[s, i, part] = sum(w * v[s, j, part] for w, j in zip(weights, keys, strict=True))
    return y @ attn.out.weight.T + attn.out.bias


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu"])
def test_block_matches_reference(causal, act):
    torch.manual_seed(0)
    block = Block(12, 3, mlp_ratio=2, act=act, ln_eps=1e-3, causal=causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.double)
    y = x + reference_attention(block.attn, reference_layer_norm(block.norm1, x, 1e-3))
    z = reference_layer_norm(block.norm2, y, 1e-3) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    half = {
        "gelu": 0.5 * (1 + torch.erf(z / 2**0.5)),
        "gelu_tanh": 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "quick_gelu": 1 / (1 + (-1.702 * z).exp()),
    }[act]
    y = y + (z * half) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(x), y, atol=1e-12, rtol=1e-12)


def test_masked_keys_have_no_effect():
    torch.manual_seed(0)
    attn, x = Attention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.double)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
    out = attn(x, mask)
    for row, keep in enumerate(mask):
        alone = reference_attention(attn, x[row : row + 1, keep])
        torch.testing.assert_close(out[row : row + 1, keep], alone, atol=1e-12, rtol=1e-12)


def test_sinusoidal_positions():
    """Checks the first row, unit pairs, shifts as rotations, and products that depend on the offset only."""
    count, dim = 40, 12
    table = sinusoidal_positions(count, dim).double()
    assert table.shape == (count, dim) and torch.equal(table[0], torch.tensor([0.0, 1.0] * 6, dtype=torch.double))
    for p in (1, 7, 39):
        for i in range(dim // 2):
            angle = torch.tensor(p / 10000 ** (2 * i / dim), dtype=torch.double)
            assert table[p, 2 * i].item() == pytest.approx(angle.sin().item(), abs=1e-6)
            assert table[p, 2 * i + 1].item() == pytest.approx(angle.cos().item(), abs=1e-6)
    pairs = table.view(count, dim // 2, 2)
    torch.testing.assert_close(pairs.norm(dim=2), torch.ones(count, dim // 2, dtype=torch.double), atol=1e-6, rtol=0)
    k = 5
    sin, cos = pairs[k, :, 0], pairs[k, :, 1]
    rotated = torch.stack([pairs[..., 0] * cos + pairs[..., 1] * sin, pairs[..., 1] * cos - pairs[..., 0] * sin], dim=2)
    torch.testing.assert_close(rotated[:-k], pairs[k:], atol=1e-6, rtol=0)
    products = table @ table.T
    for offset in (1, 9):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    with pytest.raises(ClipwrightError, match="dim: 7"):
        sinusoidal_positions(4, 7)


def test_activations_at_one():
    one = torch.ones((), dtype=torch.double)
    values = {name: ACTIVATIONS[name](one).item() for name in ("gelu", "gelu_tanh", "quick_gelu")}
    assert values == pytest.approx({"gelu": 0.841345, "gelu_tanh": 0.841192, "quick_gelu": 0.845795}, abs=1e-6)


def test_parameter_count_of_a_block():
    assert sum(p.numel() for p in Block(24, 3).parameters()) == 12 * 24**2 + 13 * 24


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75)) and (y[~kept] == 0).all()
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_rates_rise_linearly():
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]


def test_block_stack_passes_arguments_and_raises_drop_path():
    torch.manual_seed(0)
    stack = BlockStack(partial(Block, 12, 3), depth=3, drop_path=0.4)
    assert list(stack.state_dict())[:2] == ["0.norm1.weight", "0.norm1.bias"]
    assert [block.drop_path.rate for block in stack] == pytest.approx([0, 0.2, 0.4])
    x, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
    expected = x
    for block in stack.eval():
        expected = block(expected, mask)
    assert torch.equal(stack(x, mask), expected) and not torch.equal(stack(x), expected)


def test_tokens_are_row_major_and_heads_contiguous():
    maps = torch.arange(2 * 4 * 3 * 5.0).view(2, 4, 3, 5)
    tokens = to_tokens(maps)
    assert torch.equal(tokens[1, 2 * 5 + 3], maps[1, :, 2, 3])
    assert torch.equal(to_map(tokens, (3, 5)), maps)
    qkv = torch.randn(2, 7, 3 * 12)
    for part, heads in zip(qkv.split(12, dim=2), split_qkv(qkv, 3), strict=True):
        assert torch.equal(heads[1, 2, 6], part[1, 6, 8:])


@pytest.mark.parametrize(("value", "fix"), [(4, "use 3 or 5"), (0, "use 1 or more")])
def test_check_odd_offers_the_nearest_values(value, fix):
    check_odd("kernel", 3)
    with pytest.raises(ClipwrightError, match=f"kernel: {value}.*{fix}"):
        check_odd("kernel", value)


def test_relative_index():
    assert relative_index(2, 2)[0].tolist() == [4, 3, 1, 0]
    h, w = 3, 4
    index = relative_index(h, w)
    offsets: dict[int, tuple[int, int]] = {}
    for a in range(h * w):
        for b in range(h * w):
            offset = (a // w - b // w, a % w - b % w)
            assert offsets.setdefault(int(index[a, b]), offset) == offset
    assert sorted(offsets) == list(range((2 * h - 1) * (2 * w - 1)))
    assert len(set(offsets.values())) == len(offsets)


def test_resize_positions_keeps_prefix_constants_and_ramps():
    torch.manual_seed(0)
    table = torch.cat([torch.randn(1, 3), torch.tensor([[1.0, 2.0, 0.0]]).repeat(64, 1)])
    table[1:, 2] = torch.arange(8.0).repeat(8)  # rises from left to right
    out = resize_positions(table, 16 * 16, prefix=1)
    assert out.shape == (257, 3) and torch.equal(out[0], table[0])
    assert torch.allclose(out[1:, :2], torch.tensor([1.0, 2.0]).expand(256, 2), atol=1e-5)
    grid = out[1:, 2].view(16, 16)
    assert torch.allclose(grid, grid[:1].expand(16, 16), atol=1e-5)
    assert torch.allclose(grid[0, 5:11], (torch.arange(5.0, 11.0) + 0.5) / 2 - 0.5, atol=1e-4)
    assert resize_positions(table, 64, prefix=1) is table


@pytest.mark.parametrize("value", [0, -1, 15, 17])
def test_check_multiple_names_value_and_divisor(value):
    with pytest.raises(ClipwrightError) as caught:
        check_multiple("image_size", value, 8, "patch")
    assert caught.value.code == "E_CONFIG_VALUE"
    assert f"image_size: {value}" in str(caught.value) and "8 (patch)" in str(caught.value)


def test_check_multiple_offers_the_nearest_sizes():
    check_multiple("image_size", 32, 16)
    with pytest.raises(ClipwrightError, match="use 32 or 48"):
        check_multiple("image_size", 47, 16)
