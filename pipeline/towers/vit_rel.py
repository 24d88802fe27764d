"""ViT_REL: a ViT without class token or positions, with relative attention biases. CoAtNet's baseline."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import BlockStack, check_multiple, to_tokens
from clipwright.pipeline.towers.relative_attention import HEAD_DIM, RelativeBlock, resize_relative_tables


@configclass
class ViTRelConfig(ImageTowerConfig):
    """A ViT_REL. `image_size` must be a multiple of `patch`, and `dim` a multiple of 32, the head width."""

    family: ClassVar[str] = "coatnet"  # the paper that describes it

    patch: int = 16
    """Side of a patch in pixels."""
    dim: int = 384
    """Width of the tokens."""
    depth: int = 12
    """Number of blocks."""
    relative: Literal["pre", "post", "none"] = "pre"
    """Where the relative bias is added: to attention scores (`pre`), to attention weights (`post`), or nowhere."""
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class ViTRel(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), tokens (B, (S/patch)², dim).

    Dai et al. 2021 ("CoAtNet"), section 2.2: CoAtNet's transformer blocks on one grid of patches. The paper gives
    neither sizes nor code; ours are those of ViT-S/16. Pooled is the mean of the normalized tokens, as in CoAtNet.
    """

    no_weight_decay = ("relative_table",)

    def __init__(self, config: ViTRelConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        check_multiple("dim", config.dim, HEAD_DIM, "the width of a head")
        self.feature_dim = config.dim
        self.image_size = config.image_size
        side = config.image_size // config.patch
        self.grid = (side, side)
        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        make_block = partial(
            RelativeBlock,
            config.dim,
            config.dim,
            self.grid,
            pool=None,
            relative=config.relative,
            act=config.act,
            ln_eps=config.ln_eps,
        )
        self.blocks = BlockStack(make_block, config.depth, config.drop_path)
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        tokens = self.norm(to_tokens(self.blocks(self.patch_embed(images))))
        return TowerOutput(tokens.mean(dim=1), tokens, self.grid)

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return resize_relative_tables(state, self)

    def _init_weights(self) -> None:
        """CoAtNet's scheme: convolution N(0, √(2/fan_out)), matrices Xavier-uniform."""
        fan_out = self.patch_embed.weight[0, 0].numel() * self.feature_dim
        nn.init.normal_(self.patch_embed.weight, std=math.sqrt(2.0 / fan_out))
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        for block in self.blocks:
            block.attn.init_weights()
            block.mlp.init_xavier()


IMAGE_TOWERS.add(
    ViTRelConfig,
    ViTRel,
    {
        "vit_rel_nano": {"image_size": 64, "patch": 8, "dim": 128, "depth": 4},
        "vit_rel_s": {},
    },
    source="Dai et al. 2021, sizes of ViT-S/16; vit_rel_nano is ours",
)
