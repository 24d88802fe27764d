"""A small dataset of rendered images and the settings of a small run, shared by the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from dataset_maker import make_dataset as make_dataset  # the fixture
from output_checks import check_output

# Two blocks and 32 pixels: seconds, not minutes, and every mechanism of a large run.
SMALL = [
    "image.name=vit_nano",
    "image.image_size=32",
    "image.depth=2",
    "text.depth=2",
    "embed_dim=64",
    "schedule.global_batch=16",
    "runtime.threads=1",
    "runtime.workers=1",
    "runtime.log_every=1",
    "precision=fp32",
]


class Small:
    """Runs `clipwright train` with small settings; `cli`, `losses` and `settings` for tests that need the pieces."""

    settings = SMALL

    def __call__(self, folder: Path, *arguments: object, **options: Any) -> Any:
        return self.cli(folder)("train", *SMALL, *arguments, **options)

    def cli(self, folder: Path) -> Any:
        # Looked up by name: tests are not a package to import from.
        return sys.modules["conftest_root"].Cli(folder)

    def losses(self, run: Path) -> list[dict[str, Any]]:
        return losses(run)


@pytest.fixture(scope="session")
def small() -> Small:
    return Small()


def losses(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rendered images in three shards, made by the public command."""
    cli = Small().cli(tmp_path_factory.mktemp("scenes"))
    cli("prep", "scenes", "source.count=96", "source.image_size=32", "shards.samples=32", "-o", "data")
    return cli.folder / "data"


@pytest.fixture(scope="session")
def script() -> Callable[..., None]:
    """`script(module, *arguments, timeout=SECONDS)`: runs a helper that starts its own ranks."""

    def run(module: ModuleType, *arguments: object, timeout: float) -> None:
        done = subprocess.run(
            [sys.executable, str(module.__file__), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """`here(folder, *arguments, code=0)`: `clipwright ARGUMENTS` in this process, which has torch loaded."""
    from clipwright.cli import app

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def call(folder: Path, *arguments: object, code: int = 0) -> SimpleNamespace:
        monkeypatch.chdir(folder)
        capfd.readouterr()
        exit_code = app(list(map(str, arguments)), standalone_mode=False)
        printed = capfd.readouterr()
        assert exit_code == code and "Traceback" not in printed.err, printed
        check_output(list(map(str, arguments)), code, printed.out, printed.err)
        return SimpleNamespace(out=printed.out, err=printed.err, error=(printed.err.strip().splitlines() or [""])[-1])

    return call
