"""A ViT whose attention can express convolution: each head looks at a place relative to the query."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import DropPath, Mlp, check_multiple, drop_path_rates


@configclass
class AttentionConvConfig(ImageTowerConfig):
    """A ViT with quadratic relative attention. `image_size` must be a multiple of `patch`; `kernel` odd.

    kernel² heads start at the taps of a kernel × kernel convolution. alpha: how narrowly a head looks, from 0
    (everywhere alike) over 50 (one tap: exactly a convolution). learnable: centres and widths are trained. width: one
    α a head (`isotropic`) or a 2×2 positive semidefinite `precision`. border: `zero` attends to a frame of zeros of
    ⌊kernel/2⌋, as a padded convolution does; `inside` to the map alone, equal to a convolution in the interior only.
    content_dim: width of a head's queries and keys; 0 leaves the content terms out.
    """

    patch: int = 16
    dim: int = 384
    depth: int = 12
    kernel: Annotated[int, Field(ge=1)] = 3
    alpha: Annotated[float, Field(ge=0)] = 50.0
    learnable: bool = False
    width: Literal["isotropic", "precision"] = "isotropic"
    border: Literal["zero", "inside"] = "zero"
    content_dim: Annotated[int, Field(ge=0)] = 0
    mlp_ratio: float = 4.0
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    ln_eps: float = 1e-6
    drop_path: float = 0.0


class QuadraticAttention(nn.Module):
    """Tokens (B, h·w, D) of a map → the same shape, by kernel² heads h with centres Δ and precisions P = S·Sᵀ.

    Score of query q and key k: −(δ−Δ)ᵀP(δ−Δ) with δ = k − q in grid steps and no factor 1/√d. Cordonnier, Loukas and
    Jaggi 2020, section 3: isotropic, this is their v·r_δ with r_δ = (‖δ‖², δ) and v = −α(1, −2Δ), α = S², less a
    constant that the softmax does not see. Values are X itself, W_V·W_O merged into one D×D matrix a head, so that
    `out` is a kernel × kernel convolution's weight: the theorem with value width D. We differ: δ is k − q throughout
    (their theorem's is q − k, which turns copied weights by 180°), and zeros around the map are keys.
    content_dim: adds x_q W_Q (x_k W_K)ᵀ + x_q W_Q (r_δ Ŵ)ᵀ + u (x_k W_K)ᵀ (their equation 8).
    """

    def __init__(self, config: AttentionConvConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        if config.kernel % 2 == 0:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a tower cannot have this kernel",
                where=f"kernel: {config.kernel}",
                found="an even kernel has no middle",
                fix=f"use {config.kernel - 1} or {config.kernel + 1}",
            )
        self.grid, self.heads, self.content_dim = grid, config.kernel**2, config.content_dim
        self.pad = config.kernel // 2 if config.border == "zero" else 0
        half = config.kernel // 2
        taps = [(float(y), float(x)) for y in range(-half, half + 1) for x in range(-half, half + 1)]
        root = config.alpha**0.5
        spreads = torch.full((self.heads,), root)
        if config.width == "precision":
            spreads = root * torch.eye(2).repeat(self.heads, 1, 1)
        if config.learnable:
            self.centres, self.spreads = nn.Parameter(torch.tensor(taps)), nn.Parameter(spreads)
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
        """−(δ−Δ)ᵀSSᵀ(δ−Δ) for every head, query and key."""
        gap = self.get_buffer("offsets") - self.centres[:, None, None]
        if self.spreads.ndim == 1:
            return -(gap * self.spreads[:, None, None, None]).square().sum(dim=3)
        # Elementwise, not a matmul: under autocast the distances stay float32.
        return -(gap[..., None] * self.spreads[:, None, None]).sum(dim=3).square().sum(dim=3)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        maps = x.unflatten(1, self.grid)
        keys = F.pad(maps, (0, 0, self.pad, self.pad, self.pad, self.pad)).flatten(1, 2)
        if self.content_dim:
            y = self._attend_to_content(x, keys)
        else:  # one map for all images: scaled_dot_product_attention would compute it for each
            weights = self.scores().softmax(dim=2).to(x.dtype)
            y = (weights.flatten(0, 1) @ keys).unflatten(1, weights.shape[:2])
        return self.out(y.transpose(1, 2).flatten(2))

    def _attend_to_content(self, x: Float[Tensor, "b n d"], keys: Float[Tensor, "b m d"]) -> Float[Tensor, "b h n d"]:
        heads = (self.heads, self.content_dim)
        q = self.query(x).unflatten(2, heads).transpose(1, 2)
        k = self.key(keys).unflatten(2, heads).transpose(1, 2)
        delta = self.get_buffer("offsets")
        encoding = torch.cat([delta.square().sum(dim=2, keepdim=True), delta], dim=2)  # r_δ
        moved = torch.einsum("bhnp,nmp->bhnm", torch.einsum("bhnk,hpk->bhnp", q, self.position), encoding)
        values = keys[:, None].expand(-1, self.heads, -1, -1)
        bias = (self.scores() + moved).to(q.dtype)
        return F.scaled_dot_product_attention(q + self.key_bias[:, None], k, values, attn_mask=bias, scale=1.0)

    @torch.no_grad()
    def copy_convolution(self, conv: nn.Conv2d) -> None:
        """Takes a kernel × kernel convolution's weights: head Δ gets the tap at Δ + ⌊kernel/2⌋."""
        assert conv.weight[0, 0].numel() == self.heads and conv.stride == (1, 1) and conv.groups == 1, conv
        self.out.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))
        assert self.out.bias is not None
        if conv.bias is None:
            nn.init.zeros_(self.out.bias)
        else:
            self.out.bias.copy_(conv.bias)

    def _init_weights(self) -> None:
        """A convolution's start, LeCun normal over all taps; W_Q and u 0, so that content enters by training."""
        nn.init.trunc_normal_(self.out.weight, std=self.out.in_features**-0.5)
        nn.init.zeros_(self.out.bias)
        if self.content_dim:
            nn.init.zeros_(self.query.weight)
            nn.init.xavier_uniform_(self.key.weight)
            nn.init.zeros_(self.key_bias)
            nn.init.normal_(self.position, std=0.02)


