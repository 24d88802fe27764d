"""CvT: tokens embedded by convolutions, attention whose queries, keys and values come from depthwise convolutions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import DropPath, Mlp, check_multiple, drop_path_rates, merge_heads

EMBEDDINGS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding of each stage's convolution
STRIDE = 16


@configclass
class CvTConfig(ImageTowerConfig):
    """A CvT. `image_size` must be a multiple of 16; dims[i] of heads[i], where i counts the stages.

    score_scale: what scores are divided by the root of, a token's width (`dim`, the original code and its weights) or
    a head's (`head`). drop_path: reached at the end of the last stage, the only one that drops; the original code
    trains cvt_13 and cvt_21 with 0.1, cvt_w24 with 0.3.
    """

    dims: tuple[int, int, int] = (64, 192, 384)
    depths: tuple[int, int, int] = (1, 2, 10)
    heads: tuple[int, int, int] = (1, 3, 6)
    score_scale: Literal["dim", "head"] = "dim"
    act: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    ln_eps: float = 1e-5
    drop_path: float = 0.0


class ConvProjection(nn.Module):
    """Tokens of a map → depthwise 3×3 convolution, batch norm, tokens → Linear; a class token takes the Linear only.

    Wu et al. 2021, section 3.2, which has a pointwise convolution for the Linear: the same function of patch tokens.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, cls: Float[Tensor, "b p c"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.linear(torch.cat([cls, y], dim=1))


class ConvAttention(nn.Module):
    """Self-attention over `prefix` class tokens and a side×side map; keys and values lie on a grid of half the side."""

    def __init__(self, dim: int, heads: int, side: int, prefix: int, score_scale: str) -> None:
        super().__init__()
        check_multiple("dims", dim, heads, "heads")
        self.heads, self.side, self.prefix = heads, side, prefix
        self.scale = (dim if score_scale == "dim" else dim // heads) ** -0.5
        self.q = ConvProjection(dim, 1)
        self.k = ConvProjection(dim, 2)
        self.v = ConvProjection(dim, 2)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        cls = x[:, : self.prefix]
        maps = to_map(x[:, self.prefix :], self.side)
        q, k, v = (
            project(cls, maps).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))


class Block(nn.Module):
    """x += ConvAttention(LN x); x += MLP(LN x), hidden width 4·dim."""

    def __init__(self, attn: ConvAttention, config: CvTConfig, drop_path: float) -> None:
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


class Stage(nn.Module):
    """A strided convolution with overlap, a norm over channels, blocks on the row-major tokens of a side×side map.

    Map in, map out; in the last stage tokens out, a class token before them.
    """

    def __init__(self, index: int, dim: int, side: int, config: CvTConfig) -> None:
        super().__init__()
        out, depth, last = config.dims[index], config.depths[index], index == 2
        self.side = side
        self.embed = nn.Conv2d(dim, out, *EMBEDDINGS[index])
        self.norm = nn.LayerNorm(out, eps=config.ln_eps)
        self.cls_token = nn.Parameter(torch.empty(out)) if last else None
        blocks: list[nn.Module] = []
        for rate in drop_path_rates(config.drop_path if last else 0.0, depth):
            attn = ConvAttention(out, config.heads[index], side, prefix=int(last), score_scale=config.score_scale)
            blocks.append(Block(attn, config, rate))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        x = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        if self.cls_token is None:
            return to_map(self.blocks(x), self.side)
        return self.blocks(torch.cat([self.cls_token.expand(len(x), 1, -1).to(x.dtype), x], dim=1))


class CvT(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dims[2]), tokens (B, (S/16)², dims[2]).

    Wu et al. 2021 ("CvT"), section 3, and the original code: no positions, a class token in the last stage only, which
    is pooled after the final norm. The last block convolves queries for patch tokens that `pooled` never sees: that
    convolution's gradient comes from `tokens` alone. Batch norm couples the samples of a batch in training.
    """

    no_weight_decay = ("cls_token",)

    def __init__(self, config: CvTConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, STRIDE, "the embeddings' strides 4, 2 and 2")
        self.feature_dim, self.image_size = config.dims[-1], config.image_size
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

    def block_list(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def _init_weights(self) -> None:
        """Linear weights and class token N(0, 0.02), their biases 0; convolutions keep PyTorch's default."""
        for module in self.modules():
            if isinstance(module, Stage) and module.cls_token is not None:
                nn.init.trunc_normal_(module.cls_token, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def to_map(x: Float[Tensor, "b n c"], side: int) -> Float[Tensor, "b c h w"]:
    return x.transpose(1, 2).unflatten(2, (side, side))


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
