"""The contract of an optimizer, and the registry of optimizers."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from clipwright.pipeline.core.registry import Registry, configclass

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@configclass
class OptimizerConfig:
    """Fields every optimizer has.

    A family registers `build(config, groups=...)`, which returns a `torch.optim.Optimizer` of torch's parameter groups.
    `counts_updates`: whether its state has torch's `step`, the number of updates so far.
    """

    counts_updates: ClassVar[bool] = True

    name: str
    """Preset name of the optimizer; `clipwright list optimizers` shows all."""
    lr: Positive = 5e-4
    """Peak learning rate."""
    weight_decay: NotNegative = 0.2
    """Weight decay; biases, norms, positions and class tokens have none."""
    grad_clip_norm: NotNegative = 1.0
    """Largest global gradient norm of the towers; larger gradients are scaled down to it. 0: no clipping."""

    @property
    def state_size(self) -> int:
        """Numbers that the optimizer keeps per parameter."""
        raise AssertionError("an optimizer's config defines state_size")


OPTIMIZERS: Registry[torch.optim.Optimizer] = Registry("optimizer", "clipwright.pipeline.train.optimizers")
# Fields that keep their values from a lower config layer when a higher one changes `optim.name`.
SHARED_FIELDS = ("lr", "weight_decay", "grad_clip_norm")


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, no_decay: set[str] | None = None
) -> torch.optim.Optimizer:
    """Returns the optimizer of a module's trainable parameters.

    no_decay: names of parameters without weight decay; None: all.
    """
    with_decay: list[nn.Parameter] = []
    without_decay: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if no_decay is None or name in no_decay:
            without_decay.append(parameter)
        else:
            with_decay.append(parameter)
    groups = [
        {"params": with_decay, "weight_decay": config.weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    return OPTIMIZERS.build(config, groups=[group for group in groups if group["params"]])
