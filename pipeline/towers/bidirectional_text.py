"""Bidirectional text transformer: every token sees the whole caption. Also the text tower of SigLIP."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import TEXT_TOWERS, TextTower, TextTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Block, drop_path_rates, sinusoidal_positions


@configclass
class BidirectionalTextConfig(TextTowerConfig):
    """A bidirectional text transformer; `width` must be a multiple of `heads`. mlp_ratio·width is rounded.

    pool: `mean` of the real tokens, `eot`, the first EOT, or `last`, the last position of the context. hide_padding:
    no token sees what follows EOT. Without it, and with pool `last`, padding takes part in the result, so `pad` must be
    `fixed`. head: width of a biased Linear after pooling (SigLIP's), none by default.
    """

    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    ln_eps: float = 1e-6
    positions: Literal["learned", "sinusoidal"] = "learned"
    pool: Literal["mean", "eot", "last"] = "mean"
    hide_padding: bool = True
    head: int | None = None
    drop_path: float = 0.0


class BidirectionalText(TextTower):
    """Token ids (B, N), N ≤ context → pooled (B, head or width), tokens (B, N, width), mask (B, N) up to and with EOT.

    Vaswani et al. 2017, sections 3.1 and 3.5, with Devlin et al. 2019's learned positions by default; Zhai et al. 2023
    and big_vision for SigLIP's form. We differ: pre-norm blocks with a final norm, and CLIP's init (sinusoidal: token
    embeddings N(0, width^-½), which the factor √width brings to the size of the positions).
    """

    no_weight_decay = ("pos_embed",)
    pos_embed: Tensor

    def __init__(self, config: BidirectionalTextConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        _check_padding(config)
        self.feature_dim = config.head or config.width
        self.context, self.eot_id = config.context, eot_id
        self.pool, self.hide_padding = config.pool, config.hide_padding
        self.token_embed = nn.Embedding(vocab_size, config.width)
        self.embed_scale = 1.0
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(config.context, config.width))
        else:
            self.register_buffer("pos_embed", sinusoidal_positions(config.context, config.width), persistent=False)
            self.embed_scale = config.width**0.5
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                mlp_ratio=config.mlp_ratio,
                act=config.act,
                ln_eps=config.ln_eps,
                drop_path=rate,
            )
            for rate in drop_path_rates(config.drop_path, config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.head = nn.Linear(config.width, config.head) if config.head else nn.Identity()
        self._init_weights()

    @property
    def token_dim(self) -> int:
        return self.token_embed.embedding_dim

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        whole = self.pool == "last" or not self.hide_padding  # the result depends on the padding
        assert tokens.shape[1] == self.context if whole else tokens.shape[1] <= self.context, tokens.shape
        mask = self.mask(tokens)
        x = self.embed_scale * self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask if self.hide_padding else None)
        x = self.norm(x)
        return TowerOutput(self.head(self._pooled(x, mask)), x, mask=mask)

    def block_list(self) -> list[nn.Module]:
        return list(self.blocks)

    def _pooled(self, x: Float[Tensor, "b n d"], mask: Tensor) -> Float[Tensor, "b d"]:
        if self.pool == "last":
            return x[:, -1]
        if self.pool == "eot":
            return x[torch.arange(len(x), device=x.device), mask.sum(dim=1) - 1]
        real = mask[..., None].to(x.dtype)
        return (x * real).sum(dim=1) / real.sum(dim=1)

    def _init_weights(self) -> None:
        width = self.token_dim
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.token_embed.weight, std=0.02)
            nn.init.normal_(self.pos_embed, std=0.01)
        else:
            nn.init.normal_(self.token_embed.weight, std=width**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_clip(len(self.blocks))
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=width**-0.5)
            nn.init.zeros_(self.head.bias)


def _check_padding(config: BidirectionalTextConfig) -> None:
    """E_CONFIG_VALUE where trimming would change the result."""
    if config.pad == "fixed" or (config.pool != "last" and config.hide_padding):
        return
    seen = "pool=last reads it" if config.pool == "last" else "hide_padding=false shows it"
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        "captions trimmed before a text tower that needs their padding",
        where=f"text.pad={config.pad}",
        found=f"{seen}, so only pad=fixed gives a caption one embedding in every batch",
        fix="set text.pad=fixed",
    )


SIGLIP = {
    "context": 64,
    "pad": "fixed",
    "projection": "none",
    "act": "gelu_tanh",
    "pool": "last",
    "hide_padding": False,
}

TEXT_TOWERS.add(
    BidirectionalTextConfig,
    BidirectionalText,
    {
        "bidirectional_text_nano": {"context": 32, "width": 128, "depth": 4, "heads": 4},
        "siglip_text_b": {"width": 768, "depth": 12, "heads": 12, "head": 768, **SIGLIP},
        "siglip_text_l": {"width": 1024, "depth": 24, "heads": 16, "head": 1024, **SIGLIP},
        "siglip_text_so400m": {
            "width": 1152,
            "depth": 27,
            "heads": 16,
            "mlp_ratio": 4304 / 1152,
            "head": 1152,
            **SIGLIP,
        },
    },
    source="Vaswani et al. 2017 and Zhai et al. 2023; bidirectional_text_nano is ours",
)
