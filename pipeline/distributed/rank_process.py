"""A process that a launcher started as a rank: it ends with its launcher, and not alone while the ranks load."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import psutil

from clipwright.pipeline.core import lock
from clipwright.pipeline.core.command import Preempted
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.signals import deferred_signals
from clipwright.pipeline.core.streams import print_note
from clipwright.pipeline.distributed.launcher_env import read_launcher_env

RENDEZVOUS = "clipwright.pipeline.distributed.rendezvous"  # imports torch
POLL_SECONDS = 1.0
LEAVE_SECONDS = 27.0  # from a signal, or the end of the launcher, to the end of this process
PROGRAMS = ("torchrun", "deepspeed", "accelerate", "mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun")
MODULES = (
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
)


@contextmanager
def rank_process() -> Iterator[int]:
    """The context of a command that runs as ranks, from its start to its end; yields this process's rank.

    If a launcher of this process ends (SIGKILL, a lost connection), the process gets SIGTERM: it saves what it can and
    exits, at the latest LEAVE_SECONDS later. If this rank is stopped before it has joined the process group, the other
    ranks are notified and exit too.
    """
    launcher = read_launcher_env(os.environ)
    launchers = find_launchers()
    if launchers:
        threading.Thread(target=_exit_with_launcher, args=(launchers,), name="launcher", daemon=True).start()
    if launcher.world_size == 1:
        yield launcher.rank
        return
    try:
        # The other ranks are notified through torch, whose import would not survive an interruption.
        with deferred_signals(signal.SIGTERM, signal.SIGUSR1):
            importlib.import_module(RENDEZVOUS)
        yield launcher.rank
    except Preempted:
        importlib.import_module(RENDEZVOUS).leave(launcher)
        raise


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is that of a program that starts ranks.

    A shell script that starts one is none: it may end before the ranks do.
    """
    names = [Path(word).name for word in command[:2]]
    if names and (names[0] in PROGRAMS or (names[0].startswith("python") and names[-1] in PROGRAMS)):
        return True
    for word, following in pairwise(command):
        if word == "-m" and following in MODULES:
            return True
        if Path(word).name == "clipwright" and following == "launch":
            return True
    return False


def find_launchers() -> list[psutil.Process]:
    """Returns those ancestors of this process that are launchers, the nearest first."""
    try:
        return [process for process in psutil.Process().parents() if is_launcher(process.cmdline())]
    except psutil.Error:
        return []


def _exit_with_launcher(launchers: list[psutil.Process]) -> None:
    starts = {process.pid: lock.process_start(process.pid) for process in launchers}
    while all(lock.process_start(pid) == start for pid, start in starts.items()):
        time.sleep(POLL_SECONDS)
    [gone, *_] = [pid for pid, start in starts.items() if lock.process_start(pid) != start]
    with suppress(OSError):  # standard error may have ended with the launcher
        print_note(f"the launcher of this rank (process {gone}) has ended: stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE_SECONDS)
    lock.end_process(
        ClipwrightError(
            "E_RANK",
            "the launcher of this rank has ended, and the rank did not stop in time",
            where=f"process {gone}",
            found=f"limit {LEAVE_SECONDS:.0f} s",
            fix="run the same command again: it resumes from the newest checkpoint if there is one",
        )
    )
