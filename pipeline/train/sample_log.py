"""The ledger of a run: which samples each step trained on, in a line a step.

A line holds the step, its first position, how many samples, and the sum of their keys' hashes; the keys themselves
are a function of position, computed again by `data ledger RUN step=NUMBER`. What a function of position cannot know,
the samples that took the place of unreadable ones, is written out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
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
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.run_folder import LEDGER, StepFile

LIMBS = 4  # of 32 bits each: their sums over 2^31 ranks fit 64


class Ledger:
    """Every rank holds one and tells it its part of each batch; the first writes what they say together."""

    def __init__(self, run: Path, step: int, world: World, mode: Literal["sums", "keys"]) -> None:
        self.world, self.mode = world, mode
        self._file = StepFile(run / LEDGER, step) if world.is_rank0 else None
        past: Any = broadcast_object(_past(run / LEDGER, step) if world.is_rank0 else None)
        self.replaced, recent = past  # samples so far
        self._watch = BadSampleLimit()
        self._watch.add(recent)

    def add(self, step: int, position: int, mine: BatchSamples) -> None:
        """Step `step`, whose global batch began at `position`; every rank must call.

        E_BAD_SAMPLES on all ranks where too many samples could not be read, once that is written.
        """
        batch_samples = gather(mine, self.world, keys=self.mode == "keys")
        count = len(mine.keys) * self.world.size
        if self._file is not None:
            self._file.write(line(step, position, count, batch_samples, keys=self.mode == "keys"))
        self.replaced += len(batch_samples.replaced)
        self._watch.add(batch_samples.replaced)

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def line(step: int, position: int, count: int, batch_samples: BatchSamples, *, keys: bool) -> dict[str, Any]:
    """A step's object: at most 96 bytes a line where nothing was replaced and keys are not asked for."""
    record: dict[str, Any] = {"step": step, "at": position, "count": count, "sum": f"{batch_samples.sum:032x}"}
    if batch_samples.replaced:
        record["replaced"] = [dataclasses.asdict(one) for one in batch_samples.replaced]
    return record | ({"keys": batch_samples.keys} if keys else {})


def gather(mine: BatchSamples, world: World, *, keys: bool) -> BatchSamples:
    """All ranks' tallies as one; without `keys`, one small sum where nothing was replaced."""
    limbs = [mine.sum >> 32 * i & 0xFFFFFFFF for i in range(LIMBS)]
    told = all_reduce_sum(torch.tensor([*limbs, len(mine.replaced)], dtype=torch.int64, device=world.device)).tolist()
    parts = all_gather_object(mine) if keys or told[-1] else [mine]
    return merge(parts) if len(parts) == world.size else BatchSamples(sum=_from_limbs(told[:-1]))


def merge(parts: list[BatchSamples]) -> BatchSamples:
    """The tallies of ranks 0, 1, … as that of the global batch, whose samples they take in turn."""
    return BatchSamples(
        keys=[key for row in zip(*(part.keys for part in parts), strict=True) for key in row],
        replaced=sorted((one for part in parts for one in part.replaced), key=lambda one: one.at),
        sum=sum(part.sum for part in parts) % KEY_SUM_MODULUS,
    )


def _from_limbs(limbs: Iterable[int]) -> int:
    return sum(limb << 32 * i for i, limb in enumerate(limbs)) % KEY_SUM_MODULUS


def _past(path: Path, step: int) -> tuple[int, list[ReplacedSample]]:
    """How many were replaced in the steps of a ledger that was cut back to `step`, and the last of them."""
    recent: deque[ReplacedSample] = deque(maxlen=MAX_REPLACED)
    lines, count = 0, 0
    with path.open("rb") as file:
        for lines, text in enumerate(file, 1):  # noqa: B007
            if b'"replaced"' in text:
                found = json.loads(text)["replaced"]
                recent.extend(ReplacedSample(**one) for one in found)
                count += len(found)
    if lines != step:
        print(f"warning: {path} knows {lines} of {step} steps: samples they replaced are not counted", file=sys.stderr)
    return count, list(recent)


@configclass
class LedgerConfig:
    """A run, and a step of it; without one all are counted. `train`: where the dataset lies, if it was moved."""

    run: str
    step: int | None = None
    train: str | list[DatasetEntry] | None = None


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
    if not (run / LEDGER).is_file():
        raise ClipwrightError(
            "E_INPUT", "a run without a ledger", where=run / LEDGER, found="no such file", fix="give the -o of `train`"
        )
    if config.step is None:
        return _summary(run)
    record = next((found for found in run_folder.read_steps(run / LEDGER) if found["step"] == config.step), None)
    if record is None:
        raise ClipwrightError(
            "E_INPUT",
            "a step that the ledger does not know",
            where=f"{run / LEDGER} step {config.step}",
            found="no such line",
            fix=f"see which there are: clipwright data ledger {run}",
        )
    found = samples(run, record, config.train)
    instead = {one["at"]: one for one in record.get("replaced", [])}
    lines = [f"{one.position:>12}  {one.key}  {one.shard} row {one.row}{_why(instead, one)}" for one in found]
    text = f"step {record['step']}: {record['count']} samples from position {record['at']:,}; their sum is the ledger's"
    result = {**record, "samples": [dataclasses.asdict(one) for one in found]}
    return Outcome(result, "\n".join([*lines, text]))


def samples(run: Path, record: dict[str, Any], train: str | list[DatasetEntry] | None = None) -> list[Sample]:
    """The samples of a line of the ledger, found again by position; E_DATA_HASH when they do not add up to its sum."""
    tree = run_folder.stored_tree(run)
    assert tree is not None, run
    config = resolve(RunConfig, base=tree).value
    data = Datasets(config.data if train is None else dataclasses.replace(config.data, train=train))
    positions = np.arange(record["at"], record["at"] + record["count"])
    taken = positions.copy()
    for one in record.get("replaced", []):
        taken[one["at"] - record["at"]] = one["by"]
    place = data.order(config.seed).locate(taken)
    found = []
    for position, number, shard, row in zip(
        *(column.tolist() for column in (positions, place.dataset, place.shard, place.row)), strict=True
    ):
        part = data.datasets[number]
        found.append(Sample(position, part.rows(shard).key[row].decode(), data.shard_name(number, shard), row))
    if f"{key_sum(one.key for one in found):032x}" != record["sum"]:
        raise ClipwrightError(
            "E_DATA_HASH",
            "samples that are not those of the ledger",
            where=run / LEDGER,
            found=f"at step {record['step']} their keys do not add up to its sum",
            fix="name the dataset that the run was trained on: train=DATASET",
        )
    return found


def _why(instead: dict[int, dict[str, Any]], one: Sample) -> str:
    if one.position not in instead:
        return ""
    bad = instead[one.position]
    return f"  instead of {bad['key']} in {bad['shard']} ({bad['reason']})"


def _summary(run: Path) -> Outcome:
    steps, count = 0, 0
    reasons: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    for record in run_folder.read_steps(run / LEDGER):
        steps, count = steps + 1, count + record["count"]
        reasons.update(one["reason"] for one in record.get("replaced", []))
        shards.update(one["shard"] for one in record.get("replaced", []))
    result = {"steps": steps, "samples": count, "replaced": reasons.total(), "reasons": reasons, "shards": shards}
    lines = [f"{number:>8}  {name}" for name, number in [*reasons.most_common(), *shards.most_common(10)]]
    told = f"{steps:,} steps, {count:,} samples, {result['replaced']:,} of them in the place of unreadable ones"
    return Outcome(result, "\n".join([*lines, told]), next=f"clipwright data ledger {run} step={steps}")