def offsets(grid: tuple[int, int], pad: int) -> Float[Tensor, "n m 2"]:
    """δ = k − q in rows and columns, for queries on the grid and keys on the grid with a frame of `pad`."""
    ends = (0, pad)
    queries, keys = (
        torch.cartesian_prod(*(torch.arange(-e, side + e, dtype=torch.float32) for side in grid)) for e in ends
    )
    return keys[None] - queries[:, None]


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

    Cordonnier, Loukas and Jaggi 2020 ("On the relationship between self-attention and convolutional layers"). We
    differ: pre-norm blocks, exact GELU, no class token, and the mean of the normed tokens as pooled vector. There are
    no position tables, so the same weights serve every image size.
    """

    no_weight_decay = ("centres", "spreads", "key_bias")

    def __init__(self, config: AttentionConvConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, config.patch, "patch")
        self.feature_dim, self.image_size = config.dim, config.image_size
        side = config.image_size // config.patch
        self.grid = (side, side)
        self.patch_embed = nn.Conv2d(3, config.dim, config.patch, config.patch)
        rates = drop_path_rates(config.drop_path, config.depth)
        self.blocks = nn.Sequential(*(Block(config, self.grid, rate) for rate in rates))
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(x))
        return TowerOutput(tokens.mean(dim=1), tokens, self.grid)

    def block_list(self) -> list[nn.Module]:
        return list(self.blocks)

    def _init_weights(self) -> None:
        """Patch convolution LeCun normal as in ViT; MLPs Xavier-uniform."""
        fan_in = self.patch_embed.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.weight, std=fan_in**-0.5)
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.mlp.init_xavier()


IMAGE_TOWERS.add(
    AttentionConvConfig,
    AttentionConv,
    # At α = 2 a head's neighbouring tap starts with e⁻² of its own tap's weight, so that centres receive gradient.
    {"attention_conv_nano": {"image_size": 64, "patch": 8, "dim": 112, "depth": 4, "alpha": 2.0, "learnable": True}},
    source="Cordonnier et al. 2020; attention_conv_nano is ours",
)
