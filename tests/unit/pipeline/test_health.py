"""A rank that is told to stop, dies, hangs, is slow or computes nonsense, and what its group makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import group_ranks
import pytest
from group_ranks import Scenario

pytestmark = pytest.mark.xdist_group("ranks")
ROUNDS = int(os.environ.get("CLIPWRIGHT_SOAK", "0"))  # see tests/soak.py
PATIENCE = 6.0


def words(small: Any, scenes: Path, *more: str) -> list[str]:
    tiny = ["image.depth=1", "text.depth=1", "embed_dim=32", "schedule.global_batch=12", "schedule.warmup=0"]
    runtime = [f"runtime.timeout_minutes={PATIENCE / 60}", "runtime.save_every=10", "schedule.samples=48000"]
    return ["train", *small.settings, *tiny, *runtime, f"data.train={scenes}", *more, "-o", "run"]


def play(folder: Path, scenarios: dict[str, Scenario]) -> dict[str, Any]:
    """Runs scenarios one after another, in one session."""
    import json

    group_ranks.write(folder / "scenarios.json", scenarios)
    for scenario in scenarios.values():
        scenario.path.mkdir(exist_ok=True)
    line = [sys.executable, group_ranks.__file__, str(folder / "scenarios.json")]
    done = subprocess.run(
        line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


CASES: dict[str, dict[str, Any]] = {
    "killed": {"ranks": 3, "when": "steps 3", "send": "SIGKILL", "to": [1]},
    "first killed": {"ranks": 2, "when": "steps 3", "send": "SIGKILL", "to": [0]},
    "stopped": {"ranks": 3, "when": "steps 3", "send": "SIGSTOP", "to": [2]},
    "hangs": {"ranks": 3, "fault": "'hang' if rank == 1 and step == 3 else None", "when": "at 1"},
    "refuses": {"ranks": 2, "fault": "'refuse' if rank == 1 and step == 2 else None", "when": "at 1"},
    "not finite": {"ranks": 2, "fault": "'nan' if rank == 1 and step in (3, 11, 12, 13) else None", "when": "at 1"},
    "told while training": {"when": "steps 3", "send": "SIGUSR1", "to": [1]},
    "told without data": {"fault": "'starve' if rank == 0 and step == 3 else None", "when": "at 0", "to": [1]},
    "told while building": {"fault": "'build' if rank == 0 and step == -1 else None", "when": "at 0", "to": [1]},
    "told in vain": {"fault": "'hang' if rank == 0 and step == 3 else None", "when": "at 0", "to": [1]},
}


@pytest.fixture(scope="module")
def seen(small: Any, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("groups")
    slow = {"told in vain": ["runtime.timeout_minutes=1"]}
    return play(
        folder,
        {
            name: Scenario(
                str(folder / name.replace(" ", "_")),
                words(small, scenes, *slow.get(name, [])),
                **{"send": "SIGTERM" if "told" in name else "", **case},
            )
            for name, case in CASES.items()
        },
    )


@pytest.mark.parametrize("name", ["killed", "first killed", "stopped", "hangs"])
def test_a_rank_that_is_ill_is_named_and_all_leave(name: str, seen: dict[str, Any]) -> None:
    found, ill = seen[name], {"killed": 1, "first killed": 0, "stopped": 2, "hangs": 1}[name]
    [[_, line]] = found["errors"]  # one rank speaks for all
    assert line.startswith("error[E_HANG]: " if name == "hangs" else "error[E_RANK]: ")
    assert f" — rank {ill} on {os.uname().nodename} — " in line and "run the same command again" in line
    assert f"step {4 if name == 'hangs' else ''}" in line
    assert found["told"] <= (("killed" in name and 3) or PATIENCE + 10), found
    assert {code for rank, code in enumerate(found["codes"]) if rank != ill} == {1}, found
    assert [rank for rank in found["killed"] if rank != ill] == []
    assert found["status"]["exit_code"] == 1 and found["status"]["error"]["message"] == line
    if name == "hangs":
        assert "embed" in line and "fault.py" in line


def test_what_one_rank_refuses_is_said_once_and_all_leave_with_its_code(seen: dict[str, Any]) -> None:
    found = seen["refuses"]
    assert [(rank, line[:20]) for rank, line in found["errors"]] == [(1, "error[E_DATA_HASH]: ")]
    assert found["codes"] == [3, 3] and found["status"]["exit_code"] == 3 and found["left"] < 10
    assert not any("Traceback" in line for line in found["stderr"])


def test_three_steps_in_a_row_that_are_not_finite_end_a_run(seen: dict[str, Any]) -> None:
    found = seen["not finite"]
    [[_, line]] = found["errors"]
    assert line.startswith("error[E_NONFINITE]: ") and "run step 14" in line and "step-00000010 stands" in line
    assert "data ledger run step=14" in line and "lower optim.lr" in line
    assert found["codes"] == [1, 1] and found["checkpoints"] == ["step-00000010"]
    skipped = {record["step"]: record["skipped"] for record in found["log"]}
    assert (skipped[3], skipped[4], skipped[11], skipped[14]) == (0, 1, 1, 4)
    losses = {record["step"]: record["loss"] for record in found["log"]}
    assert losses[4] is None and losses[5] > 0 and "skipped 1" in found["said"]


@pytest.mark.parametrize("name", ["told while training", "told without data"])
def test_a_run_of_which_one_rank_is_told_to_stop_saves(name: str, seen: dict[str, Any]) -> None:
    found = seen[name]
    assert found["codes"] == [85, 85] and found["errors"] == [] and found["status"]["exit_code"] == 85
    assert found["checkpoints"] == [f"step-{found['steps']:08d}"] and found["steps"] >= 3  # no step is lost
    assert found["left"] < 25


def test_what_has_nothing_to_save_leaves_at_once(seen: dict[str, Any]) -> None:
    found = seen["told while building"]
    assert found["codes"] == [85, 85] and found["errors"] == [] and found["left"] < 10


def test_a_save_that_the_ranks_do_not_come_to_is_given_up(seen: dict[str, Any]) -> None:
    found = seen["told in vain"]
    [[_, line]] = found["errors"]
    assert line.startswith("error[E_UNSAVED]: ") and "did not come to agree" in line and "run the same command" in line
    assert found["codes"] == [1, 1] and found["left"] < 25 and found["status"]["exit_code"] == 1
