"""An engine of two numbers, for tests of saving that need no DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def fake_engine() -> Any:
    """Returns what a Saver reads of an engine."""
    loss = nn.Linear(1, 1)
    return SimpleNamespace(
        weights=lambda: {"weight": torch.ones(2)},
        optimizer_state=lambda: {"exp_avg/weight@0": torch.ones(2)},
        loss=loss,
        loss_optimizer=torch.optim.AdamW(loss.parameters()),
        config=SimpleNamespace(schedule=SimpleNamespace(global_batch=16)),
        updates=0,
        zero=0,
    )
