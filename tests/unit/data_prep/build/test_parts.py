"""Preparation shared by several processes: parts in any order produce the bytes of a single run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from waiting import wait_until

from clipwright.data_prep.build import plan, prep_folder
from clipwright.data_prep.build.pack import PrepConfig
from clipwright.data_prep.build.parts import PartDone, prepare_part
from clipwright.data_prep.sources import folder as folder_source
from clipwright.data_prep.sources.base import SOURCES
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.part import Part
from clipwright.pipeline.folders import output

Run = Callable[..., Any]


@pytest.fixture
def run_part() -> Callable[..., PartDone]:
    def run(part: str, out: Path, *overrides: str, quiet: bool = True, fresh: bool = False) -> PartDone:
        arguments = ["runtime.workers=1", f"runtime.part={part}", *overrides]
        return prepare_part(resolve(PrepConfig, overrides=arguments), out, quiet=quiet, fresh=fresh)

    return run


def content(out: Path) -> dict[str, bytes]:
    """Returns all files of an output folder except config and status."""
    left = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: data for name, data in left.items() if name not in ("config.yaml", "status.json")}


def table(write_table: Run, make_image: Run) -> list[str]:
    """Writes a table of 13 rows with one duplicate and two bad rows; returns the settings of its source."""
    images = [make_image(i) for i in range(13)]
    images[11], images[8] = images[1], images[8][:200]
    captions: list[Any] = [["a circle", f"number {i}"] for i in range(13)]
    captions[3] = [" "]
    path = write_table(images, captions, n=pa.array(range(13)))
    return ["source.name=table", f"source.path={path}", "source.caption=captions", "shards.samples=3"]


def images(folder: Path, make_image: Run) -> list[str]:
    """Writes a folder of images, each with a JSON file with a column; returns the settings of its source."""
    (folder / "in").mkdir()
    for i in range(9):
        (folder / "in" / f"{i}.jpg").write_bytes(make_image(i % 7))
        (folder / "in" / f"{i}.json").write_text(json.dumps({"caption": f"picture {i}", "n": i}))
    (folder / "in" / "alone.txt").write_text("no image")
    return ["source.name=folder", f"source.path={folder / 'in'}", "shards.samples=2"]


@pytest.mark.parametrize("kind", ["table", "folder", "scenes"])
@pytest.mark.parametrize("duplicates", ["merge", "keep"])
def test_parts_produce_the_bytes_of_a_single_run(
    kind: str, duplicates: str, tmp_path: Path, write_table: Run, make_image: Run, run_prep: Run, run_part: Run
) -> None:
    scenes = ["source.name=scenes", "source.count=20", "source.image_size=32", "shards.samples=3"]
    arguments = {"table": lambda: table(write_table, make_image), "folder": lambda: images(tmp_path, make_image)}
    arguments = [*arguments.get(kind, lambda: scenes)(), f"duplicates={duplicates}"]
    run_prep(tmp_path / "one", *arguments)
    whole = content(tmp_path / "one")
    assert len([name for name in whole if name.endswith(".tar")]) >= 4
    # Planned by three processes first, then parts in any order, one of them twice.
    out = tmp_path / "planned"
    for part in ("plan/2/2", "plan/1/2", "plan", "3/3", "1/3", "2/3", "1/3"):
        run_part(part, out, *arguments)
        assert not (out / "manifest.json").exists() and not (out / "status.json").exists()
    run_prep(out, *arguments, "runtime.part=finish")
    assert content(out) == whole
    assert run_part("1/3", out, *arguments).already_finished and content(out) == whole
    assert run_prep(out, *arguments, "runtime.part=finish").already_finished
    # Not planned beforehand, with more parts than shards.
    out = tmp_path / "unplanned"
    done = [run_part(f"{k}/9", out, *arguments) for k in (4, 9, 8, 7, 6, 5, 3, 2, 1)]
    assert {part.shards for part in done} <= {0, 1}
    done = run_prep(out, *arguments, "runtime.part=finish")
    assert content(out) == whole and sum(part.shards for part in [run_part("1/1", out, *arguments)]) == 0
    if kind == "folder":
        assert any("caption files without an image" in note for note in done.notes)


def test_part_shares_are_complete_and_even() -> None:
    for count in (0, 1, 5, 13, 128):
        for of in (1, 2, 3, 7, 200):
            shares = [Part.read(f"{k}/{of}", planned=False).share(count) for k in range(1, of + 1)]
            assert [number for share in shares for number in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            # The ranks of all parts split the work like as many parts.
            parts = [Part("share", k, of) for k in range(1, of + 1)]
            ranks = [part.share(count, rank, 2) for part in parts for rank in range(2)]
            assert ranks == [Part("share", k, 2 * of).share(count) for k in range(1, 2 * of + 1)]


def test_killed_part_can_be_run_again(
    tmp_path: Path, run_prep: Run, run_part: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL in the middle of a shard, finished shards stay and the rest is written again."""
    monkeypatch.setattr(SOURCES, "_entries", SOURCES.entries)  # removes the plugin's entries after the test
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from clipwright.data_prep.sources.base import SOURCES\n"
        "from clipwright.data_prep.sources.scenes.source import ScenesConfig, ScenesSource\n"
        "class SlowSource(ScenesSource):\n"
        "    def read(self, rows):\n"
        "        for record in super().read(rows):\n"
        "            while record.row == 26 and os.path.exists(os.environ.get('GATE', '')):\n"
        "                time.sleep(0.02)\n"
        "            yield record\n"
        "SOURCES.add(ScenesConfig, SlowSource, {'slow_scenes': {}})\n"
    )
    arguments = [
        f"plugins=[{tmp_path / 'slow.py'}]",
        "source.name=slow_scenes",
        "source.count=40",
        "source.image_size=32",
    ]
    arguments += ["shards.samples=4"]
    run_prep(tmp_path / "one", *arguments)
    out, gate = tmp_path / "out", tmp_path / "gate"
    gate.touch()
    command = [
        sys.executable,
        "-m",
        "clipwright",
        "prep",
        *arguments,
        "runtime.workers=1",
        "runtime.part=2/2",
        "-o",
        out,
    ]
    process = subprocess.Popen([*map(str, command)], env={**os.environ, "GATE": str(gate)}, stderr=subprocess.PIPE)
    files = (out / ".data-000006.tar.partial", out / ".prep/shard-000005.json")
    wait_until(lambda: all(path.exists() for path in files), process)
    process.kill()
    process.communicate()
    before = (out / "data-000005.tar").stat().st_ino
    with pytest.raises(ClipwrightError) as caught:
        run_prep(out, *arguments, "runtime.part=finish")
    assert caught.value.code == "E_UNFINISHED" and "9 of 10 shards not written: 0, 1, 2, 3, 4, 6" in str(caught.value)
    run_part("2/2", out, *arguments)
    run_part("1/2", out, *arguments)
    run_prep(out, *arguments, "runtime.part=finish")
    assert (out / "data-000005.tar").stat().st_ino == before
    assert content(out) == content(tmp_path / "one")


