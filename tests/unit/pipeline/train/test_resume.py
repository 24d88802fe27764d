"""A killed or stopped run resumes bit-identically."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for_lines, wait_until

pytestmark = pytest.mark.xdist_group("ranks")

ROUNDS = int(os.environ.get("CLIPWRIGHT_SOAK", "0"))  # see tests/soak.py
# Thirty steps: three epochs, each of which ends inside a batch; two micro-batches per batch.
STEPS = ["schedule.global_batch=10", "schedule.samples=300", "runtime.micro_batch=5"]
STEPS += ["schedule.warmup=40", "runtime.save_every=10", "runtime.keep=9"]


@pytest.fixture(scope="session")
def uninterrupted(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    small(folder, f"data.train={scenes}", *STEPS, "-o", "run")
    return folder / "run"


def start(folder: Path, args: list[str], stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clipwright", "train", *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_after(process: subprocess.Popen[str], run: Path, steps: int, number: int) -> tuple[int, str, str]:
    """Sends a signal once the log has `steps` steps; returns exit code, stdout and stderr."""
    wait_for_lines(run / "log.jsonl", steps, process)
    process.send_signal(number)
    output, errors = process.communicate()
    return process.returncode, output, errors


def assert_same_run(run: Path, other: Path, small: Any) -> None:
    ours, theirs = small.losses(run), small.losses(other)
    assert [line["step"] for line in ours] == list(range(1, 31))  # each step is logged once
    assert [(line["loss"], line["grad_norm"]) for line in ours] == [(o["loss"], o["grad_norm"]) for o in theirs]
    assert (run / "ledger.jsonl").read_bytes() == (other / "ledger.jsonl").read_bytes()
    last = "checkpoints/step-00000030/model.safetensors"
    assert (run / last).read_bytes() == (other / last).read_bytes()


def test_resume_after_sigkill_is_bit_identical_under_zero(scenes: Path, tmp_path: Path, small: Any) -> None:
    args = [f"data.train={scenes}", *STEPS, "runtime.zero=2"]
    code, _, _ = stop_after(
        start(tmp_path, [*small.settings, *args, "-o", "run"]), tmp_path / "run", 14, signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    small(tmp_path, *args, "-o", "uninterrupted")
    done = small(tmp_path, *args, "-o", "run")
    assert "resuming at step 10" in done.stdout or "resuming at step 20" in done.stdout
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", small)


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_resume_after_sigkill_at_random_steps_is_bit_identical(
    seed: int, scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any
) -> None:
    """Killed once, in `make soak` up to four times, perhaps during startup."""
    draw, run, at = random.Random(seed), tmp_path / "run", 0
    args = [f"data.train={scenes}", *STEPS, "-o", "run"]
    for _ in range(draw.randint(1, 4) if ROUNDS else 1):
        at = draw.randint(min(at + 1, 29), 29)
        process = start(tmp_path, [*small.settings, *args, f"runtime.workers={draw.randint(1, 3)}"])
        ledger = run / "ledger.jsonl"

        def has_reached(step: int = at, ledger: Path = ledger, process: Any = process) -> bool:
            logged = ledger.exists() and ledger.read_bytes().count(b"\n") >= step
            return logged or process.poll() is not None

        try:
            wait_until(has_reached)
        finally:
            process.kill()
            process.communicate()
    small(tmp_path, *args)
    assert_same_run(run, uninterrupted, small)


def test_repeated_kills_cost_few_repeated_steps(scenes: Path, tmp_path: Path, small: Any) -> None:
    """Goodput: a kill about every 200 steps, a checkpoint every 10; in `make soak` 20 kills, else one."""
    kills, every, draw = (20, 200, random.Random(0)) if ROUNDS else (1, 60, random.Random(0))
    args = [*small.settings, f"data.train={scenes}", "schedule.warmup=64", "runtime.save_every=10", "-o", "run"]
    args.append(f"schedule.samples={16 * every * (kills + 1)}")
    stdout, ledger = tmp_path / "stdout", tmp_path / "run" / "ledger.jsonl"
    steps_made, startup_seconds = 0, []

    def steps() -> int:
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    for turn in range(kills + 1):
        started, last = time.monotonic(), every * (turn + 1) + draw.randint(-20, 20)
        with stdout.open("w") as out:
            process = start(tmp_path, args, stdout=out)
        wait_until(lambda: re.search(r"^step ", stdout.read_text(), re.MULTILINE), process)
        startup_seconds.append(time.monotonic() - started)
        if turn == kills:
            process.wait()
        else:
            wait_until(lambda last=last: steps() >= last, process)
        process.kill()
        process.communicate()
        resumed = re.search(r"resuming at step (\d+)", stdout.read_text())
        steps_made += steps() - (int(resumed[1]) if resumed else 0)
    share = every * (kills + 1) / steps_made
    print(f"goodput {share:.4f}, from start to first step {max(startup_seconds):.1f} s at most")
    assert steps() == every * (kills + 1) and steps_made >= steps()
    assert share >= (0.95 if ROUNDS else 0.8)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_signal_saves_and_the_same_command_resumes(
    number: int, code: int, scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any
) -> None:
    args = [*small.settings, f"data.train={scenes}", *STEPS, "-o", "run"]
    exit_code, output, errors = stop_after(start(tmp_path, args), tmp_path / "run", 3, number)
    assert exit_code == code and "Traceback" not in errors
    done = small(tmp_path, f"data.train={scenes}", *STEPS, "-o", "run")
    first = int(done.stdout.split("resuming at step ")[1].split()[0])
    assert 3 <= first < 30
    assert [(line["step"], line["resumed"]) for line in small.losses(tmp_path / "run") if "resumed" in line] == [
        (first + 1, first)
    ]
    assert f"saved step {first} in run/checkpoints/step-{first:08d}" in output.splitlines()[-1]
    assert_same_run(tmp_path / "run", uninterrupted, small)


def test_corrupt_checkpoint_is_skipped_with_a_warning_and_no_valid_one_is_an_error(
    scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    args = [f"data.train={scenes}", *STEPS, "-o", "run"]
    small(tmp_path, *args, "runtime.stop_at=25")
    run = tmp_path / "run"
    saved = sorted((run / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step-00000010", "step-00000020", "step-00000025"]
    with (saved[2] / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\x00\xff")
    done = small(tmp_path, *args)
    assert "skipping a corrupt checkpoint" in done.stderr and "resuming at step 20" in done.stdout
    assert_same_run(run, uninterrupted, small)
    for folder in (run / "checkpoints").iterdir():
        (folder / "loss.safetensors").unlink()
    line = small.cli(tmp_path).error("train", *small.settings, *args, code=3)
    assert line.startswith("error[E_CKPT_HASH]") and "run" in line and "--fresh" in line
    shutil.rmtree(run / "checkpoints")
    line = here(tmp_path, "train", *small.settings, *args, code=3).error
    assert line.startswith("error[E_CKPT_NONE]") and "step-00000030 was saved" in line and "--fresh" in line


def test_dataset_may_move_between_two_starts(scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any) -> None:
    """A dataset is identified by its fingerprint, not by its path."""
    small(tmp_path, f"data.train={scenes}", *STEPS, "runtime.stop_at=11", "-o", "run")
    shutil.copytree(scenes, tmp_path / "elsewhere")
    small(tmp_path, "data.train=elsewhere", *STEPS, "-o", "run")
    assert_same_run(tmp_path / "run", uninterrupted, small)


def test_other_config_or_foreign_folder_is_refused(scenes: Path, tmp_path: Path, small: Any) -> None:
    args = [f"data.train={scenes}", *STEPS, "-o", "run"]
    small(tmp_path, *args, "optim.lr=1e-3", "optim.weight_decay=0", "runtime.stop_at=2")
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert identity["optim"]["lr"] == 0.001 and "lr: 0.001\n" in (tmp_path / "run" / "config.yaml").read_text()
    # The same values in another notation are the same config.
    small(tmp_path, *args, "optim.lr=0.001", "optim.weight_decay=.0", "schedule.samples=3e2", "runtime.stop_at=2")
    cli = small.cli(tmp_path)
    line = cli.error("train", *small.settings, *args, "optim.lr=0.7", "seed=3", code=2)
    assert line.startswith("error[E_RESUME]") and "optim.lr" in line and "seed: 0 → 3" in line and "--fresh" in line
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    line = cli.error("train", *small.settings, *args[:-1], "full", code=2)
    assert line.startswith("error[E_OUTPUT]") and "thesis.txt" in line and "empty folder" in line
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    done = small(tmp_path, *args, "seed=3", "runtime.stop_at=1", "--fresh")
    assert "resuming" not in done.stdout


@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_resume_bit_identically(zero: int, scenes: Path, tmp_path: Path, small: Any) -> None:
    args = [f"data.train={scenes}", *STEPS, f"runtime.zero={zero}", "data.captions=2"]
    small(tmp_path, *args, "-o", "uninterrupted", ranks=2)
    small(tmp_path, *args, "runtime.stop_at=17", "-o", "run", ranks=2)
    small(tmp_path, *args, "-o", "run", ranks=2)
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", small)
