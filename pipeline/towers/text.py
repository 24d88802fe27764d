"""CLIP's text tower: a causal transformer pooled at the end-of-text token."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import TEXT_TOWERS, TextTower, TextTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Block, BlockStack, sinusoidal_positions


@configclass
class CausalTextConfig(TextTowerConfig):
    """A causal text transformer."""

    width: int = 512
    """Width of the tokens; a multiple of `heads`."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 8
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs relative to the token width, rounded to an integer."""
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "quick_gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-5
    """Epsilon of the layer norms."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Learned position embeddings, or the fixed sinusoids of Vaswani et al. 2017."""
    pool: Literal["eot", "argmax"] = "eot"
    """Pooled position: the first EOT, or the first occurrence of the largest id (`argmax`, OpenAI's code)."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class CausalText(TextTower):
    """Token ids (B, N), N ≤ context → pooled (B, width), tokens (B, N, width), mask (B, N) up to and including EOT.

    Radford et al. 2021, section 2.4. Pooled is the normalized token at the first `eot_id`, or at the last position of a
    row without EOT. (The original takes the largest id, which is EOT in CLIP's vocabulary but not in others.) The
    causal mask hides what follows EOT, so a batch may be trimmed to its longest caption. Sinusoidal positions follow
    Vaswani et al. 2017, sections 3.4 and 3.5, with token embeddings N(0, width^-½) times √width.
    """

    no_weight_decay = ("pos_embed",)
    pos_embed: Tensor

    def __init__(self, config: CausalTextConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        self.feature_dim = config.width
        self.context = config.context
        self.eot_id = eot_id
        self.pool = config.pool
        self.token_embed = nn.Embedding(vocab_size, config.width)
        self.embed_scale = 1.0
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(config.context, config.width))
        else:
            self.register_buffer("pos_embed", sinusoidal_positions(config.context, config.width), persistent=False)
            self.embed_scale = config.width**0.5
        make_block = partial(
            Block,
            config.width,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            act=config.act,
            ln_eps=config.ln_eps,
            causal=True,
        )
        self.blocks = BlockStack(make_block, config.depth, config.drop_path)
        self.norm = nn.LayerNorm(config.width, eps=config.ln_eps)
        self._init_weights()

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        assert tokens.shape[1] <= self.context, (tokens.shape, self.context)
        x = self.embed_scale * self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]
        x = self.norm(self.blocks(x))
        mask = self.mask(tokens)
        position = mask.sum(dim=1) - 1 if self.pool == "eot" else tokens.argmax(dim=1)
        return TowerOutput(x[torch.arange(len(x), device=x.device), position], x, mask=mask)

    def _init_weights(self) -> None:
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.token_embed.weight, std=0.02)
            nn.init.normal_(self.pos_embed, std=0.01)
        else:
            nn.init.normal_(self.token_embed.weight, std=self.feature_dim**-0.5)
        for block in self.blocks:
            block.init_clip(len(self.blocks))


TEXT_TOWERS.add(
    CausalTextConfig,
    CausalText,
    {
        "text_nano": {"context": 32, "width": 128, "depth": 4, "heads": 4, "act": "gelu"},
        "clip_text_b": {"width": 512, "depth": 12, "heads": 8},
        "clip_text_l": {"width": 768, "depth": 12, "heads": 12},
        "openclip_text_h": {"width": 1024, "depth": 24, "heads": 16, "act": "gelu"},
        "openclip_text_bigg": {"width": 1280, "depth": 32, "heads": 20, "act": "gelu"},
    },
    source="Radford et al. 2021, openai/CLIP and mlfoundations/open_clip; text_nano is ours",
)
