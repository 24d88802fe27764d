"""Supervision of a rank during training: stop signals, failures of this rank, and failures of other ranks.

`Supervisor` wraps everything that a rank does in its process group. Whatever happens to one rank, the group exits with
one error line and one exit code. On a stop signal the run saves a checkpoint, if all ranks agree in time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from clipwright.pipeline.core import lock
from clipwright.pipeline.core.command import Call, Preempted, StopFlag, conclude, ignore_stop_signals
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.status import FAILED, INTERRUPTED, PREEMPTED, STOPPED, stop_error
from clipwright.pipeline.core.system_errors import system_error
from clipwright.pipeline.distributed.group import World, barrier, broadcast_object, is_failed_collective
from clipwright.pipeline.distributed.launcher_env import read_launcher_env
from clipwright.pipeline.train.supervision.failures import RESUME
from clipwright.pipeline.train.supervision.heartbeat import LEAVE_SECONDS, GroupExit, Heartbeat
from clipwright.pipeline.train.supervision.progress import PROGRESS, enter_phase, location

CAUSE_SECONDS = 8.0  # until the rank that caused a failed collective is known
LOAD_SECONDS = 20.0  # from a signal during loading to the exit
AGREE_SECONDS = 10.0  # plus one step, until all ranks agree to stop
SAVE_SECONDS = 45.0  # to save the checkpoint after that


class Supervisor:
    """This rank's heartbeat, its stop signals, and the exit that all ranks share.

    Use: `with supervisor.handle_signals(), process_group() as world, supervisor.start(world)`.
    timeout_seconds: without progress, or without a heartbeat, after which the group exits. A single process has no
    heartbeat.
    """

    def __init__(self, call: Call, timeout_seconds: float) -> None:
        launcher = read_launcher_env(os.environ)
        self.call, self.rank, self.timeout_seconds = call, launcher.rank, timeout_seconds
        self.stop_flag: StopFlag | None = None
        self._has_steps = False  # there is something to save
        self._agreed_to_stop = False
        self._deadline: float | None = None  # of the agreement to stop, then of the save
        self._own_exit: GroupExit | None = None  # requested by the main thread
        self._heartbeat: Heartbeat | None = None
        if launcher.world_size > 1:
            self._heartbeat = Heartbeat(
                launcher.rank, launcher.world_size, timeout_seconds, self._on_signal, self._exit_process
            )
            self._heartbeat.find_own_failure = self._find_late_stop

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handles stop signals in the heartbeat thread, at once, even if the main thread is blocked."""
        if self._heartbeat is None:
            yield
            return
        self._heartbeat.start()
        # Only the heartbeat thread handles them; a handler is needed for its wakeup file descriptor.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: None)
        try:
            yield
        finally:
            self._heartbeat.sign_off(0.0)

    def start(self, world: World) -> Supervisor:
        """Returns the context in which the ranks supervise each other."""
        self.world = world
        return self

    def __enter__(self) -> Supervisor:
        enter_phase("start", -1)
        if self._heartbeat is not None:
            server = broadcast_object(self._heartbeat.listen() if self.world.is_rank0 else None)
            assert isinstance(server, tuple)
            if not self.world.is_rank0:
                self._heartbeat.connect(self.world.launcher.master_addr, *server)
            barrier()  # from now on, a rank that is not heard has failed
            self._heartbeat.set_connected()
        return self

    def begin_training(self, stop_flag: StopFlag) -> StopFlag:
        """From now on a stop signal to any rank sets `stop_flag` on all ranks, and the training loop saves."""
        self.stop_flag = stop_flag
        return stop_flag

    def step_done(self) -> None:
        """A training step is done: there is something to save."""
        self._has_steps = True

    def agree_to_stop(self) -> None:
        """All ranks have agreed to stop and save now."""
        self._agreed_to_stop = True
        self._deadline = time.monotonic() + SAVE_SECONDS

    def end_group(self, error: ClipwrightError) -> None:
        """Ends all ranks with an error of this one, which another thread has found."""
        if self._heartbeat is None or not self._heartbeat.peers:
            lock.end_process(error)
        assert self._heartbeat is not None
        self._heartbeat.request_exit(GroupExit.with_error(self.rank, error))
        # The caller must not go on: the heartbeat thread ends this process.
        self._heartbeat.finished.wait()
        time.sleep(LEAVE_SECONDS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heartbeat is None:
            return
        if error is None or (self._agreed_to_stop and isinstance(error, (Preempted, KeyboardInterrupt))):
            self._deadline = None
            self._heartbeat.sign_off(CAUSE_SECONDS)
            return
        ignore_stop_signals()
        if is_failed_collective(error):
            # If a rank knows the cause, the heartbeat thread exits this process meanwhile.
            self._heartbeat.finished.wait(CAUSE_SECONDS)
            error = _unexplained(error)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            error = system_error(error, self.rank)
        details = error.to_dict() if isinstance(error, ClipwrightError) else None
        self._own_exit = GroupExit(self.rank, _exit_code(error), details)
        self._heartbeat.request_exit(self._own_exit)
        self._heartbeat.finished.wait(CAUSE_SECONDS)
        self.call.status.enable()
        if isinstance(error, ClipwrightError):
            raise error from None

    # Called by the heartbeat thread

    def _on_signal(self, number: int) -> None:
        """A rank has received a stop signal. Before the training loop there is nothing to save: all ranks exit.

        Before the ranks are connected, the rendezvous stops them all; this rank exits alone if that takes too long.
        """
        assert self._heartbeat is not None
        if self.stop_flag is None:
            if number != signal.SIGINT:
                if self._heartbeat.is_connected:
                    self._heartbeat.request_exit(GroupExit(self.rank, PREEMPTED))
                self._deadline = self._deadline or time.monotonic() + LOAD_SECONDS
            return
        if self.stop_flag.cause is None:
            self.stop_flag.cause = KeyboardInterrupt if number == signal.SIGINT else Preempted
        if number != signal.SIGINT and self._deadline is None:
            self._deadline = time.monotonic() + AGREE_SECONDS + PROGRESS.last_step_seconds

    def _find_late_stop(self) -> GroupExit | None:
        """Returns the group's exit if stopping takes too long."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return None
        if not self._has_steps:
            return GroupExit(self.rank, PREEMPTED)
        if self._agreed_to_stop:
            what = f"the run was stopped, and saving its checkpoint took more than {SAVE_SECONDS:.0f} s"
        else:
            what = f"the run was stopped, and its ranks did not agree to save within {AGREE_SECONDS:.0f} s and a step"
        error = ClipwrightError(
            "E_UNSAVED", what, where=f"rank {self.rank}, {location(PROGRESS.step, PROGRESS.phase)}", fix=RESUME
        )
        return GroupExit.with_error(self.rank, error)

    def _exit_process(self, group_exit: GroupExit) -> None:
        """Exits this process, unless the main thread's own error is the group's: the main thread reports that one."""
        is_reporter = group_exit.reporter == self.rank
        if is_reporter and group_exit == self._own_exit:
            return
        if is_reporter:
            self.call.status.enable()
            stopped = stop_error(group_exit.code, self.call.after_stop()) if group_exit.code in STOPPED else None
            conclude(self.call, group_exit.code, group_exit.to_error() or stopped)
        sys.stdout.flush()
        sys.stderr.flush()
        lock.release_held()
        os._exit(group_exit.code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, ClipwrightError):
        return error.exit_code
    if isinstance(error, Preempted):
        return PREEMPTED
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def _unexplained(error: BaseException) -> ClipwrightError:
    return ClipwrightError(
        "E_RANK",
        "a collective between ranks failed although no rank exited or reported an error",
        where=location(PROGRESS.step, PROGRESS.phase),
        found=str(error).splitlines()[0][:200],
        fix=f"check the network between the nodes, then {RESUME}",
    )
