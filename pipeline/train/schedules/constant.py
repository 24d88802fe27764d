"""Constant learning rate."""

from __future__ import annotations

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.train.schedules.base import SCHEDULES, ScheduleConfig, build


@configclass
class ConstantConfig(ScheduleConfig):
    """The peak learning rate, from the end of warmup on."""

    def decay(self, progress: float) -> float:
        return 1.0


SCHEDULES.add(ConstantConfig, build, {"constant": {}}, source="linear warmup, then constant")
