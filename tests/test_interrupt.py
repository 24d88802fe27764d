"""Signals during every long command, and second starts.

Ctrl-C exits with 130, SIGTERM and SIGUSR1 with 85: no traceback, no incomplete output; the next run completes it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from output_checks import check_json
from waiting import wait_until

from clipwright.pipeline.core.status import STOPPED
from clipwright.pipeline.folders import output

pytestmark = pytest.mark.xdist_group("ranks")

# A plugin that pauses a command in the middle of its work: it writes the file `here` and waits for the file `go`.
GATE = """
import time
from pathlib import Path
import {module} as module
real = {holder}.{name}
def gated(*arguments, **options):
    Path("here").touch()
    while not Path("go").exists():
        time.sleep(0.02)
    return real(*arguments, **options)
{holder}.{name} = gated
"""
TRAIN = [
    "data.train=data",
    "image.name=vit_nano",
    "image.image_size=32",
    "image.depth=1",
    "text.depth=1",
    "embed_dim=32",
    "schedule.samples=64",
    "schedule.global_batch=16",
    "runtime.threads=1",
    "precision=fp32",
]
# verb → arguments, where it is paused (module, holder, name), and files that exist only when it is complete
COMMANDS = {
    "prep": (
        ["prep", "scenes", "source.count=40", "source.image_size=32", "runtime.workers=1"],
        ("clipwright.data_prep.build.pack", "module", "write_shard"),
        ["manifest.json", "*.tar", "*.parquet"],
    ),
    "train": (["train", *TRAIN], ("clipwright.pipeline.train.trainer", "module.Engine", "step"), []),
    "doctor": (["doctor", *TRAIN], ("clipwright.pipeline.doctor.speed", "module.Engine", "step"), ["*"]),
    "embed": (
        ["embed", "model=model", "data=data"],
        ("clipwright.eval.embed_parts", "module.PartWriter", "_embeddings"),
        ["manifest.json", "part-*"],
    ),
    "index": (
        ["index", "build", "flat", "embeddings=embeddings"],
        ("clipwright.pipeline.folders.embeddings", "module", "unit_rows"),
        ["current", "versions/0*"],
    ),
    "eval": (
        ["eval", "retrieval", "model=model", "data=data"],
        ("clipwright.pipeline.model.folder", "module.Model", "embed_images"),
        ["report.json", "*.parquet"],
    ),
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a small dataset, model and embedding folder as input for the commands."""
    folder = tmp_path_factory.mktemp("stages")
    cli = sys.modules["conftest_root"].Cli(folder)
    cli("prep", "scenes", "source.count=40", "source.image_size=32", "-o", "data")
    cli("train", *TRAIN, "-o", "run")
    cli("export", "run", "-o", "model")
    cli("embed", "model=model", "data=data", "-o", "embeddings")
    return folder


# Commands that get another signal than Ctrl-C, and what they exit with.
SIGNALS = {"prep": (signal.SIGUSR1, 85), "eval": (signal.SIGUSR1, 85), "index": (signal.SIGTERM, 85)}


@pytest.mark.parametrize("verb", COMMANDS)
def test_interrupted_command_leaves_no_incomplete_output_and_can_be_run_again(
    verb: str, stages: Path, tmp_path: Path, cli: Any
) -> None:
    arguments, (module, holder, name), final = COMMANDS[verb]
    for stage in stages.iterdir():
        (tmp_path / stage.name).symlink_to(stage)
    (tmp_path / "gate.py").write_text(GATE.format(module=module, holder=holder, name=name))
    second, arguments = [*arguments, "-o", "out"], [*arguments, "plugins=gate.py", "-o", "out", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipwright", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "here").exists, process)
    if verb != "doctor":
        before = content(tmp_path / "out")
        error = cli.error(*second, code=1)
        assert error.startswith("error[E_LOCKED]: ") and f"process {process.pid} on " in error, error
        assert content(tmp_path / "out") == before  # no status either
    number, code = SIGNALS.get(verb, (signal.SIGINT, 130))
    process.send_signal(number)
    if verb == "train":
        (tmp_path / "go").touch()  # it completes the current step and saves
    printed, errors = process.communicate(timeout=1200)
    assert process.returncode == code, errors
    check_json(code, printed)
    assert json.loads(printed)["error"]["code"] == STOPPED[code][0]
    assert "Traceback" not in errors and errors.strip().endswith(
        "run the same command again to resume"
        if verb in ("prep", "train", "embed")
        else "nothing was kept, run the same command again"
    )
    assert not list((tmp_path / "out").glob("**/*.partial")) and not list(tmp_path.glob("out/.lock*"))
    assert [path for pattern in final for path in (tmp_path / "out").glob(pattern) if path.name != "status.json"] == []
    (tmp_path / "go").touch()
    cli(*arguments)
    assert verb == "doctor" or (tmp_path / "out" / "status.json").exists()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        (output.MODEL, ["export", "run", "-o", "out"]),
        (output.INSPECTION, ["data", "view", "data", "-o", "out"]),
        (output.INSPECTION, ["data", "verify", "data", "-o", "out"]),
        (output.INSPECTION, ["data", "stats", "data", "-o", "out"]),
        (output.FOREIGN, ["data", "index", "out", "--fresh"]),
        (output.DEMO, ["demo", "-o", "out"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_folder_that_another_process_writes_is_refused(
    kind: output.Kind, command: list[str], stages: Path, tmp_path: Path, cli: Any
) -> None:
    for stage in stages.iterdir():
        (tmp_path / stage.name).symlink_to(stage)
    if kind is output.FOREIGN:
        shutil.copytree(stages / "data", tmp_path / "out", ignore=shutil.ignore_patterns("*.json", "*.parquet"))
        (tmp_path / "out" / "config.yaml").unlink()
    with output.claim(tmp_path / "out", kind):
        before = content(tmp_path)
        error = cli.error(*command, code=1)
        assert error.startswith("error[E_LOCKED]: another process is writing this folder — "), error
        assert f"process {os.getpid()} on {os.uname().nodename}, started 20" in error and f"kill {os.getpid()}" in error
        assert content(tmp_path) == before
    if kind is not output.DEMO:  # it takes minutes
        cli(*command)
    assert not list(tmp_path.rglob("*.lock"))


def test_busy_daemon_thread_does_not_turn_an_error_into_an_abort(tmp_path: Path) -> None:
    """Python kills daemon threads at exit, and killing one inside torch aborts the process (SIGABRT)."""
    (tmp_path / "busy.py").write_text(
        "import threading, torch\n"
        "def busy():\n"
        "    while True:\n"
        "        torch.isfinite(torch.ones(64, 64)).all()\n"
        "for _ in range(2):\n"
        "    threading.Thread(target=busy, daemon=True).start()\n"
    )
    arguments = ["train", "plugins=[busy.py]", "data.train=nowhere", "-o", "run"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "clipwright", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 3 and "terminate" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error[E_INPUT]: ")
