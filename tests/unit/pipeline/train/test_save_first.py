"""What fails after a step costs no step: the run saves first, says so, and the same command resumes from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_engine import fake_engine

from clipwright.pipeline.distributed.group import process_group
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.train.checkpoints import saver
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.config import RuntimeConfig
from clipwright.pipeline.train.engine import StepResult
from clipwright.pipeline.train.logging import Meter, without_nonfinite

pytestmark = pytest.mark.xdist_group("ranks")

FAULTY = """
import math
from pathlib import Path
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.losses.base import LossTerm
from clipwright.pipeline.train.techniques.base import TECHNIQUES, Technique, TechniqueConfig

@configclass
class FaultyConfig(TechniqueConfig):
    nonfinite: bool = False

class Term(LossTerm):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, features):
        return features.image.sum() * self.factor

    def report(self):
        return {"term": self.factor}

class Faulty(Technique):
    def __init__(self, config):
        self.nonfinite, self.updates = config.nonfinite, 0

    def loss_terms(self):
        return {"term": Term(math.nan if self.nonfinite else 0.0)}

    def after_update(self, model, step):
        with Path("hooks").open("a") as file:
            file.write(f"{step}\\n")
        if step == 2 and not Path("repaired").exists():
            raise ZeroDivisionError("no such decay")

TECHNIQUES.add(FaultyConfig, Faulty, {"faulty": {}})
"""


def test_failed_validation_costs_no_step(scenes: Path, tmp_path: Path, small: Any, here: Callable[..., Any]) -> None:
    held_out = Path(shutil.copytree(scenes, tmp_path / "held-out"))
    record, tar = Dataset(held_out).record(1, 3), Dataset(held_out).tar_path(1)
    complete = tar.read_bytes()

    def corrupt() -> None:
        middle = record["offset"] + record["size"] // 2
        tar.write_bytes(complete[:middle] + bytes([complete[middle] ^ 1]) + complete[middle + 1 :])

    args = ["train", *small.settings, f"data.train={scenes}", "schedule.samples=96", "schedule.warmup=0", "-o", "run"]
    validated = [*args, "runtime.validation=held-out", "runtime.validate_every=4"]
    corrupt()
    for first in ("", "resuming at step 4"):  # again at the same step, and no step is repeated
        failed = here(tmp_path, *validated, code=3)
        assert failed.error.startswith("error[E_DATA_HASH]: the validation failed: "), failed.error
        assert record["key"] in failed.error and "step 4 is saved" in failed.error
        assert failed.error.endswith("or run the same command with runtime.validation=null to train on without it")
        assert first in failed.out and (not first or "\nstep " not in failed.out)
    assert [line["step"] for line in small.losses(tmp_path / "run")] == [1, 2, 3, 4]
    tar.write_bytes(complete)
    repaired = here(tmp_path, *validated, "runtime.stop_at=5")  # step 4 is validated now
    assert (
        "validation at step 4: i2t R@1 " in repaired.out
        and "saved step 5 in run/checkpoints/step-00000005" in repaired.out
    )
    scored = {line["step"]: "val_i2t_r1" in line for line in small.losses(tmp_path / "run")}
    assert scored == {1: False, 2: False, 3: False, 4: True, 5: True}
    corrupt()
    here(tmp_path, *args, "runtime.validation=null")
    assert [line["step"] for line in small.losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_failed_hook_of_a_technique_runs_again_on_resume(
    scenes: Path, tmp_path: Path, small: Any, here: Callable[..., Any]
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    args = ["train", *small.settings, f"data.train={scenes}", "schedule.samples=48", "schedule.warmup=0"]
    args += ["plugins=faulty.py", "techniques=[{name: faulty}]", "-o", "run"]
    for _ in range(2):
        line = here(tmp_path, *args, code=1).error
        assert line.startswith("error[E_TECHNIQUE]: a technique failed — techniques: faulty, after_update of step 2 — ")
        assert "ZeroDivisionError: no such decay; this step is saved" in line
    assert json.loads((tmp_path / "run/checkpoints/step-00000002/manifest.json").read_text())["hook_pending"] is True
    (tmp_path / "repaired").touch()
    done = here(tmp_path, *args)
    assert "resuming at step 2" in done.out
    assert (tmp_path / "hooks").read_text().split() == ["1", "2", "2", "2", "3"]
    assert json.loads((tmp_path / "run/checkpoints/step-00000003/manifest.json").read_text())["hook_pending"] is False


def test_nonfinite_numbers_are_null_in_the_log_and_end_the_run(
    scenes: Path, tmp_path: Path, small: Any, here: Callable[..., Any]
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    args = ["train", *small.settings, f"data.train={scenes}", "schedule.samples=96", "schedule.warmup=0"]
    line = here(
        tmp_path, *args, "plugins=faulty.py", "techniques=[{name: faulty, nonfinite: true}]", "-o", "run", code=1
    ).error
    assert line.startswith("error[E_NONFINITE]: loss or gradient was not finite in 3 steps in a row — run step 3: ")
    assert "these steps changed nothing; the weights are finite; newest checkpoint: none" in line
    assert "samples, precision and learning rate are possible causes" in line and "step=3" in line
    log = small.losses(tmp_path / "run")
    assert [record["not_finite"] for record in log] == [["loss", "grad_norm", "term"]] * 3
    assert all(record["loss"] is record["term"] is None and record["scale"] > 1 for record in log)
    assert without_nonfinite({"a": 1.5, "b": -float("inf"), "c": "x"}) == {
        "a": 1.5,
        "b": None,
        "c": "x",
        "not_finite": ["b"],
    }


SKIPPING = """
import math
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.losses.base import LossTerm
from clipwright.pipeline.train.techniques.base import TECHNIQUES, Technique, TechniqueConfig

