"""Checkpoints: readable by any layout, complete or absent wherever a save is interrupted, never loaded unverified."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint_ranks
import pytest
import torch
from checkpoint_ranks import CHAINS, LEG_STEPS, SAVE_EVERY, WORLD_SIZES
from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.train.checkpoints.checkpoint import newest, step_name
from clipwright.pipeline.train.checkpoints.saver import steps_to_keep
from clipwright.pipeline.train.config import RuntimeConfig

pytestmark = pytest.mark.xdist_group("ranks")

SOAK = int(os.environ.get("CLIPWRIGHT_SOAK", "0"))  # see tests/soak.py
KILLS = SOAK or 8
LAST = step_name(LEG_STEPS * len(WORLD_SIZES))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, script: Any) -> Path:
    """The folder of checkpoint_ranks.py's results."""
    out = tmp_path_factory.mktemp("checkpoints")
    script(checkpoint_ranks, out, KILLS, timeout=3600)
    return out


def optimizer_state(folder: Path) -> dict[str, Tensor]:
    """The complete state of an optimizer, joined from the files of all ranks."""
    slices: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for path in folder.glob("optimizer-*.safetensors"):
        for name, tensor in load_file(path).items():
            key, start = name.split("@")
            slices[key].append((int(start), tensor))
    state = {}
    for key, found in slices.items():
        found.sort(key=lambda entry: entry[0])
        ends = [0, *(start + len(tensor) for start, tensor in found)]
        assert [start for start, _ in found] == ends[:-1], key  # neither gaps nor overlaps
        state[key] = torch.cat([tensor for _, tensor in found])
    return state


@pytest.mark.parametrize("name", CHAINS)
def test_any_world_size_and_zero_stage_resumes_from_any_checkpoint(name: str, results: Path) -> None:
    expected = torch.load(results / f"{name}-uninterrupted.pt")
    for leg in range(len(WORLD_SIZES)):
        result = torch.load(results / f"{name}-{leg}.pt")
        assert result["start"] == LEG_STEPS * leg
        assert list(result["losses"]) == list(range(LEG_STEPS * leg, LEG_STEPS * (leg + 1)))
        for step, loss in result["losses"].items():
            assert loss == pytest.approx(expected["losses"][step], rel=1e-5)
    state = optimizer_state(results / name / "checkpoints" / LAST)
    expected_state = optimizer_state(results / f"{name}-uninterrupted" / "checkpoints" / LAST)
    keys = {"momentum_buffer"} if name == "0123" else {"exp_avg", "exp_avg_sq"}
    assert state.keys() == expected_state.keys() and {key.partition("/")[0] for key in state} == keys
    largest = max(float(tensor.abs().max()) for tensor in expected_state.values())
    for key, tensor in expected_state.items():
        assert (state[key] - tensor).abs().max() <= 1e-5 * largest, key
        assert tensor.abs().max() > 0 or key.endswith("bias"), key


def complete_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that have their final name; each of them must be complete."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    for folder in folders:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # equal permissions
        for name, entry in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    return [int(folder.name.removeprefix("step-")) for folder in folders]


@pytest.mark.parametrize("number", range(KILLS))
def test_run_killed_inside_a_save_resumes_bit_identically(number: int, results: Path) -> None:
    result, expected = torch.load(results / f"kill-{number}.pt"), torch.load(results / "kill-uninterrupted.pt")
    assert len(expected["calls"]) > 90
    assert result["codes"] in ([-9], [0] if result["at"] == "a random moment" else [-9])
    left, run = results / f"kill-{number}-left", results / f"kill-{number}"
    complete = complete_steps(left) if left.exists() else []
    assert result["start"] == max(complete, default=0)
    # The save that was killed, or the one before it if training continued during that save.
    assert result["progress"] - result["start"] <= 2 * SAVE_EVERY
    staged = [int(path.name[6:-8]) for path in (left / "checkpoints").glob(".step-*.partial")] if left.exists() else []
    assert all(step - result["start"] <= SAVE_EVERY for step in staged)
    assert result["latest"] is None or step_name(result["start"]) >= result["latest"]
    assert all(loss == expected["losses"][step] for step, loss in result["losses"].items())
    assert all(torch.equal(result["weights"][name], tensor) for name, tensor in expected["weights"].items())
    assert not list((run / "checkpoints").glob(".*")) and complete_steps(run)[-1] == checkpoint_ranks.END


