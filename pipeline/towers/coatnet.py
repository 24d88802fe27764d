"""CoAtNet: convolution stages, then transformer stages with relative attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import (
    Activation,
    DropPath,
    Mlp,
    check_multiple,
    drop_path_rates,
    merge_heads,
    relative_index,
    split_heads,
    xavier_qkv,
)

HEAD_DIM = 32
EXPANSION = 4


@configclass
class CoAtNetConfig(ImageTowerConfig):
    """A CoAtNet. `image_size` must be a multiple of 32; widths of T stages multiples of 32.

    layout: the kind of stages S1..S4, C = MBConv, T = transformer. relative: a table added to the attention scores
    (`pre`), to the attention weights (`post`), or `none`. stride: MBConv strides in its depthwise (`dw`) or its first
    pointwise (`pw`) convolution; `pw` is what the paper's GMACs count. pool: 2×2 max, 2×2 average or 3×3 max.
    act: GELU exact or by tanh. drop_path: the paper trains variants 0 to 3 on ImageNet-1k with 0.2, 0.3, 0.5, 0.7.
    """

    stem: int = 64
    dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    depths: tuple[int, int, int, int] = (2, 3, 5, 2)
    layout: Literal["CCTT", "CCCT", "CTTT", "CCCC"] = "CCTT"
    relative: Literal["pre", "post", "none"] = "pre"
    stride: Literal["dw", "pw"] = "dw"
    pool: Literal["max2", "avg2", "max3"] = "max2"
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    ln_eps: float = 1e-6
    drop_path: float = 0.0


POOLS = {
    "max2": lambda: nn.MaxPool2d(2),
    "avg2": lambda: nn.AvgPool2d(2),
    "max3": lambda: nn.MaxPool2d(3, 2, padding=1),
}


class SqueezeExcite(nn.Module):
    """Scales channels by σ(W2·SiLU(W1·mean x)). Hu et al. 2018."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        scale = self.fc2(F.silu(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * torch.sigmoid(scale)


class Shortcut(nn.Sequential):
    """P(x): the identity, or where a stage starts a pool and, if the width changes, a 1×1 convolution."""

    def __init__(self, dim: int, out: int, pool: str | None) -> None:
        layers: list[nn.Module] = [POOLS[pool]()] if pool else []
        if pool and dim != out:
            layers.append(nn.Conv2d(dim, out, 1))
        super().__init__(*layers)


