"""Where this rank is in its work: recorded by the training loop, sent to rank 0 by the heartbeat."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any


class RankProgress:
    """The step and phase of this rank, and the seconds spent in each phase so far."""

    def __init__(self) -> None:
        # (step, number of phases entered in it): equal on ranks that are equally far, greater on one that is ahead.
        self.step_and_phase = (-1, 0)
        self.phase, self.phase_started = "start", time.monotonic()
        self.heartbeats = 0  # signs of progress within a long phase
        self.phase_seconds: defaultdict[str, float] = defaultdict(float)
        self.step_started, self.last_step_seconds = self.phase_started, 0.0

    @property
    def step(self) -> int:
        """The current step, from 0; -1 before the first one."""
        return self.step_and_phase[0]

    def enter(self, phase: str, step: int | None) -> None:
        now = time.monotonic()
        self.phase_seconds[self.phase] += now - self.phase_started
        if step is None:
            self.step_and_phase = (self.step, self.step_and_phase[1] + 1)
        else:
            self.last_step_seconds = now - self.step_started if self.step >= 0 else 0.0
            self.step_started = now
            self.step_and_phase = (step, 0)
        self.phase, self.phase_started = phase, now

    def report(self) -> dict[str, Any]:
        """Returns the content of a heartbeat message.

        in_collective: whether the main thread waits in a collective; code_line: where its code is.
        """
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return {
            "step_and_phase": self.step_and_phase,
            "heartbeats": self.heartbeats,
            "phase": self.phase,
            "in_collective": _in_collective(frame),
            "code_line": _code_line(frame),
        }


def _in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if "/torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _code_line(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown line"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def location(step: int, phase: str) -> str:
    """Returns `step 812, phase backward` for step 811, counted from 0."""
    return "before step 1" if step < 0 else f"step {step + 1}, phase {phase}"


PROGRESS = RankProgress()  # a process is one rank


def enter_phase(phase: str, step: int | None = None) -> None:
    """Records that this rank starts a phase of its step; with `step`, the first phase of that step."""
    PROGRESS.enter(phase, step)


def heartbeat() -> None:
    """Records progress within a phase that may take long while other ranks wait for this one."""
    PROGRESS.heartbeats += 1
