"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS, OptimizerConfig


@configclass
class SGDConfig(OptimizerConfig):
    """Plain SGD, with momentum if it is set."""

    counts_updates: ClassVar[bool] = False

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum factor. 0: none."""

    @property
    def state_size(self) -> int:
        return 1 if self.momentum else 0


def build(config: SGDConfig, *, groups: list[dict[str, Any]]) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


OPTIMIZERS.add(
    SGDConfig, build, {"sgd": {}}, source="Sutskever et al. 2013, On the importance of initialization and momentum"
)
