"""Where a run's numbers go: its header, the step line, log.jsonl and TensorBoard."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from clipwright.pipeline.core.command import Outcome
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import format_duration
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.measure import peak_memory
from clipwright.pipeline.towers.base import parameter_count
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.config import Parts, RunConfig
from clipwright.pipeline.train.engine import StepResult
from clipwright.pipeline.train.run_folder import LOG, StepFile

_TAGS = ("loss", "acc_image", "acc_text", "scale", "lr", "grad_norm", "samples_per_s", "data_share", "memory_gb")


class RunLog:
    """`log.jsonl` is the truth, one object per logged step; on resume it is cut back to the checkpoint's step."""

    def __init__(self, run: Path, step: int) -> None:
        self._file = StepFile(run / LOG, step)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(record)
        for tag in (*_TAGS, *(name for name in record if name.startswith("val_"))):
            if record.get(tag) is not None:
                self._board.add_scalar(tag, record[tag], record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def header(config: RunConfig, parts: Parts, world: World, threads: int) -> str:
    """A run's numbers, printed before its first step."""
    towers, schedule, data = parts.towers, config.schedule, parts.loader.data
    epochs = data.epochs(schedule.samples)
    many = len(epochs) > 1
    named = (f"{part.folder.name} " if many else "" for part in data.datasets)
    told = ", ".join(f"{name}{turns:.1f}" for name, turns in zip(named, epochs, strict=True))
    return (
        f"image {config.image.name} {parameter_count(towers.image):,} · "
        f"text {config.text.name} {parameter_count(towers.text):,} parameters · embed {config.embed_dim}\n"
        f"data {data.samples:,} samples in {len(data.sizes)} shards{f' of {len(epochs)} datasets' if many else ''} · "
        f"{schedule.samples:,} training samples = {told} epochs · "
        f"{schedule.steps:,} steps of {schedule.global_batch}\n"
        f"{world} · {world.device.type} · precision {config.precision} · "
        f"ZeRO {config.runtime.zero} · {threads} threads · seed {config.seed}"
    )


def step_line(record: dict[str, Any], steps: int, eta: float) -> str:
    """One fixed-field line of a step, for people and grep."""
    counts = "".join(f"{name} {record[name]}  " for name in ("replaced", "skipped") if record[name])
    if "val_i2t_r1" in record:
        counts += f"val R@1 i2t {record['val_i2t_r1']:.3f} t2i {record['val_t2i_r1']:.3f}  "
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  loss {_number(record['loss'], '.4f')}  "
        f"acc i2t {record['acc_image']:.2f} t2i {record['acc_text']:.2f}  "
        f"neg {record['negatives']}  scale {record.get('scale', 0):.1f}  "
        f"lr {record['lr']:.2e}  gnorm {_number(record['grad_norm'], '.2f')}  smp/s {record['samples_per_s']:.0f}  "
        f"data {record['data_share']:.0%}  {counts}mem {record['memory_gb']:.1f}G  eta {format_duration(eta)}"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


class Meter:
    """Speed between two logged steps, and a logged step's record."""

    def __init__(self, step: int, device: torch.device) -> None:
        self._device = device
        self.begin(step)

    def begin(self, step: int) -> None:
        """What is timed begins now, behind step `step`."""
        self._since, self._step, self.waited = time.perf_counter(), step, 0.0

    def record(self, step: int, samples: int, result: StepResult, **more: Any) -> dict[str, Any]:
        """The record of step `step`, up to which `samples` were trained on; what is not finite stands as null."""
        seconds, steps = max(time.perf_counter() - self._since, 1e-9), step - self._step
        share = min(self.waited / seconds, 1.0)
        self.begin(step)
        numbers = dataclasses.asdict(result)
        return {
            "step": step,
            "samples": samples,
            **{name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()},
            **more,
            "samples_per_s": samples / step * steps / seconds,
            "data_share": share,
            "memory_gb": peak_memory(self._device) / 2**30,
        }


def summary(run: Path, config: RunConfig, world: World, steps: int) -> Outcome:
    """The outcome of a completed run."""
    lines = run_folder.read_log(run)
    if not lines:
        raise ClipwrightError(
            "E_INPUT",
            "a finished run without its log",
            where=run / LOG,
            found="no line; the checkpoints are whole",
            fix=f"export it (clipwright export {run} -o MODEL), or train again with --fresh",
        )
    result = {
        "steps": steps,
        "samples": steps * config.schedule.global_batch,
        "samples_per_s": round(statistics.median(line["samples_per_s"] for line in lines), 1),
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "precision": config.precision,
        "world": world.size,
        "run": str(run),
    }
    losses = f"{_number(result['loss_first'], '.3f')} → {_number(result['loss_last'], '.3f')}"
    text = f"trained {result['samples']:,} samples: loss {losses}"
    return Outcome(result, text, next=f"clipwright export {run} -o MODEL")
