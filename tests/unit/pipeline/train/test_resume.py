"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

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

pytestmark = pytest.mark.xdist_group("ranks")

ROUNDS = int(os.environ.get("CLIPWRIGHT_SOAK", "0"))  # see tests/soak.py
# Thirty steps: three epochs, each of which ends inside a batch; a batch in two parts.
STEPS = ["schedule.global_batch=10", "schedule.samples=300", "runtime.micro_batch=5"]
STEPS += ["schedule.warmup=40", "runtime.save_every=10", "runtime.keep=9"]


@pytest.fixture(scope="session")
def uninterrupted(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    small(folder, f"data.train={scenes}", *STEPS, "-o", "run")
    return folder / "run"


def start(folder: Path, words: list[str], stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clipwright", "train", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_after(process: subprocess.Popen[str], run: Path, steps: int, number: int) -> tuple[int, str]:
    """Sends a signal once `steps` steps stand in the log."""
    log, deadline = run / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= steps):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def same(run: Path, other: Path, small: Any) -> None:
    ours, theirs = small.losses(run), small.losses(other)
    assert [line["step"] for line in ours] == list(range(1, 31))  # each step stands once
    assert [(line["loss"], line["grad_norm"]) for line in ours] == [(o["loss"], o["grad_norm"]) for o in theirs]
    assert (run / "ledger.jsonl").read_bytes() == (other / "ledger.jsonl").read_bytes()
    last = "checkpoints/step-00000030/model.safetensors"
    assert (run / last).read_bytes() == (other / last).read_bytes()


def test_a_killed_run_resumes_bit_identically_under_zero(scenes: Path, tmp_path: Path, small: Any) -> None:
    words = [f"data.train={scenes}", *STEPS, "runtime.zero=2"]
    code, _ = stop_after(start(tmp_path, [*small.settings, *words, "-o", "run"]), tmp_path / "run", 14, signal.SIGKILL)
    assert code == -signal.SIGKILL
    small(tmp_path, *words, "-o", "whole")
    done = small(tmp_path, *words, "-o", "run")
    assert "resuming at step 10" in done.stdout or "resuming at step 20" in done.stdout
    same(tmp_path / "run", tmp_path / "whole", small)


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_killed_at_a_random_step(seed: int, scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any) -> None:
    """Killed once, in `make soak` up to four times, by then perhaps while it starts."""
    draw, run, at = random.Random(seed), tmp_path / "run", 0
    words = [f"data.train={scenes}", *STEPS, "-o", "run"]
    for _ in range(draw.randint(1, 4) if ROUNDS else 1):
        at = draw.randint(min(at + 1, 29), 29)
        process = start(tmp_path, [*small.settings, *words, f"runtime.workers={draw.randint(1, 3)}"])
        ledger, begun = run / "ledger.jsonl", time.monotonic()
        try:
            while process.poll() is None and not (ledger.exists() and ledger.read_bytes().count(b"\n") >= at):
                assert time.monotonic() - begun < 600  # the machine may be busy
                time.sleep(0.002)
        finally:
            process.kill()
            process.communicate()
    small(tmp_path, *words)
    same(run, uninterrupted, small)


def test_killed_again_and_again_little_is_done_twice(scenes: Path, tmp_path: Path, small: Any) -> None:
    """Goodput: a kill after each 200 steps or so, a checkpoint each 10; in `make soak` 20 kills, else one."""
    kills, every, draw = (20, 200, random.Random(0)) if ROUNDS else (1, 60, random.Random(0))
    words = [*small.settings, f"data.train={scenes}", "schedule.warmup=64", "runtime.save_every=10", "-o", "run"]
    words.append(f"schedule.samples={16 * every * (kills + 1)}")
    said, ledger, made, waits = tmp_path / "said", tmp_path / "run" / "ledger.jsonl", 0, []

    def steps() -> int:
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    for turn in range(kills + 1):
        begun, last = time.monotonic(), every * (turn + 1) + draw.randint(-20, 20)
        with said.open("w") as out:
            process = start(tmp_path, words, stdout=out)
        while process.poll() is None and not re.search(r"^step ", said.read_text(), re.MULTILINE):
            time.sleep(0.01)
        waits.append(time.monotonic() - begun)
        while process.poll() is None and (turn == kills or steps() < last):
            assert time.monotonic() - begun < 600
            time.sleep(0.005)
        process.kill()
        process.communicate()
        resumed = re.search(r"resuming at step (\d+)", said.read_text())
        made += steps() - (int(resumed[1]) if resumed else 0)
    share = every * (kills + 1) / made
    print(f"goodput {share:.4f}, from start to first step {max(waits):.1f} s at most")
    assert steps() == every * (kills + 1) and made >= steps()
    assert share >= (0.95 if ROUNDS else 0.8) and max(waits) <= 60


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: int, code: int, scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any
) -> None:
    words = [*small.settings, f"data.train={scenes}", *STEPS, "-o", "run"]
    got, errors = stop_after(start(tmp_path, words), tmp_path / "run", 3, number)
    assert got == code and "Traceback" not in errors
    done = small(tmp_path, f"data.train={scenes}", *STEPS, "-o", "run")
    first = int(done.stdout.split("resuming at step ")[1].split()[0])
    assert 3 <= first < 30
    same(tmp_path / "run", uninterrupted, small)


