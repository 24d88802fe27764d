"""Resuming with an accepted change of the config, and starting from the weights of another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipwright.pipeline.train import warm_start

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = ["schedule.samples=64", "schedule.warmup=16"]


@pytest.fixture(scope="module")
def started(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    folder = tmp_path_factory.mktemp("started")
    small(folder, f"data.train={scenes}", *STEPS, "runtime.stop_at=2", "-o", "run")
    return folder


def test_resume_with_accepted_config_changes(scenes: Path, started: Path, small: Any, here: Callable[..., Any]) -> None:
    args = ["train", *small.settings, f"data.train={scenes}", *STEPS, "optim.lr=0.001", "loss.label_smoothing=0.1"]
    line = here(started, *args, "-o", "run", code=2).error
    assert line.startswith("error[E_RESUME]") and "optim.lr: 0.0005 → 0.001" in line
    assert "accept=[loss.label_smoothing,optim.lr]" in line
    line = here(started, *args, "accept=[optim.lr]", "-o", "run", code=2).error
    assert line.startswith("error[E_RESUME]") and "loss.label_smoothing: 0.0 → 0.1" in line and "optim.lr:" not in line
    line = here(started, *args, "schedule.samples=128", "-o", "run", code=2).error
    assert line.startswith("error[E_RESUME]") and "schedule.samples: 64 → 128" in line and "accept" not in line
    for key in ("schedule.samples", "schedule.global_batch", "data.window", "seed", "image.depth", "loss.name"):
        line = here(started, *args, f"accept=[{key}]", "-o", "run", code=2).error
        assert line.startswith("error[E_CONFIG_VALUE]") and "accept.0" in line and "keys of optim, loss" in line
    done = small(started, *args[1 + len(small.settings) :], "accept=[optim.lr,loss.label_smoothing]", "-o", "run")
    changed = ["loss.label_smoothing: 0.0 → 0.1", "optim.lr: 0.0005 → 0.001"]
    assert f"resuming at step 2; {'; '.join(changed)}" in done.stdout
    log = small.losses(started / "run")
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert [record.get("accepted") for record in log].count(changed) == 1
    assert log[2]["accepted"] == changed and log[2]["lr"] > 1.2 * log[1]["lr"]
    manifest = json.loads((started / "run" / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["accepted"] == [{"step": 2, "changed": changed}] and manifest["identity"]["optim"]["lr"] == 0.001
    here(started, "export", "run", "-o", "model")
    assert f"config changed after step 2: {'; '.join(changed)}" in (started / "model" / "README.md").read_text()


def test_init_from_starts_with_the_weights_of_another_run(
    scenes: Path, started: Path, small: Any, here: Callable[..., Any]
) -> None:
    args = [f"data.train={scenes}", *STEPS, "init_from=run", "optim.lr=1e-9"]
    before = warm_start.read(started / "run")
    small(started, *args, "runtime.stop_at=1", "-o", "next")
    after = warm_start.read(started / "next")
    assert after.weights.keys() == before.weights.keys() and after.loss.keys() == before.loss.keys()
    assert all(torch.allclose(after.weights[name], t, atol=1e-6) for name, t in before.weights.items())
    identity = json.loads((started / "next" / "identity.json").read_text())
    assert identity["init_from"] == {"name": "run", "fingerprint": before.fingerprint} and "accept" not in identity
    # Once started, the run no longer needs the source.
    moved_away = started / "elsewhere" / "run"
    assert warm_start.init_source(str(moved_away), started / "next", fresh=False) == identity["init_from"]
    for error_code, code, args in (
        ("E_INPUT", 3, ["init_from=nowhere", "-o", "new"]),
        ("E_MODEL_SHAPE", 3, ["init_from=run", "text.width=32", "-o", "new"]),
        ("E_CONFIG_VALUE", 2, ["init_from=next", "-o", "next"]),
        (
            "E_FINGERPRINT",
            3,
            ["init_from=run", "tokenizer.name=sentencepiece", "tokenizer.vocab_size=400", "-o", "new"],
        ),
    ):
        args = [*small.settings, f"data.train={scenes}", *STEPS, *args, "--fresh"]
        line = here(started, "train", *args, code=code).error
        assert line.startswith(f"error[{error_code}]"), line
    line = here(started, "train", *small.settings, f"data.train={scenes}", *STEPS, "-o", "next", code=2).error
    assert line.startswith("error[E_RESUME]") and "init_from: " in line and "accept" not in line
    saved = load_file(started / "run" / "checkpoints" / "step-00000002" / "model.safetensors")
    assert saved.keys() == before.weights.keys()


def test_checkpoint_of_another_run_is_refused(
    scenes: Path, started: Path, small: Any, here: Callable[..., Any]
) -> None:
    other = shutil.copytree(started / "run", started / "other")
    identity = json.loads((other / "identity.json").read_text())
    (other / "identity.json").write_text(
        json.dumps(identity | {"seed": 9})
    )  # as if this run's checkpoints were copied into another run
    accept = "accept=[optim.lr,loss.label_smoothing]"  # the test above may have changed them
    args = [*small.settings, f"data.train={scenes}", *STEPS, "seed=9", accept, "optim.lr=0.002"]
    files = [other / "latest", *(path for path in other.rglob("step-*/*"))]
    before = [path.read_bytes() for path in files]
    line = here(started, "train", *args, "-o", "other", code=2).error
    assert line.startswith("error[E_RESUME]") and "seed: 0 → 9" in line and "optim.lr" not in line
    assert "step-0000000" in line and "--fresh" in line
    assert [path.read_bytes() for path in files] == before