def test_part_waits_for_the_plan_and_reports_it(
    tmp_path: Path, write_table: Run, make_image: Run, run_part: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = table(write_table, make_image)
    out, done = tmp_path / "out", []
    run_part("plan/1/2", out, *arguments)
    with prep_folder.in_turn(out, lambda: None):  # like a part that makes the plan
        other = threading.Thread(target=lambda: done.append(run_part("1/2", out, *arguments, quiet=False)))
        other.start()
        printed: list[str] = []

        def is_waiting() -> bool:
            printed.append(capsys.readouterr().err)
            return "waiting for the part that makes the plan" in "".join(printed)

        wait_until(is_waiting)
        assert not done and not (out / "plan.parquet").exists()
    other.join()
    assert done[0].shards == 2 and (out / "plan.parquet").exists()


def test_plan_reuses_keys_hashed_by_parts(
    tmp_path: Path, write_table: Run, make_image: Run, run_part: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, hashed = table(write_table, make_image), []
    real = plan.hash_rows
    monkeypatch.setattr(plan, "ROWS_PER_TASK", 3)
    monkeypatch.setattr(plan, "hash_rows", lambda job, rows: (hashed.extend(rows), real(job, rows))[1])
    for part in ("plan/3/3", "plan/1/3"):
        run_part(part, tmp_path / "out", *arguments)
    assert sorted(hashed) == [0, 1, 2, 3, 8, 9, 10, 11, 12]
    run_part("plan", tmp_path / "out", *arguments)
    assert sorted(hashed[9:]) == [3, 4, 5, 6, 7, 8]  # the tasks in which keys were missing


def test_parts_reuse_the_scan_until_files_change(
    tmp_path: Path, make_image: Run, run_part: Run, run_prep: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, hashed = images(tmp_path, make_image), []
    real = folder_source._file_hash
    monkeypatch.setattr(folder_source, "_file_hash", lambda root, name: (hashed.append(name), real(root, name))[1])
    run_part("plan", tmp_path / "out", *arguments)
    assert len(hashed) == 18
    run_part("1/2", tmp_path / "out", *arguments)
    assert len(hashed) == 18
    os.utime(tmp_path / "in" / "3.jpg", (1, 1))  # another time, same bytes: only reading them shows that
    run_part("2/2", tmp_path / "out", *arguments)
    assert len(hashed) == 36
    (tmp_path / "in" / "3.json").write_text('{"caption": "another", "n": 3}')
    with pytest.raises(ClipwrightError) as caught:
        run_prep(tmp_path / "out", *arguments, "runtime.part=finish")
    assert caught.value.code == "E_RESUME" and "source.sha256" in str(caught.value)


def test_invalid_and_conflicting_parts_are_refused(
    tmp_path: Path, write_table: Run, make_image: Run, run_part: Run, run_prep: Run
) -> None:
    arguments, out = table(write_table, make_image), tmp_path / "out"

    def refused(code: str, named: str, call: Callable[[], object]) -> None:
        with pytest.raises(ClipwrightError) as caught:
            call()
        assert caught.value.code == code and named in str(caught.value), caught.value

    for part in ("0/3", "4/3", "3", "plan/3", "plan/0/3", "finish/2", "1/0", "-1/2", "all"):
        refused("E_CONFIG_VALUE", "runtime.part", lambda part=part: run_part(part, out, *arguments))
    refused("E_USAGE", "runtime.part=1/2", lambda: run_part("1/2", out, *arguments, fresh=True))
    assert not out.exists()
    run_part("1/2", out, *arguments)
    refused("E_RESUME", "images.quality", lambda: run_part("2/2", out, *arguments, "images.quality=50"))
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    with output.claim(out, output.DATASET, part="share-2-of-2"):
        refused("E_LOCKED", holder, lambda: run_part("2/2", out, *arguments))
        refused("E_LOCKED", holder, lambda: run_part("1/3", out, *arguments))  # of another division of the shards
        refused("E_LOCKED", holder, lambda: run_prep(out, *arguments))
        assert run_part("1/2", out, *arguments).shards == 2
    with output.claim(out, output.DATASET):
        refused("E_LOCKED", holder, lambda: run_part("2/2", out, *arguments))
    assert not list(out.glob(".lock*"))
    run_part("3/3", out, *arguments)  # another number of parts resumes the same run
    run_prep(out, *arguments)  # and so does a run without parts


def test_command_reports_its_part(tmp_path: Path, cli: Any) -> None:
    arguments = ["prep", "scenes", "source.count=8", "source.image_size=32", "shards.samples=4", "-o", "out"]
    done = cli(*arguments, "runtime.part=2/2")
    assert done.stdout == "prep: part 2/2: 1 shard, 4 samples written, 0 merged or rejected\n"
    assert not (tmp_path / "out" / "status.json").exists()
    error = cli.error(*arguments, "runtime.part=finish", code=3)
    assert error.startswith("error[E_UNFINISHED]") and "1 of 2 shards not written: 0" in error