class MBConv(nn.Module):
    """P(x) + W3·SE(GELU(BN(dw(GELU(BN(W1·BN(x))))))), hidden width 4·out, SE width ⌊out/4⌋.

    Dai et al. 2021, appendix A.1. Expansion and SE count from the output width, no norm after W3.
    """

    def __init__(
        self, dim: int, out: int, pool: str | None, stride: str, *, act: str = "gelu", drop_path: float = 0.0
    ) -> None:
        super().__init__()
        hidden = EXPANSION * out
        pw_stride = 2 if pool and stride == "pw" else 1
        dw_stride = 2 if pool and stride == "dw" else 1
        self.shortcut = Shortcut(dim, out, pool)
        self.norm = nn.BatchNorm2d(dim)
        self.expand = nn.Conv2d(dim, hidden, 1, pw_stride, bias=False)
        self.norm_expand = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, dw_stride, padding=1, groups=hidden, bias=False)
        self.norm_depthwise = nn.BatchNorm2d(hidden)
        self.squeeze = SqueezeExcite(hidden, out // 4)
        self.project = nn.Conv2d(hidden, out, 1)
        self.act = Activation(act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        y = self.act(self.norm_expand(self.expand(self.norm(x))))
        y = self.act(self.norm_depthwise(self.depthwise(y)))
        return self.shortcut(x) + self.drop_path(self.project(self.squeeze(y)))


class RelativeAttention(nn.Module):
    """Self-attention over a grid, dim → out, with one learned scalar per head and offset.

    Dai et al. 2021, equation 3. pre: softmax(QKᵀ/√32 + w)V; post: (softmax(QKᵀ/√32) + w)V, not renormalised. The
    paper's formulas leave out scale and projections.
    """

    def __init__(self, dim: int, out: int, grid: tuple[int, int], relative: str) -> None:
        super().__init__()
        self.heads, self.relative = out // HEAD_DIM, relative
        self.qkv = nn.Linear(dim, 3 * out)
        self.out = nn.Linear(out, out)
        if relative != "none":
            self.relative_table = nn.Parameter(torch.empty(self.heads, (2 * grid[0] - 1) * (2 * grid[1] - 1)))
            self.register_buffer("relative_index", relative_index(*grid), persistent=False)

    def bias(self) -> Float[Tensor, "h n n"]:
        """w[i−j] for every query i and key j."""
        index = self.get_buffer("relative_index")
        return self.relative_table[:, index.flatten()].view(self.heads, *index.shape)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n o"]:
        q, k, v = split_heads(self.qkv(x), self.heads)
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
            nn.init.zeros_(self.relative_table)  # plain attention at the start


class Transformer(nn.Module):
    """P(x) + Attn(Pool(LN x)), then x + FFN(LN x), on maps; `grid` is the block's output grid."""

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
        return x.transpose(1, 2).unflatten(2, shortcut.shape[2:])


def to_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    return x.flatten(2).transpose(1, 2)


class CoAtNet(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dims[3]), tokens (B, (S/32)², dims[3]).

    Dai et al. 2021 ("CoAtNet"), section 2 and appendix A.1. No code was published; where the paper is silent the
    choices are: 2×2 max pooling, stride in the depthwise convolution, LayerNorm at each position and then the mean, no
    hidden head layer. Parameters come out 2.2 % below the published ones at most. Batch norm couples the samples of a
    batch in training.
    """

    no_weight_decay = ("relative_table",)

    def __init__(self, config: CoAtNetConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, 32, "five stages of stride 2")
        self.feature_dim, self.image_size = config.dims[-1], config.image_size
        self.stem = nn.Sequential(
            nn.Conv2d(3, config.stem, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(config.stem),
            Activation(config.act),
            nn.Conv2d(config.stem, config.stem, 3, padding=1, bias=False),
        )
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        dim, side = config.stem, config.image_size // 2
        stages: list[nn.Module] = []
        for kind, out, depth in zip(config.layout, config.dims, config.depths, strict=True):
            side //= 2
            blocks: list[nn.Module] = []
            for i in range(depth):
                pool, branch = config.pool if i == 0 else None, {"act": config.act, "drop_path": next(rates)}
                if kind == "C":
                    blocks.append(MBConv(dim, out, pool, config.stride, **branch))
                else:
                    check_multiple("dims", out, HEAD_DIM, "the size of a head")
                    grid = (side, side)
                    blocks.append(Transformer(dim, out, grid, pool, config.relative, ln_eps=config.ln_eps, **branch))
                dim = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.stages(self.stem(images))
        tokens = self.norm(to_tokens(x))
        return TowerOutput(tokens.mean(dim=1), tokens, (x.shape[2], x.shape[3]))

    def block_list(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return resize_tables(state, self)

    def _init_weights(self) -> None:
        """Convolutions N(0, √(2/fan_out)), transformer matrices Xavier-uniform, biases 0, MLP biases N(0, 1e-6)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RelativeAttention):
                module.init_weights()
            elif isinstance(module, Mlp):
                module.init_xavier()


def resize_tables(state: dict[str, Tensor], tower: ImageTower) -> dict[str, Tensor]:
    """`state` with every relative table at the size that `tower` has."""
    own = tower.state_dict()
    return {
        name: resize_table(value, own[name].shape[1]) if name.endswith("relative_table") else value
        for name, value in state.items()
    }


def resize_table(table: Float[Tensor, "h m"], count: int) -> Float[Tensor, "h n"]:
    """Each head's square map of offsets, resized bilinearly to `count` entries, as the paper does."""
    old, new = math.isqrt(table.shape[1]), math.isqrt(count)
    if old == new:
        return table
    maps = table.float().view(1, -1, old, old)
    return F.interpolate(maps, size=(new, new), mode="bilinear")[0].flatten(1).to(table.dtype)


VARIANTS = {
    "coatnet_0": {"stem": 64, "dims": (96, 192, 384, 768), "depths": (2, 3, 5, 2)},
    "coatnet_1": {"stem": 64, "dims": (96, 192, 384, 768), "depths": (2, 6, 14, 2)},
    "coatnet_2": {"stem": 128, "dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2)},
    "coatnet_3": {"stem": 192, "dims": (192, 384, 768, 1536), "depths": (2, 6, 14, 2)},
    "coatnet_4": {"stem": 192, "dims": (192, 384, 768, 1536), "depths": (2, 12, 28, 2)},
}

IMAGE_TOWERS.add(
    CoAtNetConfig,
    CoAtNet,
    {
        "coatnet_nano": {"image_size": 64, "stem": 24, "dims": (32, 64, 128, 192), "depths": (1, 2, 2, 1)},
        **VARIANTS,
        # The paper's other layouts at the same widths and depths; those of equal parameters were not published.
        **{
            f"{name}_{layout.lower()}": {**fields, "layout": layout}
            for name, fields in VARIANTS.items()
            for layout in ("CCCT", "CTTT", "CCCC")
        },
    },
    source="Dai et al. 2021; coatnet_nano is ours",
)
