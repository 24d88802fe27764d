"""Ctrl-C during every long command: exit 130, no traceback, no incomplete output; the next run completes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

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


@pytest.mark.parametrize("verb", COMMANDS)
def test_interrupted_command_leaves_no_incomplete_output_and_can_be_run_again(
    verb: str, stages: Path, tmp_path: Path, cli: Any
) -> None:
    arguments, (module, holder, name), final = COMMANDS[verb]
    for stage in stages.iterdir():
        (tmp_path / stage.name).symlink_to(stage)
    (tmp_path / "gate.py").write_text(GATE.format(module=module, holder=holder, name=name))
    arguments = [*arguments, "plugins=gate.py", "-o", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipwright", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "here").exists, process)
    process.send_signal(signal.SIGINT)
    if verb == "train":
        (tmp_path / "go").touch()  # it completes the current step and saves
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and errors.strip().endswith("run the same command again to resume")
    assert not list((tmp_path / "out").glob("**/*.partial"))
    assert [path for pattern in final for path in (tmp_path / "out").glob(pattern) if path.name != "status.json"] == []
    (tmp_path / "go").touch()
    cli(*arguments)
    assert verb == "doctor" or (tmp_path / "out" / "status.json").exists()


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
