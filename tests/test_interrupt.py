"""Ctrl-C in the middle of every long command: exit 130, no traceback, nothing half-written; again, and it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("ranks")

# A plugin that stops a command in the middle of its work: it says where it is and waits until it may go on.
GATE = """
import time
from pathlib import Path
import {module} as module
real = {holder}.{name}
def gated(*words, **options):
    Path("here").touch()
    while not Path("go").exists():
        time.sleep(0.02)
    return real(*words, **options)
{holder}.{name} = gated
"""
TRAIN = [
    *("data.train=data", "image.name=vit_nano", "image.image_size=32", "image.depth=1", "text.depth=1", "embed_dim=32"),
    *("schedule.samples=64", "schedule.global_batch=16", "runtime.threads=1", "precision=fp32"),
]
# verb → its words, where it is stopped (module, holder, name), and files that stand only when it is done
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
        ("clipwright.eval.embed", "module", "_embeddings"),
        ["manifest.json", "part-*"],
    ),
    "index": (
        ["index", "build", "flat", "embeddings=embeddings"],
        ("clipwright.eval.search.versions", "module", "_renormalized"),
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
    """A small dataset, model and embedding folder for the commands to start from."""
    folder = tmp_path_factory.mktemp("stages")
    cli = sys.modules["conftest_root"].Cli(folder)
    cli("prep", "scenes", "source.count=40", "source.image_size=32", "-o", "data")
    cli("train", *TRAIN, "-o", "run")
    cli("export", "run", "-o", "model")
    cli("embed", "model=model", "data=data", "-o", "embeddings")
    return folder


@pytest.mark.parametrize("verb", COMMANDS)
def test_an_interrupted_command_leaves_nothing_half_written_and_can_be_run_again(
    verb: str, stages: Path, tmp_path: Path, cli: Any
) -> None:
    words, (module, holder, name), final = COMMANDS[verb]
    for stage in stages.iterdir():
        (tmp_path / stage.name).symlink_to(stage)
    (tmp_path / "gate.py").write_text(GATE.format(module=module, holder=holder, name=name))
    words = [*words, "plugins=gate.py", "-o", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipwright", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "here").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    if verb == "train":
        (tmp_path / "go").touch()  # it ends the step it is in and saves
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and errors.strip().endswith("run the same command again to resume")
    assert not list((tmp_path / "out").glob("**/*.partial"))
    assert [path for pattern in final for path in (tmp_path / "out").glob(pattern) if path.name != "status.json"] == []
    (tmp_path / "go").touch()
    cli(*words)
    assert verb == "doctor" or (tmp_path / "out" / "status.json").exists()


def test_a_thread_that_is_still_at_work_makes_no_abort_of_an_error(tmp_path: Path) -> None:
    """Python takes daemon threads down when it ends, and one inside torch takes the process with it (SIGABRT)."""
    (tmp_path / "busy.py").write_text(
        "import threading, torch\n"
        "def busy():\n"
        "    while True:\n"
        "        torch.isfinite(torch.ones(64, 64)).all()\n"
        "for _ in range(2):\n"
        "    threading.Thread(target=busy, daemon=True).start()\n"
    )
    words = ["train", "plugins=[busy.py]", "data.train=nowhere", "-o", "run"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "clipwright", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 3 and "terminate" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error[E_INPUT]: ")
