"""CLIP's modified ResNet: a stem of three convolutions, average pools instead of strides, attention pooling."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import check_multiple, resize_positions, split_heads, to_tokens

EXPANSION = 4


@configclass
class CLIPResNetConfig(ImageTowerConfig):
    """CLIP's ResNet. `image_size` must be a multiple of 4·stem_stride·last_stride (32 as published)."""

    family: ClassVar[str] = "clip"

    projection: Literal["linear", "none"] = "none"
    """Projection of the pooled output to the embedding; none by default: the attention pool already contains it."""
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Number of blocks of each stage."""
    planes: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Bottleneck width of each stage, which outputs 4·planes channels."""
    stem_stride: Literal[2, 4] = 4
    """Stride of the stem; 2 leaves out its average pool."""
    last_stride: Literal[1, 2] = 2
    """Stride of the last stage."""
    out_dim: int = 1024
    """Output width of the attention pool."""


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """1×1 and 3×3 convolution, average pool, 1×1; the shortcut pools too. All convolutions have stride 1."""

    def __init__(self, dim: int, planes: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * planes
        self.conv1 = ConvNorm(dim, planes, 1)
        self.conv2 = ConvNorm(planes, planes, 3)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = ConvNorm(planes, out, 1)
        nn.init.zeros_(self.conv3.norm.weight)
        self.shortcut = nn.Sequential(self.pool, ConvNorm(dim, out, 1)) if stride > 1 or dim != out else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv3(self.pool(y)) + self.shortcut(x))


class AttentionPool(nn.Module):
    """Attention with the mean token as the only query and the mean and grid tokens as keys; learned positions."""

    def __init__(self, dim: int, out: int, heads: int, tokens: int) -> None:
        super().__init__()
        check_multiple("planes", dim, heads, "heads of the attention pool")
        self.heads = heads
        self.pos_embed = nn.Parameter(torch.empty(tokens + 1, dim))
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, out)
        nn.init.normal_(self.pos_embed, std=dim**-0.5)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.normal_(linear.weight, std=dim**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b d"]:
        x = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.pos_embed
        q = split_heads(self.q(x[:, :1]), self.heads)
        k = split_heads(self.k(x), self.heads)
        v = split_heads(self.v(x), self.heads)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class CLIPResNet(ImageTower):
    """Images (B, 3, S, S) → pooled (B, out_dim), tokens (B, N, 4·planes[3]).

    Radford et al. 2021, section 2.4. The pool has planes[0]/2 heads, 32 as published. Tokens are the grid before the
    pool adds its positions; they are wider than pooled (`token_dim`). The pool's weights are initialized N(0, D^-½)
    with zero biases, and the scale of each block's last batch norm with 0, so that a block starts as its shortcut.
    """

    no_weight_decay = ("pos_embed",)

    def __init__(self, config: CLIPResNetConfig) -> None:
        super().__init__()
        reduction = 4 * config.stem_stride * config.last_stride
        check_multiple("image_size", config.image_size, reduction, "the tower's stride")
        self.feature_dim = config.out_dim
        self.image_size = config.image_size
        side = config.image_size // reduction
        self.grid = (side, side)
        width = config.planes[0]
        self.stem = nn.Sequential(
            ConvNorm(3, width // 2, 3, 2),
            nn.ReLU(),
            ConvNorm(width // 2, width // 2, 3),
            nn.ReLU(),
            ConvNorm(width // 2, width, 3),
            nn.ReLU(),
            nn.AvgPool2d(2) if config.stem_stride == 4 else nn.Identity(),
        )
        dim = width
        stages: list[nn.Module] = []
        for planes, depth, stride in zip(config.planes, config.layers, (1, 2, 2, config.last_stride), strict=True):
            blocks: list[nn.Module] = []
            for i in range(depth):
                blocks.append(Bottleneck(dim, planes, stride if i == 0 else 1))
                dim = EXPANSION * planes
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = AttentionPool(dim, config.out_dim, width // 2, side * side)
        self._token_dim = dim

    @property
    def token_dim(self) -> int:
        return self._token_dim

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        tokens = to_tokens(self.stages(self.stem(images)))
        return TowerOutput(self.pool(tokens), tokens, self.grid)

    def block_list(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        count = self.grid[0] * self.grid[1]
        return {**state, "pool.pos_embed": resize_positions(state["pool.pos_embed"], count, prefix=1)}


IMAGE_TOWERS.add(
    CLIPResNetConfig,
    CLIPResNet,
    {
        "clip_rn_nano": {
            "image_size": 64,
            "layers": (1, 1, 1, 1),
            "planes": (32, 64, 128, 128),
            "last_stride": 1,
            "out_dim": 256,
            "projection": "linear",
        },
        "clip_rn50": {"layers": (3, 4, 6, 3), "out_dim": 1024},
        "clip_rn101": {"layers": (3, 4, 23, 3), "out_dim": 512},
    },
    source="Radford et al. 2021 and openai/CLIP; clip_rn_nano is ours",
)
