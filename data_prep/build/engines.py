"""Where the work runs: in this process, or in a pool of worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.plugins import import_plugin

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

# Loaded once by the fork server, so that a worker starts in milliseconds. webdataset brings torch.
PRELOAD = ["clipwright.data_prep.build.shards", "webdataset.writer"]

_state: Any = None
_busy = _ending = False


class Engine:
    """Runs tasks on `workers` processes that share a pickled `state`; one worker means in this process.

    `plugins` are (path, sha256) of files that workers import before they unpickle the state. As a context manager
    it lets running tasks finish when left by an exception (Ctrl-C, SIGTERM, a failed task) and stops at once when
    interrupted again.
    """

    def __init__(self, workers: int, state: Any, plugins: Iterable[tuple[str, str]] = ()) -> None:
        self.workers, self._shared = workers, state
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Not fork: pyarrow and a caller's torch have threads, whose locks a fork would copy as they are.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            _start_server()
            self._pool = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start, initargs=(pickle.dumps(state), list(plugins))
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is None:
            return
        try:
            self._pool.shutdown(wait=True, cancel_futures=True)
        except BaseException:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            raise

    def run(self, function: Callable[[S, T], R], tasks: Iterable[T]) -> Iterator[R]:
        """`function(state, task)` of each task, in the order they end. A dead worker is E_WORKER."""
        if self._pool is None:
            for task in tasks:
                yield function(self._shared, task)
            return
        left = iter(tasks)
        running: set[Future[R]] = set()
        try:
            while True:
                # Two a worker: none waits for work, and an interrupt leaves little to finish.
                while len(running) < 2 * self.workers and (task := next(left, None)) is not None:
                    running.add(self._pool.submit(_call, function, task))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise ClipwrightError(
                "E_WORKER",
                "a worker process died",
                where=f"one of {self.workers} workers",
                found="it was killed, most often for memory",
                fix="run the same command again, it goes on where it stopped; fewer runtime.workers need less memory",
            ) from None


def _start_server() -> None:
    """Starts the fork server deaf to SIGTERM: sent to the whole process group, it must not take the workers along."""
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        forkserver.ensure_running()  # an ignored signal stays ignored in what is started meanwhile
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def workers_for(wanted: int, tasks: int) -> int:
    """How many processes to use: `wanted`, or with 0 one a core, but never more than there are tasks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted or cores, tasks))


def _start(state: bytes, plugins: list[tuple[str, str]]) -> None:
    """A worker's start: it leaves Ctrl-C to its parent, ends with it, and keeps to one core."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    pa.set_cpu_count(1)
    for path, digest in plugins:
        import_plugin(Path(path), digest)
    _state = pickle.loads(state)  # our own parent's bytes


def _end_with(sentinel: int) -> None:
    # A parent that was killed cannot tell its workers; they would wait for work for ever.
    connection.wait([sentinel])
    os._exit(1)


def _terminate(number: int, frame: object) -> None:
    """SIGTERM, which launchers send to every process: a worker ends, but not in the middle of a task."""
    global _ending
    if not _busy:
        os._exit(0)
    _ending = True


def _call(function: Callable[[Any, T], R], task: T) -> R:
    global _busy
    _busy = True
    try:
        return function(_state, task)
    finally:
        _busy = False
        if _ending:
            os._exit(0)
