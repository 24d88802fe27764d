"""Where a run's numbers go: its header, the step line, log.jsonl and TensorBoard."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import command_line, format_count, format_duration
from clipwright.pipeline.distributed.group import World, any_rank
from clipwright.pipeline.losses.base import LossTerm
from clipwright.pipeline.measure import peak_memory
from clipwright.pipeline.towers.base import parameter_count
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.config import Components, RunConfig
from clipwright.pipeline.train.engine import StepResult
from clipwright.pipeline.train.run_folder import LOG, StepFile

_TAGS = ("loss", "acc_image", "acc_text", "scale", "lr", "grad_norm", "samples_per_s", "data_share", "memory_gb")
SCORE_PREFIX = "val_"  # of the numbers of a validation


class RunLog:
    """`log.jsonl`, one object per logged step, and the same numbers in TensorBoard; written by rank 0 only.

    On resume both are cut back to the checkpoint's step.
    """

    def __init__(self, run: Path, step: int, world: World) -> None:
        self._file: StepFile | None = None
        self.last: dict[str, Any] = {}  # the newest record
        if world.is_rank0:
            self._file = StepFile(run / LOG, step)
            self.last = self._file.last_record()
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Adds the record of a step."""
        if self._file is None:
            return
        self.last = record
        self._file.write(record)
        self._plot(record, _TAGS)

    def extend(self, numbers: dict[str, float]) -> None:
        """Adds numbers to the newest record."""
        if self._file is None:
            return
        self.last = {**self.last, **numbers}
        self._file.replace_last(self.last)
        self._plot(self.last, numbers)

    def _plot(self, record: dict[str, Any], tags: Iterable[str]) -> None:
        for tag in tags:
            if record.get(tag) is not None:
                self._board.add_scalar(tag, record[tag], record["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class Records:
    """Measures, logs and prints the numbers of steps; every rank has one, rank 0 writes."""

    def __init__(
        self, call: Call, run: Path, step: int, end: int, world: World, config: RunConfig, changed: Sequence[str]
    ) -> None:
        """step, end: where the run starts and ends. changed: `key: old → new` per accepted change of the config."""
        self.call, self.world, self.config = call, world, config
        self._resumed_at, self._changed = step, changed  # until the first record, which states them
        self.log, self.meter = RunLog(run, step, world), Meter(world.device)
        batch, quiet = config.schedule.global_batch, call.quiet or not world.is_rank0
        # Between the step lines, which are the usual progress.
        self.progress = Progress("train", end * batch, "sample", quiet=quiet, interval=60.0, already_done=step * batch)

    def say(self, *lines: str) -> None:
        """Prints lines for people, on rank 0."""
        for line in lines if self.world.is_rank0 else ():
            self.call.say(line)

    def write(
        self, step: int, result: StepResult, loss: LossTerm, counts: dict[str, int], slow: Sequence[int]
    ) -> dict[str, Any]:
        """Logs and prints step `step`, the newest one; returns its record. slow: ranks that slow down the others."""
        schedule = self.config.schedule
        samples = step * schedule.global_batch
        further: dict[str, Any] = {name: float(value) for name, value in loss.report().items()}
        further["lr"] = self.config.optim.lr * schedule.factor(samples - schedule.global_batch)
        further.update(counts)
        if self._resumed_at:
            further["resumed"], self._resumed_at = self._resumed_at, 0
        if self._changed:
            further["accepted"], self._changed = list(self._changed), ()
        if slow:
            further["slow"] = list(slow)
        record = without_nonfinite(self.meter.record(step, samples, result, **further))
        self.log.write(record)
        remaining = schedule.steps * schedule.global_batch - samples
        self.say(step_line(record, schedule.steps, remaining / record["samples_per_s"]))
        return record

    def lacks_scores(self, step: int) -> bool:
        """Returns, on all ranks, whether step `step` is the newest in the log, without the scores of a validation."""
        last = self.log.last
        lacks = last.get("step") == step and not any(name.startswith(SCORE_PREFIX) for name in last)
        return any_rank(lacks and self.world.is_rank0, self.world.device)

    def add_scores(self, step: int, scores: dict[str, float]) -> dict[str, Any]:
        """Adds the scores of a validation to the record of step `step`, the newest one; returns them with the step."""
        if scores:
            scores = without_nonfinite(scores)
            self.log.extend(scores)
            self.say(f"validation at step {step}: {_recall(scores)}")
        return {"step": step, **scores}

    def close(self) -> None:
        with suppress(OSError):  # a run that ends with an error must end with that one
            self.log.close()


def without_nonfinite(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with null for each number that is not finite, which JSON has not; `not_finite` names them."""
    names = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**record, **dict.fromkeys(names), "not_finite": names} if names else record


def _recall(scores: dict[str, Any]) -> str:
    return ", ".join(
        f"{direction} " + " ".join(f"R@{k} {_number(scores[f'val_{direction}_r{k}'], '.3f')}" for k in (1, 5, 10))
        for direction in ("i2t", "t2i")
    )


def header(config: RunConfig, components: Components, world: World, threads: int) -> str:
    """Returns a run's numbers, printed before its first step."""
    towers, schedule, data = components.towers, config.schedule, components.loader.data
    epochs = data.epochs(schedule.samples)
    if len(epochs) > 1:
        names = [dataset.folder.name for dataset in data.datasets]
        of_datasets = f" of {format_count(len(epochs), 'dataset')}"
        epochs_text = ", ".join(f"{name} {count:.1f}" for name, count in zip(names, epochs, strict=True))
    else:
        of_datasets, epochs_text = "", f"{epochs[0]:.1f}"
    return (
        f"parameters: image {config.image.name} {_parameters(towers.image)} · text {config.text.name} "
        f"{_parameters(towers.text)} · embedding {config.embed_dim}\n"
        f"data {format_count(data.samples, 'sample')} in {format_count(len(data.sizes), 'shard')}{of_datasets} · "
        f"{format_count(schedule.samples, 'training sample')} (epochs: {epochs_text}) · "
        f"{format_count(schedule.steps, 'step')} of {schedule.global_batch}\n"
        f"{world} · {world.device.type} · precision {config.precision} · "
        f"ZeRO {config.runtime.zero} · {format_count(threads, 'thread')} · seed {config.seed}"
    )


def _parameters(tower: nn.Module) -> str:
    """Returns the number of parameters, and of trainable ones if some are frozen."""
    total, trainable = sum(p.numel() for p in tower.parameters()), parameter_count(tower)
    return f"{total:,}" if trainable == total else f"{total:,} ({trainable:,} trainable)"


def step_line(record: dict[str, Any], steps: int, eta_seconds: float) -> str:
    """Returns one line with fixed fields about a step, for people and grep."""
    fields = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {_number(record['loss'], '.4f')}",
        f"i2t acc {_number(record['acc_image'], '.2f')}",
        f"t2i acc {_number(record['acc_text'], '.2f')}",
        f"negatives {record['negatives']}",
        f"scale {_number(record.get('scale'), '.1f')}",
        f"lr {record['lr']:.2e}",
        f"grad norm {_number(record['grad_norm'], '.2f')}",
        f"samples/s {record['samples_per_s']:.0f}",
        f"data wait {record['data_share']:.0%}",
    ]
    for count in ("replaced", "skipped"):
        if record[count]:
            fields.append(f"{count} {record[count]}")
    fields.append(f"memory {record['memory_gb']:.1f} GB")
    if eta_seconds > 0:
        fields.append(f"eta {format_duration(eta_seconds)}")
    return "  ".join(fields)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


class Meter:
    """Measures speed between two logged steps, and makes a logged step's record."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart(0)

    def restart(self, step: int) -> None:
        """Starts the next interval after step `step`."""
        self._started, self._step, self.waited = time.perf_counter(), step, 0.0

    def record(self, step: int, samples: int, result: StepResult, **further: Any) -> dict[str, Any]:
        """Returns the record of step `step`, after `samples` samples."""
        seconds, steps = max(time.perf_counter() - self._started, 1e-9), step - self._step
        data_share = min(self.waited / seconds, 1.0)
        self.restart(step)
        return {
            "step": step,
            "samples": samples,
            **dataclasses.asdict(result),
            **further,
            "samples_per_s": samples / step * steps / seconds,
            "data_share": data_share,
            "memory_gb": peak_memory(self._device) / 2**30,
        }


def summary(run: Path, config: RunConfig, world: World, steps: int) -> Outcome:
    """Returns the outcome of a complete run."""
    lines = run_folder.read_log(run)
    if not lines:
        raise ClipwrightError(
            "E_INPUT",
            "the log of this finished run is empty",
            where=run / LOG,
            found="no line; the checkpoints are valid",
            fix=f"export it ({command_line('export', run, '-o', 'MODEL')}), or train again with --fresh",
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
    text = f"trained {format_count(result['samples'], 'sample')}: loss {losses}"
    return Outcome(result, text, next=command_line("export", run, "-o", "MODEL"))
