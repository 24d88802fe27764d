"""Preparation: source → plan → shards → finish. Writes a dataset folder from a source of image-text pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field

from clipwright.data_prep.build import prep_folder
from clipwright.data_prep.build.engines import WorkerPool, WorkerRuntime, worker_count
from clipwright.data_prep.build.finish import Contents, count_reasons, finish, no_samples, write_rejects
from clipwright.data_prep.build.images import ImagesConfig
from clipwright.data_prep.build.plan import ROWS_PER_TASK, DuplicatePolicy, Job, Plan, make_plan
from clipwright.data_prep.build.shards import read_receipt, rejects_path, write_shard
from clipwright.data_prep.sources.base import SOURCES, Source, SourceConfig
from clipwright.pipeline.core.activity import Progress, phase
from clipwright.pipeline.core.command import Call
from clipwright.pipeline.core.config import Choice, Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.part import Part
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.output import DATASET, PLAN, REJECTS, WORK
from clipwright.pipeline.folders.schema import REJECTS_SCHEMA


@configclass
class ShardsConfig:
    """The shards NAME-000000.tar, NAME-000001.tar, …"""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,40}$")] = "data"
    """Prefix of the shard file names."""
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Samples per shard."""


def _validated_part(text: str) -> str:
    Part.read(text, planned=True)
    return text


@configclass
class PrepRuntime(WorkerRuntime):
    """How preparation runs. Nothing here changes the result.

    In a job array, `part=K/N` writes the K-th of N parts of the shards, and `finish` joins them when all are done. The
    first part makes the plan. For large inputs `plan` makes it beforehand, after `plan/K/N` has hashed the K-th of N
    parts of the images.
    """

    part: Annotated[str, AfterValidator(_validated_part)] = ""
    """Job-array part to run: K/N, plan, plan/K/N or finish; empty does everything in one process."""


@configclass
class PrepConfig:
    """From image-text pairs to a dataset folder."""

    source: Annotated[SourceConfig, Choice(SOURCES)]
    """Where the pairs come from; `name` selects the source."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """How images are stored."""
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    """Name and size of the shards."""
    duplicates: DuplicatePolicy = "merge"
    """Rows with equal images: merge their captions into the first, keep only the first, or keep all (numbered keys)."""
    runtime: PrepRuntime = field(default_factory=PrepRuntime)
    """How preparation runs; not part of the dataset's identity."""


@dataclass(frozen=True)
class Prepared:
    """The result of a run: the manifest, whether an earlier run had finished it, and notes about unused input."""

    manifest: dict[str, Any]
    already_finished: bool
    notes: list[str]


def prepare(resolved: Resolved[PrepConfig], folder: Path, *, fresh: bool = False, quiet: bool = False) -> Prepared:
    """Writes the dataset folder that a config describes, or resumes an unfinished run of the same config.

    Shards, sidecars and manifest depend on input and config only, not on the number of workers. With
    `runtime.part=finish` the parts must have written all shards. Raises E_PREP_EMPTY if no sample could be written,
    E_UNFINISHED, E_RESUME, E_OUTPUT, E_LOCKED, E_WORKER, and the source's errors.
    """
    config = resolved.value
    output.refuse_locked(folder, DATASET)
    source = open_source(config, folder=None if fresh else folder, quiet=quiet)
    identity = run_identity(resolved, source)
    manifest = None if fresh else prep_folder.finished(folder, identity)
    if manifest is not None:
        return Prepared(manifest, True, list(source.notes))
    with output.claim(folder, DATASET, fresh=fresh):
        manifest = prep_folder.finished(folder, identity)  # by another process since
        if manifest is not None:
            return Prepared(manifest, True, list(source.notes))
        start_run(resolved, folder, source, identity)
        job = make_job(config, source, folder)
        receipts = _write_all_shards(job, config, plugin_hashes(resolved), quiet)
        manifest = _finish(job, config, identity, receipts)
        output.release(folder, DATASET)
    return Prepared(manifest, False, list(source.notes))


def open_source(config: PrepConfig, *, folder: Path | None = None, quiet: bool = False) -> Source:
    """Opens and scans the source that a config names. Raises E_PREP_EMPTY if it has no rows.

    If an unfinished run in the output `folder` has scanned the same files, its scan is used.
    """
    phase("opening the source")
    source = SOURCES.build(config.source)
    if source.count == 0:
        raise ClipwrightError(
            "E_PREP_EMPTY",
            "the input has no rows",
            where=f"source {config.source.name}",
            found="0 rows, possibly after source.where",
            fix="check source.path and source.where",
        )
    saved_scan = None if folder is None else folder / WORK / prep_folder.SCAN
    reused = False
    if saved_scan is not None and saved_scan.is_file():
        reused = source.load_scan(json.loads(saved_scan.read_text(encoding="utf-8")))
    if not reused:
        source.scan(quiet=quiet)
    return source


def check_inputs(call: Call, resolved: Resolved[PrepConfig]) -> None:
    """Raises what `prep` would raise for its source and its output folder, without reading all of the source."""
    SOURCES.build(resolved.value.source)
    output.check(call.output(), DATASET)


def run_identity(resolved: Resolved[PrepConfig], source: Source) -> dict[str, Any]:
    """Returns the config as identity: without `runtime`, and files by name and content hash."""
    identity = {**resolved.identity(), "source": source.identity()}
    return json.loads(json.dumps(identity, default=str))  # YAML reads dates in source.where; JSON has none


