"""Blocks and helpers that several tower families share verbatim."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702x), the activation of OpenAI's CLIP weights (its model.py); 0.845795 at 1."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


class Activation(nn.Module):
    """An activation by its name in `ACTIVATIONS`, so that a config can state it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is dropped with probability `rate` and else scaled by 1/(1−rate).

    Huang et al. 2016, per sample as in timm; the identity in eval mode.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1.0 - self.rate) / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate:.3f}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The linear schedule rate·i/(L−1) over the L blocks of a network."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class Mlp(nn.Module):
    """W2·act(W1·x), both with bias."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = Activation(act)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(self.act(self.fc1(x)))

    def init_xavier(self) -> None:
        """Matrices Xavier-uniform, biases N(0, 1e-6), as ViT and CoAtNet do."""
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention with biases; rows of `qkv` are all q, all k, all v, heads contiguous inside each.

    Vaswani et al. 2017, section 3.2. `causal`: token i sees tokens j ≤ i. `mask` (not with `causal`): the keys that
    any token may see; at least one a row.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        check_multiple("dim", dim, heads, "heads")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        q, k, v = split_heads(self.qkv(x), self.heads)
        keys = None if mask is None else mask[:, None, None]
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, keys, is_causal=self.causal)))

    def init_xavier(self) -> None:
        """q, k, v and out each Xavier-uniform as a d×d matrix of its own (Flax's ViT; timm bounds the fused one)."""
        xavier_qkv(self.qkv)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class Block(nn.Module):
    """Pre-norm transformer block: x += MHSA(LN x); x += MLP(LN x), hidden width mlp_ratio·dim, rounded."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        act: str = "gelu",
        ln_eps: float = 1e-6,
        drop_path: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=ln_eps)
        self.attn = Attention(dim, heads, causal=causal)
        self.norm2 = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = Mlp(dim, round(mlp_ratio * dim), act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def init_xavier(self) -> None:
        self.attn.init_xavier()
        self.mlp.init_xavier()

    def init_clip(self, depth: int) -> None:
        """CLIP's scheme in a stack of `depth` blocks: what feeds the residual stream shrinks by (2·depth)^-½.

        Matrices as in OpenAI's model.py; biases 0 (there the MLP's keep PyTorch's uniform default).
        """
        dim = self.attn.out.in_features
        residual = dim**-0.5 * (2 * depth) ** -0.5
        for linear, std in (
            (self.attn.qkv, dim**-0.5),
            (self.attn.out, residual),
            (self.mlp.fc1, (2 * dim) ** -0.5),
            (self.mlp.fc2, residual),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


def split_heads(qkv: Float[Tensor, "b n d3"], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3·D) → q, k, v, each (B, heads, N, D/heads)."""
    b, n, d3 = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, d3 // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merge_heads(x: Float[Tensor, "b h n k"]) -> Float[Tensor, "b n d"]:
    """(B, heads, N, D/heads) → (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


def xavier_qkv(qkv: nn.Linear) -> None:
    """Xavier-uniform on each third of a fused projection as if it were a Linear of its own; bias 0."""
    for part in qkv.weight.detach().chunk(3):
        nn.init.xavier_uniform_(part)
    nn.init.zeros_(qkv.bias)


def sinusoidal_positions(count: int, dim: int) -> Float[Tensor, "n d"]:
    """PE[p, 2i] = sin(p / 10000^(2i/d)), PE[p, 2i+1] = cos of the same: Vaswani et al. 2017, section 3.5; d even.

    Sine and cosine are interleaved (tensor2tensor has all sines first). Computed in float64.
    """
    check_multiple("dim", dim, 2, "sine and cosine")
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def relative_index(height: int, width: int) -> Int[Tensor, "n n"]:
    """Place in a ((2h−1)(2w−1)) table of the offset between query a and key b, tokens row-major.

    (y_a−y_b+h−1)(2w−1) + (x_a−x_b+w−1): Swin, section 3.2; for h = w = 2 the row of query 0 is 4, 3, 1, 0.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows = y[:, None] - y[None, :] + height - 1
    return rows * (2 * width - 1) + x[:, None] - x[None, :] + width - 1


def resize_positions(table: Float[Tensor, "m d"], count: int, prefix: int) -> Float[Tensor, "n d"]:
    """A position table for `count` grid tokens: the first `prefix` rows are kept, the square rest is resized.

    Bicubic with antialiasing, align_corners false (ViT's JAX code zooms linearly).
    """
    head, grid = table[:prefix], table[prefix:]
    if len(grid) == count:
        return table
    old, new = math.isqrt(len(grid)), math.isqrt(count)
    maps = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([head, maps[0].flatten(1).T.to(table.dtype)])


def check_multiple(field: str, value: int, of: int, unit: str = "") -> None:
    """E_CONFIG_VALUE unless `value` is a positive multiple of `of`; `unit` says where `of` comes from."""
    if value > 0 and value % of == 0:
        return
    near = sorted({max(value // of, 1) * of, (max(value, 0) // of + 1) * of})
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        f"a tower cannot have this {field}",
        where=f"{field}: {value}",
        found=f"{value} is not a positive multiple of {of}{f' ({unit})' if unit else ''}",
        fix=f"use {' or '.join(map(str, near))}",
    )