@configclass
class SkippingConfig(TechniqueConfig):
    pass

class Term(LossTerm):
    def forward(self, features):
        steps.append(0)
        return features.image.sum() * (math.nan if len(steps) == 2 else 0.0)

class Skipping(Technique):
    def __init__(self, config):
        pass

    def loss_terms(self):
        return {"term": Term()}

steps = []
TECHNIQUES.add(SkippingConfig, Skipping, {"skipping": {}})
"""


def test_skipped_step_is_no_update_after_resuming(
    scenes: Path, tmp_path: Path, small: Any, here: Callable[..., Any]
) -> None:
    """Adam's correction depends on the number of updates."""
    (tmp_path / "skipping.py").write_text(SKIPPING)
    args = [f"data.train={scenes}", "schedule.samples=64", "schedule.warmup=0", "optim.lr=0.01", "runtime.keep=9"]
    args += ["plugins=skipping.py", "techniques=[{name: skipping}]"]
    small(tmp_path, *args, "-o", "straight")
    small(tmp_path, *args, "runtime.stop_at=3", "-o", "run")
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000003/manifest.json").read_text())
    assert (manifest["updates"], manifest["skipped"], manifest["samples"]) == (2, 1, 48)
    small(tmp_path, *args, "-o", "run")
    curves = [[record["loss"] for record in small.losses(tmp_path / run)] for run in ("run", "straight")]
    assert curves[0] == curves[1] and curves[0][1] is None
    last = "checkpoints/step-00000004/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()


FAULTS = """
import os
from pathlib import Path
from clipwright.pipeline.data import loader
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.train.checkpoints import saver

loader.RETRY_DELAYS_SECONDS = ()
read, save, reads = Dataset.image, saver.save_file, []

def failing(kind):
    return os.environ.get("RANK") == "1" and Path("fault").read_text() == kind

def image(self, shard, row):
    reads.append(row)
    if len(reads) > 32 and failing("read"):
        raise OSError(5, "Input/output error", str(self.tar_path(shard)))
    return read(self, shard, row)

def save_file(tensors, path):
    if failing("write"):
        raise OSError(107, "Transport endpoint is not connected", str(path))
    save(tensors, path)

Dataset.image, saver.save_file = image, save_file
"""


