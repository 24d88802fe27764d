"""Cosine decay."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.train.schedules.base import SCHEDULES, ScheduleConfig, build


@configclass
class CosineConfig(ScheduleConfig):
    """Half a cosine, from the peak learning rate to `final_lr_ratio` of it."""

    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of the peak."""

    def decay(self, progress: float) -> float:
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES.add(
    CosineConfig, build, {"cosine": {}}, source="Loshchilov and Hutter 2017, SGDR, without restarts; linear warmup"
)
