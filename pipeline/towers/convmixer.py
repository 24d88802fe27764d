"""ConvMixer: depthwise and pointwise convolutions on patches, at one resolution."""

from __future__ import annotations

from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import (
    Activation,
    BlockStack,
    DropPath,
    check_multiple,
    check_odd,
    to_tokens,
)


@configclass
class ConvMixerConfig(ImageTowerConfig):
    """A ConvMixer. `image_size` must be a multiple of `patch`."""

    patch: int = 7
    """Side of a patch in pixels."""
    dim: int = 768
    """Number of channels."""
    depth: int = 32
    """Number of blocks."""
    kernel: int = 7
    """Kernel size of the depthwise convolutions; odd."""
    act: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    """Activation after every convolution."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class ActNorm(nn.Sequential):
    """BN(act(x)): batch norm after the activation."""

    def __init__(self, dim: int, act: str) -> None:
        super().__init__(Activation(act), nn.BatchNorm2d(dim))


class Block(nn.Module):
    """x + BN(act(dw(x))), then BN(act(W·x)); the residual spans the depthwise part only.

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

    Trockman and Kolter 2022 ("Patches Are All You Need?"), section 2. Convolutions keep PyTorch's default
    initialization, as in the authors' code; drop path is our addition. In training, batch norm makes a sample's output
    depend on its batch.
    """

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        check_odd("kernel", config.kernel)
        self.feature_dim = config.dim
        self.image_size = config.image_size
        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.norm = ActNorm(config.dim, config.act)
        make_block = partial(Block, config.dim, config.kernel, config.act)
        self.blocks = BlockStack(make_block, config.depth, config.drop_path)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.blocks(self.norm(self.patch_embed(images)))
        tokens = to_tokens(x)
        return TowerOutput(tokens.mean(dim=1), tokens, (x.shape[2], x.shape[3]))


IMAGE_TOWERS.add(
    ConvMixerConfig,
    ConvMixer,
    {
        "convmixer_nano": {"image_size": 64, "patch": 8, "dim": 320, "depth": 7, "kernel": 5},
        "convmixer_256_8_k7_p2": {"image_size": 32, "patch": 2, "dim": 256, "depth": 8, "kernel": 7},
        "convmixer_1536_20_k9_p7": {"patch": 7, "dim": 1536, "depth": 20, "kernel": 9},
        # The paper uses GELU throughout; the released weights of this variant were trained with ReLU.
        "convmixer_768_32_k7_p7": {"patch": 7, "dim": 768, "depth": 32, "kernel": 7, "act": "relu"},
        "convmixer_1024_20_k9_p14": {"patch": 14, "dim": 1024, "depth": 20, "kernel": 9},
    },
    source="Trockman and Kolter 2022 and locuslab/convmixer; convmixer_nano and convmixer_256_8_k7_p2 are ours",
)
