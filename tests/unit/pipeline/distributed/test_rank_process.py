"""Which processes are launchers of ranks, and what a rank does when one ends."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from clipwright.pipeline.distributed import rank_process
from clipwright.pipeline.distributed.rank_process import is_launcher


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/venv/bin/python3.12 /venv/bin/torchrun --nproc-per-node 8 -m clipwright train photos", True),
        ("python -m torch.distributed.run --standalone --nproc-per-node=2 -m clipwright train", True),
        ("/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=x --module clipwright train", True),
        ("/venv/bin/python /venv/bin/deepspeed --hostfile hosts train.py", True),
        ("mpirun -np 4 clipwright train photos", True),
        ("/venv/bin/python /venv/bin/clipwright launch torchrun processes=2 train photos", True),
        ("python -m clipwright launch hostfile hostfile=hosts train photos", True),
        ("bash torchrun", False),
        ("sh -c torchrun --standalone -m clipwright train", False),
        ("tmux new-session", False),
        ("python -m clipwright train photos -o launch", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_command_line(command: str, expected: bool) -> None:
    assert is_launcher(command.split()) is expected


def test_rank_that_does_not_stop_in_time_ends_without_saving(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    done: list[Any] = []
    starts = iter(["100", "100"])  # of the launcher: it runs at first
    monkeypatch.setattr(rank_process.lock, "process_start", lambda pid: next(starts, None))
    monkeypatch.setattr(rank_process.lock, "end_process", done.append)
    monkeypatch.setattr(rank_process.time, "sleep", done.append)
    monkeypatch.setattr(rank_process.os, "kill", lambda pid, number: done.append((pid, number)))
    rank_process._exit_with_launcher([SimpleNamespace(pid=7)])  # type: ignore[list-item]
    watched, stopped, waited, error = done
    assert watched == rank_process.POLL_SECONDS and stopped == (os.getpid(), signal.SIGTERM)
    assert waited == rank_process.LEAVE_SECONDS < 30 - watched
    assert error.code == "E_RANK" and error.where == "process 7"
    assert capsys.readouterr().err == "the launcher of this rank (process 7) has ended: stopping\n"
