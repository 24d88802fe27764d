"""The ledger of a run: which samples each step trained on, one line per step.

A line has the step, its first position, the number of samples, and the sum of their hashed keys. The keys themselves
are a function of position; `data ledger RUN step=NUMBER` computes them again. Samples that replaced unreadable ones are
not a function of position, so the line lists them.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import command_line, format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.streams import print_warning
from clipwright.pipeline.data.batch_samples import (
    KEY_SUM_MODULUS,
    MAX_REPLACED,
    BadSampleLimit,
    BatchSamples,
    ReplacedSample,
    key_sum,
)
from clipwright.pipeline.data.datasets import DatasetEntry, Datasets
from clipwright.pipeline.distributed.group import World, all_gather_object, all_reduce_sum, broadcast_object
from clipwright.pipeline.folders.describe import describe, wrong_kind
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.rank_failure import RankFailure
from clipwright.pipeline.train.run_folder import LEDGER, StepFile

LIMBS = 4  # a 128-bit sum as numbers of 32 bits, whose sums over 2^31 ranks fit 64 bits


class Ledger:
    """Records each step's samples. Every rank has one and passes its part of each batch; rank 0 writes the file."""

    def __init__(self, run: Path, step: int, world: World, mode: Literal["sums", "keys"], failure: RankFailure) -> None:
        """failure: keeps an error of the operating system, until the run can save."""
        self.world, self.mode, self._failure = world, mode, failure
        self._file = StepFile(run / LEDGER, step) if world.is_rank0 else None
        earlier: Any = broadcast_object(_earlier_replacements(run / LEDGER, step) if world.is_rank0 else None)
        self.replaced, recent = earlier  # samples so far
        self._warned: set[str] = set()
        self._limit = BadSampleLimit()
        self._limit.add(recent)

    def add(self, step: int, position: int, own: BatchSamples) -> None:
        """Records step `step`, whose global batch started at `position`; every rank must call it.

        Once it is written, raises E_BAD_SAMPLES on all ranks if too many samples could not be read.
        """
        batch_samples = gather(own, self.world, keys=self.mode == "keys")
        count = len(own.keys) * self.world.size
        if self._file is not None:
            with self._failure.deferred():
                self._file.write(line(step, position, count, batch_samples, keys=self.mode == "keys"))
        self.replaced += len(batch_samples.replaced)
        self._warn(step, batch_samples.unreadable)
        self._limit.add(batch_samples.replaced)

    def _warn(self, step: int, unreadable: dict[str, str]) -> None:
        """Warns once per shard that cannot be read."""
        for shard, reason in unreadable.items():
            if self.world.is_rank0 and shard not in self._warned:
                print_warning(
                    f"{shard} cannot be read since step {step}: {reason}; its samples are replaced by others "
                    "and counted; restore it, and it is used again from the next start on"
                )
                self._warned.add(shard)

    def sync(self) -> None:
        if self._file is not None:
            with self._failure.deferred():
                self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a run that ends with an error must end with that one
                self._file.close()


def line(step: int, position: int, count: int, batch_samples: BatchSamples, *, keys: bool) -> dict[str, Any]:
    """Returns a step's object: at most 96 bytes as JSON if nothing was replaced and keys are not listed."""
    record: dict[str, Any] = {"step": step, "at": position, "count": count, "sum": f"{batch_samples.sum:032x}"}
    if batch_samples.replaced:
        record["replaced"] = [dataclasses.asdict(sample) for sample in batch_samples.replaced]
    if keys:
        record["keys"] = batch_samples.keys
    return record


def gather(own: BatchSamples, world: World, *, keys: bool) -> BatchSamples:
    """Returns the samples of all ranks; without `keys`, one small all-reduce of sums if nothing was replaced."""
    limbs = [own.sum >> 32 * i & 0xFFFFFFFF for i in range(LIMBS)]
    numbers = torch.tensor([*limbs, len(own.replaced)], dtype=torch.int64, device=world.device)
    *limb_sums, replaced = all_reduce_sum(numbers).tolist()
    parts = all_gather_object(own) if keys or replaced else [own]
    return merge(parts) if len(parts) == world.size else BatchSamples(sum=_from_limbs(limb_sums))


def merge(parts: list[BatchSamples]) -> BatchSamples:
    """Merges the samples of ranks 0, 1, … into those of the global batch, which they take in turn."""
    return BatchSamples(
        keys=[key for row in zip(*(part.keys for part in parts), strict=True) for key in row],
        replaced=sorted((sample for part in parts for sample in part.replaced), key=lambda sample: sample.at),
        sum=sum(part.sum for part in parts) % KEY_SUM_MODULUS,
        unreadable={shard: reason for part in reversed(parts) for shard, reason in part.unreadable.items()},
    )


def _from_limbs(limbs: Iterable[int]) -> int:
    return sum(limb << 32 * i for i, limb in enumerate(limbs)) % KEY_SUM_MODULUS


