"""Preparation: plan → engine → shards → finish, from a source of pairs to a dataset folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field

from clipwright.data_prep.build import output
from clipwright.data_prep.build.engines import Engine, workers_for
from clipwright.data_prep.build.images import ImagesConfig
from clipwright.data_prep.build.plan import CHUNK, WORK, Duplicates, Job, Plan, make_plan
from clipwright.data_prep.build.shards import REJECTS, read_receipt, rejects_path, write_shard
from clipwright.data_prep.sources.base import SOURCES, Source, SourceConfig
from clipwright.pipeline.core.config import Choice, Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, write_json
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.part import Part
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.records import DatasetFingerprint, file_entries, write_manifest


@configclass
class ShardsConfig:
    """Shards NAME-000000.tar, NAME-000001.tar, … of so many samples each."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,40}$")] = "data"
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 1000


@configclass
class RuntimeConfig:
    """How a run is carried out, which changes nothing about its result. `workers: 0` takes one a core."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 0


def _checked_part(text: str) -> str:
    Part.read(text, planned=True)
    return text


@configclass
class PrepRuntime(RuntimeConfig):
    """`part`: what of the work this process does, where a job array shares it; all of it without.

    `plan` decides what goes where, `plan/K/N` hashes a share of the images for it, `K/N` writes the K-th of N parts of
    the shards, and `finish` joins them. Only `finish` is needed beside the parts: the first of them plans.
    """

    part: Annotated[str, AfterValidator(_checked_part)] = ""


@configclass
class PrepConfig:
    """From pairs to a dataset folder.

    `duplicates` says what becomes of rows with equal image bytes: `merge` gives the first all captions, `first` drops
    the others, `keep` keeps all under numbered keys.
    """

    source: Annotated[SourceConfig, Choice(SOURCES)]
    images: ImagesConfig = field(default_factory=ImagesConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    duplicates: Duplicates = "merge"
    runtime: PrepRuntime = field(default_factory=PrepRuntime)


@dataclass(frozen=True)
class Prepared:
    """What a run gives back: its manifest, whether the folder was finished before, lines about unused input."""

    manifest: dict[str, Any]
    already: bool
    notes: list[str]


def open_source(config: PrepConfig, *, folder: Path | None = None, quiet: bool = False) -> Source:
    """The source a config names, scanned; E_PREP_EMPTY when it has no row.

    Where an unfinished run of the output `folder` has scanned the same files, its scan is taken.
    """
    source = SOURCES.build(config.source)
    if source.count == 0:
        raise ClipwrightError(
            "E_PREP_EMPTY",
            "no rows",
            where=f"source {config.source.name}",
            found="the input has 0 rows, or source.where leaves none",
            fix="check source.path and source.where",
        )
    known = None if folder is None else folder / WORK / output.SCAN
    if known is None or not known.is_file() or not source.recall(json.loads(known.read_text(encoding="utf-8"))):
        source.scan(quiet=quiet)
    return source


def identity_of(resolved: Resolved[PrepConfig], source: Source) -> dict[str, Any]:
    """The config as identity: no runtime, files by name and content."""
    identity = {**resolved.identity(), "source": source.identity()}
    return json.loads(json.dumps(identity, default=str))  # a date in `where` is a date to YAML, not to JSON


def prepare(resolved: Resolved[PrepConfig], folder: Path, *, fresh: bool = False, quiet: bool = False) -> Prepared:
    """Writes the dataset folder that a config describes, or goes on where an earlier run of it stopped.

    Shards, sidecars and manifest depend on input and config alone, not on workers. With `runtime.part=finish` the
    shards must have been written by parts. Raises ClipwrightError: E_PREP_EMPTY when no sample could be written,
    E_UNFINISHED, E_RESUME, E_OUTPUT, E_WORKER, and what the source raises.
    """
    config = resolved.value
    source = open_source(config, folder=None if fresh else folder, quiet=quiet)
    identity = identity_of(resolved, source)
    if fresh:
        output.clear(folder)
    if (manifest := output.finished(folder, identity)) is not None:
        return Prepared(manifest, True, list(source.notes))
    with output.claim(folder):
        begin(resolved, folder, source, identity)
        job = job_of(config, source, folder)
        receipts = _run(job, config, plugins_of(resolved), quiet)
        manifest = _finish(job, config, identity, receipts)
        output.release(folder)
    return Prepared(manifest, False, list(source.notes))


def begin(resolved: Resolved[PrepConfig], folder: Path, source: Source, identity: dict[str, Any]) -> None:
    """Notes in the folder what this run is, and what it found in its source."""
    output.start(folder, identity, resolved.yaml())
    if (found := source.scanned()) is not None:
        write_json(folder / WORK / output.SCAN, found)


def job_of(config: PrepConfig, source: Source, folder: Path) -> Job:
    return Job(source, config.images, config.duplicates, folder, config.shards.name)


def plugins_of(resolved: Resolved[PrepConfig]) -> list[tuple[str, str]]:
    return [
        (path, plugin["sha256"])
        for path, plugin in zip(resolved.tree.get("plugins", []), resolved.plugins, strict=True)
    ]


def _run(job: Job, config: PrepConfig, plugins: list[tuple[str, str]], quiet: bool) -> list[dict[str, Any]]:
    """Plans, then writes the shards that are not there yet; the receipts of all, in order."""
    with pool(job, config, plugins) as engine:
        plan = planned(job, engine, quiet)
        numbers = range(plan.shards(config.shards.samples))
        if config.runtime.part == "finish":
            require_shards(job, numbers)
        return write_shards(job, config, engine, plan, numbers, quiet)


def pool(job: Job, config: PrepConfig, plugins: list[tuple[str, str]]) -> Engine:
    most = max(
        -(-job.source.count // config.shards.samples), 1 if job.source.distinct else -(-job.source.count // CHUNK)
    )
    return Engine(workers_for(config.runtime.workers, most), job, plugins)


def write_shards(
    job: Job, config: PrepConfig, engine: Engine, plan: Plan, numbers: range, quiet: bool
) -> list[dict[str, Any]]:
    """Writes those of the shards `numbers` that are not there yet; the receipts of them all, in order."""
    size = config.shards.samples
    receipts: dict[int, dict[str, Any]] = {}
    for number in numbers:
        if (receipt := read_receipt(job.folder, number)) is not None:
            receipts[number] = receipt
    todo = plan.tasks(size, [number for number in numbers if number not in receipts])
    begun = sum(map(_rows, receipts.values()))
    rows = round(job.source.count * len(numbers) / max(plan.shards(size), 1))  # of a part, about
    with Progress("prep", rows, "rows", quiet=quiet, already_done=begun) as progress:
        for receipt in engine.run(write_shard, todo):
            receipts[receipt["shard"]] = receipt
            progress.add(_rows(receipt), sum(receipt["rejects"].values()) - receipt["merged"])
    return [receipts[number] for number in sorted(receipts)]


def require_shards(job: Job, numbers: range) -> None:
    """E_UNFINISHED unless all shards are written."""
    missing = [number for number in numbers if read_receipt(job.folder, number) is None]
    if missing:
        some = ", ".join(map(str, missing[:6])) + (", …" if len(missing) > 6 else "")
        raise ClipwrightError(
            "E_UNFINISHED",
            "parts that are missing or did not finish",
            where=job.folder,
            found=f"{len(missing)} of {len(numbers)} shards are not written: {some}",
            fix="run the parts again (they write only what is missing), or leave runtime.part out to write it here",
        )


def _rows(receipt: dict[str, Any]) -> int:
    """How many rows of the plan a shard accounts for."""
    return receipt["samples"] + sum(receipt["rejects"].values())


def planned(job: Job, engine: Engine, quiet: bool) -> Plan:
    """The plan, made and written down where it is not there yet."""
    if job.source.distinct:
        return make_plan(job, engine)
    path = job.folder / output.PLAN
    if path.is_file():
        return Plan.load(path)
    plan = make_plan(job, engine, quiet=quiet)
    plan.save(path)
    return plan


def _finish(job: Job, config: PrepConfig, identity: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the rejects, checks that every row stands exactly once, fingerprints, and writes the manifest last."""
    rejects = pa.concat_tables([pq.read_table(rejects_path(job.folder, r["shard"])) for r in receipts])
    rejects = rejects.sort_by("row")
    sink = pa.BufferOutputStream()
    pq.write_table(rejects.cast(REJECTS), sink, compression="zstd")
    atomic_write(job.folder / output.REJECTS, sink.getvalue().to_pybytes())
    reasons = Counter(rejects["reason"].to_pylist())
    written, merged = sum(r["samples"] for r in receipts), reasons.get("merged", 0)
    if written == 0:
        raise _empty(job, reasons, rejects)
    shards = [r for r in receipts if r["samples"]]
    fingerprint = DatasetFingerprint()
    seen = np.zeros(job.source.count, dtype=np.int64)
    np.add.at(seen, rejects["row"].to_numpy(), 1)
    for sidecar in _sidecars(job.folder, shards, fingerprint):
        np.add.at(seen, sidecar, 1)
    assert (seen == 1).all(), "a plan row that stands not exactly once"
    names = ("sidecar", "sidecar_bytes", "sidecar_sha256", "tar", "tar_bytes", "tar_sha256", "samples")
    others = [name for name in (output.PLAN, output.REJECTS) if (job.folder / name).is_file()]
    body = {
        "name": config.shards.name,
        "shards": [{name: shard[name] for name in names} for shard in shards],
        "rows_in": job.source.count,
        "written": written,
        "merged": merged,
        "rejected": rejects.num_rows - merged,
        "rejects": dict(sorted((reason, n) for reason, n in reasons.items() if reason != "merged")),
        "captions": sum(r["captions"] for r in receipts),
        "captions_dropped": sum(r["captions_dropped"] for r in receipts),
        "files": file_entries(job.folder, others),
        "identity": identity,
    }
    return write_manifest(job.folder, "dataset", fingerprint.hexdigest(), body)


def _sidecars(folder: Path, shards: list[dict[str, Any]], fingerprint: DatasetFingerprint) -> Iterator[np.ndarray]:
    """Feeds each sidecar to the fingerprint and gives its plan rows."""
    for shard in shards:
        table = pq.read_table(folder / shard["sidecar"], columns=["row", "key", "sha256", "captions"])
        columns = (table[name].to_pylist() for name in ("key", "sha256", "captions"))
        for key, sha256, captions in zip(*columns, strict=True):
            fingerprint.sample(key, sha256, captions)
        fingerprint.shard(shard["samples"])
        yield table["row"].to_numpy()


def _empty(job: Job, reasons: Counter[str], rejects: pa.Table) -> ClipwrightError:
    first = rejects.slice(0, 1).to_pylist()[0]
    counts = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
    # So that the mended input is not held against this run.
    output.release(job.folder)
    return ClipwrightError(
        "E_PREP_EMPTY",
        "no sample could be written",
        where=job.folder / output.REJECTS,
        found=f"{job.source.count} rows: {counts}; the first is {first['source']}: {first['detail']}",
        fix="look at the rejects, mend the input or the column names, and run again",
    )
