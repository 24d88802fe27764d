"""A checkpoint whose hashes are right but whose state is invalid: refused by tensor, the one before it is used."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipwright.pipeline.core.files import digest, write_json
from clipwright.pipeline.folders import records
from clipwright.pipeline.train.checkpoints import checkpoint

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = ["schedule.samples=64", "schedule.warmup=0", "runtime.save_every=1", "runtime.keep=9"]
MOMENT = "exp_avg_sq/text_projection.weight@0"


@pytest.fixture(scope="module")
def saved(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    """A run with the checkpoints of its first two steps, of four."""
    folder = tmp_path_factory.mktemp("saved")
    small(folder, f"data.train={scenes}", *STEPS, "runtime.stop_at=2", "-o", "run")
    return folder / "run"


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def craft(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object], **manifest: Any) -> None:
    """Changes the tensors of a file, and the manifest so that all hashes are right again."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    body = json.loads((folder / "manifest.json").read_text())
    body = {key: value for key, value in body.items() if key not in ("format", "version", "fingerprint")}
    body |= {"files": records.file_entries(folder, body["files"]), **manifest}
    stored = {"format": "checkpoint", "version": 1, "fingerprint": digest(body), **body}
    write_json(folder / "manifest.json", stored)


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


WEIGHTS, LOSS, OPTIMIZER = "model.safetensors", "loss.safetensors", "optimizer-00000.safetensors"
CASES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "scale too large": (LOSS, fill("logit_scale", 11.0), "logit_scale is 11; 0 to 4.605 (ln 100) is allowed"),
    "scale negative": (LOSS, fill("logit_scale", -0.5), "logit_scale is -0.5"),
    "weight": (WEIGHTS, fill("text_projection.weight", math.nan), "text_projection.weight contains numbers that are"),
    "moment infinite": (OPTIMIZER, fill("exp_avg/text_projection.weight@0", math.inf), "exp_avg/text_projection"),
    "moment negative": (OPTIMIZER, fill(MOMENT, -1e-9), f"{MOMENT} contains negative numbers: its smallest is -1e-09"),
    "moment of the loss": (LOSS, fill("optimizer.0.exp_avg_sq", -2.0), "optimizer.0.exp_avg_sq contains negative"),
    "updates of the loss": (LOSS, fill("optimizer.0.step", 7.0), "optimizer.0.step counts 7 updates, the manifest 2"),
}
MISFITS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "weight missing": (WEIGHTS, lambda t: t.pop("text_projection.weight"), "text_projection.weight is missing"),
    "weight of another type": (
        WEIGHTS,
        lambda t: t.update({"text_projection.weight": t["text_projection.weight"].double()}),
        "text_projection.weight is ((64, ",
    ),
    "scale missing": (LOSS, lambda t: t.pop("logit_scale"), "logit_scale is missing"),
    "loss without optimizer": (LOSS, lambda t: t.pop("optimizer.0.exp_avg"), "optimizer.0.exp_avg is missing"),
    "moment missing": (OPTIMIZER, lambda t: t.pop(MOMENT), "has the optimizer state exp_avg, not 2 tensors"),
    "moment too short": (OPTIMIZER, lambda t: t.update({MOMENT: t[MOMENT][:-1].clone()}), f"{MOMENT[:-2]}: "),
    "moment shifted": (OPTIMIZER, lambda t: t.update({f"{MOMENT[:-1]}1": t.pop(MOMENT)}), "a gap at element 0"),
    "moment of no parameter": (OPTIMIZER, lambda t: t.update({"exp_avg/other@0": torch.ones(2)}), "state of other"),
    "no moments": (OPTIMIZER, lambda t: [t.pop(name) for name in list(t)], "there is no optimizer state"),
}


