"""The contract of a learning-rate schedule, and the registry of schedules."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from clipwright.pipeline.core.registry import Registry, configclass


@configclass
class ScheduleConfig:
    """How long a run trains, and its learning rate: linear warmup, then the decay of the schedule.

    All counts are samples (images), so that the batch size does not change the schedule. A schedule has no state: its
    config is the schedule.
    """

    name: str
    """Preset name of the schedule; `clipwright list schedules` shows all."""
    samples: Annotated[int, Field(ge=1)] = 100_000
    """Training samples in total, counted over all epochs."""
    global_batch: Annotated[int, Field(ge=1)] = 256
    """Samples per step, over all ranks and micro-batches."""
    warmup: Annotated[int, Field(ge=0)] = 5_000
    """Samples over which the learning rate rises linearly to its peak."""

    @property
    def steps(self) -> int:
        """Complete batches within `samples`, at least one."""
        return max(self.samples // self.global_batch, 1)

    def factor(self, samples: int) -> float:
        """Returns the factor of the peak learning rate for the batch that starts at sample `samples`."""
        if samples < self.warmup:
            return (samples + self.global_batch) / (self.warmup + self.global_batch)
        return self.decay(min((samples - self.warmup) / max(self.samples - self.warmup, 1), 1.0))

    def decay(self, progress: float) -> float:
        """Returns the factor after warmup; progress: the share of the samples after warmup, in [0, 1]."""
        raise AssertionError("a schedule defines decay")


SCHEDULES: Registry[ScheduleConfig] = Registry("schedule", "clipwright.pipeline.train.schedules")
# Fields that keep their values from a lower config layer when a higher one changes `schedule.name`.
SHARED_FIELDS = ("samples", "global_batch", "warmup")


def build(config: ScheduleConfig) -> ScheduleConfig:
    """Returns `config`, which is the schedule itself."""
    return config
