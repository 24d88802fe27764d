"""Where preparation work runs: in this process, or in a pool of worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow as pa
from pydantic import Field

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.plugins import import_plugin
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.signals import deferred_signals

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

# Loaded once by the fork server, so that a worker starts in milliseconds. webdataset imports torch.
PRELOAD = ["clipwright.data_prep.build.shards", "webdataset.writer"]
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # reach all processes of a terminal or launcher
TASKS_PER_WORKER = 2  # queued at a time: no worker waits for work, and an interrupt leaves little to finish

# State of a worker process.
_state: Any = None
_is_running_task = False
_stop_requested = False


@configclass
class WorkerRuntime:
    """How a command runs its worker processes. Nothing here changes the result."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Number of worker processes; 0 uses one per CPU core."""


class WorkerPool:
    """Runs tasks on `workers` processes that share a pickled `state`. One worker means: in this process.

    `plugins` are (path, sha256) of files that each worker imports before it unpickles the state. When the context
    manager exits on an exception (Ctrl-C, SIGTERM, a failed task), running tasks finish first; a second interrupt
    kills the workers.
    """

    def __init__(self, workers: int, state: Any, plugins: Iterable[tuple[str, str]] = ()) -> None:
        self.workers = workers
        self._state = state
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            # Not fork: pyarrow, and torch in a caller, have threads whose locks a fork would copy in a locked state.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            _start_fork_server()
            self._executor = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start_worker, initargs=(pickle.dumps(state), list(plugins))
            )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is None:
            return
        try:
            self._executor.shutdown(wait=True, cancel_futures=True)
        except BaseException:
            for process in list((self._executor._processes or {}).values()):
                process.kill()
            raise

    def run(self, function: Callable[[S, T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yields `function(state, task)` of each task in order of completion. Raises E_WORKER if a worker dies."""
        if self._executor is None:
            for task in tasks:
                yield function(self._state, task)
            return
        pending = iter(tasks)
        running: set[Future[R]] = set()
        try:
            while True:
                while len(running) < TASKS_PER_WORKER * self.workers:
                    task = next(pending, None)
                    if task is None:
                        break
                    # It may start a worker. One that is not registered yet could not be ended with the others.
                    with deferred_signals(*GROUP_SIGNALS):
                        running.add(self._executor.submit(_run_task, function, task))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise ClipwrightError(
                "E_WORKER",
                "a worker process died",
                where=f"one of {format_count(self.workers, 'worker')}",
                found="it was killed, most likely because memory ran out",
                fix="run the same command again to resume; a smaller runtime.workers needs less memory",
            ) from None


def worker_count(requested: int, tasks: int) -> int:
    """Returns the number of worker processes: `requested` (0: one per CPU core), but at most one per task."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(requested or cores, tasks))


def _start_fork_server() -> None:
    """Starts the fork server with blocked signals: one to the process group must not end it, or the workers.

    Blocked, not ignored: a signal that arrives meanwhile reaches this process afterwards. A child process inherits the
    blocked signals.
    """
    resource_tracker.ensure_running()  # unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(state: bytes, plugins: list[tuple[str, str]]) -> None:
    """Sets up a worker: it ignores Ctrl-C, exits with its parent and uses one core."""
    global _state
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # drops one that has arrived
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()
    pa.set_cpu_count(1)
    for path, digest in plugins:
        import_plugin(Path(path), digest)
    _state = pickle.loads(state)  # these bytes come from our own parent process


def _exit_with_parent(sentinel: int) -> None:
    # A parent that is killed cannot stop its workers; without this they would wait for tasks forever.
    connection.wait([sentinel])
    os._exit(1)


def _on_sigterm(number: int, frame: object) -> None:
    """Handles SIGTERM, which launchers send to every process: the worker exits, but not in the middle of a task."""
    global _stop_requested
    if not _is_running_task:
        os._exit(0)
    _stop_requested = True


def _run_task(function: Callable[[Any, T], R], task: T) -> R:
    global _is_running_task
    _is_running_task = True
    try:
        return function(_state, task)
    finally:
        _is_running_task = False
        if _stop_requested:
            os._exit(0)
