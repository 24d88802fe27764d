"""CoAtNet: convolution stages followed by transformer stages with relative attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Activation, DropPath, Mlp, check_multiple, drop_path_rates, to_tokens
from clipwright.pipeline.towers.relative_attention import (
    HEAD_DIM,
    RelativeAttention,
    RelativeBlock,
    Shortcut,
    resize_relative_tables,
)

EXPANSION = 4


@configclass
class CoAtNetConfig(ImageTowerConfig):
    """A CoAtNet. `image_size` must be a multiple of 32, and the widths of transformer stages multiples of 32.

    The paper trains variants 0 to 3 on ImageNet-1k with drop_path 0.2, 0.3, 0.5, 0.7.
    """

    stem: int = 64
    """Channels of the stem."""
    dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    """Width of each stage S1 to S4."""
    depths: tuple[int, int, int, int] = (2, 3, 5, 2)
    """Number of blocks of each stage."""
    layout: Literal["CCTT", "CCCT", "CTTT", "CCCC"] = "CCTT"
    """Kind of each stage: C for MBConv blocks, T for transformer blocks."""
    relative: Literal["pre", "post", "none"] = "pre"
    """Where the relative bias is added: to attention scores (`pre`), to attention weights (`post`), or nowhere."""
    stride: Literal["dw", "pw"] = "dw"
    """Strided convolution of an MBConv block: depthwise, or first pointwise (`pw`, which the paper's GMACs count)."""
    pool: Literal["max2", "avg2", "max3"] = "max2"
    """Downsampling at the start of a stage: 2×2 max, 2×2 average or 3×3 max."""
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of all blocks and the stem."""
    ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class SqueezeExcite(nn.Module):
    """Scales channels by σ(W2·SiLU(W1·mean x)). Hu et al. 2018, section 3."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        scale = self.fc2(F.silu(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * torch.sigmoid(scale)


class MBConv(nn.Module):
    """P(x) + W3·SE(GELU(BN(dw(GELU(BN(W1·BN(x))))))), with hidden width 4·out and SE width ⌊out/4⌋.

    Dai et al. 2021, appendix A.1. Expansion and SE are relative to the output width; there is no norm after W3.
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


class CoAtNet(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dims[3]), tokens (B, (S/32)², dims[3]).

    Dai et al. 2021 ("CoAtNet"), section 2 and appendix A.1. No code was published; where the paper leaves a choice we
    take 2×2 max pooling, the stride in the depthwise convolution, LayerNorm at each position before the mean, and no
    hidden layer in the head. Parameter counts are at most 2.2 % below the published ones. In training, batch norm makes
    a sample's output depend on its batch.
    """

    no_weight_decay = ("relative_table",)

    def __init__(self, config: CoAtNetConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, 32, "five stages of stride 2")
        self.feature_dim = config.dims[-1]
        self.image_size = config.image_size
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
            if kind == "T":
                check_multiple("dims", out, HEAD_DIM, "the width of a head")
            blocks: list[nn.Module] = []
            for i in range(depth):
                pool = config.pool if i == 0 else None
                rate = next(rates)
                if kind == "C":
                    block = MBConv(dim, out, pool, config.stride, act=config.act, drop_path=rate)
                else:
                    block = RelativeBlock(
                        dim,
                        out,
                        (side, side),
                        pool,
                        config.relative,
                        act=config.act,
                        ln_eps=config.ln_eps,
                        drop_path=rate,
                    )
                blocks.append(block)
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
        return resize_relative_tables(state, self)

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


VARIANTS = {
    "coatnet_0": {"stem": 64, "dims": (96, 192, 384, 768), "depths": (2, 3, 5, 2)},
    "coatnet_1": {"stem": 64, "dims": (96, 192, 384, 768), "depths": (2, 6, 14, 2)},
    "coatnet_2": {"stem": 128, "dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2)},
    "coatnet_3": {"stem": 192, "dims": (192, 384, 768, 1536), "depths": (2, 6, 14, 2)},
    "coatnet_4": {"stem": 192, "dims": (192, 384, 768, 1536), "depths": (2, 12, 28, 2)},
}
# The paper's other layouts at the same widths and depths; it also has layouts of equal size, which were not published.
OTHER_LAYOUTS = {
    "coatnet_0_ccct": {**VARIANTS["coatnet_0"], "layout": "CCCT"},
    "coatnet_0_cttt": {**VARIANTS["coatnet_0"], "layout": "CTTT"},
    "coatnet_0_cccc": {**VARIANTS["coatnet_0"], "layout": "CCCC"},
    "coatnet_1_ccct": {**VARIANTS["coatnet_1"], "layout": "CCCT"},
    "coatnet_1_cttt": {**VARIANTS["coatnet_1"], "layout": "CTTT"},
    "coatnet_1_cccc": {**VARIANTS["coatnet_1"], "layout": "CCCC"},
    "coatnet_2_ccct": {**VARIANTS["coatnet_2"], "layout": "CCCT"},
    "coatnet_2_cttt": {**VARIANTS["coatnet_2"], "layout": "CTTT"},
    "coatnet_2_cccc": {**VARIANTS["coatnet_2"], "layout": "CCCC"},
    "coatnet_3_ccct": {**VARIANTS["coatnet_3"], "layout": "CCCT"},
    "coatnet_3_cttt": {**VARIANTS["coatnet_3"], "layout": "CTTT"},
    "coatnet_3_cccc": {**VARIANTS["coatnet_3"], "layout": "CCCC"},
    "coatnet_4_ccct": {**VARIANTS["coatnet_4"], "layout": "CCCT"},
    "coatnet_4_cttt": {**VARIANTS["coatnet_4"], "layout": "CTTT"},
    "coatnet_4_cccc": {**VARIANTS["coatnet_4"], "layout": "CCCC"},
}

IMAGE_TOWERS.add(
    CoAtNetConfig,
    CoAtNet,
    {
        "coatnet_nano": {"image_size": 64, "stem": 24, "dims": (32, 64, 128, 192), "depths": (1, 2, 2, 1)},
        **VARIANTS,
        **OTHER_LAYOUTS,
    },
    source="Dai et al. 2021; coatnet_nano is ours",
)
