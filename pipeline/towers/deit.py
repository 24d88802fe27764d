"""DeiT: a ViT with, if distilled, a second token beside the class token that learns from a teacher."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Block, check_multiple, drop_path_rates, resize_positions


@configclass
class DeiTConfig(ImageTowerConfig):
    """A DeiT. `image_size` must be a multiple of `patch`; `dim` of `heads`. distilled: with the distillation token."""

    patch: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    ln_eps: float = 1e-6
    distilled: bool = False
    drop_path: float = 0.1


class DeiT(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), the class token; tokens (B, (S/patch)², dim); distilled: extra `dist`.

    Touvron et al. 2021 ("Training data-efficient image transformers & distillation through attention"), sections 3
    and 4. Tokens are ordered class, distillation, patches. The distillation token is a pooled vector of its own, with
    its own projection instead of a second classifier.
    """

    no_weight_decay = ("prefix_tokens", "pos_embed")

    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        self.feature_dim, self.image_size = config.dim, config.image_size
        self.extra_names = ("dist",) if config.distilled else ()
        self.prefix = 1 + len(self.extra_names)
        side = config.image_size // config.patch
        self.grid = (side, side)

        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.prefix_tokens = nn.Parameter(torch.empty(self.prefix, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(self.prefix + side * side, config.dim))
        self.blocks = nn.Sequential(
            *(
                Block(
                    config.dim,
                    config.heads,
                    mlp_ratio=config.mlp_ratio,
                    act=config.act,
                    ln_eps=config.ln_eps,
                    drop_path=rate,
                )
                for rate in drop_path_rates(config.drop_path, config.depth)
            )
        )
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        prefix = self.prefix_tokens.expand(len(patches), -1, -1).to(patches.dtype)
        x = self.norm(self.blocks(torch.cat([prefix, patches], dim=1) + self.pos_embed))
        extra = {name: x[:, 1 + i] for i, name in enumerate(self.extra_names)}
        return TowerOutput(x[:, 0], x[:, self.prefix :], self.grid, extra=extra)

    def block_list(self) -> list[nn.Module]:
        return list(self.blocks)

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