def _earlier_replacements(path: Path, step: int) -> tuple[int, list[ReplacedSample]]:
    """Returns how many samples were replaced in the `step` steps of a ledger, and the last of them."""
    recent: deque[ReplacedSample] = deque(maxlen=MAX_REPLACED)
    lines, count = 0, 0
    with path.open("rb") as file:
        for text in file:
            lines += 1
            if b'"replaced"' in text:
                replaced = json.loads(text)["replaced"]
                recent.extend(ReplacedSample(**sample) for sample in replaced)
                count += len(replaced)
    if lines != step:
        print_warning(
            f"{path} has {lines} of {format_count(step, 'step')}; samples replaced in the missing steps are not counted"
        )
    return count, list(recent)


@configclass
class LedgerConfig:
    """Which run, and which of its steps."""

    run: str
    """Run folder."""
    step: int | None = None
    """Step whose samples are listed; without one, all steps are counted."""
    train: str | list[DatasetEntry] | None = None
    """Where the training data is now, if it was moved."""


@dataclass(frozen=True)
class Sample:
    """A sample that a step trained on."""

    position: int
    key: str
    shard: str
    row: int


def show(call: Call) -> Outcome:
    """Runs `clipwright data ledger RUN step=NUMBER`."""
    config: LedgerConfig = call.load().value
    run = Path(config.run)
    if not run.is_dir() or describe(run).kind != "run":
        raise wrong_kind(run, "run")
    if not (run / LEDGER).is_file():
        raise ClipwrightError(
            "E_INPUT",
            "the run has no ledger",
            where=run / LEDGER,
            found="no such file",
            fix="give the -o folder of `train`",
        )
    if config.step is None:
        return _summary(run)
    record = next((record for record in run_folder.read_steps(run / LEDGER) if record["step"] == config.step), None)
    if record is None:
        raise ClipwrightError(
            "E_INPUT",
            "the ledger does not have this step",
            where=f"{run / LEDGER} step {config.step}",
            found="no such line",
            fix=f"see which steps it has: {command_line('data', 'ledger', run)}",
        )
    listed = samples(run, record, config.train)
    replaced = {sample["at"]: sample for sample in record.get("replaced", [])}
    lines = []
    for sample in listed:
        lines.append(f"{sample.position:>12}  {sample.key}  {sample.shard} row {sample.row}")
        if (unreadable := replaced.get(sample.position)) is not None:
            lines.append(f"{'':12}  instead of {unreadable['key']} in {unreadable['shard']}, {unreadable['reason']}")
    lines.append(
        f"step {record['step']}: {format_count(record['count'], 'sample')} from position {record['at']:,}, "
        "verified by key sum"
    )
    return Outcome({**record, "samples": [dataclasses.asdict(sample) for sample in listed]}, "\n".join(lines))


def samples(run: Path, record: dict[str, Any], train: str | list[DatasetEntry] | None = None) -> list[Sample]:
    """Returns the samples of a line of the ledger, located by position; E_DATA_HASH if their key sum differs."""
    tree = run_folder.stored_tree(run)
    assert tree is not None, run
    config = resolve(RunConfig, base=tree).value
    data = Datasets(config.data if train is None else dataclasses.replace(config.data, train=train))
    positions = np.arange(record["at"], record["at"] + record["count"])
    read_positions = positions.copy()
    for sample in record.get("replaced", []):
        read_positions[sample["at"] - record["at"]] = sample["by"]
    location = data.order(config.seed).locate(read_positions)
    columns = [column.tolist() for column in (positions, location.dataset, location.shard, location.row)]
    located = [
        Sample(position, data.datasets[number].rows(shard).key[row].decode(), data.shard_name(number, shard), row)
        for position, number, shard, row in zip(*columns, strict=True)
    ]
    if f"{key_sum(sample.key for sample in located):032x}" != record["sum"]:
        raise ClipwrightError(
            "E_DATA_HASH",
            "the dataset's samples do not match the ledger",
            where=run / LEDGER,
            found=f"at step {record['step']} the sum of their keys differs",
            fix="name the dataset that the run was trained on: train=DATASET",
        )
    return located


def _summary(run: Path) -> Outcome:
    steps, count = 0, 0
    reasons: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    for record in run_folder.read_steps(run / LEDGER):
        steps, count = steps + 1, count + record["count"]
        reasons.update(sample["reason"] for sample in record.get("replaced", []))
        shards.update(sample["shard"] for sample in record.get("replaced", []))
    result = {"steps": steps, "samples": count, "replaced": reasons.total(), "reasons": reasons, "shards": shards}
    lines = [f"{number:>8}  {name}" for name, number in [*reasons.most_common(), *shards.most_common(10)]]
    lines.append(
        f"{format_count(steps, 'step')}, {format_count(count, 'sample')}, {result['replaced']:,} of them "
        "replaced unreadable ones"
    )
    return Outcome(result, "\n".join(lines), next=command_line("data", "ledger", run, f"step={steps}"))