def test_failed_mount_of_one_rank_is_named_after_saving(
    scenes: Path, tmp_path: Path, small: Any, here: Callable[..., Any]
) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    args = [f"data.train={scenes}", "schedule.samples=160", "schedule.warmup=0", "runtime.zero=1"]
    args += ["plugins=faults.py", "-o", "run"]
    (tmp_path / "fault").write_text("read")
    printed = small(tmp_path, *args, ranks=2, code=1)
    line = next(line for line in printed.stderr.splitlines() if line.startswith("error["))
    assert line.startswith(
        f"error[E_SYSTEM]: the dataset {scenes} cannot be read on one rank — {scenes}/scenes-0000"
    ), line
    assert "EIO (Input/output error) on rank 1, host " in line and "this step is saved" in line
    first = int((tmp_path / "run" / "latest").read_text().strip().removeprefix("step-"))
    assert first > 0 and f"saved step {first} in run/checkpoints/step-{first:08d}" in printed.stdout
    (tmp_path / "fault").write_text("write")
    printed = small(tmp_path, *args, ranks=2, code=1)
    line = next(line for line in printed.stderr.splitlines() if line.startswith("error["))
    assert line.startswith("error[E_SYSTEM]: a checkpoint could not be written — "), line
    assert "optimizer-00001.safetensors" in line and "ENOTCONN (Transport endpoint is not connected) on rank 1" in line
    (tmp_path / "fault").write_text("none")
    done = here(tmp_path, "train", *small.settings, *args)
    assert f"resuming at step {first}" in done.out
    assert [record["step"] for record in small.losses(tmp_path / "run")] == list(range(1, 11))


def test_speed_in_the_log_is_that_since_the_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=lambda: clock.now, now=100.0)
    monkeypatch.setattr("clipwright.pipeline.train.logging.time", clock)
    meter = Meter(torch.device("cpu"))
    meter.restart(10)
    clock.now, meter.waited = 104.0, 1.0
    record = meter.record(18, 18 * 16, StepResult(loss=1.0, grad_norm=2.0), lr=0.1)
    assert record["samples_per_s"] == 8 * 16 / 4.0 and record["data_share"] == 0.25
    assert (record["step"], record["samples"], record["loss"], record["lr"]) == (18, 288, 1.0, 0.1)
    clock.now = 106.0
    again = meter.record(20, 20 * 16, StepResult(loss=1.0, grad_norm=2.0))  # the first record restarted the interval
    assert again["samples_per_s"] == 2 * 16 / 2.0 and again["data_share"] == 0.0


def test_best_step_is_judged_by_its_own_figure(tmp_path: Path) -> None:
    """The best step is not the newest; a step without a figure does not take over that of an earlier one."""

    def kept() -> list[int]:
        return sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*"))

    runtime, figures = RuntimeConfig(keep=1, keep_best="score"), {1: 0.5, 2: 0.9, 4: 0.9, 5: 0.2}
    lines: list[str] = []
    with process_group() as world:
        saves = Saver(tmp_path, world, runtime, {"identity": {}, "accepted": []}, 0, say=lines.append)
        for step in range(1, 6):
            saves.save(fake_engine(), step, wait=True)
            if step in figures:
                saves.note({"step": step, "score": figures[step], "loss": 1.0})
        assert kept() == [2, 5]
        assert lines[-1] == f"saved step 5 in {tmp_path / 'checkpoints' / 'step-00000005'}"
        # Another start of the run knows the figures from the log.
        log = [{"step": step, "score": score} for step, score in figures.items()]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        again = Saver(tmp_path, world, runtime, {"identity": {}, "accepted": []}, 5)
        again.save(fake_engine(), 6, wait=True)
        assert kept() == [2, 6]


def test_checkpoint_is_due_after_minutes_or_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr(saver, "time", clock)
    with process_group() as world:
        saves = Saver(tmp_path, world, RuntimeConfig(save_minutes=2.0, save_every=10), {}, 0)
    clock.now += 119.9
    assert not saves.late
    clock.now += 0.2
    assert saves.late and saves.due(3, late=True)
    assert [step for step in range(1, 31) if saves.due(step, late=False)] == [10, 20, 30]
