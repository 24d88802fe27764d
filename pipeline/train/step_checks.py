"""Checks on each step: updates that are not finite, and ranks that are slow."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed.group import World, all_gather, all_gather_object
from clipwright.pipeline.train.engine import StepResult
from clipwright.pipeline.train.sample_log import merge
from clipwright.pipeline.train.supervision.failures import MAX_LISTED_RANKS
from clipwright.pipeline.train.supervision.progress import PROGRESS

IN_A_ROW = 3  # steps that are skipped


WINDOW = 16  # steps over which ranks are compared: two of them, begun anywhere, are over within 48


SLOW, SHARE = 1.6, 0.02  # times the median of the others; and at least this share of the time all take


class NonFiniteSteps:
    """Steps that were skipped, since their loss or gradient is not finite; IN_A_ROW of them end the run."""

    def __init__(self, run: Path, count: int) -> None:
        self.run, self.count, self._row = run, count, 0

    def add(self, result: StepResult) -> None:
        self._row = self._row + 1 if result.skipped else 0
        self.count += result.skipped

    @property
    def too_many(self) -> bool:
        """Whether the run ends, on all ranks alike."""
        return self._row >= IN_A_ROW

    def error(self, result: StepResult, step: int, batch: Batch) -> ClipwrightError:
        """E_NONFINITE behind step `step`, whose part on this rank was `batch`; every rank must call."""
        keys = merge(all_gather_object(batch.batch_samples)).keys
        latest = self.run / "latest"
        stands = latest.read_text(encoding="utf-8").strip() if latest.exists() else "no checkpoint"
        return ClipwrightError(
            "E_NONFINITE",
            f"{IN_A_ROW} steps in a row that are not finite",
            where=f"{self.run} step {step}: {', '.join(keys[:MAX_LISTED_RANKS])}, …",
            found=f"loss {result.loss}, gradient norm {result.grad_norm}; {stands} stands, no update was made since",
            fix=f"see all samples: clipwright data ledger {self.run} step={step}; "
            "lower optim.lr or use precision=fp32, with --fresh or another -o",
        )


class StepPace:
    """Which ranks hold up the others: what each takes by itself for WINDOW steps, compared."""

    def __init__(self, world: World) -> None:
        self.world, self.slow = world, list[int]()
        self._hosts = all_gather_object(os.uname().nodename)
        self._suspects: set[int] = set()
        self._before: torch.Tensor | None = None  # the first window holds what is slow only once

    def add(self, step: int) -> list[str]:
        """Behind step `step`; every rank must call. A line for each rank that was slow twice, the first time only."""
        if step % WINDOW or self.world.size == 1:
            return []
        now = torch.tensor(
            [[PROGRESS.phase_seconds["data"], PROGRESS.phase_seconds["embed"], time.monotonic()]], dtype=torch.float64
        )
        before, self._before = self._before, now
        if before is None:
            return []
        took = all_gather((now - before).to(self.world.device)).cpu()
        own, data, wall = (took[:, 0] + took[:, 1]).tolist(), took[:, 0].tolist(), float(took[:, 2].mean())
        suspects = slow_ranks(own, wall)
        known, self.slow = self.slow, sorted(suspects & self._suspects)
        self._suspects = suspects
        return [
            f"slow: rank {rank} on {self._hosts[rank]} takes {own[rank] / WINDOW:.3f} s a step by itself, the others' "
            f"median is {_others(own, rank) / WINDOW:.3f}; {data[rank] / own[rank]:.0%} of it is waiting for data"
            for rank in self.slow
            if rank not in known
        ]


def slow_ranks(own: Sequence[float], wall: float) -> set[int]:
    """Ranks whose own seconds are far above the median of the others', and matter in the `wall` seconds all took."""
    medians = [_others(own, rank) for rank in range(len(own))]
    pairs = zip(own, medians, strict=True)
    return {rank for rank, (mine, others) in enumerate(pairs) if mine > max(SLOW * others, others + SHARE * wall)}


def _others(own: Sequence[float], rank: int) -> float:
    return statistics.median([*own[:rank], *own[rank + 1 :]])
