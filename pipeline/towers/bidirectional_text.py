"""Bidirectional text transformer: every token attends to the full caption. Also the text tower of SigLIP."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import TEXT_TOWERS, TextTower, TextTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import Block, BlockStack, sinusoidal_positions


@configclass
class BidirectionalTextConfig(TextTowerConfig):
    """A bidirectional text transformer.

    With pool `last` or without `hide_padding` the result depends on the padding, so `pad` must be `fixed`.
    """

    width: int = 512
    """Width of the tokens; a multiple of `heads`."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 8
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs relative to the token width, rounded to an integer."""
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Learned position embeddings, or the fixed sinusoids of Vaswani et al. 2017."""
    pool: Literal["mean", "eot", "last"] = "mean"
    """Pooled output: mean of the real tokens, the first EOT, or the last position of the context."""
    hide_padding: bool = True
    """Mask what follows EOT in attention."""
    head: int | None = None
    """Width of a Linear with bias after pooling (SigLIP); none by default."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class BidirectionalText(TextTower):
    """Token ids (B, N), N ≤ context → pooled (B, head or width), tokens (B, N, width), mask (B, N) to EOT inclusive.

    Vaswani et al. 2017, sections 3.1 and 3.5, with the learned positions of Devlin et al. 2019 by default; Zhai et al.
    2023 and big_vision for SigLIP's variant. Differences: pre-norm blocks with a final norm, and CLIP's initialization
    (with sinusoidal positions: token embeddings N(0, width^-½), scaled by √width to the magnitude of the positions).
    """

    no_weight_decay = ("pos_embed",)
    pos_embed: Tensor

    def __init__(self, config: BidirectionalTextConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        _check_padding(config)
        self.feature_dim = config.head or config.width
        self.context = config.context
        self.eot_id = eot_id
        self.pool = config.pool
        self.hide_padding = config.hide_padding
        self.token_embed = nn.Embedding(vocab_size, config.width)
        self.embed_scale = 1.0
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(config.context, config.width))
        else:
            self.register_buffer("pos_embed", sinusoidal_positions(config.context, config.width), persistent=False)
            self.embed_scale = config.width**0.5
        make_block = partial(
            Block, config.width, config.heads, mlp_ratio=config.mlp_ratio, act=config.act, ln_eps=config.ln_eps
        )
        self.blocks = BlockStack(make_block, config.depth, config.drop_path)
        self.norm = nn.LayerNorm(config.width, eps=config.ln_eps)
        self.head = nn.Linear(config.width, config.head) if config.head else nn.Identity()
        self._init_weights()

    @property
    def token_dim(self) -> int:
        return self.token_embed.embedding_dim

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        if self.pool == "last" or not self.hide_padding:  # the result depends on the padding
            assert tokens.shape[1] == self.context, tokens.shape
        else:
            assert tokens.shape[1] <= self.context, tokens.shape
        mask = self.mask(tokens)
        x = self.embed_scale * self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]
        x = self.norm(self.blocks(x, mask if self.hide_padding else None))
        return TowerOutput(self.head(self._pooled(x, mask)), x, mask=mask)

    def _pooled(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
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
            block.init_clip(len(self.blocks))
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=width**-0.5)
            nn.init.zeros_(self.head.bias)


def _check_padding(config: BidirectionalTextConfig) -> None:
    """Raises E_CONFIG_VALUE if trimming captions would change the result."""
    if config.pad == "fixed" or (config.pool != "last" and config.hide_padding):
        return
    cause = "pool=last reads the padding" if config.pool == "last" else "hide_padding=false attends to the padding"
    raise ClipwrightError(
        "E_CONFIG_VALUE",
        "this text tower does not support trimmed captions",
        where=f"text.pad={config.pad}",
        found=f"{cause}, so a caption's embedding would depend on its batch",
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