@pytest.mark.parametrize("case", CASES)
def test_invalid_number_is_named_and_the_checkpoint_before_is_taken(
    case: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, change, message = CASES[case]
    craft(run / "checkpoints" / "step-00000002", file, change)
    found = checkpoint.newest(run)
    assert found is not None and found.step == 1
    warning = capfd.readouterr().err
    assert warning.startswith("warning: skipping a corrupt checkpoint: error[E_CKPT_STATE]: "), warning
    assert message in warning and f"step-00000002/{file}" in warning


@pytest.mark.parametrize("counts", [{"updates": 3}, {"updates": -1, "skipped": 3}, {"skipped": 1}, {"updates": "2"}])
def test_counts_of_steps_must_add_up(counts: dict[str, Any], run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    craft(run / "checkpoints" / "step-00000002", LOSS, lambda tensors: None, **counts)
    found = checkpoint.newest(run)
    assert found is not None and found.step == 1
    assert "skipping a corrupt checkpoint: error[E_CKPT_" in capfd.readouterr().err


def test_resuming_takes_the_newest_checkpoint_whose_state_is_valid(
    run: Path, scenes: Path, small: Any, here: Callable[..., Any]
) -> None:
    args = ["train", *small.settings, f"data.train={scenes}", *STEPS, "-o", "run"]
    original = run.with_name("original")
    shutil.copytree(run, original)
    for number, (file, change, message) in enumerate(MISFITS.values()):
        craft(run / "checkpoints" / "step-00000002", file, change)
        if number:  # one of them trains on; for all, both checkpoints fail
            craft(run / "checkpoints" / "step-00000001", LOSS, fill("logit_scale", 5.0))
            failed = here(run.parent, *args, code=3)
            assert failed.error.startswith("error[E_CKPT_STATE]: no checkpoint of this run is valid"), failed.error
            assert "logit_scale is 5" in failed.error and "restore one, or start over with --fresh" in failed.error
            assert "export" not in failed.error and "learning rate" not in failed.error
        else:
            failed = here(run.parent, *args, "runtime.stop_at=2")
            assert "resuming at step 1" in failed.out and "saved step 2 in" in failed.out
        assert "warning: skipping a corrupt checkpoint: error[E_CKPT_STATE]" in failed.err and message in failed.err
        shutil.rmtree(run)
        shutil.copytree(original, run)


def test_export_and_warm_start_refuse_an_invalid_state(
    run: Path, scenes: Path, small: Any, here: Callable[..., Any]
) -> None:
    folder = run.parent
    here(folder, "export", "run", "-o", "model")
    for step in (1, 2):
        craft(run / "checkpoints" / f"step-{step:08d}", LOSS, fill("logit_scale", 100.0))
    line = here(folder, "export", "run", "step=1", "-o", "other", code=3).error
    assert (
        line.startswith("error[E_CKPT_STATE]: the checkpoint of step 1 is not valid") and "logit_scale is 100" in line
    )
    args = ["train", *small.settings, f"data.train={scenes}", *STEPS, "runtime.stop_at=1", "-o", "next"]
    line = here(folder, *args, "init_from=run", code=3).error
    assert line.startswith("error[E_CKPT_STATE]") and "logit_scale is 100" in line
    # A model folder whose manifest is right again.
    tensors = load_file(folder / "model" / WEIGHTS)
    tensors["loss.logit_scale"].fill_(math.nan)
    save_file(tensors, folder / "model" / WEIGHTS)
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    manifest["files"] = records.file_entries(folder / "model", manifest["files"])
    write_json(folder / "model" / "manifest.json", manifest)
    line = here(folder, *args, "init_from=model", code=3).error
    assert line.startswith("error[E_MODEL_SHAPE]: the weights hold invalid numbers")
    assert "loss.logit_scale contains numbers that are not finite" in line and "export the run again" in line


def test_checkpoint_that_cannot_be_read_is_skipped(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = records.file_sha256

    def unreadable(path: Path) -> str:
        if path.parent.name == "step-00000002":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(records, "file_sha256", unreadable)
    found = checkpoint.newest(run)
    assert found is not None and found.step == 1
    assert "it cannot be read: Input/output error" in capfd.readouterr().err


def test_lost_checkpoints_do_not_start_a_run_over(
    run: Path, scenes: Path, small: Any, here: Callable[..., Any]
) -> None:
    args = ["train", *small.settings, f"data.train={scenes}", *STEPS, "runtime.stop_at=2", "-o", "run"]
    shutil.rmtree(run / "checkpoints")
    (run / "latest").unlink()
    for log, evidence in (
        ('{"step":1,"saved":0}\n{"step":2,"saved":1}\n', "step-00000001 was saved, as log.jsonl states"),
        ('{"step":1,"saved":0}\n', "ledger.jsonl has 2 steps, with a checkpoint every 1"),
        ("", "ledger.jsonl has 2 steps, and the log, which names the saved ones, is empty or missing"),
    ):
        (run / "log.jsonl").write_text(log)
        line = here(run.parent, *args, code=3).error
        assert line.startswith("error[E_CKPT_NONE]: the checkpoints of this run are missing") and evidence in line
        assert "restore them, or start over with --fresh" in line
    (run / "log.jsonl").write_text('{"step":1,"saved":0}\n')
    # As many steps as a run may make before its first checkpoint is complete.
    done = here(run.parent, *(word.replace("save_every=1", "save_every=2") for word in args))
    assert "warning: 2 steps of run ended before a checkpoint: training starts over" in done.err
    assert [line["step"] for line in small.losses(run)] == [1, 2]
