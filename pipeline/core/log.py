"""What a person reads while a command runs: words, progress, and no noise from libraries."""

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


def quiet_libraries() -> None:
    """Silences notices that ask nothing of the user; a warning that is shown means: act."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("deepspeed", "DeepSpeed", "accelerate", "transformers", "torch.distributed", "webdataset"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)(\.|$)")
    warnings.filterwarnings("ignore", message=r".*untested.*optimizer.*")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings and bars: what matters is an error of ours."""
    from transformers.utils import logging as theirs  # noqa: PLC0415

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)


class Progress:
    """Done/total, rate, time left and failures, on stderr: a bar on a terminal, elsewhere a plain line per interval.

    Used as `with Progress("prep", total, "rows", quiet=call.quiet) as progress: … progress.add(10)`. The bar leaves
    nothing behind; the command's own summary says what was done. NO_COLOR is honoured. `begun`: what an earlier start
    had done already, which counts as done but not for the rate.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        quiet: bool = False,
        interval: float = 10.0,
        begun: int = 0,
    ) -> None:
        self.what, self.total, self.unit, self.quiet, self.interval = what, total, unit, quiet, interval
        self.started = self.last = time.monotonic()
        self.done = self.begun = begun
        self.failed = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            self._start_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Takes the bar away; the cursor is back, whatever ended the work.
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def add(self, done: int, failed: int = 0) -> None:
        self.done += done
        self.failed += failed
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, left=self._left())
        elif not self.quiet and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            of = f"/{self.total}" if self.total is not None else ""
            print(f"{self.what} {self.done}{of} {self.unit}  {self._left()}", file=sys.stderr, flush=True)

    def rename(self, what: str) -> None:
        """Says what is being done now."""
        self.what = what
        if self._bar is not None:
            self._bar.update(self._task, description=self._description())

    @contextmanager
    def above(self) -> Iterator[None]:
        """What is printed meanwhile, on stdout or stderr, stands above the bar where there is one."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def _left(self) -> str:
        """Rate, time left, failures."""
        rate = (self.done - self.begun) / max(time.monotonic() - self.started, 1e-9)
        text = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
        if self.total is not None and rate > 0:
            minutes, seconds = divmod(round(max(self.total - self.done, 0) / rate), 60)
            hours, minutes = divmod(minutes, 60)
            text += f"  eta {hours}h{minutes:02d}m" if hours else f"  eta {minutes}m{seconds:02d}s"
        return text + (f"  failed {self.failed}" if self.failed else "")

    def _description(self) -> str:
        return f"{self.what} ({self.unit})"

    def _start_bar(self) -> None:
        # Imported where there is a terminal to draw on: rich costs 60 ms that a job's log need not pay.
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415

        count = MofNCompleteColumn() if self.total is not None else TextColumn("{task.completed}")
        columns = (TextColumn("{task.description}"), BarColumn(), count, TextColumn("{task.fields[left]}"))
        # transient: a bar that is done says nothing that the summary does not say. stdout is not rich's: it would
        # send what a command prints into a file to the terminal.
        console = Console(stderr=True)
        self._bar = Bar(*columns, console=console, transient=True, refresh_per_second=4, redirect_stdout=False)
        self._task = self._bar.add_task(self._description(), total=self.total, completed=self.done, left="")
        try:
            self._bar.start()
        except BaseException:  # Ctrl-C just now: where __enter__ did not end, nobody calls __exit__
            with suppress(Exception):  # it may be half begun
                self._bar.stop()
            console.show_cursor()
            raise
