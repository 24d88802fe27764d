"""Swin: attention within windows that shift between blocks, on maps that halve between stages."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
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
    resize_positions,
    to_tokens,
)
from clipwright.pipeline.towers.relative_attention import relative_index

PATCH = 4
STRIDE = 8 * PATCH  # three patch mergings


@configclass
class SwinConfig(ImageTowerConfig):
    """A Swin. `image_size` must be a multiple of 32, and dim·2^i a multiple of heads[i] for each stage i.

    The grid of each stage (image_size/4, halved three times) must be a multiple of `window` or fit into one window,
    unless `pad` is set. The paper trains tiny, small and base on ImageNet-1k with drop_path 0.2, 0.3, 0.5.
    """

    dim: int = 96
    """Width of the first stage; doubles with each stage."""
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    """Number of blocks of each stage."""
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    """Number of attention heads of each stage."""
    window: int = 7
    """Side of an attention window in tokens."""
    pad: bool = False
    """Pad grids that the windows do not divide, and mask the padding."""
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-5
    """Epsilon of the layer norms."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class WindowAttention(nn.Module):
    """Self-attention within the M×M windows of a side×side map, plus one learned scalar per head and offset.

    Liu et al. 2021, section 3.2: softmax(QKᵀ/√d_h + B)V. A window larger than the map is reduced to the map. `shift`
    moves the windows by ⌊M/2⌋ cells, unless one window covers the map: the map is rolled, and a mask (−inf where the
    original adds −100) separates cells that are neighbors only because of the roll. Cells that pad a map which M does
    not divide are masked too.
    """

    def __init__(self, dim: int, heads: int, side: int, window: int, *, shift: bool) -> None:
        super().__init__()
        check_multiple("dim", dim, heads, "heads")
        self.heads = heads
        self.side = side
        self.window = min(window, side)
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
        """Returns the bias of attention scores: wh = heads without masks, else windows·heads."""
        index = self.get_buffer("relative_index")
        bias = self.relative_table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)  # (heads, query, key)
        if not self.masked:
            return bias[None]
        return (bias + self.get_buffer("mask")[:, None]).flatten(0, 1)[None]

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x.unflatten(1, (self.side, self.side))
        padding = self.padded - self.side
        if padding:
            x = F.pad(x, (0, 0, 0, padding, 0, padding))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        m, g = self.window, self.padded // self.window
        # Axes: image, window row, row in it, window column, column in it, qkv, head, channel. The permutation brings
        # the cells of a window together.
        qkv = self.qkv(x).view(-1, g, m, g, m, 3, self.heads, x.shape[3] // self.heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
        # Without masks all windows have the same scores and join the batch. Otherwise they join the heads, so that the
        # scores are not repeated for every image.
        scores = self.scores().to(qkv.dtype)
        q, k, v = qkv.reshape(3, -1, scores.shape[1], m * m, qkv.shape[7]).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        y = y.reshape(qkv.shape[1:]).permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        return self.out(y[:, : self.side, : self.side].flatten(1, 2))


def window_mask(side: int, padded: int, window: int, shift: int) -> Float[Tensor, "w n n"]:
    """Returns, per window of the rolled padded×padded map, 0 where a query attends to a key and −inf elsewhere.

    A query attends to the real cells of its window before the roll, and to itself, so that no row is all −inf.
    """
    cell = (torch.arange(padded) + shift) % padded  # the original coordinate at each position of the rolled map
    label = torch.where(cell < side, (cell - shift) // window, -2)  # its window; −1 before the first, −2 for padding
    rows, columns = torch.meshgrid(label, label, indexing="ij")
    row = rearrange(rows, "(gy my) (gx mx) -> (gy gx) (my mx)", my=window, mx=window)
    column = rearrange(columns, "(gy my) (gx mx) -> (gy gx) (my mx)", my=window, mx=window)
    visible = (row[:, :, None] == row[:, None]) & (column[:, :, None] == column[:, None])
    visible &= ((row > -2) & (column > -2))[:, None]
    visible |= torch.eye(window**2, dtype=torch.bool)
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


class Block(nn.Module):
    """x += WindowAttention(LN x); x += MLP(LN x) with a hidden width of 4·dim, on row-major tokens."""

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
    """Merges 2×2 cells into one: W·LN([x_00; x_10; x_01; x_11]), x_rc the cell in row r and column c; W has no bias.

    The row varies fastest, as in the original code; published weights depend on this order.
    """

    def __init__(self, dim: int, side: int, ln_eps: float) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim, eps=ln_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n4 c2"]:
        half = self.side // 2
        x = rearrange(x, "b (y row x column) c -> b (y x) (column row c)", y=half, row=2, x=half, column=2)
        return self.reduction(self.norm(x))


class Swin(ImageTower):
    """Images (B, 3, S, S) → pooled (B, 8·dim), tokens (B, (S/32)², 8·dim).

    Liu et al. 2021 ("Swin transformer"), section 3, without absolute positions. Patch merging ends a stage, as in the
    original code. Differences: an image size that the windows do not divide is rejected unless `pad` is set, and
    padding is masked. Tables of another window size are resized bicubically.
    """

    no_weight_decay = ("relative_table",)

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, STRIDE, "patches of 4 and three patch mergings")
        if not config.pad:
            check_windows(config.image_size, config.window)
        self.feature_dim = 8 * config.dim
        self.image_size = config.image_size
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
        x = self.patch_norm(to_tokens(self.patch_embed(images)))
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
    """Raises E_CONFIG_VALUE unless the grid of every stage is a multiple of the window or fits into one window."""

    def unsupported_side(size: int) -> int:
        sides = [size // PATCH >> stage for stage in range(4)]
        return next((side for side in sides if side > window and side % window), 0)

    side = unsupported_side(image_size)
    if not side:
        return
    candidates = range(STRIDE, image_size + STRIDE * window + 1, STRIDE)
    supported = [size for size in candidates if not unsupported_side(size)]
    smaller = [size for size in supported if size < image_size][-1:]
    larger = [size for size in supported if size > image_size][:1]
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        "the tower does not support this image_size",
        where=f"image_size: {image_size}",
        found=f"a stage's grid of {side}×{side} is neither a multiple of window {window} nor fits into one",
        fix=f"use {' or '.join(map(str, smaller + larger))}, or pad: true",
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
