"""Where this process is in its work: told by the work itself, read by its heartbeat."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any


class RankProgress:
    """A step, its phase, and the seconds spent in each phase so far."""

    def __init__(self) -> None:
        # The step and how many of its phases were begun: equal on ranks that are equally far, greater on one ahead.
        self.mark = (-1, 0)
        self.phase, self.since = "start", time.monotonic()
        self.signs = 0  # of life within a long phase
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.began, self.lasted = self.since, 0.0  # the step it is in, and the one before

    def enter(self, phase: str, step: int | None) -> None:
        now = time.monotonic()
        self.spent[self.phase] += now - self.since
        if step is not None:
            self.began, self.lasted = now, now - self.began if self.mark[0] >= 0 else 0.0
        self.mark = (self.mark[0], self.mark[1] + 1) if step is None else (step, 0)
        self.phase, self.since = phase, now

    def told(self) -> dict[str, Any]:
        """What a heartbeat says. waits: whether the main thread is in an exchange with other ranks; at: its code."""
        inner = frame = sys._current_frames().get(threading.main_thread().ident or 0)
        waits = False
        while frame is not None and not waits:
            waits, frame = "/torch/distributed/" in frame.f_code.co_filename, frame.f_back
        return {"mark": self.mark, "signs": self.signs, "phase": self.phase, "waits": waits, "at": _line(inner)}


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


PROGRESS = RankProgress()  # a process is one rank


def enter_phase(phase: str, step: int | None = None) -> None:
    """Says that this process begins a phase of its step, or with `step` the first phase of that one."""
    PROGRESS.enter(phase, step)


def heartbeat() -> None:
    """Says that a phase which may take long, while other ranks wait for this one, gets on."""
    PROGRESS.signs += 1
