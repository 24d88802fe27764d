"""What a command is doing, shown on stderr while it works: a bar on a terminal, elsewhere one line per interval.

A command is always in a phase (`phase("building the towers")`); work that can be counted is a `Progress`. A thread
shows the current one whenever nothing was printed for INTERVAL_SECONDS.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any

from clipwright.pipeline.core import streams
from clipwright.pipeline.core.messages import format_count, format_duration

INTERVAL_SECONDS = 10.0  # without a message, until the next line about the current activity
BAR_SECONDS = 2.0  # of a phase, until a terminal shows it
TICK_SECONDS = 0.5


class Progress:
    """Done/total, rate, time left and failures.

    Used as `with Progress("prep", total, "row", quiet=call.quiet) as progress: … progress.add(10)`. The bar is removed
    at the end; the command's summary reports the result. NO_COLOR is honored. `already_done`: the amount that an
    earlier start had done, which counts as done but not toward the rate. `interval`: seconds between two lines once the
    first amount is done.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        plural: str = "",
        quiet: bool = False,
        interval: float = INTERVAL_SECONDS,
        already_done: int = 0,
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.plural = plural or f"{unit}s"
        self.quiet = quiet
        self.started = time.monotonic()
        self.already_done = already_done
        self.done = already_done
        self.failed = 0
        self._interval = interval

    def __enter__(self) -> Progress:
        _display.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Removes the bar and restores the cursor, however the work ended.
        _display.end(self)

    def add(self, done: int, failed: int = 0) -> None:
        self.done += done
        self.failed += failed
        _display.update(self)

    def rename(self, what: str) -> None:
        """Changes the description of the work in progress."""
        self.what = what
        _display.update(self)

    @property
    def interval(self) -> float:
        """Seconds between two lines."""
        return min(self._interval, INTERVAL_SECONDS) if self.done == self.already_done else self._interval

    @property
    def description(self) -> str:
        """What a bar is labeled with."""
        return f"{self.what} ({self.plural})"

    def line(self) -> str:
        """Returns what is done, as one line."""
        if self.total is None:
            count = format_count(self.done, self.unit, self.plural)
        else:
            count = f"{self.done:,}/{format_count(self.total, self.unit, self.plural)}"
        return "  ".join(part for part in (f"{self.what} {count}", self.details()) if part)

    def details(self) -> str:
        """Returns rate, time left and failures, as far as they are known."""
        parts: list[str] = []
        seconds, new = time.monotonic() - self.started, self.done - self.already_done
        if new > 0 and seconds > 0:
            parts.append(_format_rate(new / seconds))
            if self.total is not None and self.total > self.done:
                parts.append(f"eta {format_duration((self.total - self.done) * seconds / new)}")
        if self.failed:
            parts.append(f"failed {self.failed:,}")
        return "  ".join(parts)


class _Phase:
    """A part of a command's work that is not counted."""

    interval = INTERVAL_SECONDS
    quiet = False

    def __init__(self, what: str) -> None:
        self.what = what
        self.started = time.monotonic()

    @property
    def description(self) -> str:
        return self.what

    def line(self) -> str:
        return f"{self.what} ({self.details()})"

    def details(self) -> str:
        return format_duration(time.monotonic() - self.started)


