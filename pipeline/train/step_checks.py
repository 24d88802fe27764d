"""Checks after each step: non-finite steps, and slow ranks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import command_line, format_count
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed.group import World, all_gather, all_gather_object
from clipwright.pipeline.train.engine import Engine, StepResult
from clipwright.pipeline.train.sample_log import merge
from clipwright.pipeline.train.supervision.progress import PROGRESS

MAX_SKIPPED_IN_A_ROW = 3
SHOWN_KEYS = 4

PACE_WINDOW = 16  # steps over which ranks are compared: two windows fit into any 48 steps
# A slow rank takes SLOW_FACTOR times the median of the other ranks, and the excess matters: SLOW_SHARE of the time.
SLOW_FACTOR, SLOW_SHARE = 1.6, 0.02


class NonFiniteSteps:
    """Counts skipped steps, whose loss or gradient is not finite; MAX_SKIPPED_IN_A_ROW in a row end the run."""

    def __init__(self, run: Path, count: int) -> None:
        self.run, self.count, self._in_a_row = run, count, 0

    def add(self, result: StepResult) -> None:
        self._in_a_row = self._in_a_row + 1 if result.skipped else 0
        self.count += result.skipped

    @property
    def too_many(self) -> bool:
        """Whether the run ends, on all ranks alike."""
        return self._in_a_row >= MAX_SKIPPED_IN_A_ROW

    def error(self, result: StepResult, step: int, batch: Batch, engine: Engine) -> ClipwrightError:
        """Returns E_NONFINITE after step `step`; batch: this rank's part. Every rank must call it."""
        keys = merge(all_gather_object(batch.batch_samples)).keys
        # Usually the weights are finite, and what the steps computed is not; else an earlier update made them so.
        broken = next((name for name in all_gather_object(engine.nonfinite_weight()) if name is not None), None)
        latest = self.run / "latest"
        newest = latest.read_text(encoding="utf-8").strip() if latest.exists() else "none"
        if broken is None:
            state = "the weights are finite"
            causes = "samples, precision and learning rate are possible causes"
        else:
            state = f"an earlier update made {broken} not finite"
            causes = "the learning rate, momentum or precision of that update are possible causes"
        change = "accept=[optim.lr] resumes from the newest checkpoint with another optim.lr"
        if not latest.exists():
            change = "start over with another optim.lr or precision=fp32 and --fresh"
        return ClipwrightError(
            "E_NONFINITE",
            f"loss or gradient was not finite in {format_count(MAX_SKIPPED_IN_A_ROW, 'step')} in a row",
            where=f"{self.run} step {step}: samples {', '.join(keys[:SHOWN_KEYS])}, …",
            found=f"loss {result.loss}, gradient norm {result.grad_norm}; these steps changed nothing; {state}; "
            f"newest checkpoint: {newest}",
            fix=f"{causes}: list the samples ({command_line('data', 'ledger', self.run, f'step={step}')}), or {change}",
        )


class StepPace:
    """Finds ranks that slow down the others, by the time each spends by itself in PACE_WINDOW steps."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slow: list[int] = []
        self._hosts = all_gather_object(os.uname().nodename)
        self._suspects: set[int] = set()
        self._before: torch.Tensor | None = None  # None in the first window, whose start-up costs do not count

    def add(self, step: int) -> list[str]:
        """Returns a line for each rank that was slow in two windows, once; every rank must call it after each step."""
        if step % PACE_WINDOW or self.world.size == 1:
            return []
        seconds = PROGRESS.phase_seconds
        now = torch.tensor([[seconds["data"], seconds["embed"], time.monotonic()]], dtype=torch.float64)
        before, self._before = self._before, now
        if before is None:
            return []
        spent = all_gather((now - before).to(self.world.device)).cpu()
        data = spent[:, 0].tolist()
        own = (spent[:, 0] + spent[:, 1]).tolist()
        suspects = slow_ranks(own, float(spent[:, 2].mean()))
        known, self.slow = self.slow, sorted(suspects & self._suspects)
        self._suspects = suspects
        return [
            f"slow: rank {rank} on {self._hosts[rank]} takes {own[rank] / PACE_WINDOW:.3f} s per step by itself, the "
            f"median of the other ranks is {_median_of_others(own, rank) / PACE_WINDOW:.3f} s; "
            f"{data[rank] / own[rank]:.0%} of it is spent waiting for data"
            for rank in self.slow
            if rank not in known
        ]


def slow_ranks(own: Sequence[float], elapsed: float) -> set[int]:
    """Returns the ranks far above the median of the others; own: seconds per rank, elapsed: seconds of the window."""
    slow: set[int] = set()
    for rank, seconds in enumerate(own):
        others = _median_of_others(own, rank)
        if seconds > max(SLOW_FACTOR * others, others + SLOW_SHARE * elapsed):
            slow.add(rank)
    return slow


def _median_of_others(own: Sequence[float], rank: int) -> float:
    return statistics.median([*own[:rank], *own[rank + 1 :]])
