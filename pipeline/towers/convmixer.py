"""ConvMixer: patches, then depthwise and pointwise convolutions at one resolution."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Activation, DropPath, check_multiple, drop_path_rates


@configclass
class ConvMixerConfig(ImageTowerConfig):
    """A ConvMixer. `image_size` must be a multiple of `patch`; `kernel`, of the depthwise convolutions, is odd."""

    patch: int = 7
    dim: int = 768
    depth: int = 32
    kernel: int = 7
    act: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    drop_path: float = 0.0


class ActNorm(nn.Sequential):
    """BN(act(x)): the activation comes first."""

    def __init__(self, dim: int, act: str) -> None:
        super().__init__(Activation(act), nn.BatchNorm2d(dim))


class Block(nn.Module):
    """x + BN(act(dw(x))), then BN(act(W·x)); the residual wraps the depthwise part alone.

    Trockman and Kolter 2022, section 2, equations 2 and 3.
    """

    def __init__(self, dim: int, kernel: int, act: str, drop_path: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm1 = ActNorm(dim, act)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.norm2 = ActNorm(dim, act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = x + self.drop_path(self.norm1(self.depthwise(x)))
        return self.norm2(self.pointwise(x))


class ConvMixer(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), the mean of tokens (B, (S/patch)², dim); no final norm.

    Trockman and Kolter 2022 ("Patches Are All You Need?"), section 2. Convolutions keep PyTorch's default init, as in
    the authors' code; drop path is ours. Batch norm couples the samples of a batch in training.
    """

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        check_odd("kernel", config.kernel)
        self.feature_dim, self.image_size = config.dim, config.image_size
        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.norm = ActNorm(config.dim, config.act)
        self.blocks = nn.Sequential(
            *(
                Block(config.dim, config.kernel, config.act, rate)
                for rate in drop_path_rates(config.drop_path, config.depth)
            )
        )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.norm(self.patch_embed(images))
        x = self.blocks(x)
        tokens = x.flatten(2).transpose(1, 2)
        return TowerOutput(tokens.mean(dim=1), tokens, (x.shape[2], x.shape[3]))

    def block_list(self) -> list[nn.Module]:
        return list(self.blocks)


def check_odd(field: str, value: int) -> None:
    """E_CONFIG_VALUE unless `value` is odd: an even kernel has no centre and would need uneven padding."""
    if value > 0 and value % 2 == 1:
        return
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        f"a tower cannot have this {field}",
        where=f"{field}: {value}",
        found=f"{value} is not a positive odd number",
        fix=f"use {value - 1} or {value + 1}" if value > 0 else "use 1 or more",
    )


IMAGE_TOWERS.add(
    ConvMixerConfig,
    ConvMixer,
    {
        "convmixer_nano": {"image_size": 64, "patch": 8, "dim": 320, "depth": 7, "kernel": 5},
        "convmixer_256_8_k7_p2": {"image_size": 32, "patch": 2, "dim": 256, "depth": 8, "kernel": 7},
        "convmixer_1536_20_k9_p7": {"patch": 7, "dim": 1536, "depth": 20, "kernel": 9},
        # The paper says GELU throughout; the weights released for this one were trained with ReLU.
        "convmixer_768_32_k7_p7": {"patch": 7, "dim": 768, "depth": 32, "kernel": 7, "act": "relu"},
        "convmixer_1024_20_k9_p14": {"patch": 14, "dim": 1024, "depth": 20, "kernel": 9},
    },
    source="Trockman and Kolter 2022 and locuslab/convmixer; convmixer_nano and convmixer_256_8_k7_p2 are ours",
)
