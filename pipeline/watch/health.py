"""A rank among its peers while it trains: told to stop, ill, slow, or left by one of them.

`Health` wraps all that a rank does in its group. Whatever happens to one of them, the group ends by one line and one
exit code; a run that was told to stop saves if all ranks agree in time.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from clipwright.pipeline.core.command import (
    FAILED,
    INTERRUPTED,
    PREEMPTED,
    STOPPED,
    Call,
    Preempted,
    StopFlag,
    conclude,
    deafen,
)
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed import World, barrier, from_all, from_first, gather
from clipwright.pipeline.engine import StepResult
from clipwright.pipeline.ledger import merge
from clipwright.pipeline.place import detect
from clipwright.pipeline.watch.heartbeat import End, Heartbeat
from clipwright.pipeline.watch.judge import AGAIN, SHOWN
from clipwright.pipeline.watch.whereabouts import HERE, at

CAUSE = 8.0  # seconds until the cause of a lost connection is known
AGREE = 10.0  # seconds, and one step, until all ranks agree to stop
SAVE = 45.0  # seconds to save, once they do
IN_A_ROW = 3  # steps that are skipped
WINDOW = 16  # steps over which ranks are compared: two of them, begun anywhere, are over within 48
SLOW, SHARE = 1.6, 0.02  # times the median of the others; and at least this share of the time all take


class Health:
    """This rank's heartbeat, and the one way out for all.

    `with health.hears(), process_group() as world, health.joins(world)`: a signal is heard while the group meets.
    `patience`: seconds without progress, or a sign of life, that end the group. A process alone watches nobody.
    """

    def __init__(self, call: Call, patience: float) -> None:
        place = detect(os.environ)
        self.call, self.rank, self.patience = call, place.rank, patience
        self.flag: StopFlag | None = None
        self._begun = self._agreed = False
        self._deadline: float | None = None
        self._own: End | None = None
        self._heart: Heartbeat | None = None
        if place.size > 1:
            self._heart = Heartbeat(place.rank, place.size, patience, self._told, self._leave)
            self._heart.check = self._late

    @contextmanager
    def hears(self) -> Iterator[None]:
        """Signals are heard at once, whatever the main thread is in."""
        if self._heart is None:
            yield
            return
        self._heart.start()
        try:
            yield
        finally:
            self._heart.bye(0.0)

    def joins(self, world: World) -> Health:
        self.world = world
        return self

    def __enter__(self) -> Health:
        at("start", -1)
        if self._heart is not None:
            meet = from_first(self._heart.listen() if self.world.first else None)
            assert isinstance(meet, tuple)
            if not self.world.first:
                self._heart.join_first(self.world.place.master, *meet)
            barrier()  # whoever is not heard from now on is ill
        return self

    def trains(self, flag: StopFlag) -> StopFlag:
        """From now on a signal sets `flag`, on all ranks, and the loop saves."""
        self.flag = flag
        return flag

    def stepped(self) -> None:
        """A step was made: there is something to save."""
        self._begun = True

    def agrees(self) -> None:
        """All ranks agreed to stop, and save."""
        self._agreed, self._deadline = True, time.monotonic() + SAVE

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heart is None:
            return
        if error is None or (self._agreed and isinstance(error, (Preempted, KeyboardInterrupt))):
            self._deadline = None
            self._heart.bye(CAUSE)
            return
        deafen()
        if _is_lost_peer(error):  # whoever knows the cause ends this process from the other thread
            self._heart.over.wait(CAUSE)
            error = _lost(error)
        self._own = End(self.rank, _exit_code(error), error.args if isinstance(error, ClipwrightError) else None)
        self._heart.wish(self._own)
        self._heart.over.wait(CAUSE)
        self.call.writes_status = True
        if isinstance(error, ClipwrightError):
            raise error from None

    # What the heartbeat's thread calls

    def _told(self, number: int) -> None:
        """A rank was told to stop; before the loop there is nothing to save, and all leave at once."""
        if self.flag is None:
            assert self._heart is not None
            if number != signal.SIGINT:
                self._heart.wish(End(self.rank, PREEMPTED))
            return
        self.flag.cause = self.flag.cause or (KeyboardInterrupt if number == signal.SIGINT else Preempted)
        if number != signal.SIGINT and self._deadline is None:
            self._deadline = time.monotonic() + AGREE + HERE.lasted

    def _late(self) -> End | None:
        """Whether a stop takes too long."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return None
        if not self._begun:
            return End(self.rank, PREEMPTED)
        error = ClipwrightError(
            "E_UNSAVED",
            "told to stop, and not saved in time",
            where=f"rank {self.rank}, step {HERE.mark[0] + 1}, {HERE.phase}",
            found="the save did not end" if self._agreed else "the ranks did not come to agree",
            fix=AGAIN,
        )
        return End(self.rank, error.exit_code, error.args)

    def _leave(self, end: End) -> None:
        """Ends this process; if the main thread's own error is the group's, that goes on and tells it."""
        speaks = end.by == self.rank
        if speaks and end == self._own:
            return
        if speaks:
            self.call.writes_status = True
            conclude(self.call, end.code, end.raised(), STOPPED.get(end.code, ""))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, ClipwrightError):
        return error.exit_code
    return {Preempted: PREEMPTED, KeyboardInterrupt: INTERRUPTED}.get(type(error), FAILED)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether an exchange failed: NCCL's errors have a class, gloo's are known by the file they name."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _lost(error: BaseException) -> ClipwrightError:
    return ClipwrightError(
        "E_RANK",
        "an exchange between ranks failed",
        where=f"step {HERE.mark[0] + 1}, {HERE.phase}",
        found=str(error).splitlines()[0][:200],
        fix=f"no rank has died or reports a fault: see the network between the hosts, and {AGAIN}",
    )


class Skips:
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
        keys = merge(from_all(batch.tally)).keys
        latest = self.run / "latest"
        stands = latest.read_text(encoding="utf-8").strip() if latest.exists() else "no checkpoint"
        return ClipwrightError(
            "E_NONFINITE",
            f"{IN_A_ROW} steps in a row that are not finite",
            where=f"{self.run} step {step}: {', '.join(keys[:SHOWN])}, …",
            found=f"loss {result.loss}, gradient norm {result.grad_norm}; {stands} stands, no update was made since",
            fix=f"see all samples: clipwright data ledger {self.run} step={step}; "
            "lower optim.lr or use precision=fp32, with --fresh or another -o",
        )


class Pace:
    """Which ranks hold up the others: what each takes by itself for WINDOW steps, compared."""

    def __init__(self, world: World) -> None:
        self.world, self.slow = world, list[int]()
        self._hosts = from_all(os.uname().nodename)
        self._suspects: set[int] = set()
        self._before: torch.Tensor | None = None  # the first window holds what is slow only once

    def add(self, step: int) -> list[str]:
        """Behind step `step`; every rank must call. A line for each rank that was slow twice, the first time only."""
        if step % WINDOW or self.world.size == 1:
            return []
        now = torch.tensor([[HERE.spent["data"], HERE.spent["embed"], time.monotonic()]], dtype=torch.float64)
        before, self._before = self._before, now
        if before is None:
            return []
        took = gather((now - before).to(self.world.device)).cpu()
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
