"""MLP-Mixer: blocks of one MLP across tokens and one MLP across channels."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import BlockStack, DropPath, Mlp, check_multiple, to_tokens


@configclass
class MixerConfig(ImageTowerConfig):
    """An MLP-Mixer. `image_size` must be a multiple of `patch`.

    The token MLPs fix the number of tokens, so trained weights support one image size only.
    """

    family: ClassVar[str] = "mlp_mixer"

    patch: int = 16
    """Side of a patch in pixels."""
    dim: int = 768
    """Width of the tokens."""
    depth: int = 12
    """Number of blocks."""
    tokens_dim: int = 384
    """Hidden width of the MLPs across tokens."""
    channels_dim: int = 3072
    """Hidden width of the MLPs across channels."""
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class Block(nn.Module):
    """x + (W2·act(W1·(LN x)ᵀ))ᵀ across the tokens, then x + W4·act(W3·LN x) across the channels.

    Tolstikhin et al. 2021, equation 1.
    """

    def __init__(self, tokens: int, config: MixerConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self.mlp_tokens = Mlp(tokens, config.tokens_dim, config.act)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self.mlp_channels = Mlp(config.dim, config.channels_dim, config.act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class Mixer(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), the mean of tokens (B, (S/patch)², dim) after the final norm.

    Tolstikhin et al. 2021 ("MLP-Mixer"), section 2 and appendix E. Initialization as in the authors' Flax code:
    matrices LeCun normal, biases 0. Difference: exact GELU (Flax uses the tanh form).
    """

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        self.feature_dim = config.dim
        self.image_size = config.image_size
        side = config.image_size // config.patch
        self.grid = (side, side)
        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.blocks = BlockStack(partial(Block, side * side, config), config.depth, config.drop_path)
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        tokens = self.norm(self.blocks(to_tokens(self.patch_embed(images))))
        return TowerOutput(tokens.mean(dim=1), tokens, self.grid)

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        expected = state["blocks.0.mlp_tokens.fc1.weight"].shape[1]
        tokens = self.grid[0] * self.grid[1]
        if tokens == expected:
            return state
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the weights of an MLP-Mixer support one image size only",
            where=f"image_size: {self.image_size}",
            found=f"{format_count(tokens, 'token')}, the weights expect {expected}",
            fix="use the image size that the weights were trained at",
        )

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


SMALL = {"dim": 512, "depth": 8, "tokens_dim": 256, "channels_dim": 2048}
BASE = {"dim": 768, "depth": 12, "tokens_dim": 384, "channels_dim": 3072}
LARGE = {"dim": 1024, "depth": 24, "tokens_dim": 512, "channels_dim": 4096}
HUGE = {"dim": 1280, "depth": 32, "tokens_dim": 640, "channels_dim": 5120}

IMAGE_TOWERS.add(
    MixerConfig,
    Mixer,
    {
        "mixer_nano": {
            "image_size": 64,
            "patch": 8,
            "dim": 128,
            "depth": 6,
            "tokens_dim": 64,
            "channels_dim": 512,
        },
        "mixer_s32": {"patch": 32, **SMALL},
        "mixer_s16": {"patch": 16, **SMALL},
        "mixer_b32": {"patch": 32, **BASE},
        "mixer_b16": {"patch": 16, **BASE},
        "mixer_l32": {"patch": 32, **LARGE},
        "mixer_l16": {"patch": 16, **LARGE},
        "mixer_h14": {"patch": 14, **HUGE},
    },
    source="Tolstikhin et al. 2021; mixer_nano is ours",
)