class _Display:
    """The one place that shows activities; a thread runs while there is one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything: in a forked process, whose parent still shows its activities."""
        self.lock = threading.RLock()
        self.activities: list[Progress | _Phase] = []
        self.verb = ""
        self.hidden = False
        self._bar: Any = None
        self._bar_of: Progress | _Phase | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._pauses = 0

    def begin(self, activity: Progress | _Phase) -> None:
        with self.lock:
            self._remove_bar()
            if not self._is_shown(activity):
                return
            if not self.activities:
                streams.seen.last_message = time.monotonic()
            self.activities.append(activity)
            try:
                if isinstance(activity, Progress) and sys.stderr.isatty():
                    self._start_bar(activity)
            except BaseException:  # Ctrl-C: `end` is not called if `begin` does not return
                self.activities.remove(activity)
                raise
            if self._thread is None:
                self._end = threading.Event()
                self._thread = threading.Thread(target=self._run, args=(self._end,), name="activity", daemon=True)
                self._thread.start()

    def end(self, activity: Progress | _Phase) -> None:
        with self.lock:
            self._remove_bar()
            if activity in self.activities:
                self.activities.remove(activity)
            rest = self.activities[-1] if self.activities else None
            if isinstance(activity, Progress) and isinstance(rest, _Phase):
                self.set_phase("finishing")
            if isinstance(rest, Progress) and sys.stderr.isatty():
                self._start_bar(rest)
            thread = None if self.activities else self._thread
            if thread is not None:
                self._thread = None
                self._end.set()
        if thread is not None:
            thread.join()

    def set_phase(self, what: str) -> None:
        with self.lock:
            if self.activities and isinstance(self.activities[0], _Phase):
                phase = self.activities[0]
                phase.what, phase.started = f"{self.verb}: {what}", time.monotonic()
                self.update(phase)

    def update(self, activity: Progress | _Phase) -> None:
        with self.lock:
            if self._bar is not None and self._bar_of is activity:
                done = activity.done if isinstance(activity, Progress) else 0
                self._bar.update(
                    self._task, completed=done, description=activity.description, details=activity.details()
                )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a message is printed: it appears above the bar, and the next line comes an interval later."""
        with self.lock:
            if self._bar is not None and not self._pauses:
                self._bar.stop()
            self._pauses += 1
        try:
            yield
        finally:
            with self.lock:
                self._pauses -= 1
                if self._bar is not None and not self._pauses:
                    self._bar.start()

    def tick(self) -> None:
        """Shows the current activity if it is time to."""
        with self.lock:
            activity = self.activities[-1] if self.activities else None
            if activity is None or self._pauses or not self._is_shown(activity):
                return
            now = time.monotonic()
            if sys.stderr.isatty():
                if self._bar is None and now - activity.started >= BAR_SECONDS:
                    self._start_bar(activity)
                self.update(activity)
            elif now - streams.seen.last_message >= activity.interval:
                streams.print_note(activity.line())

    def _is_shown(self, activity: Progress | _Phase) -> bool:
        return not (self.hidden or activity.quiet)

    def _run(self, end: threading.Event) -> None:
        while not end.wait(TICK_SECONDS):
            with suppress(OSError, ValueError):  # stderr is closed
                self.tick()

    def _remove_bar(self) -> None:
        if self._bar is not None:
            bar, self._bar, self._bar_of = self._bar, None, None
            bar.stop()

    def _start_bar(self, activity: Progress | _Phase) -> None:
        # Imported only if there is a terminal to draw on: rich costs 60 ms.
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415

        total, done = None, 0
        columns = [TextColumn("{task.description}", markup=False), BarColumn()]
        if isinstance(activity, Progress):
            total, done = activity.total, activity.done
            columns.append(MofNCompleteColumn() if total is not None else TextColumn("{task.completed}"))
        columns.append(TextColumn("{task.fields[details]}"))
        # transient: the summary replaces a finished bar. redirect_stdout=False: rich would send to the terminal what a
        # command prints into a file.
        console = Console(stderr=True)
        self._bar = Bar(*columns, console=console, transient=True, refresh_per_second=4, redirect_stdout=False)
        self._bar_of = activity
        self._task = self._bar.add_task(activity.description, total=total, completed=done, details=activity.details())
        try:
            self._bar.start()
        except BaseException:  # Ctrl-C at this moment: __exit__ is not called if __enter__ does not return
            with suppress(Exception):  # the bar may be half started
                self._bar.stop()
            self._bar = self._bar_of = None
            console.show_cursor()
            raise


_display = _Display()
os.register_at_fork(after_in_child=_display.reset)


def _around_message() -> AbstractContextManager[None]:
    return _display.paused() if _display.activities else nullcontext()


streams.seen.around_message = _around_message


@contextmanager
def working(verb: str, *, hidden: bool) -> Iterator[None]:
    """Shows, until it ends, what the command of this verb does. hidden: with --quiet, and on ranks other than 0."""
    start = _Phase(f"{verb}: starting")
    _display.verb, _display.hidden = verb, hidden
    _display.begin(start)
    try:
        yield
    finally:
        _display.activities[1:] = []  # what Ctrl-C has left
        _display.end(start)
        _display.hidden = False


def phase(what: str) -> None:
    """States what the command does from now on, such as "building the towers"."""
    _display.set_phase(what)


@contextmanager
def during(what: str) -> Iterator[None]:
    """States what the command does inside this context, in place of the progress around it."""
    part = _Phase(f"{_display.verb}: {what}")
    _display.begin(part)
    try:
        yield
    finally:
        _display.end(part)


def hide() -> None:
    """Shows nothing from now on: the processes that this command has started do."""
    _display.hidden = True


def _format_rate(per_second: float) -> str:
    """Returns a rate with at least two digits: `25/s`, `1.5/s`, `2.4/min` or `3.1/h`."""
    if per_second >= 10:
        return f"{per_second:.0f}/s"
    for count, unit in ((per_second, "s"), (per_second * 60, "min")):
        if count >= 1:
            return f"{count:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"