def test_calls_of_a_save_are_in_crash_safe_order(results: Path) -> None:
    """Files before the manifest, it before the folder's name, that before `latest`; only then old ones are removed."""
    calls = torch.load(results / "kill-uninterrupted.pt")["calls"]
    starts = [at for at, call in enumerate(calls) if call.startswith("mkdir .step")]
    starts = [at for at in starts if calls[at + 1].startswith("save_file")]
    saves = [calls[start:end] for start, end in itertools.pairwise([*starts, len(calls)])]
    assert len(saves) == 4
    for save in saves:

        def first(prefix: str, save: list[str] = save) -> int:
            return next(number for number, call in enumerate(save) if call.startswith(prefix))

        manifest, named, pointer = first("open .manifest"), first("replace .step"), first("open .latest")
        assert save[:manifest].count("fsync") == sum(call.startswith("save_file") for call in save[:manifest]) == 3
        assert "fsync" in save[manifest : first("replace .manifest")]
        assert first("replace .manifest") < named < pointer
        assert "fsync" in save[named:pointer] and "fsync" in save[pointer : first("replace .latest")]
        removed = [number for number, call in enumerate(save) if call.startswith("rename step")]
        assert all(number > first("replace .latest") for number in removed)


def test_full_disk_fails_all_ranks_and_keeps_the_older_checkpoint(results: Path) -> None:
    """At each call by which either of two ranks writes, manifest, rename and `latest` included."""
    full_calls = set()
    for run in (results / "full").iterdir():
        ranks = [json.loads((run / f"result-{rank}.json").read_text()) for rank in range(2)]
        full_at = ranks[0]["full_at"] or ranks[1]["full_at"]
        if full_at is None or (full_at.startswith("mkdir") and not full_at.endswith(".partial")):
            assert complete_steps(run) == [SAVE_EVERY, 2 * SAVE_EVERY]  # the folder existed: no call failed
            continue
        full_calls.add(full_at.replace("half of ", ""))
        for rank in ranks:
            message = rank["message"]
            assert message.startswith("error[E_DISK]") and str(run) in message and (rank["seconds"] < 60 or not SOAK)
            assert "it needs 70,0" in message and "are free" in message and "free space" in message
        assert complete_steps(run)[0] == SAVE_EVERY and not list((run / "checkpoints").glob(".*"))
        found = newest(run)
        assert found is not None
        assert (run / "latest").read_text().strip() in (step_name(SAVE_EVERY), step_name(found.step))
    texts = " ".join(full_calls)
    assert len(full_calls) >= 10
    for text in ("mkdir", "save_file", "fsync", "open .manifest", "replace .step", "replace .latest"):
        assert text in texts


def test_all_ranks_take_the_same_checkpoint(results: Path) -> None:
    found = {(results / "agreement" / f"found-{rank}").read_text() for rank in range(3)}
    assert found == {str(LEG_STEPS * (len(WORLD_SIZES) - 1))}