def test_a_broken_checkpoint_is_skipped_loudly_and_all_broken_or_gone_is_an_error(
    scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    words = [f"data.train={scenes}", *STEPS, "-o", "run"]
    small(tmp_path, *words, "runtime.stop_at=25")
    run = tmp_path / "run"
    saved = sorted((run / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step-00000010", "step-00000020", "step-00000025"]
    with (saved[2] / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\x00\xff")
    done = small(tmp_path, *words)
    assert "skipping a corrupt checkpoint" in done.stderr and "resuming at step 20" in done.stdout
    same(run, uninterrupted, small)
    for folder in (run / "checkpoints").iterdir():
        (folder / "loss.safetensors").unlink()
    line = small.cli(tmp_path).error("train", *small.settings, *words, code=3)
    assert line.startswith("error[E_CKPT_HASH]") and "run" in line and "--fresh" in line
    shutil.rmtree(run / "checkpoints")
    line = here(tmp_path, "train", *small.settings, *words, code=3).error
    assert line.startswith("error[E_CKPT_NONE]") and "step-00000030 was saved" in line and "--fresh" in line


def test_a_dataset_may_move_between_two_starts(scenes: Path, uninterrupted: Path, tmp_path: Path, small: Any) -> None:
    """A dataset is known by its fingerprint, not by where it lies."""
    small(tmp_path, f"data.train={scenes}", *STEPS, "runtime.stop_at=11", "-o", "run")
    shutil.copytree(scenes, tmp_path / "elsewhere")
    small(tmp_path, "data.train=elsewhere", *STEPS, "-o", "run")
    same(tmp_path / "run", uninterrupted, small)


def test_another_config_or_folder_is_refused(scenes: Path, tmp_path: Path, small: Any) -> None:
    words = [f"data.train={scenes}", *STEPS, "-o", "run"]
    small(tmp_path, *words, "runtime.stop_at=2")
    cli = small.cli(tmp_path)
    line = cli.error("train", *small.settings, *words, "optim.lr=0.7", "seed=3", code=2)
    assert line.startswith("error[E_RESUME]") and "optim.lr" in line and "seed: 0 → 3" in line and "--fresh" in line
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    line = cli.error("train", *small.settings, *words[:-1], "full", code=2)
    assert line.startswith("error[E_OUTPUT]") and "thesis.txt" in line and "empty folder" in line
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    done = small(tmp_path, *words, "seed=3", "runtime.stop_at=1", "--fresh")
    assert "resuming" not in done.stdout


@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_resume_bit_identically(zero: int, scenes: Path, tmp_path: Path, small: Any) -> None:
    words = [f"data.train={scenes}", *STEPS, f"runtime.zero={zero}", "data.captions=2"]
    small(tmp_path, *words, "-o", "whole", ranks=2)
    small(tmp_path, *words, "runtime.stop_at=17", "-o", "run", ranks=2)
    small(tmp_path, *words, "-o", "run", ranks=2)
    same(tmp_path / "run", tmp_path / "whole", small)
