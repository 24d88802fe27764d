"""The contract of a learning-rate schedule, and the registry of schedules."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass

WARMUP_PART, MAX_DEFAULT_WARMUP = 20, 5_000  # the default warmup: a twentieth of the samples, at most so many


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
    warmup: Annotated[int, Field(ge=0)] | None = None
    """Samples over which the learning rate rises linearly to its peak; null: a twentieth of all, at most 5,000."""

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the training samples do not fill a batch",
                where="schedule.samples",
                found=f"{self.samples}; allowed: schedule.global_batch={self.global_batch} or more",
                fix="count samples over all epochs, not epochs: samples of the dataset × epochs",
            )
        if self.warmup is not None and self.warmup > self.samples:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the warmup is longer than the training",
                where="schedule.warmup",
                found=f"{self.warmup}; allowed: 0 to schedule.samples={self.samples}",
                fix=f"set schedule.warmup={self._default_warmup}, or more schedule.samples",
            )

    @property
    def steps(self) -> int:
        """Complete batches within `samples`, at least one."""
        return max(self.samples // self.global_batch, 1)

    def factor(self, samples: int) -> float:
        """Returns the factor of the peak learning rate for the batch that starts at sample `samples`."""
        warmup = self._default_warmup if self.warmup is None else self.warmup
        if samples < warmup:
            return (samples + self.global_batch) / (warmup + self.global_batch)
        return self.decay(min((samples - warmup) / max(self.samples - warmup, 1), 1.0))

    @property
    def _default_warmup(self) -> int:
        return min(self.samples // WARMUP_PART, MAX_DEFAULT_WARMUP)

    def decay(self, progress: float) -> float:
        """Returns the factor after warmup; progress: the share of the samples after warmup, in [0, 1]."""
        raise AssertionError("a schedule defines decay")


SCHEDULES: Registry[ScheduleConfig] = Registry("schedule", "clipwright.pipeline.train.schedules")
# Fields that keep their values from a lower config layer when a higher one changes `schedule.name`.
SHARED_FIELDS = ("samples", "global_batch", "warmup")


def build(config: ScheduleConfig) -> ScheduleConfig:
    """Returns `config`, which is the schedule itself."""
    return config
