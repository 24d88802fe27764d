"""Self-attention over a grid with learned relative offsets: the transformer blocks of CoAtNet and ViT_REL."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipwright.pipeline.towers.layers import (
    DropPath,
    Mlp,
    merge_heads,
    split_qkv,
    to_map,
    to_tokens,
    xavier_qkv,
)

HEAD_DIM = 32

POOLS = {
    "max2": lambda: nn.MaxPool2d(2),
    "avg2": lambda: nn.AvgPool2d(2),
    "max3": lambda: nn.MaxPool2d(3, 2, padding=1),
}


def relative_index(height: int, width: int) -> Int[Tensor, "n n"]:
    """Returns, for query a and key b, the index of their offset in a table of (2h−1)(2w−1) entries.

    Tokens are row-major: (y_a−y_b+h−1)(2w−1) + (x_a−x_b+w−1). Liu et al. 2021 (Swin), section 3.2; for h = w = 2 the
    row of query 0 is 4, 3, 1, 0.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows = y[:, None] - y[None, :] + height - 1
    return rows * (2 * width - 1) + x[:, None] - x[None, :] + width - 1


class Shortcut(nn.Sequential):
    """The residual path: the identity, or with `pool` a pool and, if the width changes, a 1×1 convolution."""

    def __init__(self, dim: int, out: int, pool: str | None) -> None:
        layers: list[nn.Module] = [POOLS[pool]()] if pool else []
        if pool and dim != out:
            layers.append(nn.Conv2d(dim, out, 1))
        super().__init__(*layers)


class RelativeAttention(nn.Module):
    """Self-attention over a grid, dim → out, with one learned scalar per head and offset.

    Dai et al. 2021 (CoAtNet), equation 3. `relative`: `pre` is softmax(QKᵀ/√32 + w)V; `post` is
    (softmax(QKᵀ/√32) + w)V, not renormalized; `none` leaves w out. The paper's formulas omit scale and projections.
    """

    def __init__(self, dim: int, out: int, grid: tuple[int, int], relative: str) -> None:
        super().__init__()
        self.heads = out // HEAD_DIM
        self.relative = relative
        self.qkv = nn.Linear(dim, 3 * out)
        self.out = nn.Linear(out, out)
        if relative != "none":
            self.relative_table = nn.Parameter(torch.empty(self.heads, (2 * grid[0] - 1) * (2 * grid[1] - 1)))
            self.register_buffer("relative_index", relative_index(*grid), persistent=False)

    def bias(self) -> Float[Tensor, "h n n"]:
        """Returns w[i−j] for every query i and key j."""
        index = self.get_buffer("relative_index")
        return self.relative_table[:, index.flatten()].view(self.heads, *index.shape)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n o"]:
        q, k, v = split_qkv(self.qkv(x), self.heads)
        scores = self.bias().to(q.dtype).unsqueeze(0) if self.relative == "pre" else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        if self.relative == "post":
            y = y + self.bias().to(v.dtype) @ v  # (A + w)V = AV + wV
        return self.out(merge_heads(y))

    def init_weights(self) -> None:
        xavier_qkv(self.qkv)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        if self.relative == "pre":
            nn.init.trunc_normal_(self.relative_table, std=0.02)
        elif self.relative == "post":
            nn.init.zeros_(self.relative_table)  # starts as plain attention


class RelativeBlock(nn.Module):
    """Transformer block on feature maps: P(x) + Attn(Pool(LN x)), then x + MLP(LN x); `grid` is its output grid.

    Dai et al. 2021 (CoAtNet), appendix A.1.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        grid: tuple[int, int],
        pool: str | None,
        relative: str,
        *,
        act: str = "gelu",
        ln_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.shortcut = Shortcut(dim, out, pool)
        self.norm1 = nn.LayerNorm(dim, eps=ln_eps)
        self.pool = POOLS[pool]() if pool else nn.Identity()
        self.attn = RelativeAttention(dim, out, grid, relative)
        self.norm2 = nn.LayerNorm(out, eps=ln_eps)
        self.mlp = Mlp(out, 4 * out, act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        y = self.pool(self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        shortcut = self.shortcut(x)
        x = to_tokens(shortcut) + self.drop_path(self.attn(to_tokens(y)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return to_map(x, (shortcut.shape[2], shortcut.shape[3]))


def resize_relative_tables(state: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
    """Returns `state` with every relative table resized to the size it has in `tower`."""
    own = tower.state_dict()
    return {
        name: resize_relative_table(value, own[name].shape[1]) if name.endswith("relative_table") else value
        for name, value in state.items()
    }


def resize_relative_table(table: Float[Tensor, "h m"], count: int) -> Float[Tensor, "h n"]:
    """Resizes each head's square map of offsets to `count` entries, bilinearly as in Dai et al. 2021."""
    old_side, new_side = math.isqrt(table.shape[1]), math.isqrt(count)
    if old_side == new_side:
        return table
    maps = table.float().view(1, -1, old_side, old_side)
    return F.interpolate(maps, size=(new_side, new_side), mode="bilinear")[0].flatten(1).to(table.dtype)
