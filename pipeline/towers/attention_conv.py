"""A ViT whose attention can express convolution: each head attends to a position relative to the query."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import (
    BlockStack,
    DropPath,
    Mlp,
    check_multiple,
    check_odd,
    merge_heads,
    split_heads,
    to_tokens,
)


@configclass
class AttentionConvConfig(ImageTowerConfig):
    """A ViT with quadratic relative attention. `image_size` must be a multiple of `patch`."""

    patch: int = 16
    """Side of a patch in pixels."""
    dim: int = 384
    """Width of the tokens."""
    depth: int = 12
    """Number of blocks."""
    kernel: Annotated[int, Field(ge=1)] = 3
    """Side of the equivalent convolution kernel, odd; a block has kernel² heads that start at its taps."""
    alpha: Annotated[float, Field(ge=0)] = 50.0
    """Initial sharpness of a head: 0 is uniform attention; at 50 a head is one tap and the block a convolution."""
    learnable: bool = False
    """Train the centers and widths of the heads."""
    width: Literal["isotropic", "precision"] = "isotropic"
    """Shape of a head's attention: one α, or a 2×2 positive semidefinite precision matrix."""
    border: Literal["zero", "inside"] = "zero"
    """Attend to a border of ⌊kernel/2⌋ zeros, as a padded convolution, or to the map only (`inside`)."""
    content_dim: Annotated[int, Field(ge=0)] = 0
    """Width of a head's queries and keys; 0 leaves out the content terms."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs relative to the token width, rounded to an integer."""
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class QuadraticAttention(nn.Module):
    """Tokens (B, h·w, D) of a map → the same shape, by kernel² heads with centers Δ and precisions P = S·Sᵀ.

    The score of query q and key k is −(δ−Δ)ᵀP(δ−Δ) with δ = k − q in grid steps and no factor 1/√d. Cordonnier, Loukas
    and Jaggi 2020, section 3: in the isotropic case this is their v·r_δ with r_δ = (‖δ‖², δ), v = −α(1, −2Δ) and
    α = S², up to a constant that cancels in the softmax. Values are X itself, and W_V·W_O is one D×D matrix per head,
    so that `out` is the weight of a kernel × kernel convolution: their theorem with value width D. Differences: δ is
    k − q throughout (their theorem has q − k, which rotates copied weights by 180°); zeros around the map are keys.
    content_dim: adds x_q W_Q (x_k W_K)ᵀ + x_q W_Q (r_δ Ŵ)ᵀ + u (x_k W_K)ᵀ (their equation 8).
    """

    def __init__(self, config: AttentionConvConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        check_odd("kernel", config.kernel)
        self.grid = grid
        self.heads = config.kernel**2
        self.content_dim = config.content_dim
        half = config.kernel // 2
        self.pad = half if config.border == "zero" else 0
        taps = [(float(y), float(x)) for y in range(-half, half + 1) for x in range(-half, half + 1)]
        root = config.alpha**0.5
        spreads = torch.full((self.heads,), root)
        if config.width == "precision":
            spreads = root * torch.eye(2).repeat(self.heads, 1, 1)
        if config.learnable:
            self.centres = nn.Parameter(torch.tensor(taps))
            self.spreads = nn.Parameter(spreads)
        else:
            self.register_buffer("centres", torch.tensor(taps), persistent=False)
            self.register_buffer("spreads", spreads, persistent=False)
        self.register_buffer("offsets", offsets(grid, self.pad), persistent=False)
        self.out = nn.Linear(self.heads * config.dim, config.dim)
        if config.content_dim:
            self.query = nn.Linear(config.dim, self.heads * config.content_dim, bias=False)
            self.key = nn.Linear(config.dim, self.heads * config.content_dim, bias=False)
            self.key_bias = nn.Parameter(torch.empty(self.heads, config.content_dim))  # u
            self.position = nn.Parameter(torch.empty(self.heads, 3, config.content_dim))  # Ŵ
        self._init_weights()

    def scores(self) -> Float[Tensor, "h n m"]:
        """Returns −(δ−Δ)ᵀSSᵀ(δ−Δ) for every head, query and key."""
        gap = self.get_buffer("offsets") - self.centres[:, None, None]
        if self.spreads.ndim == 1:
            return -(gap * self.spreads[:, None, None, None]).square().sum(dim=3)
        # Elementwise rather than a matmul: the distances stay float32 under autocast.
        return -(gap[..., None] * self.spreads[:, None, None]).sum(dim=3).square().sum(dim=3)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        maps = x.unflatten(1, self.grid)
        keys = F.pad(maps, (0, 0, self.pad, self.pad, self.pad, self.pad)).flatten(1, 2)
        if self.content_dim:
            y = self._attend_to_content(x, keys)
        else:  # the weights are the same for all images; scaled_dot_product_attention would repeat them per image
            weights = self.scores().softmax(dim=2).to(x.dtype)
            y = (weights.flatten(0, 1) @ keys).unflatten(1, weights.shape[:2])
        return self.out(merge_heads(y))

    def _attend_to_content(self, x: Float[Tensor, "b n d"], keys: Float[Tensor, "b m d"]) -> Float[Tensor, "b h n d"]:
        q = split_heads(self.query(x), self.heads)
        k = split_heads(self.key(keys), self.heads)
        delta = self.get_buffer("offsets")
        encoding = torch.cat([delta.square().sum(dim=2, keepdim=True), delta], dim=2)  # r_δ
        position_scores = torch.einsum("bhnp,nmp->bhnm", torch.einsum("bhnk,hpk->bhnp", q, self.position), encoding)
        values = keys[:, None].expand(-1, self.heads, -1, -1)
        bias = (self.scores() + position_scores).to(q.dtype)
        return F.scaled_dot_product_attention(q + self.key_bias[:, None], k, values, attn_mask=bias, scale=1.0)

    @torch.no_grad()
    def copy_convolution(self, conv: nn.Conv2d) -> None:
        """Copies the weights of a kernel × kernel convolution: head Δ gets the tap at Δ + ⌊kernel/2⌋."""
        assert conv.weight[0, 0].numel() == self.heads and conv.stride == (1, 1) and conv.groups == 1, conv
        self.out.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))
        assert self.out.bias is not None
        if conv.bias is None:
            nn.init.zeros_(self.out.bias)
        else:
            self.out.bias.copy_(conv.bias)

    def _init_weights(self) -> None:
        """LeCun normal over all taps, as a convolution; W_Q and u are 0, so that content terms start at 0."""
        nn.init.trunc_normal_(self.out.weight, std=self.out.in_features**-0.5)
        nn.init.zeros_(self.out.bias)
        if self.content_dim:
            nn.init.zeros_(self.query.weight)
            nn.init.xavier_uniform_(self.key.weight)
            nn.init.zeros_(self.key_bias)
            nn.init.normal_(self.position, std=0.02)


