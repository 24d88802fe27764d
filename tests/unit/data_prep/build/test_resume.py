"""Resume: runs that were killed, interrupted, changed or repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until, wait_until_delivered

from clipwright.pipeline.core.errors import ClipwrightError

Run = Callable[..., Any]
SCENES = ["prep", "scenes", "source.count=600", "source.image_size=32", "shards.samples=50"]
FINAL = ("*.tar", "*.parquet", "manifest.json")

# A source that waits at a row until a file is deleted, so that a test can stop the run there, or that dies at a row.
SLOW = """
import os, time
from clipwright.data_prep.sources.base import SOURCES
from clipwright.data_prep.sources.scenes.source import ScenesConfig, ScenesSource
from clipwright.pipeline.core.registry import configclass

@configclass
class SlowConfig(ScenesConfig):
    gate: str = ""
    dies_at: int = -1

class SlowSource(ScenesSource):
    def __init__(self, config):
        super().__init__(config)
        self.gate, self.dies_at = config.gate, config.dies_at
    def read(self, rows):
        for record in super().read(rows):
            if record.row == self.dies_at:
                os._exit(9)
            while record.row == 320 and self.gate and os.path.exists(self.gate):
                time.sleep(0.05)
            yield record

SOURCES.add(SlowConfig, SlowSource, {"slow": {}})
"""


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in FINAL for path in sorted(out.glob(pattern))}


@pytest.fixture
def slow(tmp_path: Path) -> list[str]:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "gate").touch()
    arguments = [
        "plugins=[slow.py]",
        "source.name=slow",
        "source.gate=gate",
        "source.count=600",
        "source.image_size=32",
    ]
    return ["prep", *arguments, "shards.samples=50"]


def start_run(folder: Path, arguments: list[str], *extra: str) -> subprocess.Popen[str]:
    """Starts a run and waits until it has finished six shards and waits at the gate."""
    command = [sys.executable, "-m", "clipwright", *arguments, "-o", "out", *extra]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)
    wait_until(lambda: len(list((folder / "out" / ".prep").glob("shard-*.json"))) >= 6, process)
    return process


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_resumes_without_rewriting_finished_shards(
    tmp_path: Path, cli: Any, slow: list[str], workers: int
) -> None:
    process = start_run(tmp_path, slow, f"runtime.workers={workers}")
    process.kill()
    # The pipes close when the last worker has exited: a worker that outlived its run would fail the test here.
    process.communicate()
    out = tmp_path / "out"
    # A shard is finished when its receipt exists. A tar alone may have been published just before the kill.
    receipts = [json.loads(path.read_text()) for path in (out / ".prep").glob("shard-*.json")]
    done = [out / receipt["tar"] for receipt in receipts]
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done}
    assert 6 <= len(before) < 12 and not (out / "manifest.json").exists()
    (tmp_path / "gate").unlink()
    cli(*slow, "-o", "out", "runtime.workers=1")
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    assert {name: after[name] for name in before} == before and len(after) == 12
    cli(*slow, "-o", "clean")
    assert content(out) == content(tmp_path / "clean")
    assert not list(out.rglob("*.partial")) and not (out / ".prep").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85)])
def test_signal_lets_running_shards_finish(tmp_path: Path, cli: Any, slow: list[str], number: int, code: int) -> None:
    process = start_run(tmp_path, slow, "runtime.workers=2")
    os.killpg(process.pid, number)  # like a terminal or a launcher: workers receive it too
    wait_until_delivered(process.pid, number)
    (tmp_path / "gate").unlink()
    _, errors = process.communicate()
    assert process.returncode == code and "run the same command again" in errors and "Traceback" not in errors
    out = tmp_path / "out"
    # The shard that waited at the gate is complete, and the run did not continue to the end.
    names = {path.name for path in out.glob("*.tar")}
    assert "data-000006.tar" in names and len(names) < 12 and not (out / "manifest.json").exists()
    assert json.loads((out / "status.json").read_text())["exit_code"] == code
    assert cli.json(*slow, "-o", "out")["written"] == 600


def test_dead_worker_is_reported_as_e_worker(tmp_path: Path, cli: Any, slow: list[str]) -> None:
    (tmp_path / "gate").unlink()
    error = cli.error(*slow, "source.dies_at=320", "runtime.workers=2", "-o", "out", code=1)
    assert error.startswith("error[E_WORKER]") and "workers" in error and "run the same command again" in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_finished_run_is_reported_and_changes_nothing(tmp_path: Path, cli: Any) -> None:
    cli(*SCENES, "-o", "out")
    before = content(tmp_path / "out")
    assert "finished before" in cli(*SCENES, "-o", "out", "runtime.workers=1").stdout
    assert content(tmp_path / "out") == before


def test_changed_config_is_refused_and_fresh_starts_over(tmp_path: Path, cli: Any) -> None:
    cli(*SCENES, "-o", "out")
    before = content(tmp_path / "out")
    changed = [*SCENES, "images.quality=50", "shards.name=other"]
    error = cli.error(*changed, "-o", "out", code=2)
    assert error.startswith("error[E_RESUME]") and "images.quality: 85 → 50" in error and "shards.name" in error
    assert "--fresh" in error and content(tmp_path / "out") == before
    cli(*changed, "-o", "out", "--fresh")
    assert sorted({name.split("-")[0] for name in content(tmp_path / "out") if name.endswith(".tar")}) == ["other"]
    (tmp_path / "out" / "other-000003.tar").write_bytes(b"")
    error = cli.error(*changed, "-o", "out", code=3)
    assert error.startswith("error[E_DATA_HASH]") and "other-000003.tar" in error and "--fresh" in error


def test_unfinished_run_of_another_config_is_refused(tmp_path: Path, slow: list[str], cli: Any) -> None:
    process = start_run(tmp_path, slow, "runtime.workers=1")
    before = content(tmp_path / "out")
    for more in ([], ["--fresh"]):
        second = cli.error(*slow, "-o", "out", *more, code=1)
        assert second.startswith("error[E_LOCKED]") and f"process {process.pid} on {os.uname().nodename}" in second
    assert content(tmp_path / "out") == before  # --fresh removed nothing, and no status was written
    process.kill()
    process.communicate()
    error = cli.error(*slow, "source.seed=7", "-o", "out", code=2)
    assert error.startswith("error[E_RESUME]") and "source.seed: 0 → 7" in error


def test_foreign_output_folder_is_refused_unchanged(tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    for flags in ((), ("--fresh",)):
        error = cli.error(*SCENES, "-o", "out", *flags, code=2)
        assert error.startswith("error[E_OUTPUT]") and "thesis.tex" in error
    assert (out / "thesis.tex").read_text() == "years"
    (tmp_path / "file").touch()
    assert cli.error(*SCENES, "-o", "file", code=2).startswith("error[E_OUTPUT]")


def test_image_changed_after_the_plan_stops_the_run(tmp_path: Path, run_prep: Run) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i * 80, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"images/{i}.png,text {i}\n" for i in range(3)))
    arguments = ["source.name=table", f"source.path={tmp_path / 'pairs.csv'}"]
    run_prep(tmp_path / "out", *arguments)
    # Like a run that stopped after its plan: the plan exists, no shard does.
    out = tmp_path / "out"
    identity = json.loads((out / "manifest.json").read_text())["identity"]
    for path in (*out.glob("data-*"), out / "manifest.json"):
        path.unlink()
    (out / ".prep").mkdir()
    (out / ".prep" / "identity.json").write_text(json.dumps(identity))
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "images" / "1.png")
    with pytest.raises(ClipwrightError) as caught:
        run_prep(out, *arguments)
    assert caught.value.code == "E_INPUT" and "images/1.png" in str(caught.value)
