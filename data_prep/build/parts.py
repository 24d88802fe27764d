"""One part of a preparation that a job array shares: the plan, a share of its hashing, or some of the shards.

Parts communicate only through files in the output folder, which must be on storage that all of them share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipwright.data_prep.build import prep_folder
from clipwright.data_prep.build.pack import (
    PrepConfig,
    load_or_make_plan,
    make_job,
    open_source,
    plugin_hashes,
    run_identity,
    start_pool,
    start_run,
    write_shards,
)
from clipwright.data_prep.build.plan import Job, hash_part
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.part import Part
from clipwright.pipeline.core.streams import print_note
from clipwright.pipeline.folders import output


@dataclass(frozen=True)
class PartDone:
    """The result of a part: its number of shards and what they hold. All zero if the dataset was already finished."""

    shards: int = 0
    samples: int = 0
    rejected: int = 0
    already_finished: bool = False


def prepare_part(resolved: Resolved[PrepConfig], folder: Path, *, fresh: bool = False, quiet: bool = False) -> PartDone:
    """Does the part of the work that `runtime.part` names, except for `finish`, which is `prepare`'s.

    A part may be run again on any machine; it writes only what is missing. If there is no plan, the first part makes
    it while the others wait. Raises the same errors as `prepare`.
    """
    config = resolved.value
    part = Part.read(config.runtime.part, planned=True)
    part.check(fresh=fresh)
    output.refuse_locked(folder, output.DATASET)
    source = open_source(config, folder=folder, quiet=quiet)
    identity = run_identity(resolved, source)
    prep_folder.finished(folder, identity)  # refuses the folder of another config before anything is written to it
    job = make_job(config, source, folder)
    with output.claim(folder, output.DATASET, part=f"{part.step}-{part.number}-of-{part.of}"):
        with prep_folder.in_turn(folder, lambda: _report_waiting(quiet)):
            if prep_folder.finished(folder, identity) is not None:
                output.release(folder, output.DATASET)
                return PartDone(already_finished=True)
            if not prep_folder.started(folder):
                start_run(resolved, folder, source, identity)
        return _run_part(job, config, part, plugin_hashes(resolved), quiet)


def _run_part(job: Job, config: PrepConfig, part: Part, plugins: list[tuple[str, str]], quiet: bool) -> PartDone:
    with start_pool(job, config, plugins) as pool:
        if part.step == "hash":
            if not job.source.distinct and job.source.keys() is None:
                hash_part(job, pool, part.share(job.source.count), quiet=quiet)
            return PartDone()
        with prep_folder.in_turn(job.folder, lambda: _report_waiting(quiet)):
            plan = load_or_make_plan(job, pool, quiet)
        shards = plan.shard_count(config.shards.samples)
        if part.step == "plan":
            return PartDone(shards)
        receipts = write_shards(job, config, pool, plan, part.share(shards), quiet)
    samples = sum(receipt["samples"] for receipt in receipts)
    rejected = sum(sum(receipt["rejects"].values()) for receipt in receipts)
    return PartDone(len(receipts), samples, rejected)


def _report_waiting(quiet: bool) -> None:
    if not quiet:
        print_note("prep: waiting for the part that makes the plan")
