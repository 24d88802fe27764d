"""Daemon threads that run the loader's jobs and report how long the current item has taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]
JOIN_TIMEOUT_SECONDS = 5.0  # how long `close` waits for the threads


class Workers:
    """Threads that run jobs in order of submission. A job handles its own exceptions.

    Unlike those of concurrent.futures, the threads are daemons: a read that never returns must not keep the process
    from exiting.
    """

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._items: dict[int, tuple[float, object]] = {}  # thread → when its current item started, and the item
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"decode-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def start_item(self, item: object) -> None:
        """Starts the clock for `item`; called by a job before each step that may take long."""
        self._items[threading.get_ident()] = (time.monotonic(), item)

    def stop_clock(self) -> None:
        """Stops the clock; called by a job before it waits for something that has its own timeout."""
        self._items.pop(threading.get_ident(), None)

    def slowest(self) -> tuple[float, object]:
        """Returns the seconds that the slowest thread has spent on its current item, and that item."""
        now = time.monotonic()
        running = [(now - started, item) for started, item in list(self._items.values())]
        return max(running, default=(0.0, None), key=lambda entry: entry[0])

    def close(self) -> None:
        """Ends the threads after their current jobs and drops the queued ones."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + JOIN_TIMEOUT_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _run(self) -> None:
        thread = threading.get_ident()
        while (job := self._jobs.get()) is not None and not self._closed:
            job()
            self._items.pop(thread, None)
