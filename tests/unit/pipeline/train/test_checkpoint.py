"""Checkpoints: read by any layout, whole or absent wherever a save ends, never loaded unverified."""

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
from checkpoint_ranks import CHAINS, INTERVAL, LEG, WORLDS
from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.folders.records import write_manifest
from clipwright.pipeline.train.checkpoints.checkpoint import newest, step_name
from clipwright.pipeline.train.checkpoints.saver import kept
from clipwright.pipeline.train.config import RuntimeConfig

pytestmark = pytest.mark.xdist_group("ranks")

KILLS = int(os.environ.get("CLIPWRIGHT_SOAK", "0")) or 8  # see tests/soak.py
LAST = step_name(LEG * len(WORLDS))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, script: Any) -> Path:
    """Where checkpoint_ranks.py left what it saw."""
    out = tmp_path_factory.mktemp("checkpoints")
    script(checkpoint_ranks, out, KILLS, timeout=3600)
    return out


def state(folder: Path) -> dict[str, Tensor]:
    """An optimiser's whole state, put together from the files of all ranks."""
    parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for path in folder.glob("optimizer-*.safetensors"):
        for name, tensor in load_file(path).items():
            place, start = name.split("@")
            parts[place].append((int(start), tensor))
    whole = {}
    for place, found in parts.items():
        found.sort(key=lambda part: part[0])
        ends = [0, *(start + len(tensor) for start, tensor in found)]
        assert [start for start, _ in found] == ends[:-1], place  # neither gaps nor overlaps
        whole[place] = torch.cat([tensor for _, tensor in found])
    return whole


@pytest.mark.parametrize("name", CHAINS)
def test_any_ranks_and_any_stage_go_on_with_any_checkpoint(name: str, seen: Path) -> None:
    whole = torch.load(seen / f"{name}-whole.pt")
    for leg in range(len(WORLDS)):
        found = torch.load(seen / f"{name}-{leg}.pt")
        assert found["start"] == LEG * leg and list(found["losses"]) == list(range(LEG * leg, LEG * (leg + 1)))
        for step, loss in found["losses"].items():
            assert loss == pytest.approx(whole["losses"][step], rel=1e-5)
    ours, theirs = (state(seen / run / "checkpoints" / LAST) for run in (name, f"{name}-whole"))
    moments = {"momentum_buffer"} if name == "0123" else {"exp_avg", "exp_avg_sq"}
    assert ours.keys() == theirs.keys() and {key.partition("/")[0] for key in ours} == moments
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).abs().max() <= 1e-5 * largest, key
        assert tensor.abs().max() > 0 or key.endswith("bias"), key


def whole_steps(run: Path) -> list[int]:
    """The checkpoints that lie there under their names; each of them whole."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    for folder in folders:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one may read all
        for name, entry in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    return [int(folder.name.removeprefix("step-")) for folder in folders]


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_inside_a_save(number: int, seen: Path) -> None:
    found, whole = torch.load(seen / f"kill-{number}.pt"), torch.load(seen / "kill-whole.pt")
    assert len(whole["calls"]) > 90 and found["codes"] in ([-9], [0] if found["at"] == "a random moment" else [-9])
    left, run = seen / f"kill-{number}-left", seen / f"kill-{number}"
    stands = whole_steps(left) if left.exists() else []
    assert found["start"] == max(stands, default=0)
    # The save that was killed, or the one before it where training went on beside it.
    assert found["progress"] - found["start"] <= 2 * INTERVAL
    begun = [int(path.name[6:-8]) for path in (left / "checkpoints").glob(".step-*.partial")] if left.exists() else []
    assert all(step - found["start"] <= INTERVAL for step in begun)
    assert found["latest"] is None or step_name(found["start"]) >= found["latest"]
    assert all(loss == whole["losses"][step] for step, loss in found["losses"].items())
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in whole["weights"].items())
    assert not list((run / "checkpoints").glob(".*")) and whole_steps(run)[-1] == checkpoint_ranks.END


def test_what_is_seen_is_on_the_disk(seen: Path) -> None:
    """Files before the manifest, that before the name, the name before the pointer, and only then the old ones go."""
    calls = torch.load(seen / "kill-whole.pt")["calls"]
    starts = [at for at, call in enumerate(calls) if call.startswith("mkdir .step")]
    starts = [at for at in starts if calls[at + 1].startswith("save_file")]
    saves = [calls[at:end] for at, end in itertools.pairwise([*starts, len(calls)])]
    assert len(saves) == 4
    for save in saves:

        def at(word: str, save: list[str] = save) -> int:
            return next(number for number, call in enumerate(save) if call.startswith(word))

        manifest, named, pointer = at("open .manifest"), at("rename .step"), at("open .latest")
        assert save[:manifest].count("fsync") == sum(call.startswith("save_file") for call in save[:manifest]) == 3
        assert "fsync" in save[manifest : at("replace .manifest")] and at("replace .manifest") < named < pointer
        assert "fsync" in save[named:pointer] and "fsync" in save[pointer : at("replace .latest")]
        gone = [number for number, call in enumerate(save) if call.startswith("rename step")]
        assert all(number > at("replace .latest") for number in gone)


def test_a_full_disk_ends_all_ranks_and_the_older_checkpoint_stands(seen: Path) -> None:
    """At each of the calls by which either of two ranks writes, manifest, rename and pointer included."""
    places = set()
    for run in (seen / "full").iterdir():
        ranks = [json.loads((run / f"seen-{rank}.json").read_text()) for rank in range(2)]
        place = ranks[0]["place"] or ranks[1]["place"]
        if place is None or (place.startswith("mkdir") and not place.endswith(".partial")):
            assert whole_steps(run) == [INTERVAL, 2 * INTERVAL]  # the folder is there: nothing was refused
            continue
        places.add(place.replace("half of ", ""))
        for rank in ranks:
            assert rank["said"].startswith("error[E_DISK]") and str(run) in rank["said"] and rank["seconds"] < 60
            assert "it needs 70,0" in rank["said"] and "are free" in rank["said"] and "free space" in rank["said"]
        assert whole_steps(run)[0] == INTERVAL and not list((run / "checkpoints").glob(".*"))
        found = newest(run)
        assert found is not None and (run / "latest").read_text().strip() in (
            step_name(INTERVAL),
            step_name(found.step),
        )
    names = " ".join(places)
    assert len(places) >= 10
    assert all(word in names for word in ("mkdir", "save_file", "fsync", "open .manifest", "rename", "replace .latest"))


def test_all_ranks_take_the_same_checkpoint(seen: Path) -> None:
    found = {(seen / "agreed" / f"found-{rank}").read_text() for rank in range(3)}
    assert found == {str(LEG * (len(WORLDS) - 1))}


@pytest.fixture
def run(seen: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints, the newest by three ranks."""
    shutil.copytree(seen / "1230", tmp_path / "run")
    return tmp_path / "run"


