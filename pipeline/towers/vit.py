"""Vision transformer (ViT) with class-token, mean or attention pooling; also the image towers of CLIP and SigLIP."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import (
    Block,
    BlockStack,
    Mlp,
    check_multiple,
    merge_heads,
    resize_positions,
    split_heads,
    to_tokens,
)


@configclass
class ViTConfig(ImageTowerConfig):
    """A ViT. `image_size` must be a multiple of `patch` unless `drop_rest` is set, and `dim` a multiple of `heads`."""

    patch: int = 16
    """Side of a patch in pixels."""
    drop_rest: bool = False
    """Ignore pixels at the right and bottom that do not fill a patch (SigLIP's so400m at 384 pixels)."""
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
    patch_bias: bool = True
    """Whether the patch convolution has a bias (CLIP's has none)."""
    pre_norm: bool = False
    """LayerNorm before the blocks (CLIP)."""
    pool: Literal["cls", "mean", "attention"] = "cls"
    """Pooled output: class token after the norm, norm of the mean patch token, or SigLIP's attention pooling."""
    init: Literal["jax", "clip", "official"] = "jax"
    """Initialization: ViT's JAX code, CLIP's text scheme (`clip`), or that of OpenAI's image tower (`official`)."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class AttentionPool(nn.Module):
    """Tokens (B, N, D) → (B, D): one learned query attends to all tokens, y = MHA(query, x), then y + MLP(LN y).

    SigLIP's head (Zhai et al. 2023). big_vision calls it MAP, after Zhai et al. 2022 ("Scaling vision transformers"),
    section 2.2. The query itself is not added to y. The rows of `kv` are all of k, then all of v.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Parameter(torch.empty(config.dim))
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self.mlp = Mlp(config.dim, round(config.mlp_ratio * config.dim), config.act)
        self._init_weights()

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        q = self.q(self.query).view(1, self.heads, 1, -1).expand(len(x), -1, -1, -1)
        k, v = self.kv(x).chunk(2, dim=2)
        k, v = split_heads(k, self.heads), split_heads(v, self.heads)
        y = self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return (y + self.mlp(self.norm(y)))[:, 0]

    def _init_weights(self) -> None:
        """Query and matrices Xavier-uniform (k and v as separate d×d matrices), biases 0, MLP biases N(0, 1e-6)."""
        nn.init.xavier_uniform_(self.query.detach()[None])
        for matrix in (self.q.weight, *self.kv.weight.detach().chunk(2), self.out.weight):
            nn.init.xavier_uniform_(matrix)
        for linear in (self.q, self.kv, self.out):
            nn.init.zeros_(linear.bias)
        self.mlp.init_xavier()


class ViT(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), tokens (B, (S/patch)², dim).

    Dosovitskiy et al. 2021, section 3.1; Radford et al. 2021, section 2.4 for CLIP's variant; Zhai et al. 2023 for
    SigLIP's. Differences: no hidden layer in the head, exact GELU (Flax uses the tanh form, which SigLIP keeps),
    learned positions resized bicubically.
    """

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if not config.drop_rest or config.image_size < config.patch:
            check_multiple("image_size", config.image_size, config.patch, "patch")
        self.feature_dim = config.dim
        self.image_size = config.image_size
        self.pool = config.pool
        side = config.image_size // config.patch
        self.grid = (side, side)
        self.prefix = 1 if config.pool == "cls" else 0
        tokens = side * side

        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch, bias=config.patch_bias)
        if self.prefix:
            self.cls_token = nn.Parameter(torch.empty(config.dim))
        self.pos_embed = nn.Parameter(torch.empty(self.prefix + tokens, config.dim))
        self.norm_pre = nn.LayerNorm(config.dim, eps=config.ln_eps) if config.pre_norm else nn.Identity()
        make_block = partial(
            Block, config.dim, config.heads, mlp_ratio=config.mlp_ratio, act=config.act, ln_eps=config.ln_eps
        )
        self.blocks = BlockStack(make_block, config.depth, config.drop_path)
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        if config.pool == "attention":
            self.attention_pool = AttentionPool(config)
        {"jax": self._init_jax, "clip": self._init_clip, "official": self._init_official}[config.init]()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = to_tokens(self.patch_embed(images))
        if self.prefix:
            x = torch.cat([self.cls_token.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        x = self.blocks(self.norm_pre(x + self.pos_embed))
        tokens = self.norm(x)
        if self.pool == "cls":
            return TowerOutput(tokens[:, 0], tokens[:, 1:], self.grid)
        if self.pool == "attention":
            return TowerOutput(self.attention_pool(tokens), tokens, self.grid)
        return TowerOutput(self.norm(x.mean(dim=1)), tokens, self.grid)

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        count = self.grid[0] * self.grid[1]
        return {**state, "pos_embed": resize_positions(state["pos_embed"], count, self.prefix)}

    def _init_jax(self) -> None:
        fan_in = self.patch_embed.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.weight, std=fan_in**-0.5)  # LeCun normal
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.pos_embed, std=0.02)
        if self.prefix:
            nn.init.zeros_(self.cls_token)
        for block in self.blocks:
            block.init_xavier()

    def _init_clip(self) -> None:
        self._init_embeddings()
        for block in self.blocks:
            block.init_clip(len(self.blocks))

    def _init_official(self) -> None:
        self._init_embeddings()
        for block in self.blocks:
            # As torch's MultiheadAttention: one bound for the fused matrix; out and MLP keep the default of Linear.
            nn.init.xavier_uniform_(block.attn.qkv.weight)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.out.bias)

    def _init_embeddings(self) -> None:
        """CLIP: class token and positions N(0, D^-½); the patch convolution keeps PyTorch's default."""
        nn.init.normal_(self.pos_embed, std=self.feature_dim**-0.5)
        if self.prefix:
            nn.init.normal_(self.cls_token, std=self.feature_dim**-0.5)


TINY = {"dim": 192, "depth": 12, "heads": 3}
SMALL = {"dim": 384, "depth": 12, "heads": 6}
BASE = {"dim": 768, "depth": 12, "heads": 12}
LARGE = {"dim": 1024, "depth": 24, "heads": 16}
HUGE = {"dim": 1280, "depth": 32, "heads": 16}
CLIP = {"act": "quick_gelu", "ln_eps": 1e-5, "patch_bias": False, "pre_norm": True, "init": "clip"}
SO400M = {"dim": 1152, "depth": 27, "heads": 16, "mlp_ratio": 4304 / 1152}
SIGLIP = {"act": "gelu_tanh", "pool": "attention", "projection": "none"}

IMAGE_TOWERS.add(
    ViTConfig,
    ViT,
    {
        "vit_nano": {"image_size": 64, "patch": 8, "dim": 128, "depth": 4, "heads": 4, "pool": "mean"},
        "vit_tiny_patch16": {"patch": 16, **TINY},
        "vit_small_patch32": {"patch": 32, **SMALL},
        "vit_small_patch16": {"patch": 16, **SMALL},
        "vit_base_patch32": {"patch": 32, **BASE},
        "vit_base_patch16": {"patch": 16, **BASE},
        "vit_base_patch8": {"patch": 8, **BASE},
        "vit_large_patch32": {"patch": 32, **LARGE},
        "vit_large_patch16": {"patch": 16, **LARGE},
        "vit_large_patch14": {"patch": 14, **LARGE},
        "vit_huge_patch14": {"patch": 14, **HUGE},
        "clip_vit_b32": {"patch": 32, **BASE, **CLIP},
        "clip_vit_b16": {"patch": 16, **BASE, **CLIP},
        "clip_vit_l14": {"patch": 14, **LARGE, **CLIP},
        "clip_vit_l14_336": {"image_size": 336, "patch": 14, **LARGE, **CLIP},
        "siglip_vit_b16": {"patch": 16, **BASE, **SIGLIP},
        "siglip_vit_l16": {"image_size": 256, "patch": 16, **LARGE, **SIGLIP},
        "siglip_vit_so400m14": {"patch": 14, **SO400M, **SIGLIP},
    },
    source="Dosovitskiy et al. 2021, Radford et al. 2021 and Zhai et al. 2023; vit_nano is ours",
)
