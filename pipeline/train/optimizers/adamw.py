"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS, OptimizerConfig, Positive

Decay = Annotated[float, Field(ge=0, lt=1)]


@configclass
class AdamWConfig(OptimizerConfig):
    """AdamW; the defaults are CLIP's."""

    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Decay rates of the running means of gradient and squared gradient."""
    eps: Positive = 1e-6
    """Added to the denominator for numerical stability."""

    @property
    def state_size(self) -> int:
        return 2


def build(config: AdamWConfig, *, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


OPTIMIZERS.add(
    AdamWConfig, build, {"adamw": {}}, source="Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization"
)