def start_run(resolved: Resolved[PrepConfig], folder: Path, source: Source, identity: dict[str, Any]) -> None:
    """Records the run's identity, and the scan of its source, in the folder."""
    prep_folder.start(folder, identity, resolved.yaml())
    scan = source.scan_result()
    if scan is not None:
        write_json(folder / WORK / prep_folder.SCAN, scan)


def make_job(config: PrepConfig, source: Source, folder: Path) -> Job:
    return Job(source, config.images, config.duplicates, folder, config.shards.name)


def plugin_hashes(resolved: Resolved[PrepConfig]) -> list[tuple[str, str]]:
    """Returns (path, sha256) of each plugin the config names."""
    paths = resolved.tree.get("plugins", [])
    return [(path, plugin["sha256"]) for path, plugin in zip(paths, resolved.plugins, strict=True)]


def start_pool(job: Job, config: PrepConfig, plugins: list[tuple[str, str]]) -> WorkerPool:
    shard_tasks = -(-job.source.count // config.shards.samples)
    hash_tasks = 1 if job.source.distinct else -(-job.source.count // ROWS_PER_TASK)
    workers = worker_count(config.runtime.workers, max(shard_tasks, hash_tasks))
    return WorkerPool(workers, job, plugins)


def load_or_make_plan(job: Job, pool: WorkerPool, quiet: bool) -> Plan:
    """Returns the plan; makes and saves it if the folder has none."""
    if job.source.distinct:
        return make_plan(job, pool)
    path = job.folder / PLAN
    if path.is_file():
        return Plan.load(path)
    plan = make_plan(job, pool, quiet=quiet)
    plan.save(path)
    return plan


def write_shards(
    job: Job, config: PrepConfig, pool: WorkerPool, plan: Plan, numbers: range, quiet: bool
) -> list[dict[str, Any]]:
    """Writes those of the shards `numbers` that are missing. Returns the receipts of all `numbers`, in order."""
    shard_samples = config.shards.samples
    receipts: dict[int, dict[str, Any]] = {}
    for number in numbers:
        receipt = read_receipt(job.folder, number)
        if receipt is not None:
            receipts[number] = receipt
    tasks = plan.tasks(shard_samples, [number for number in numbers if number not in receipts])
    rows_done = sum(map(_rows_covered, receipts.values()))
    # For one part of a job array, its share of all rows is an estimate.
    rows = round(job.source.count * len(numbers) / max(plan.shard_count(shard_samples), 1))
    with Progress("prep", rows, "row", quiet=quiet, already_done=rows_done) as progress:
        for receipt in pool.run(write_shard, tasks):
            receipts[receipt["shard"]] = receipt
            rejected = sum(receipt["rejects"].values()) - receipt["merged"]
            progress.add(_rows_covered(receipt), rejected)
    return [receipts[number] for number in sorted(receipts)]


def _write_all_shards(
    job: Job, config: PrepConfig, plugins: list[tuple[str, str]], quiet: bool
) -> list[dict[str, Any]]:
    with start_pool(job, config, plugins) as pool:
        plan = load_or_make_plan(job, pool, quiet)
        numbers = range(plan.shard_count(config.shards.samples))
        if config.runtime.part == "finish":
            _require_shards(job, numbers)
        return write_shards(job, config, pool, plan, numbers, quiet)


def _require_shards(job: Job, numbers: range) -> None:
    """Raises E_UNFINISHED unless all shards are written."""
    missing = [number for number in numbers if read_receipt(job.folder, number) is None]
    if missing:
        listed = ", ".join(map(str, missing[:6]))
        if len(missing) > 6:
            listed += ", …"
        raise ClipwrightError(
            "E_UNFINISHED",
            "some parts are missing or did not finish",
            where=job.folder,
            found=f"{len(missing)} of {format_count(len(numbers), 'shard')} not written: {listed}",
            fix="run the parts again (they write only what is missing), or leave out runtime.part to write them here",
        )


def _rows_covered(receipt: dict[str, Any]) -> int:
    """Returns how many plan rows a shard accounts for."""
    return receipt["samples"] + sum(receipt["rejects"].values())


def _finish(job: Job, config: PrepConfig, identity: dict[str, Any], receipts: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the shards' rejects and finishes the dataset. Raises E_PREP_EMPTY if no shard has a sample."""
    tables = [pq.read_table(rejects_path(job.folder, receipt["shard"])) for receipt in receipts]
    rejects = pa.concat_tables(tables).sort_by("row").cast(REJECTS_SCHEMA)
    shards = [receipt for receipt in receipts if receipt["samples"]]
    if not shards:
        write_rejects(job.folder, rejects)
        output.release(job.folder, DATASET)  # so that a run with the corrected input is not refused as another config
        fix = "look at the rejects, correct the input or the column names, and run again"
        if set(count_reasons(rejects)) == {"E_CAP_EMPTY"}:
            fix = "to prepare the images without captions, add source.caption=none; else correct the captions"
        raise no_samples(job.folder / REJECTS, rejects, fix=fix)
    contents = Contents(
        name=config.shards.name,
        rows_in=job.source.count,
        shards=shards,
        rejects=rejects,
        captions_dropped=sum(receipt["captions_dropped"] for receipt in receipts),
        blank=[key for receipt in receipts for key in receipt["blank"]],
        identity=identity,
    )
    return finish(job.folder, contents)
