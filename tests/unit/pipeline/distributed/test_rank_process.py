"""Which processes are launchers of ranks."""

from __future__ import annotations

import pytest

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
