"""A rank among its peers while it trains: told to stop, ill, slow, or left by one of them.

`Health` wraps all that a rank does in its group. Whatever happens to one of them, the group ends by one line and one
exit code; a run that was told to stop saves if all ranks agree in time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

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
from clipwright.pipeline.distributed.group import World, barrier, broadcast_object
from clipwright.pipeline.distributed.launcher_env import read_launcher_env
from clipwright.pipeline.train.supervision.failures import AGAIN
from clipwright.pipeline.train.supervision.heartbeat import End, Heartbeat
from clipwright.pipeline.train.supervision.progress import PROGRESS, enter_phase

CAUSE = 8.0  # seconds until the cause of a lost connection is known
AGREE = 10.0  # seconds, and one step, until all ranks agree to stop
SAVE = 45.0  # seconds to save, once they do


class Health:
    """This rank's heartbeat, and the one way out for all.

    Use: `with health.handle_signals(), process_group() as world, health.start(world)`.
    `timeout_seconds`: seconds without progress, or a sign of life, that end the group. A process alone watches nobody.
    """

    def __init__(self, call: Call, timeout_seconds: float) -> None:
        launcher = read_launcher_env(os.environ)
        self.call, self.rank, self.timeout_seconds = call, launcher.rank, timeout_seconds
        self.flag: StopFlag | None = None
        self._begun = self._agreed = False
        self._deadline: float | None = None
        self._own: End | None = None
        self._heart: Heartbeat | None = None
        if launcher.world_size > 1:
            self._heart = Heartbeat(launcher.rank, launcher.world_size, timeout_seconds, self._told, self._leave)
            self._heart.check = self._late

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Signals are heard at once, whatever the main thread is in."""
        if self._heart is None:
            yield
            return
        self._heart.start()
        try:
            yield
        finally:
            self._heart.sign_off(0.0)

    def start(self, world: World) -> Health:
        self.world = world
        return self

    def __enter__(self) -> Health:
        enter_phase("start", -1)
        if self._heart is not None:
            meet = broadcast_object(self._heart.listen() if self.world.is_rank0 else None)
            assert isinstance(meet, tuple)
            if not self.world.is_rank0:
                self._heart.join_first(self.world.launcher.master_addr, *meet)
            barrier()  # whoever is not heard from now on is ill
        return self

    def begin_training(self, flag: StopFlag) -> StopFlag:
        """From now on a signal sets `flag`, on all ranks, and the loop saves."""
        self.flag = flag
        return flag

    def stepped(self) -> None:
        """A step was made: there is something to save."""
        self._begun = True

    def agree_to_stop(self) -> None:
        """All ranks agreed to stop, and save."""
        self._agreed, self._deadline = True, time.monotonic() + SAVE

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heart is None:
            return
        if error is None or (self._agreed and isinstance(error, (Preempted, KeyboardInterrupt))):
            self._deadline = None
            self._heart.sign_off(CAUSE)
            return
        deafen()
        if _is_lost_peer(error):  # whoever knows the cause ends this process from the other thread
            self._heart.over.wait(CAUSE)
            error = _lost(error)
        self._own = End(self.rank, _exit_code(error), error.args if isinstance(error, ClipwrightError) else None)
        self._heart.request_exit(self._own)
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
                self._heart.request_exit(End(self.rank, PREEMPTED))
            return
        self.flag.cause = self.flag.cause or (KeyboardInterrupt if number == signal.SIGINT else Preempted)
        if number != signal.SIGINT and self._deadline is None:
            self._deadline = time.monotonic() + AGREE + PROGRESS.lasted

    def _late(self) -> End | None:
        """Whether a stop takes too long."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return None
        if not self._begun:
            return End(self.rank, PREEMPTED)
        error = ClipwrightError(
            "E_UNSAVED",
            "told to stop, and not saved in time",
            where=f"rank {self.rank}, step {PROGRESS.mark[0] + 1}, {PROGRESS.phase}",
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
        where=f"step {PROGRESS.mark[0] + 1}, {PROGRESS.phase}",
        found=str(error).splitlines()[0][:200],
        fix=f"no rank has died or reports a fault: see the network between the hosts, and {AGAIN}",
    )
