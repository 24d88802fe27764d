"""DeiT: a ViT with an optional distillation token beside the class token."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Block, BlockStack, check_multiple, resize_positions, to_tokens


@configclass
class DeiTConfig(ImageTowerConfig):
    """A DeiT. `image_size` must be a multiple of `patch`, and `dim` a multiple of `heads`."""

    patch: int = 16
    """Side of a patch in pixels."""
    dim: int = 768
    """Width of the tokens."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs relative to the token width, rounded to an integer."""
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    distilled: bool = False
    """Add the distillation token, a second pooled output named `dist`."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class DeiT(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), the class token; tokens (B, (S/patch)², dim); if distilled, extra `dist`.

    Touvron et al. 2021 ("Training data-efficient image transformers & distillation through attention"), sections 3
    and 4. Tokens are ordered class, distillation, patches. The distillation token is a second pooled output with its
    own projection instead of a second classifier.
    """

    no_weight_decay = ("prefix_tokens", "pos_embed")

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        self.feature_dim = config.dim
        self.image_size = config.image_size
        self.extra_names = ("dist",) if config.distilled else ()
        self.prefix = 1 + len(self.extra_names)
        side = config.image_size // config.patch
        self.grid = (side, side)

        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.prefix_tokens = nn.Parameter(torch.empty(self.prefix, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(self.prefix + side * side, config.dim))
        make_block = partial(
            Block, config.dim, config.heads, mlp_ratio=config.mlp_ratio, act=config.act, ln_eps=config.ln_eps
        )
        self.blocks = BlockStack(make_block, config.depth, config.drop_path)
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        patches = to_tokens(self.patch_embed(images))
        prefix = self.prefix_tokens.expand(len(patches), -1, -1).to(patches.dtype)
        x = self.norm(self.blocks(torch.cat([prefix, patches], dim=1) + self.pos_embed))
        extra = {name: x[:, 1 + i] for i, name in enumerate(self.extra_names)}
        return TowerOutput(x[:, 0], x[:, self.prefix :], self.grid, extra=extra)

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        count = self.grid[0] * self.grid[1]
        return {**state, "pos_embed": resize_positions(state["pos_embed"], count, self.prefix)}

    def _init_weights(self) -> None:
        """Linear weights, tokens and positions N(0, 0.02), biases 0; the patch convolution keeps PyTorch's default."""
        nn.init.trunc_normal_(self.prefix_tokens, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


TINY = {"dim": 192, "heads": 3}
SMALL = {"dim": 384, "heads": 6}
BASE = {"dim": 768, "heads": 12}

IMAGE_TOWERS.add(
    DeiTConfig,
    DeiT,
    {
        "deit_nano": {"image_size": 64, "patch": 8, "dim": 128, "depth": 4, "heads": 4, "distilled": True},
        "deit_tiny_patch16": TINY,
        "deit_small_patch16": SMALL,
        "deit_base_patch16": BASE,
        "deit_tiny_distilled_patch16": {"distilled": True, **TINY},
        "deit_small_distilled_patch16": {"distilled": True, **SMALL},
        "deit_base_distilled_patch16": {"distilled": True, **BASE},
    },
    source="Touvron et al. 2021; deit_nano is ours",
)
