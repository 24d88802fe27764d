"""CvT: convolutional token embedding, and attention with depthwise convolutions as query, key and value projections."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import (
    BlockStack,
    DropPath,
    Mlp,
    check_multiple,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)

EMBEDDINGS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding of each stage's embedding convolution
STRIDE = 16


@configclass
class CvTConfig(ImageTowerConfig):
    """A CvT. `image_size` must be a multiple of 16, and dims[i] a multiple of heads[i] for each stage i.

    The original code trains cvt_13 and cvt_21 with drop_path 0.1, and cvt_w24 with 0.3.
    """

    dims: tuple[int, int, int] = (64, 192, 384)
    """Width of each stage."""
    depths: tuple[int, int, int] = (1, 2, 10)
    """Number of blocks of each stage."""
    heads: tuple[int, int, int] = (1, 3, 6)
    """Number of attention heads of each stage."""
    score_scale: Literal["dim", "head"] = "dim"
    """Attention scores are divided by the root of the token width (`dim`, as the original) or of the head width."""
    act: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-5
    """Epsilon of the layer norms."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly within the last stage and are 0 before it."""


class ConvProjection(nn.Module):
    """Feature map → depthwise 3×3 convolution, batch norm, Linear on tokens; class tokens pass the Linear only.

    Wu et al. 2021, section 3.2. The paper has a pointwise convolution, which is the same function of patch tokens.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, cls: Float[Tensor, "b p c"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        y = to_tokens(self.norm(self.conv(x)))
        return self.linear(torch.cat([cls, y], dim=1))


class ConvAttention(nn.Module):
    """Self-attention over `prefix` class tokens and a side×side map; keys and values are on a grid of half the side."""

    def __init__(self, dim: int, heads: int, side: int, prefix: int, score_scale: str) -> None:
        super().__init__()
        check_multiple("dims", dim, heads, "heads")
        self.heads = heads
        self.grid = (side, side)
        self.prefix = prefix
        self.scale = (dim if score_scale == "dim" else dim // heads) ** -0.5
        self.q = ConvProjection(dim, 1)
        self.k = ConvProjection(dim, 2)
        self.v = ConvProjection(dim, 2)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        cls = x[:, : self.prefix]
        maps = to_map(x[:, self.prefix :], self.grid)
        q, k, v = (split_heads(project(cls, maps), self.heads) for project in (self.q, self.k, self.v))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))


class Block(nn.Module):
    """x += ConvAttention(LN x); x += MLP(LN x), hidden width 4·dim."""

    def __init__(self, dim: int, heads: int, side: int, prefix: int, config: CvTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.ln_eps)
        self.attn = ConvAttention(dim, heads, side, prefix, config.score_scale)
        self.norm2 = nn.LayerNorm(dim, eps=config.ln_eps)
        self.mlp = Mlp(dim, 4 * dim, config.act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A strided convolution with overlap, a layer norm, and blocks on the row-major tokens of a side×side map.

    Returns a map; the last stage returns tokens with a class token first.
    """

    def __init__(self, index: int, dim: int, side: int, config: CvTConfig) -> None:
        super().__init__()
        out = config.dims[index]
        last = index == 2
        self.grid = (side, side)
        self.embed = nn.Conv2d(dim, out, *EMBEDDINGS[index])
        self.norm = nn.LayerNorm(out, eps=config.ln_eps)
        self.cls_token = nn.Parameter(torch.empty(out)) if last else None
        make_block = partial(Block, out, config.heads[index], side, int(last), config)
        self.blocks = BlockStack(make_block, config.depths[index], config.drop_path if last else 0.0)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        x = self.norm(to_tokens(self.embed(x)))
        if self.cls_token is None:
            return to_map(self.blocks(x), self.grid)
        return self.blocks(torch.cat([self.cls_token.expand(len(x), 1, -1).to(x.dtype), x], dim=1))


class CvT(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dims[2]), tokens (B, (S/16)², dims[2]).

    Wu et al. 2021 ("CvT"), section 3, and the original code: no positions; the class token is added in the last stage
    and pooled after the final norm. `pooled` does not depend on the last block's queries of patch tokens, so the
    gradient of that query convolution comes from `tokens` only. In training, batch norm makes a sample's output depend
    on its batch.
    """

    no_weight_decay = ("cls_token",)

    def __init__(self, config: CvTConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, STRIDE, "embedding strides 4, 2 and 2")
        self.feature_dim = config.dims[-1]
        self.image_size = config.image_size
        side = config.image_size
        stages: list[Stage] = []
        for i, dim in enumerate((3, *config.dims[:-1])):
            side //= EMBEDDINGS[i][1]
            stages.append(Stage(i, dim, side, config))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.feature_dim, eps=config.ln_eps)
        self.grid = (side, side)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.norm(self.stages(images))
        return TowerOutput(x[:, 0], x[:, 1:], self.grid)

    def _init_weights(self) -> None:
        """Linear weights and class token N(0, 0.02), Linear biases 0; convolutions keep PyTorch's default."""
        for module in self.modules():
            if isinstance(module, Stage) and module.cls_token is not None:
                nn.init.trunc_normal_(module.cls_token, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


IMAGE_TOWERS.add(
    CvTConfig,
    CvT,
    {
        "cvt_nano": {"image_size": 64, "dims": (32, 64, 128), "depths": (1, 2, 3), "heads": (1, 2, 4)},
        "cvt_13": {"depths": (1, 2, 10)},
        "cvt_21": {"depths": (1, 4, 16)},
        "cvt_w24": {"image_size": 384, "dims": (192, 768, 1024), "depths": (2, 2, 20), "heads": (3, 12, 16)},
    },
    source="Wu et al. 2021 and microsoft/CvT; cvt_nano is ours",
)
