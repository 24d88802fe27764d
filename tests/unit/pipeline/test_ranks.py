"""Two processes against one: same losses, norms and parameters under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("ranks")

SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.weight_decay=0", "schedule.warmup=0", "schedule.decay=constant"]
ADAMW = ["optim.name=adamw", "optim.lr=1e-3", "optim.eps=1e-6", "schedule.warmup=64"]


@pytest.fixture(scope="session")
def reference(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> dict[str, Path]:
    """One process, ZeRO 0: what every other layout must equal."""
    folder = tmp_path_factory.mktemp("reference")
    for name, optim in (("sgd", SGD), ("adamw", ADAMW)):
        small(folder, f"data.train={scenes}", "schedule.samples=320", *optim, "-o", name)
    return {name: folder / name for name in ("sgd", "adamw")}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_equal_one_under_sgd(zero: int, scenes: Path, reference: dict, tmp_path: Path, small: Any) -> None:
    """SGD without warm-up: AdamW would hide a gradient wrong by a constant factor."""
    words = [f"data.train={scenes}", "schedule.samples=320", f"runtime.zero={zero}", *SGD, "-o", "run"]
    small(tmp_path, *words, ranks=2)
    ours, theirs = small.losses(tmp_path / "run"), small.losses(reference["sgd"])
    assert [line["step"] for line in ours] == list(range(1, 21))
    for mine, other in zip(ours, theirs, strict=True):
        for field in ("loss", "grad_norm", "scale"):
            assert mine[field] == pytest.approx(other[field], rel=1e-5, abs=1e-5), (mine["step"], field)
    assert ours[-1]["loss"] < 0.95 * ours[0]["loss"]
    mine, other = (
        load_file(run / "checkpoints/step-00000020/model.safetensors") for run in (tmp_path / "run", reference["sgd"])
    )
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_equal_one_under_adamw(zero: int, scenes: Path, reference: dict, tmp_path: Path, small: Any) -> None:
    words = [f"data.train={scenes}", "schedule.samples=320", f"runtime.zero={zero}", *ADAMW, "-o", "run"]
    small(tmp_path, *words, ranks=2)
    pairs = zip(small.losses(tmp_path / "run"), small.losses(reference["adamw"]), strict=True)
    assert all(mine["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5) for mine, other in pairs)


@pytest.mark.parametrize("zero", [1, 3])
def test_one_process_runs_every_stage(zero: int, scenes: Path, reference: dict, tmp_path: Path, small: Any) -> None:
    words = [f"data.train={scenes}", "schedule.samples=320", f"runtime.zero={zero}", *SGD, "-o", "run"]
    small(tmp_path, *words)
    pairs = zip(small.losses(tmp_path / "run"), small.losses(reference["sgd"]), strict=True)
    for mine, other in pairs:
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5, abs=1e-5)


def test_clipping_is_what_the_config_says(scenes: Path, tmp_path: Path, small: Any) -> None:
    """DeepSpeed clips at 1.0 when told nothing: `optim.clip=0` must mean none, and the norm is logged unclipped."""
    common = [f"data.train={scenes}", "schedule.samples=16", *SGD]
    small(tmp_path, *common, "optim.clip=0", "-o", "off")
    small(tmp_path, *common, "optim.clip=1e-3", "-o", "on")
    [off], [on] = small.losses(tmp_path / "off"), small.losses(tmp_path / "on")
    assert off["grad_norm"] == pytest.approx(on["grad_norm"], rel=1e-6)
    # One step of plain SGD moves the weights by lr × norm: the two runs end that far apart, less the clipped step.
    last = "checkpoints/step-00000001/model.safetensors"
    free, clipped = load_file(tmp_path / "off" / last), load_file(tmp_path / "on" / last)
    apart = sum(float((free[name] - clipped[name]).double().square().sum()) for name in free) ** 0.5
    assert apart == pytest.approx(0.05 * (off["grad_norm"] - 1e-3), rel=1e-3)


def test_ranks_that_cannot_share_the_batch_are_refused(scenes: Path, tmp_path: Path, small: Any) -> None:
    words = [f"data.train={scenes}", "schedule.global_batch=15", "schedule.samples=30", "-o", "run"]
    done = small(tmp_path, *words, ranks=2, code=1)  # torchrun turns every exit code into 1
    assert "error[E_BATCH]" in done.stderr and "schedule.global_batch=15" in done.stderr
    assert "take a multiple of 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("zero", [0, 2])
def test_bf16_computes_in_bf16_and_keeps_fp32_parameters(
    zero: int, scenes: Path, reference: dict, tmp_path: Path, small: Any
) -> None:
    words = [f"data.train={scenes}", "schedule.samples=64", f"runtime.zero={zero}", *SGD, "precision=bf16", "-o", "run"]
    small(tmp_path, *words)
    ours, theirs = small.losses(tmp_path / "run")[0], small.losses(reference["sgd"])[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    assert ours["loss"] != theirs["loss"]  # or nothing was computed in bf16
    weights = load_file(tmp_path / "run" / "checkpoints/step-00000004/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_auto_precision_is_chosen_once_and_kept(scenes: Path, tmp_path: Path, small: Any) -> None:
    words = [f"data.train={scenes}", "schedule.samples=64", "precision=auto", "-o", "run"]
    small(tmp_path, *words, "runtime.stop_at=2")
    config = tmp_path / "run" / "config.yaml"
    chosen = "bf16" if "precision: bf16" in config.read_text() else "fp32"
    assert f"precision: {chosen}" in config.read_text()
    # As if it had been started on a machine of the other kind: the run keeps what its first start chose.
    other = {"bf16": "fp32", "fp32": "bf16"}[chosen]
    for name in ("config.yaml", "identity.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(chosen, other))
    done = small(tmp_path, *words)
    assert "resuming at step 2" in done.stdout and f"precision {other}" in done.stdout


def test_running_statistics_are_the_average_over_ranks(scenes: Path, tmp_path: Path, small: Any) -> None:
    """The first norm sees the same pixels however they are shared: its saved mean must not be one rank's alone."""
    words = [f"data.train={scenes}", "image.name=clip_rn_nano", "image.image_size=32", "schedule.samples=16"]
    settings = [word for word in small.settings if not word.startswith("image.")]
    for ranks in (0, 2):
        small.cli(tmp_path)("train", *settings, *words, "-o", f"run{ranks}", ranks=ranks)
    last = "checkpoints/step-00000001/model.safetensors"
    one, two = load_file(tmp_path / "run0" / last), load_file(tmp_path / "run2" / last)
    first = next(name for name in sorted(one) if name.startswith("image.stem.0") and name.endswith("running_mean"))
    assert one[first].abs().max() > 1e-4
    assert torch.allclose(one[first], two[first], rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero", [2, 3])
def test_extra_pooled_vectors_train_alike_on_two_ranks(zero: int, scenes: Path, tmp_path: Path, small: Any) -> None:
    """ZeRO's hooks must see the tensors in TowerOutput.extra, and the projection of each."""
    settings = [word for word in small.settings if not word.startswith("image.")]
    settings += ["image.name=deit_nano", "image.image_size=32", "image.depth=2", "image.drop_path=0"]
    settings += [f"data.train={scenes}", "schedule.samples=96", *SGD]
    small.cli(tmp_path)("train", *settings, "-o", "one")
    small.cli(tmp_path)("train", *settings, f"runtime.zero={zero}", "-o", "two", ranks=2)
    last = "checkpoints/step-00000006/model.safetensors"
    one, two = load_file(tmp_path / "one" / last), load_file(tmp_path / "two" / last)
    assert one.keys() == two.keys() and "extra_projections.dist.weight" in one
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=1e-5), name
