"""What a person reads while a command runs: progress, durations, and no noise from libraries."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from clipwright.pipeline.core.messages import format_count, format_duration


def quiet_libraries() -> None:
    """Silences notices that ask nothing of the user: a warning that is shown needs action."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("deepspeed", "DeepSpeed", "accelerate", "transformers", "torch.distributed", "webdataset"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)(\.|$)")
    warnings.filterwarnings("ignore", message=r".*untested.*optimizer.*")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the warnings and progress bars of transformers; what matters is raised as a ClipwrightError."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


class Progress:
    """Done/total, rate, time left and failures on stderr: a bar on a terminal, elsewhere one plain line per interval.

    Used as `with Progress("prep", total, "row", quiet=call.quiet) as progress: … progress.add(10)`. The bar is removed
    at the end; the command's summary reports the result. NO_COLOR is honored. `already_done`: the amount that an
    earlier start had done, which counts as done but not toward the rate.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        plural: str = "",
        quiet: bool = False,
        interval: float = 10.0,
        already_done: int = 0,
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.plural = plural or f"{unit}s"
        self.quiet = quiet
        self.interval = interval
        self.started = time.monotonic()
        self.last_line = self.started
        self.already_done = already_done
        self.done = already_done
        self.failed = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            self._start_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Removes the bar and restores the cursor, however the work ended.
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def add(self, done: int, failed: int = 0) -> None:
        self.done += done
        self.failed += failed
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, details=self._details())
        elif not self.quiet and time.monotonic() - self.last_line >= self.interval:
            self.last_line = time.monotonic()
            of = self.done if self.total is None else self.total
            done = "" if self.total is None else f"{self.done:,}/"
            count = done + format_count(of, self.unit, self.plural)
            line = "  ".join(part for part in (f"{self.what} {count}", self._details()) if part)
            print(line, file=sys.stderr, flush=True)

    def rename(self, what: str) -> None:
        """Changes the description of the work in progress."""
        self.what = what
        if self._bar is not None:
            self._bar.update(self._task, description=self._description())

    @contextmanager
    def above(self) -> Iterator[None]:
        """Lines printed inside this context, on stdout or stderr, appear above the bar if there is one."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def _details(self) -> str:
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

    def _description(self) -> str:
        return f"{self.what} ({self.plural})"

    def _start_bar(self) -> None:
        # Imported only if there is a terminal to draw on: rich costs 60 ms.
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415

        count = MofNCompleteColumn() if self.total is not None else TextColumn("{task.completed}")
        columns = (TextColumn("{task.description}"), BarColumn(), count, TextColumn("{task.fields[details]}"))
        # transient: the summary replaces a finished bar. redirect_stdout=False: rich would send to the terminal what a
        # command prints into a file.
        console = Console(stderr=True)
        self._bar = Bar(*columns, console=console, transient=True, refresh_per_second=4, redirect_stdout=False)
        self._task = self._bar.add_task(self._description(), total=self.total, completed=self.done, details="")
        try:
            self._bar.start()
        except BaseException:  # Ctrl-C at this moment: __exit__ is not called if __enter__ does not return
            with suppress(Exception):  # the bar may be half started
                self._bar.stop()
            console.show_cursor()
            raise


def _format_rate(per_second: float) -> str:
    """Returns a rate with at least two digits: `25/s`, `1.5/s`, `2.4/min` or `3.1/h`."""
    if per_second >= 10:
        return f"{per_second:.0f}/s"
    for count, unit in ((per_second, "s"), (per_second * 60, "min")):
        if count >= 1:
            return f"{count:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"
