"""The plan: which row leads a sample, which rows duplicate its image, and which rows go to which shard."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.build.engines import WorkerPool
from clipwright.data_prep.build.images import ImagesConfig
from clipwright.data_prep.sources.base import Record, Source
from clipwright.pipeline import pixels
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.folders.output import WORK
from clipwright.pipeline.folders.schema import parquet_bytes

DuplicatePolicy = Literal["merge", "first", "keep"]
ROWS_PER_TASK = 1024  # rows hashed by one task


@dataclass(frozen=True)
class Job:
    """What all shards of a run share. It is sent to each worker once."""

    source: Source
    images: ImagesConfig
    duplicates: DuplicatePolicy
    folder: Path
    name: str


@dataclass(frozen=True)
class ShardTask:
    """The leading rows of one shard and what the plan knows about them.

    `duplicate_rows` maps a leading row to the rows that duplicate its image. `copies` maps a row to its copy number,
    for the second and later rows of an image under `duplicates=keep`. `keys` holds the keys of the leading rows as
    they were when the plan was made, or None if the images were not hashed.
    """

    number: int
    rows: np.ndarray
    duplicate_rows: dict[int, list[int]]
    copies: dict[int, int]
    keys: list[str] | None


@dataclass(frozen=True)
class Plan:
    """The decision for each row.

    `keys` are the image keys (S32, empty for a row without an image), or None if the images were not hashed.
    `leaders` are the leading row of each row: its own number, or that of the first row with an equal image.
    `copies` are copy numbers, 0 for the first row of an image.
    """

    keys: np.ndarray | None
    leaders: np.ndarray
    copies: np.ndarray

    def tasks(self, shard_samples: int, numbers: Iterable[int]) -> Iterator[ShardTask]:
        """Yields the tasks of the shards `numbers`, each with `shard_samples` leading rows and their duplicates."""
        is_leader = self.leaders == np.arange(len(self.leaders))
        leading = np.flatnonzero(is_leader)
        duplicates = np.flatnonzero(~is_leader)
        duplicates = duplicates[np.argsort(self.leaders[duplicates], kind="stable")]
        leaders = self.leaders[duplicates]
        for number in numbers:
            rows = leading[number * shard_samples : (number + 1) * shard_samples]
            first, last = np.searchsorted(leaders, [rows[0], rows[-1] + 1])
            duplicate_rows: dict[int, list[int]] = {}
            for leader, row in zip(leaders[first:last].tolist(), duplicates[first:last].tolist(), strict=True):
                duplicate_rows.setdefault(leader, []).append(row)
            later_copies = rows[self.copies[rows] > 0]
            copies = dict(zip(later_copies.tolist(), self.copies[later_copies].tolist(), strict=True))
            keys = None if self.keys is None else [key.decode() for key in self.keys[rows].tolist()]
            yield ShardTask(number, rows, duplicate_rows, copies, keys)

    def shard_count(self, shard_samples: int) -> int:
        samples = int((self.leaders == np.arange(len(self.leaders))).sum())
        return -(-samples // shard_samples)

    def save(self, path: Path) -> None:
        assert self.keys is not None
        keys = pa.array([key.decode() or None for key in self.keys.tolist()], pa.string())
        rows = np.arange(len(self.leaders))
        table = pa.table({"row": rows, "key": keys, "head": self.leaders, "copy": self.copies})
        atomic_write(path, parquet_bytes(table))

    @staticmethod
    def load(path: Path) -> Plan:
        table = pq.read_table(path)
        keys = np.array([(key or "").encode() for key in table["key"].to_pylist()], dtype="S32")
        return Plan(keys, table["head"].to_numpy(), table["copy"].to_numpy())


def record_key(record: Record) -> str:
    """Returns the key of a row's image, or an empty string if the row has none."""
    if record.image is None:
        return ""
    if isinstance(record.image, bytes):
        return pixels.bytes_key(record.image)
    return pixels.pixel_key(record.image)


def hash_rows(job: Job, rows: range) -> tuple[int, list[str]]:
    """Returns the first of the consecutive `rows` and the keys of all of them."""
    return rows.start, [record_key(record) for record in job.source.read(rows)]


def make_plan(job: Job, pool: WorkerPool, *, quiet: bool = False) -> Plan:
    """Hashes all rows on `pool`, unless the source has hashed them, and resolves duplicate images."""
    count = job.source.count
    if job.source.distinct:
        return Plan(None, np.arange(count), np.zeros(count, dtype=np.int64))
    source_keys = job.source.keys()
    if source_keys is not None:
        return resolve_duplicates(source_keys, job.duplicates)
    keys = np.zeros(count, dtype="S32")
    hashed = np.zeros(count, dtype=bool)
    for path in (job.folder / WORK).glob("keys-*.npy"):
        part_keys = np.load(path, allow_pickle=False)
        start = int(path.stem.removeprefix("keys-"))
        stop = start + len(part_keys)
        keys[start:stop] = part_keys
        hashed[start:stop] = True
    missing = [rows for rows in _split(range(count)) if not hashed[rows.start : rows.stop].all()]
    for start, task_keys in _hash(job, pool, missing, quiet):
        keys[start : start + len(task_keys)] = task_keys
    return resolve_duplicates(keys, job.duplicates)


def hash_part(job: Job, pool: WorkerPool, rows: range, *, quiet: bool = False) -> None:
    """Hashes the rows of one job-array part and saves the keys for the process that makes the plan."""
    results = sorted(_hash(job, pool, list(_split(rows)), quiet))
    keys = np.array([key for _, task_keys in results for key in task_keys], dtype="S32")
    out = io.BytesIO()
    np.save(out, keys)
    atomic_write(job.folder / WORK / f"keys-{rows.start:012d}.npy", out.getvalue())


def resolve_duplicates(keys: np.ndarray, duplicates: DuplicatePolicy) -> Plan:
    """Groups rows with equal keys: the first one in plan order leads, or (`keep`) each gets a copy number."""
    rows = np.arange(len(keys))
    leaders = rows.copy()
    copies = np.zeros_like(rows)
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] != b""]
    if len(order):
        starts_group = np.r_[True, keys[order][1:] != keys[order][:-1]]
        group_start = np.flatnonzero(starts_group)[np.cumsum(starts_group) - 1]
        if duplicates == "keep":
            copies[order] = np.arange(len(order)) - group_start
        else:
            leaders[order] = order[group_start]
    return Plan(keys, leaders, copies)


def _split(rows: range) -> Iterator[range]:
    return (rows[start : start + ROWS_PER_TASK] for start in range(0, len(rows), ROWS_PER_TASK))


def _hash(job: Job, pool: WorkerPool, tasks: list[range], quiet: bool) -> Iterator[tuple[int, list[str]]]:
    with Progress("prep: plan", sum(map(len, tasks)), "row", quiet=quiet) as progress:
        for start, keys in pool.run(hash_rows, tasks):
            yield start, keys
            progress.add(len(keys))