@pytest.fixture
def run(results: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints, the newest one written by three ranks."""
    shutil.copytree(results / "1230", tmp_path / "run")
    return tmp_path / "run"


def corruptions(folder: Path, older: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to corrupt a checkpoint, each with its name; `older` is another checkpoint of the run."""
    draw = random.Random(0)

    def flip(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    def swap(first: Path, second: Path) -> None:
        middle = first.with_name("middle")
        first.rename(middle)
        second.rename(first)
        middle.rename(second)

    older_names = {path.name for path in older.iterdir()}
    for name in sorted(path.name for path in folder.iterdir()):
        path, size = folder / name, (folder / name).stat().st_size
        yield f"{name} missing", path.unlink
        for at in (0, 1, size // 2, size - 1):
            yield f"{name} truncated at {at}", lambda path=path, at=at: os.truncate(path, at)
        for at in (0, size - 2, *(draw.randrange(size) for _ in range(6))):
            yield f"{name} flipped at {at}", lambda path=path, at=at: flip(path, at)
        if name in older_names:
            yield f"{name} of another checkpoint", lambda path=path: shutil.copy(older / path.name, path)
    yield "swapped", lambda: swap(folder / "optimizer-00000.safetensors", folder / "optimizer-00001.safetensors")
    yield "swapped", lambda: swap(folder / "loss.safetensors", folder / "model.safetensors")
    yield "renamed", lambda: swap(folder, older)


def test_every_corruption_is_detected(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, older = run / "checkpoints" / LAST, run / "checkpoints" / step_name(LEG_STEPS * (len(WORLD_SIZES) - 1))
    original = run.with_name("original")
    shutil.copytree(run, original)
    count = 0
    for name, corrupt in corruptions(folder, older):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        corrupt()
        if name == "renamed":
            with pytest.raises(ClipwrightError, match="E_CKPT_HASH"):
                newest(run)
        elif {path.name: path.read_bytes() for path in folder.iterdir()} != before:
            found = newest(run)
            assert found is not None and found.folder == older, name
        assert "skipping a corrupt checkpoint" in capfd.readouterr().err, name
        shutil.rmtree(run)
        shutil.copytree(original, run)
        count += 1
    found = newest(run)
    assert count > 60 and found is not None and found.folder == folder and not capfd.readouterr().err


def test_missing_checkpoints_do_not_start_a_new_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints" / LAST)
    found = newest(run)
    assert found is not None and found.step == LEG_STEPS * (len(WORLD_SIZES) - 1)
    assert f"latest names {LAST}, which does not exist" in capfd.readouterr().err
    shutil.rmtree(found.folder)
    with pytest.raises(ClipwrightError, match="E_CKPT_NONE") as error:
        newest(run)
    assert LAST in str(error.value) and "--fresh" in str(error.value)
    (run / "latest").unlink()
    assert newest(run) is None
    (run / "log.jsonl").write_text('{"step":20,"saved":0}\n{"step":40,"saved":30}\n')
    with pytest.raises(ClipwrightError, match="step-00000030 was saved"):
        newest(run)


def test_newest_periodic_and_best_checkpoints_are_kept() -> None:
    steps, losses = [3, 6, 9, 12, 15], {3: 0.1, 6: 0.3, 7: 0.0, 12: 0.1}  # that of step 7 was not saved
    assert steps_to_keep(steps, RuntimeConfig(keep=2), {}) == {12, 15}
    assert steps_to_keep(steps, RuntimeConfig(keep=1, keep_every=6), {}) == {6, 12, 15}
    assert steps_to_keep(steps, RuntimeConfig(keep=1, keep_best="loss"), losses) == {3, 15}  # the earliest of two
    assert steps_to_keep(steps, RuntimeConfig(keep=1, keep_best="score"), losses) == {6, 15}
    assert steps_to_keep(steps, RuntimeConfig(keep=1, keep_best="score"), {3: 1, 6: 2, 9: 2, 15: 1}) == {6, 15}
    assert steps_to_keep(steps, RuntimeConfig(keep=1, keep_best="score"), {}) == {15}


def test_best_checkpoint_is_kept_until_the_end_of_a_run(results: Path) -> None:
    """That of the first save, which has the highest figure, since losses fall."""
    losses = torch.load(results / "kill-uninterrupted.pt")["losses"]
    saved = range(SAVE_EVERY, checkpoint_ranks.END, SAVE_EVERY)
    best = max(saved, key=lambda step: losses[step - 1])
    assert best == SAVE_EVERY
    assert complete_steps(results / "kill-uninterrupted") == sorted({best, checkpoint_ranks.END})


FULL_DISK = """
import os
real = os.statvfs
def full(path):
    values = list(real(path))
    values[4] = 1  # f_bavail: one block is free
    return os.statvfs_result(values)
os.statvfs = full
"""


def test_checkpoint_is_refused_before_it_fills_the_disk(scenes: Path, tmp_path: Path, small: Any) -> None:
    (tmp_path / "full.py").write_text(FULL_DISK)
    arguments = [*small.settings, f"data.train={scenes}", "schedule.samples=16", "plugins=[full.py]", "-o", "run"]
    line = small.cli(tmp_path).error("train", *arguments, code=1)
    assert line.startswith("error[E_DISK]") and "— run —" in line, line
    assert "4,096 are free" in line and "free space and run the same command again" in line, line
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_run_on_a_small_disk_fails_with_e_disk(scenes: Path, tmp_path: Path, small: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=False).returncode:
        pytest.skip("no permission to mount")
    try:
        arguments = [*small.settings, f"data.train={scenes}", "schedule.samples=16", "-o", "disk/run"]
        line = small.cli(tmp_path).error("train", *arguments, code=1)
        assert line.startswith("error[E_DISK]") and "disk/run" in line and "bytes" in line and "free space" in line
        assert not list((disk / "run").glob("checkpoints/*"))
    finally:
        subprocess.run(["umount", disk], check=True)
