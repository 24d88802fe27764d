"""Runs with several ranks, and compute precision."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("ranks")

SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.weight_decay=0", "schedule.warmup=0", "schedule.name=constant"]


@pytest.fixture(scope="session")
def reference(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    """One process, ZeRO 0, no micro-batches: every other layout must equal it."""
    folder = tmp_path_factory.mktemp("reference")
    small(folder, f"data.train={scenes}", "schedule.samples=320", *SGD, "-o", "run")
    return folder / "run"


def test_two_ranks_equal_one(scenes: Path, reference: Path, tmp_path: Path, small: Any) -> None:
    """A complete run: loader, schedule, log, checkpoints. Single steps are tested in test_layouts.py."""
    args = ["runtime.zero=3", "runtime.micro_batch=3", "runtime.exchange=ring", "runtime.offload=optimizer"]
    small(tmp_path, f"data.train={scenes}", "schedule.samples=320", *SGD, *args, "-o", "run", ranks=2)
    ours, theirs = small.losses(tmp_path / "run"), small.losses(reference)
    assert [line["step"] for line in ours] == list(range(1, 21))
    for line, expected in zip(ours, theirs, strict=True):
        for field in ("loss", "grad_norm", "scale"):
            assert line[field] == pytest.approx(expected[field], rel=1e-5, abs=1e-5), (line["step"], field)
        assert line["negatives"] == expected["negatives"] == 15
        assert (line["acc_image"], line["acc_text"]) == (expected["acc_image"], expected["acc_text"])
    assert ours[-1]["loss"] < 0.95 * ours[0]["loss"]
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == (reference / "ledger.jsonl").read_bytes()
    ours, theirs = (
        load_file(run / "checkpoints/step-00000020/model.safetensors") for run in (tmp_path / "run", reference)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-5), name


def test_batch_not_divisible_by_the_ranks_is_refused(scenes: Path, tmp_path: Path, small: Any) -> None:
    args = [f"data.train={scenes}", "schedule.global_batch=15", "schedule.samples=30", "-o", "run"]
    done = small(tmp_path, *args, ranks=2, code=1)  # torchrun turns every exit code into 1
    assert "error[E_BATCH]" in done.stderr and "schedule.global_batch=15" in done.stderr
    assert "use a multiple of 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_bf16_computes_in_bf16_and_keeps_fp32_parameters(
    scenes: Path, reference: Path, tmp_path: Path, small: Any
) -> None:
    args = ["schedule.samples=64", "runtime.zero=2", "runtime.micro_batch=8", *SGD, "precision=bf16", "-o", "run"]
    small(tmp_path, f"data.train={scenes}", *args)
    ours, theirs = small.losses(tmp_path / "run")[0], small.losses(reference)[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    assert ours["loss"] != theirs["loss"]  # or nothing was computed in bf16
    weights = load_file(tmp_path / "run" / "checkpoints/step-00000004/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_auto_precision_is_chosen_once_and_kept(scenes: Path, tmp_path: Path, small: Any) -> None:
    args = [f"data.train={scenes}", "schedule.samples=64", "precision=auto", "-o", "run"]
    small(tmp_path, *args, "runtime.stop_at=2")
    config = tmp_path / "run" / "config.yaml"
    chosen = "bf16" if "precision: bf16" in config.read_text() else "fp32"
    assert f"precision: {chosen}" in config.read_text()
    # As if it had started on a machine that chose the other precision, and been killed before its first checkpoint.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for name in ("latest", "log.jsonl", "ledger.jsonl"):
        (tmp_path / "run" / name).unlink()
    other = {"bf16": "fp32", "fp32": "bf16"}[chosen]
    for name in ("config.yaml", "identity.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(chosen, other))
    done = small(tmp_path, *args)
    assert "resuming" not in done.stdout and f"precision {other}" in done.stdout


def test_extra_pooled_outputs_train_equally_on_two_ranks(scenes: Path, tmp_path: Path, small: Any) -> None:
    """ZeRO's hooks must find the tensors in TowerOutput.extra, and the projection of each."""
    settings = [word for word in small.settings if not word.startswith("image.")]
    settings += ["image.name=deit_nano", "image.image_size=32", "image.depth=2", "image.drop_path=0"]
    settings += [f"data.train={scenes}", "schedule.samples=96", *SGD]
    small.cli(tmp_path)("train", *settings, "-o", "one")
    small.cli(tmp_path)("train", *settings, "runtime.zero=3", "-o", "two", ranks=2)
    last = "checkpoints/step-00000006/model.safetensors"
    one, two = load_file(tmp_path / "one" / last), load_file(tmp_path / "two" / last)
    assert one.keys() == two.keys() and "extra_projections.dist.weight" in one
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=1e-5), name
