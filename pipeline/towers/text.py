"""CLIP's text tower: a causal transformer read at the end of the caption."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import TEXT_TOWERS, TextTower, TextTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Block, drop_path_rates, sinusoidal_positions


@configclass
class CausalTextConfig(TextTowerConfig):
    """A causal text transformer; `width` must be a multiple of `heads`. mlp_ratio·width is rounded.

    pool: `eot`, the first EOT, or `argmax`, the first place of the row's largest id, as OpenAI reads its own weights.
    """

    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "quick_gelu"
    ln_eps: float = 1e-5
    positions: Literal["learned", "sinusoidal"] = "learned"
    pool: Literal["eot", "argmax"] = "eot"
    drop_path: float = 0.0


class CausalText(TextTower):
    """Token ids (B, N), N ≤ context → pooled (B, width), tokens (B, N, width), mask (B, N) up to and with EOT.

    Radford et al. 2021, section 2.4. Pooled is the final-norm row at the first `eot_id`; a row without EOT is read at
    its last position. (The original takes the largest id: the same for CLIP's vocabulary, wrong where EOT is not the
    largest.) Causality hides what follows EOT, so a batch may be trimmed to its longest caption. Sinusoidal positions
    are those of Vaswani et al. 2017, sections 3.4 and 3.5, with token embeddings N(0, width^-½) times √width.
    """

    no_weight_decay = ("pos_embed",)
    pos_embed: Tensor

    def __init__(self, config: CausalTextConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        self.feature_dim, self.context, self.eot_id = config.width, config.context, eot_id
        self.pool = config.pool
        self.token_embed = nn.Embedding(vocab_size, config.width)
        self.embed_scale = 1.0
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(config.context, config.width))
        else:
            self.register_buffer("pos_embed", sinusoidal_positions(config.context, config.width), persistent=False)
            self.embed_scale = config.width**0.5
        self.blocks = nn.Sequential(
            *(
                Block(
                    config.width,
                    config.heads,
                    mlp_ratio=config.mlp_ratio,
                    act=config.act,
                    ln_eps=config.ln_eps,
                    drop_path=rate,
                    causal=True,
                )
                for rate in drop_path_rates(config.drop_path, config.depth)
            )
        )
        self.norm = nn.LayerNorm(config.width, eps=config.ln_eps)
        self._init_weights()

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        assert tokens.shape[1] <= self.context, (tokens.shape, self.context)
        x = self.embed_scale * self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]
        x, mask = self.norm(self.blocks(x)), self.mask(tokens)
        last = mask.sum(dim=1) - 1 if self.pool == "eot" else tokens.argmax(dim=1)
        return TowerOutput(x[torch.arange(len(x), device=x.device), last], x, mask=mask)

    def block_list(self) -> list[nn.Module]:
        return list(self.blocks)

    def _init_weights(self) -> None:
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.token_embed.weight, std=0.02)
            nn.init.normal_(self.pos_embed, std=0.01)
        else:
            nn.init.normal_(self.token_embed.weight, std=self.feature_dim**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
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
