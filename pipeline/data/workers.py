"""Threads that a stuck job cannot take down with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]
STOPPING = 5.0  # seconds that closing waits for a thread


class Workers:
    """Threads that do jobs in the order they come; what a job raises is the job's own matter.

    Daemons, unlike those of concurrent.futures: a read that never returns must not keep a process from ending.
    """

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._since: dict[int, tuple[float, object]] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"decode-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def begins(self, what: object) -> None:
        """Called by a job when it turns to something new that may take its time."""
        self._since[threading.get_ident()] = (time.monotonic(), what)

    def rests(self) -> None:
        """Called by a job before it waits for something that has time-outs of its own."""
        self._since.pop(threading.get_ident(), None)

    def longest(self) -> tuple[float, object]:
        """Seconds that the slowest thread has been at what it last began, and what that is."""
        now = time.monotonic()
        begun = [(now - since, what) for since, what in list(self._since.values())]
        return max(begun, default=(0.0, None), key=lambda found: found[0])

    def close(self) -> None:
        """Ends the threads after the jobs they are at; the others are dropped."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + STOPPING
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))

    def _run(self) -> None:
        me = threading.get_ident()
        while (job := self._jobs.get()) is not None and not self._closed:
            job()
            self._since.pop(me, None)
