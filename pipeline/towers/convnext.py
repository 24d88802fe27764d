"""ConvNeXt: a convolutional network modeled on the transformer."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput
from clipwright.pipeline.towers.layers import DropPath, Mlp, check_multiple, drop_path_rates, to_map, to_tokens

KERNEL = 7
LAYER_SCALE = 1e-6


@configclass
class ConvNeXtConfig(ImageTowerConfig):
    """A ConvNeXt. `image_size` must be a multiple of 32.

    The authors train tiny, small, base and large on ImageNet-1k with drop_path 0.1, 0.4, 0.5, 0.5, and xlarge on
    ImageNet-22k with 0.2.
    """

    dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    """Width of each stage."""
    depths: tuple[int, int, int, int] = (3, 3, 9, 3)
    """Number of blocks of each stage."""
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the MLPs."""
    ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; rates rise linearly from 0."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position of a feature map."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + γ ⊙ W2·act(W1·LN(dw7×7(x))), hidden width 4·dim; γ per channel starts at 1e-6.

    Liu et al. 2022, section 2.6 and figure 4. One norm, one residual; nothing between the convolution and the norm.
    """

    def __init__(self, dim: int, act: str, ln_eps: float, drop_path: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = Mlp(dim, 4 * dim, act)
        self.scale = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.scale * self.mlp(self.norm(to_tokens(self.depthwise(x))))
        return x + to_map(self.drop_path(y), (x.shape[2], x.shape[3]))


class ConvNeXt(ImageTower):
    """Images (B, 3, S, S) → pooled (B, dims[3]), tokens (B, (S/32)², dims[3]).

    Liu et al. 2022, section 2 and appendix A. Pooled is the norm of the mean token; tokens are normalized one by one.
    With channels-last maps every conversion between maps and tokens is a view.
    """

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        check_multiple("image_size", config.image_size, 32, "the tower's stride")
        self.feature_dim = config.dims[-1]
        self.image_size = config.image_size
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        dim = config.dims[0]
        stages: list[nn.Module] = []
        for i, (out, depth) in enumerate(zip(config.dims, config.depths, strict=True)):
            if i == 0:
                layers: list[nn.Module] = [nn.Conv2d(3, out, 4, 4), ChannelNorm(out, eps=config.ln_eps)]
            else:
                layers = [ChannelNorm(dim, eps=config.ln_eps), nn.Conv2d(dim, out, 2, 2)]
            layers += [Block(out, config.act, config.ln_eps, next(rates)) for _ in range(depth)]
            stages.append(nn.Sequential(*layers))
            dim = out
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dim, eps=config.ln_eps)
        self._init_weights()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        assert images.shape[-2:] == (self.image_size, self.image_size), images.shape
        x = self.stages(images)
        tokens = to_tokens(x)
        return TowerOutput(self.norm(tokens.mean(dim=1)), self.norm(tokens), (x.shape[2], x.shape[3]))

    def block_list(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def _init_weights(self) -> None:
        """Convolutions and matrices N(0, 0.02) truncated at ±2, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


IMAGE_TOWERS.add(
    ConvNeXtConfig,
    ConvNeXt,
    {
        "convnext_nano": {"image_size": 64, "dims": (32, 64, 128, 192), "depths": (2, 2, 2, 1)},
        "convnext_tiny": {"dims": (96, 192, 384, 768), "depths": (3, 3, 9, 3)},
        "convnext_small": {"dims": (96, 192, 384, 768), "depths": (3, 3, 27, 3)},
        "convnext_base": {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3)},
        "convnext_large": {"dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3)},
        "convnext_xlarge": {"dims": (256, 512, 1024, 2048), "depths": (3, 3, 27, 3)},
    },
    source="Liu et al. 2022; convnext_nano is ours",
)
