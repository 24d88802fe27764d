"""CLIP's text tower: a causal transformer read at the end of the caption."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import TEXT_TOWERS, TextTower, TextTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Block


@configclass
class CausalTextConfig(TextTowerConfig):
    """A causal text transformer; `width` must be a multiple of `heads`."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "quick_gelu"
    ln_eps: float = 1e-5


class CausalText(TextTower):
    """Token ids (B, N), N ≤ context → pooled (B, width), tokens (B, N, width), mask (B, N) up to and with EOT.

    Radford et al. 2021, section 2.4. Pooled is the final-norm row at the first `eot_id`; a row without EOT is read at
    its last position. (The original takes the largest id: the same for CLIP's vocabulary, wrong where EOT is not the
    largest.) Causality hides what follows EOT, so a batch may be trimmed to its longest caption.
    """

    no_weight_decay = ("pos_embed",)

    def __init__(self, config: CausalTextConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        self.feature_dim, self.context, self.eot_id = config.width, config.context, eot_id
        self.token_embed = nn.Embedding(vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.Sequential(
            *(
                Block(config.width, config.heads, act=config.act, ln_eps=config.ln_eps, causal=True)
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(config.width, eps=config.ln_eps)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_clip(config.depth)

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        assert tokens.shape[1] <= self.context, (tokens.shape, self.context)
        x = self.norm(self.blocks(self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]))
        mask = self.mask(tokens)
        last = mask.sum(dim=1) - 1
        return TowerOutput(x[torch.arange(len(x), device=x.device), last], x, mask=mask)


TEXT_TOWERS.add(
    CausalTextConfig,
    CausalText,
    {
        "text_nano": {"context": 32, "width": 128, "depth": 4, "heads": 4, "act": "gelu"},
        "clip_text_b": {"width": 512, "depth": 12, "heads": 8},
        "clip_text_l": {"width": 768, "depth": 12, "heads": 12},
    },
    source="Radford et al. 2021 and openai/CLIP; text_nano is ours",
)
