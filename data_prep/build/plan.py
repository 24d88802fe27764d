"""The plan: which row leads a sample, which rows are its twins, and which rows go to which shard."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.build.engines import Engine
from clipwright.data_prep.build.images import ImagesConfig
from clipwright.data_prep.sources.base import Record, Source
from clipwright.pipeline import pixels
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.log import Progress

Duplicates = Literal["merge", "first", "keep"]
WORK = ".prep"  # what a run keeps in its output until it has finished
CHUNK = 1024  # rows hashed by one task


@dataclass(frozen=True)
class Job:
    """What all shards of a run share; it travels to the workers once."""

    source: Source
    images: ImagesConfig
    duplicates: Duplicates
    folder: Path
    name: str


@dataclass(frozen=True)
class ShardTask:
    """The rows that lead the samples of one shard, their twins by leading row, and what the plan knows of them.

    `copies`: row → number of the copy, for second and later rows of an image that are kept. `keys`: keys of the
    leading rows as they were when the plan was made, or None where they were not looked at.
    """

    number: int
    rows: np.ndarray
    twins: dict[int, list[int]]
    copies: dict[int, int]
    keys: list[str] | None


@dataclass(frozen=True)
class Plan:
    """For each row: its key (S32, empty when it has no image; None when not looked at), leading row, copy number."""

    keys: np.ndarray | None
    heads: np.ndarray
    copies: np.ndarray

    def tasks(self, samples: int, numbers: Iterable[int]) -> Iterator[ShardTask]:
        """The shards `numbers`, of `samples` leading rows each; twins go where their leading row goes."""
        rows = np.arange(len(self.heads))
        leading = np.flatnonzero(self.heads == rows)
        following = np.flatnonzero(self.heads != rows)
        following = following[np.argsort(self.heads[following], kind="stable")]
        of = self.heads[following]
        for number in numbers:
            mine = leading[number * samples : (number + 1) * samples]
            first, last = np.searchsorted(of, [mine[0], mine[-1] + 1])
            twins: dict[int, list[int]] = {}
            for head, row in zip(of[first:last].tolist(), following[first:last].tolist(), strict=True):
                twins.setdefault(head, []).append(row)
            again = mine[self.copies[mine] > 0]
            copies = dict(zip(again.tolist(), self.copies[again].tolist(), strict=True))
            keys = None if self.keys is None else [key.decode() for key in self.keys[mine].tolist()]
            yield ShardTask(number, mine, twins, copies, keys)

    def shards(self, samples: int) -> int:
        return -(-int((self.heads == np.arange(len(self.heads))).sum()) // samples)

    def save(self, path: Path) -> None:
        assert self.keys is not None
        names = pa.array([key.decode() or None for key in self.keys.tolist()], pa.string())
        table = pa.table({"row": np.arange(len(self.heads)), "key": names, "head": self.heads, "copy": self.copies})
        out = io.BytesIO()
        pq.write_table(table, out, compression="zstd")
        atomic_write(path, out.getvalue())

    @staticmethod
    def load(path: Path) -> Plan:
        table = pq.read_table(path)
        keys = np.array([(key or "").encode() for key in table["key"].to_pylist()], dtype="S32")
        return Plan(keys, table["head"].to_numpy(), table["copy"].to_numpy())


def record_key(record: Record) -> str:
    """The key of a row's image, or an empty string when it has none."""
    if record.image is None:
        return ""
    return pixels.bytes_key(record.image) if isinstance(record.image, bytes) else pixels.pixel_key(record.image)


def hash_rows(job: Job, rows: range) -> tuple[int, list[str]]:
    """Where a stretch of rows starts, and the keys of its rows."""
    return rows.start, [record_key(record) for record in job.source.read(rows)]


def make_plan(job: Job, engine: Engine, *, quiet: bool = False) -> Plan:
    """Hashes all rows on `engine`, where the source has not, and decides what to do with equal images."""
    count = job.source.count
    if job.source.distinct:
        return Plan(None, np.arange(count), np.zeros(count, dtype=np.int64))
    if (known := job.source.keys()) is not None:
        return decide(known, job.duplicates)
    keys, there = np.zeros(count, dtype="S32"), np.zeros(count, dtype=bool)
    for path in (job.folder / WORK).glob("keys-*.npy"):
        share = np.load(path, allow_pickle=False)
        start = int(path.stem.removeprefix("keys-"))
        keys[start : start + len(share)], there[start : start + len(share)] = share, True
    todo = [rows for rows in chunks(range(count)) if not there[rows.start : rows.stop].all()]
    for start, found in _hash(job, engine, todo, quiet):
        keys[start : start + len(found)] = found
    return decide(keys, job.duplicates)


def hash_share(job: Job, engine: Engine, rows: range, *, quiet: bool = False) -> None:
    """Hashes some of the rows for the plan that another process will make."""
    found = [keys for _, keys in sorted(_hash(job, engine, list(chunks(rows)), quiet))]
    share = np.array([key for keys in found for key in keys], dtype="S32")
    out = io.BytesIO()
    np.save(out, share)
    atomic_write(job.folder / WORK / f"keys-{rows.start:012d}.npy", out.getvalue())


def chunks(rows: range) -> Iterator[range]:
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def _hash(job: Job, engine: Engine, todo: list[range], quiet: bool) -> Iterator[tuple[int, list[str]]]:
    with Progress("prep: plan", sum(map(len, todo)), "rows", quiet=quiet) as progress:
        for start, found in engine.run(hash_rows, todo):
            yield start, found
            progress.add(len(found))


def decide(keys: np.ndarray, duplicates: Duplicates) -> Plan:
    """Equal keys in plan order: the first leads and the others follow it, or each is a numbered copy (keep)."""
    rows = np.arange(len(keys))
    heads, copies = rows.copy(), np.zeros_like(rows)
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] != b""]
    if len(order):
        starts = np.r_[True, keys[order][1:] != keys[order][:-1]]
        first = np.flatnonzero(starts)[np.cumsum(starts) - 1]
        if duplicates == "keep":
            copies[order] = np.arange(len(order)) - first
        else:
            heads[order] = order[first]
    return Plan(keys, heads, copies)
