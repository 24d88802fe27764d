"""Swin: attention within windows that shift from block to block, on maps that are halved from stage to stage."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import (
    DropPath,
    Mlp,
    check_multiple,
    drop_path_rates,
    relative_index,
    resize_positions,
)

PATCH = 4
STRIDE = 8 * PATCH  # three mergings


@configclass
class SwinConfig(ImageTowerConfig):
    """A Swin. `image_size` must be a multiple of 32; dim·2^i of heads[i], where i counts the stages.

    Every stage's grid (image_size/4, halved three times) must be a multiple of `window` or fit into one, unless `pad`
    fills it up with cells that no query sees. drop_path: the paper trains tiny, small and base on ImageNet-1k with
    0.2, 0.3, 0.5.
    """

    dim: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window: int = 7
    pad: bool = False
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    ln_eps: float = 1e-5
    drop_path: float = 0.0


class WindowAttention(nn.Module):
    """Self-attention within the M×M windows of a side×side map, plus one learned scalar per head and offset.

    Liu et al. 2021, section 3.2: softmax(QKᵀ/√d_h + B)V. A window larger than the map becomes the map. `shift` moves
    the windows by ⌊M/2⌋ cells, unless one holds the whole map: the map is rolled by that much, and a mask keeps cells
    apart that only the rolling has brought together (−inf where the original adds −100). Masked as well are the cells
    that fill up a map which M does not divide.
    """

    def __init__(self, dim: int, heads: int, side: int, window: int, *, shift: bool) -> None:
        super().__init__()
        check_multiple("dim", dim, heads, "heads")
        self.heads, self.side, self.window = heads, side, min(window, side)
        self.shift = self.window // 2 if shift and side > window else 0
        self.padded = -(-side // self.window) * self.window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.relative_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, heads))
        self.register_buffer("relative_index", relative_index(self.window, self.window), persistent=False)
        self.masked = self.shift > 0 or self.padded > side
        if self.masked:
            self.register_buffer("mask", window_mask(side, self.padded, self.window, self.shift), persistent=False)
        nn.init.trunc_normal_(self.relative_table, std=0.02)

    def scores(self) -> Float[Tensor, "1 wh n n"]:
        """What is added to the scores of every window and head: wh = heads if all windows are alike, else all."""
        index = self.get_buffer("relative_index")
        bias = self.relative_table[index.flatten()].view(*index.shape, self.heads).permute(2, 0, 1)
        if not self.masked:
            return bias[None]
        return (bias + self.get_buffer("mask")[:, None]).flatten(0, 1)[None]

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        b, n, c = x.shape
        x = x.view(b, self.side, self.side, c)
        fill = self.padded - self.side
        if fill:
            x = F.pad(x, (0, 0, 0, fill, 0, fill))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        # Windows with scores alike are a batch; windows whose masks differ are heads, so that no mask is repeated.
        m, g = self.window, self.padded // self.window
        qkv = self.qkv(x).view(b, g, m, g, m, 3, self.heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        scores = self.scores().to(qkv.dtype)
        q, k, v = qkv.reshape(3, -1, scores.shape[1], m * m, c // self.heads).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        y = y.reshape(b, g, g, self.heads, m, m, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        return self.out(y[:, : self.side, : self.side].reshape(b, n, c))


def window_mask(side: int, padded: int, window: int, shift: int) -> Float[Tensor, "w n n"]:
    """0 where a query of a window sees a key, −inf where not, for each window of the rolled padded×padded map.

    A query sees the real cells that were its window's before the rolling, and itself, so that no row is all −inf.
    """
    cell = (torch.arange(padded) + shift) % padded  # the cell that the rolling has brought to each place
    label = torch.where(cell < side, (cell - shift) // window, -2)  # its window; −1: of the strip before the first
    g = padded // window
    row, column = (
        part.view(g, window, g, window).transpose(1, 2).reshape(g * g, -1)
        for part in torch.meshgrid(label, label, indexing="ij")
    )
    seen = (row[:, :, None] == row[:, None]) & (column[:, :, None] == column[:, None])
    seen &= ((row > -2) & (column > -2))[:, None]
    seen |= torch.eye(window**2, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


class Block(nn.Module):
    """x += WindowAttention(LN x); x += MLP(LN x), hidden width 4·dim, on row-major tokens."""

    def __init__(self, attn: WindowAttention, config: SwinConfig, drop_path: float) -> None:
        super().__init__()
        dim = attn.out.in_features
        self.norm1 = nn.LayerNorm(dim, eps=config.ln_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=config.ln_eps)
        self.mlp = Mlp(dim, 4 * dim, config.act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """2×2 cells become one: W·LN([x_00; x_10; x_01; x_11]), x_rc the cell in row r and column c; W without bias.

    Rows before columns as in the original code, which weights depend on.
    """

    def __init__(self, dim: int, side: int, ln_eps: float) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim, eps=ln_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n4 c2"]:
        half = self.side // 2
        x = x.view(len(x), half, 2, half, 2, -1).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(len(x), half * half, -1)))


class Swin(ImageTower):
    """Images (B, 3, S, S) → pooled (B, 8·dim), tokens (B, (S/32)², 8·dim).

    Liu et al. 2021 ("Swin transformer"), section 3; no absolute positions. Merging ends a stage as in the original
    code. We differ: an image that the windows do not divide is refused, or `pad` masks what fills it up. Tables of
    another window are resized bicubically.
    """

    no_weight_decay = ("relative_table",)

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, STRIDE, "patches of 4 and three mergings")
        if not config.pad:
            check_windows(config.image_size, config.window)
        self.feature_dim, self.image_size = 8 * config.dim, config.image_size
        side, dim = config.image_size // PATCH, config.dim
        self.patch_embed = nn.Conv2d(3, dim, PATCH, PATCH)
        self.patch_norm = nn.LayerNorm(dim, eps=config.ln_eps)
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        stages: list[nn.Module] = []
        for i, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            layers: list[nn.Module] = []
            for j in range(depth):
                attn = WindowAttention(dim, heads, side, config.window, shift=j % 2 == 1)
                layers.append(Block(attn, config, next(rates)))
            if i < 3:
                layers.append(PatchMerging(dim, side, config.ln_eps))
                side, dim = side // 2, 2 * dim
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dim, eps=config.ln_eps)
        self.grid = (side, side)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.patch_norm(self.patch_embed(images).flatten(2).transpose(1, 2))
        tokens = self.norm(self.stages(x))
        return TowerOutput(tokens.mean(dim=1), tokens, self.grid)

    def block_list(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.state_dict()
        return {
            name: resize_positions(value, len(own[name]), prefix=0) if name.endswith("relative_table") else value
            for name, value in state.items()
        }


def check_windows(image_size: int, window: int) -> None:
    """E_CONFIG_VALUE unless every stage's grid is a multiple of the window or fits into one."""

    def misfit(size: int) -> int:
        sides = [size // PATCH >> i for i in range(4)]
        return next((side for side in sides if side > window and side % window), 0)

    found = misfit(image_size)
    if not found:
        return
    fitting = [size for size in range(STRIDE, image_size + STRIDE * window + 1, STRIDE) if not misfit(size)]
    near = [max((s for s in fitting if s < image_size), default=0), min(s for s in fitting if s > image_size)]
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        "a tower cannot have this image_size",
        where=f"image_size: {image_size}",
        found=f"a stage's grid of {found}×{found} is neither a multiple of window {window} nor fits into one",
        fix=f"use {' or '.join(str(size) for size in near if size)}, or pad: true",
    )


SMALL = {"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)}
BASE = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
LARGE = {"dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)}

IMAGE_TOWERS.add(
    SwinConfig,
    Swin,
    {
        "swin_nano": {"image_size": 64, "dim": 18, "depths": (2, 2, 4, 2), "heads": (1, 2, 3, 6), "window": 4},
        "swin_tiny_window7": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
        "swin_small_window7": SMALL,
        "swin_base_window7": BASE,
        "swin_large_window7": LARGE,
        "swin_base_window12": {"image_size": 384, "window": 12, **BASE},
        "swin_large_window12": {"image_size": 384, "window": 12, **LARGE},
    },
    source="Liu et al. 2021; swin_nano is ours",
)
