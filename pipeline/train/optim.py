"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from clipwright.pipeline.core.registry import configclass

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@configclass
class OptimConfig:
    """`name: adamw` uses betas and eps, `sgd` uses momentum. `grad_clip_norm`: 0 turns it off."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: Positive = 1e-6
    momentum: NotNegative = 0.0
    weight_decay: NotNegative = 0.2
    grad_clip_norm: NotNegative = 1.0


@configclass
class ScheduleConfig:
    """How long and how fast: all counts are samples (images), so that a batch size changes no schedule."""

    samples: Annotated[int, Field(ge=1)] = 100_000
    global_batch: Annotated[int, Field(ge=1)] = 256
    warmup: Annotated[int, Field(ge=0)] = 5_000
    decay: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: NotNegative = 0.0

    @property
    def steps(self) -> int:
        """Whole batches that fit into the budget: it is never exceeded."""
        return max(self.samples // self.global_batch, 1)

    def factor(self, samples: int) -> float:
        """The learning rate's factor for the batch that begins at sample `samples`: linear warm-up, then the decay."""
        if samples < self.warmup:
            return (samples + self.global_batch) / (self.warmup + self.global_batch)
        if self.decay == "constant":
            return 1.0
        share = min((samples - self.warmup) / max(self.samples - self.warmup, 1), 1.0)
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(module: nn.Module, config: OptimConfig, no_decay: set[str] | None = None) -> torch.optim.Optimizer:
    """The optimiser of a module's trainable parameters; those in `no_decay` are free of weight decay (None: all)."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    free = no_decay if no_decay is not None else {name for name, _ in named}
    groups = [
        {"params": [p for name, p in named if name not in free], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if name in free], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
