"""Vision transformer: patches in; class token, mean or attention-pooled vector out. Also CLIP's and SigLIP's towers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import (
    Block,
    Mlp,
    check_multiple,
    drop_path_rates,
    merge_heads,
    resize_positions,
)


@configclass
class ViTConfig(ImageTowerConfig):
    """A ViT. `image_size` must be a multiple of `patch`, or `drop_rest` true; `dim` of `heads`.

    drop_rest: what is left over at the right and at the bottom is not seen (SigLIP's so400m at 384 pixels).

    pre_norm: a LayerNorm before the blocks (CLIP). pool: `cls`, the class token after the final norm; `mean`, the mean
    of the patch tokens and then the norm; `attention`, SigLIP's head over the normed patch tokens; the last two without
    a class token. init: `jax`, the original code's; `clip`, CLIP's text scheme; `official`, what OpenAI's image tower
    starts from. mlp_ratio·dim is rounded.
    """

    patch: int = 16
    drop_rest: bool = False
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    ln_eps: float = 1e-6
    patch_bias: bool = True
    pre_norm: bool = False
    pool: Literal["cls", "mean", "attention"] = "cls"
    init: Literal["jax", "clip", "official"] = "jax"
    drop_path: float = 0.0


class AttentionPool(nn.Module):
    """Tokens (B, N, D) → (B, D): one learned query looks at all tokens, y = MHA(query, x), then y + MLP(LN y).

    SigLIP's head (Zhai et al. 2023; big_vision calls it MAP, after Zhai et al. 2022, "Scaling vision transformers",
    section 2.2). The query itself is not added. Rows of `kv` are all k, all v.
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
        k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, dim=2))
        y = self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return (y + self.mlp(self.norm(y)))[:, 0]

    def _init_weights(self) -> None:
        """Query and matrices Xavier-uniform, k and v each a d×d matrix of its own; biases 0, the MLP's N(0, 1e-6)."""
        nn.init.xavier_uniform_(self.query.detach()[None])
        for matrix in (self.q.weight, *self.kv.weight.detach().chunk(2), self.out.weight):
            nn.init.xavier_uniform_(matrix)
        for linear in (self.q, self.kv, self.out):
            nn.init.zeros_(linear.bias)
        self.mlp.init_xavier()


class ViT(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), tokens (B, (S/patch)², dim).

    Dosovitskiy et al. 2021, section 3.1; Radford et al. 2021, section 2.4 for CLIP's form; Zhai et al. 2023 for
    SigLIP's. We differ: no hidden head layer, exact GELU (Flax's is the tanh form, which SigLIP keeps), learnable
    positions resized bicubically.
    """

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if not config.drop_rest or config.image_size < config.patch:
            check_multiple("image_size", config.image_size, config.patch, "patch")
        self.feature_dim, self.image_size, self.pool = config.dim, config.image_size, config.pool
        side = config.image_size // config.patch
        self.grid = (side, side)
        self.prefix = 1 if config.pool == "cls" else 0
        tokens = side * side

        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch, bias=config.patch_bias)
        if self.prefix:
            self.cls_token = nn.Parameter(torch.empty(config.dim))
        self.pos_embed = nn.Parameter(torch.empty(self.prefix + tokens, config.dim))
        self.norm_pre = nn.LayerNorm(config.dim, eps=config.ln_eps) if config.pre_norm else nn.Identity()
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
        if config.pool == "attention":
            self.attention_pool = AttentionPool(config)
        {"jax": self._init_jax, "clip": self._init_clip, "official": self._init_official}[config.init]()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if self.prefix:
            x = torch.cat([self.cls_token.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        x = self.blocks(self.norm_pre(x + self.pos_embed))
        tokens = self.norm(x)
        if self.pool == "cls":
            return TowerOutput(tokens[:, 0], tokens[:, 1:], self.grid)
        if self.pool == "attention":
            return TowerOutput(self.attention_pool(tokens), tokens, self.grid)
        return TowerOutput(self.norm(x.mean(dim=1)), tokens, self.grid)

    def block_list(self) -> list[nn.Module]:
        return list(self.blocks)

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
            assert isinstance(block, Block)
            block.init_xavier()

    def _init_clip(self) -> None:
        self._init_embeddings()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_clip(len(self.blocks))

    def _init_official(self) -> None:
        self._init_embeddings()
        for block in self.blocks:
            assert isinstance(block, Block)
            # torch's MultiheadAttention: one bound for the fused matrix; out and MLP keep Linear's own default.
            nn.init.xavier_uniform_(block.attn.qkv.weight)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.out.bias)

    def _init_embeddings(self) -> None:
        """CLIP: class and positions N(0, D^-½); the patch convolution keeps PyTorch's default."""
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
