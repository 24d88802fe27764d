"""Waiting for another process: until a condition holds, with a limit that a loaded machine does not reach."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 600.0  # far above what a wait takes on an idle machine: only a hang reaches it
POLL_SECONDS = 0.01


def wait_until(condition: Callable[[], object], process: subprocess.Popen[Any] | None = None) -> None:
    """Returns when `condition()` is true. Fails if `process` ends before, with its output, or at the limit."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"the process ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < deadline, f"not reached in {LIMIT_SECONDS:.0f} s"
        time.sleep(POLL_SECONDS)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[Any]) -> None:
    """Returns when a file that `process` writes has `count` lines."""
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= count, process)


def wait_until_delivered(pid: int, number: int) -> None:
    """Returns when a signal sent to a process is no longer pending: its handler has been called."""

    def is_delivered() -> bool:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        pending = [line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
        return not any(int(mask, 16) >> (number - 1) & 1 for mask in pending)

    wait_until(is_delivered)