def offsets(grid: tuple[int, int], pad: int) -> Float[Tensor, "n m 2"]:
    """Returns δ = k − q in rows and columns, for queries on the grid and keys on the grid with a border of `pad`."""

    def positions(border: int) -> Float[Tensor, "n 2"]:
        return torch.cartesian_prod(*(torch.arange(-border, side + border, dtype=torch.float32) for side in grid))

    return positions(pad)[None] - positions(0)[:, None]


class Block(nn.Module):
    """Pre-norm block: x += QuadraticAttention(LN x); x += MLP(LN x)."""

    def __init__(self, config: AttentionConvConfig, grid: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self.attn = QuadraticAttention(config, grid)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self.mlp = Mlp(config.dim, round(config.mlp_ratio * config.dim), config.act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AttentionConv(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dim), tokens (B, (S/patch)², dim).

    Cordonnier, Loukas and Jaggi 2020 ("On the relationship between self-attention and convolutional layers").
    Differences: pre-norm blocks, exact GELU, no class token; pooled is the mean of the normalized tokens. There are no
    position tables, so the same weights support every image size.
    """

    no_weight_decay = ("centres", "spreads", "key_bias")

    def __init__(self, config: AttentionConvConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        self.feature_dim = config.dim
        self.image_size = config.image_size
        side = config.image_size // config.patch
        self.grid = (side, side)
        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.blocks = BlockStack(partial(Block, config, self.grid), config.depth, config.drop_path)
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        tokens = self.norm(self.blocks(to_tokens(self.patch_embed(images))))
        return TowerOutput(tokens.mean(dim=1), tokens, self.grid)

    def _init_weights(self) -> None:
        """Patch convolution LeCun normal, as in ViT; MLPs Xavier-uniform."""
        fan_in = self.patch_embed.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.weight, std=fan_in**-0.5)
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        for block in self.blocks:
            block.mlp.init_xavier()


IMAGE_TOWERS.add(
    AttentionConvConfig,
    AttentionConv,
    # At α = 2 a neighboring tap starts with e⁻² of the weight of a head's own tap, so that centers receive gradient.
    {"attention_conv_nano": {"image_size": 64, "patch": 8, "dim": 112, "depth": 4, "alpha": 2.0, "learnable": True}},
    source="Cordonnier et al. 2020; attention_conv_nano is ours",
)