def spoiled(folder: Path, older: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to spoil a checkpoint, each with its name; `older` is another one of the run."""
    draw = random.Random(0)

    def flip(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    def swap(one: Path, other: Path) -> None:
        middle = one.with_name("middle")
        one.rename(middle)
        other.rename(one)
        middle.rename(other)

    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        path, size = folder / name, (folder / name).stat().st_size
        yield f"{name} missing", path.unlink
        for at in (0, 1, size // 2, size - 1):
            yield f"{name} cut at {at}", lambda path=path, at=at: os.truncate(path, at)
        for at in (0, size - 2, *(draw.randrange(size) for _ in range(6))):
            yield f"{name} flipped at {at}", lambda path=path, at=at: flip(path, at)
        if name in {path.name for path in older.iterdir()}:
            yield f"{name} of another", lambda path=path: shutil.copy(older / path.name, path)
    yield "swapped", lambda: swap(folder / "optimizer-00000.safetensors", folder / "optimizer-00001.safetensors")
    yield "swapped", lambda: swap(folder / "loss.safetensors", folder / "model.safetensors")
    yield "renamed", lambda: swap(folder, older)


def test_whatever_is_changed_is_seen(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, older = run / "checkpoints" / LAST, run / "checkpoints" / step_name(LEG * (len(WORLDS) - 1))
    spare = run.with_name("spare")
    shutil.copytree(run, spare)
    count = 0
    for name, spoil in spoiled(folder, older):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        spoil()
        if name == "renamed":
            with pytest.raises(ClipwrightError, match="E_CKPT_HASH"):
                newest(run)
        elif {path.name: path.read_bytes() for path in folder.iterdir()} != before:
            found = newest(run)
            assert found is not None and found.folder == older, name
        assert "skipping a broken checkpoint" in capfd.readouterr().err, name
        shutil.rmtree(run)
        shutil.copytree(spare, run)
        count += 1
    found = newest(run)
    assert count > 60 and found is not None and found.folder == folder and not capfd.readouterr().err


def test_lost_checkpoints_are_no_fresh_start(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints" / LAST)
    found = newest(run)
    assert found is not None and found.step == LEG * (len(WORLDS) - 1)
    assert f"latest names {LAST}, which is not there" in capfd.readouterr().err
    shutil.rmtree(found.folder)
    with pytest.raises(ClipwrightError, match="E_CKPT_NONE") as error:
        newest(run)
    assert LAST in str(error.value) and "--fresh" in str(error.value)
    (run / "latest").unlink()
    assert newest(run) is None
    (run / "log.jsonl").write_text('{"step":20,"saved":0}\n{"step":40,"saved":30}\n')
    with pytest.raises(ClipwrightError, match="step-00000030 was saved"):
        newest(run)


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    figures: dict[int, Any] = {
        3: {"loss": 0.1},
        6: {"loss": 0.3},
        9: {},
        12: {"loss": 0.2, "score": 1},
        15: {"score": 2},
    }
    folders = {step: tmp_path / step_name(step) for step in figures}
    for step, folder in folders.items():
        folder.mkdir()
        write_manifest(folder, "checkpoint", digest({}), {"figures": figures[step]})
    assert kept(folders, RuntimeConfig(keep=2)) == {12, 15}
    assert kept(folders, RuntimeConfig(keep=1, keep_every=6)) == {6, 12, 15}
    assert kept(folders, RuntimeConfig(keep=1, keep_best="loss")) == {3, 15}
    assert kept(folders, RuntimeConfig(keep=1, keep_best="score")) == {15}
    (folders[3] / "manifest.json").write_text("{")
    assert kept(folders, RuntimeConfig(keep=1, keep_best="loss")) == {12, 15}


def test_the_best_is_kept_through_a_whole_run(seen: Path) -> None:
    """By its first save's figure, the highest: losses fall."""
    losses = torch.load(seen / "kill-whole.pt")["losses"]
    best = max(range(INTERVAL, checkpoint_ranks.END, INTERVAL), key=lambda step: losses[step - 1])
    assert whole_steps(seen / "kill-whole") == sorted({best, checkpoint_ranks.END})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_run_on_a_small_disk(scenes: Path, tmp_path: Path, small: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        words = [*small.settings, f"data.train={scenes}", "schedule.samples=16", "-o", "disk/run"]
        line = small.cli(tmp_path).error("train", *words, code=1)
        assert line.startswith("error[E_DISK]") and "disk/run" in line and "bytes" in line and "free space" in line
        assert not list((disk / "run").glob("checkpoints/*"))
    finally:
        subprocess.run(["umount", disk], check=True)
