"""Timing and memory of work on one device: what training, doctor and tests/bench share."""

from __future__ import annotations

import gc
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its queued work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call of `work`, in seconds, with the device synchronized before and after."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def cpu_seconds_of(work: Callable[[], Any]) -> float:
    """CPU time of one call of `work` in this process, all threads, user and system, in seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated by torch on a GPU, resident set size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not from getrusage first: its value starts with that of the parent process.
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if match is not None:
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak, so that earlier work does not count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # without the permission, earlier work counts
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
