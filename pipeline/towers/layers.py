"""Blocks and helpers shared by several tower families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError

AnyBlock = TypeVar("AnyBlock", bound=nn.Module)


def quick_gelu(x: Tensor) -> Tensor:
    """Returns x·σ(1.702x), the activation of OpenAI's CLIP weights (model.py of openai/CLIP); 0.845795 at x = 1."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


class Activation(nn.Module):
    """An activation selected by its name in `ACTIVATIONS`, so that a config can name it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a sample's branch with probability `rate`, else scales it by 1/(1−rate).

    Huang et al. 2016, per sample as in timm. The identity in eval mode.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b *shape"]:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1.0 - self.rate) / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate:.3f}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Returns the linear schedule rate·i/(L−1) for the L blocks of a network."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class BlockStack(nn.Sequential, Generic[AnyBlock]):
    """`depth` blocks of one kind, with drop-path rates that rise linearly from 0 to `drop_path`.

    `make_block(drop_path=rate)` builds a block. A call passes further arguments, such as a mask, to every block.
    `Tower.block_list` finds these blocks for activation checkpointing.
    """

    def __init__(self, make_block: Callable[..., AnyBlock], depth: int, drop_path: float = 0.0) -> None:
        super().__init__(*(make_block(drop_path=rate) for rate in drop_path_rates(drop_path, depth)))

    def __iter__(self) -> Iterator[AnyBlock]:
        return cast(Iterator[AnyBlock], super().__iter__())

    def forward(self, input: Float[Tensor, "b *shape"], *context: Any) -> Float[Tensor, "b *shape"]:
        for block in self:
            input = block(input, *context)
        return input


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
        """Initializes matrices Xavier-uniform and biases N(0, 1e-6), as ViT and CoAtNet do."""
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention with biases; the rows of `qkv` are all of q, all of k, all of v, each split into heads.

    Vaswani et al. 2017, section 3.2. `causal`: token i attends to tokens j ≤ i. `mask` (not with `causal`) is true at
    the keys that tokens may attend to; every row needs at least one.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        check_multiple("dim", dim, heads, "heads")
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        q, k, v = split_qkv(self.qkv(x), self.heads)
        keys = None if mask is None else mask[:, None, None]
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, keys, is_causal=self.causal)))

    def init_xavier(self) -> None:
        """Initializes q, k, v and out as separate Xavier-uniform matrices, as Flax's ViT (timm: q, k, v as one)."""
        xavier_qkv(self.qkv)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class Block(nn.Module):
    """Pre-norm transformer block: x += MHSA(LN x); x += MLP(LN x), with a hidden width of round(mlp_ratio·dim)."""

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
        """Initializes as CLIP does in a stack of `depth` blocks: residual branches are scaled down by (2·depth)^-½.

        Matrices as in model.py of openai/CLIP; biases 0 (there the MLP's keep PyTorch's uniform default).
        """
        dim = self.attn.out.in_features
        residual_std = dim**-0.5 * (2 * depth) ** -0.5
        for linear, std in (
            (self.attn.qkv, dim**-0.5),
            (self.attn.out, residual_std),
            (self.mlp.fc1, (2 * dim) ** -0.5),
            (self.mlp.fc2, residual_std),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


# What every block calls uses no einops: torch.compile would trace its parsing of the pattern, 0.1 s or more per call.


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b h n k"]:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "b h n k"]) -> Float[Tensor, "b n d"]:
    return x.transpose(1, 2).flatten(2)


def split_qkv(
    qkv: Float[Tensor, "b n d3"], heads: int
) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b h n k"], Float[Tensor, "b h n k"]]:
    """Splits a fused projection (B, N, 3·D) into q, k and v, each (B, heads, N, D/heads)."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def to_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Flattens a feature map into tokens in row-major order; a view if the map is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(x: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """Undoes `to_tokens` for a map of `grid` = (height, width)."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def xavier_qkv(qkv: nn.Linear) -> None:
    """Initializes each third of a fused projection Xavier-uniform as if it were a separate Linear; bias 0."""
    for matrix in qkv.weight.detach().chunk(3):
        nn.init.xavier_uniform_(matrix)
    nn.init.zeros_(qkv.bias)


def sinusoidal_positions(count: int, dim: int) -> Float[Tensor, "n d"]:
    """Returns PE[p, 2i] = sin(p / 10000^(2i/d)), PE[p, 2i+1] = cos of the same; d must be even.

    Vaswani et al. 2017, section 3.5, with sine and cosine interleaved (tensor2tensor puts all sines first). Computed
    in float64, returned in float32.
    """
    check_multiple("dim", dim, 2, "sine and cosine")
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def resize_positions(table: Float[Tensor, "m d"], count: int, prefix: int) -> Float[Tensor, "n d"]:
    """Resizes a position table to `count` grid tokens; the first `prefix` rows (class tokens) are kept unchanged.

    Both grids are square. Bicubic with antialiasing, align_corners false (ViT's JAX code interpolates linearly).
    """
    head, grid = table[:prefix], table[prefix:]
    if len(grid) == count:
        return table
    old_side, new_side = math.isqrt(len(grid)), math.isqrt(count)
    maps = rearrange(grid.float(), "(h w) d -> 1 d h w", h=old_side)
    maps = F.interpolate(maps, size=(new_side, new_side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([head, rearrange(maps, "1 d h w -> (h w) d").to(table.dtype)])


def check_multiple(field: str, value: int, of: int, reason: str = "") -> None:
    """Raises E_CONFIG_VALUE unless `value` is a positive multiple of `of`; `reason` states where `of` comes from."""
    if value > 0 and value % of == 0:
        return
    nearest = sorted({max(value // of, 1) * of, (max(value, 0) // of + 1) * of})
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        f"the tower does not support this {field}",
        where=f"{field}: {value}",
        found=f"{value} is not a positive multiple of {of}{f' ({reason})' if reason else ''}",
        fix=f"use {' or '.join(map(str, nearest))}",
    )


def check_odd(field: str, value: int) -> None:
    """Raises E_CONFIG_VALUE unless `value`, a kernel size, is odd: an even kernel has no center."""
    if value > 0 and value % 2 == 1:
        return
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        f"the tower does not support this {field}",
        where=f"{field}: {value}",
        found=f"{value} is not a positive odd number",
        fix=f"use {value - 1} or {value + 1}" if value > 0 else "use 1 or more",
    )
