"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS, NotNegative, OptimizerConfig


@configclass
class SGDConfig(OptimizerConfig):
    """Plain SGD, with momentum if it is set."""

    counts_updates: ClassVar[bool] = False

    momentum: NotNegative = 0.0
    """Momentum factor. 0: none."""

    @property
    def state_size(self) -> int:
        return 1 if self.momentum else 0


def build(config: SGDConfig, *, groups: list[dict[str, Any]]) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


OPTIMIZERS.add(
    SGDConfig, build, {"sgd": {}}, source="Sutskever et al. 2013, On the importance of initialization and momentum"
)
