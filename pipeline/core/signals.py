"""Signals that have to wait while something is started that must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeferredSignal:
    """The number of a signal that arrived meanwhile, or None."""

    number: int | None = None

    def handle(self, number: int, frame: object) -> None:
        self.number = number


@contextmanager
def deferred_signals(*numbers: int) -> Iterator[DeferredSignal]:
    """Notes signals instead of handling them; afterwards the last one is handled as before.

    Does nothing outside the main thread, which alone handles signals.
    """
    deferred = DeferredSignal()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return
    before = {number: signal.signal(number, deferred.handle) for number in numbers}
    try:
        yield deferred
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if deferred.number is not None:
        signal.raise_signal(deferred.number)
