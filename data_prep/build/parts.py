"""One part of a preparation that a job array shares: the plan, a share of its hashing, or some of the shards.

Parts meet only in the output folder, which all of them see: what one has written, another finds there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from clipwright.data_prep.build import output
from clipwright.data_prep.build.pack import (
    PrepConfig,
    begin,
    identity_of,
    job_of,
    open_source,
    planned,
    plugins_of,
    pool,
    write_shards,
)
from clipwright.data_prep.build.plan import Job, hash_share
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.part import Part


@dataclass(frozen=True)
class PartDone:
    """What a part did: how many shards are its own and what is in them; of a folder that is finished, nothing."""

    shards: int = 0
    samples: int = 0
    rejected: int = 0
    already: bool = False


def prepare_part(resolved: Resolved[PrepConfig], folder: Path, *, fresh: bool = False, quiet: bool = False) -> PartDone:
    """Does the part of the work that `runtime.part` names; `finish` is `prepare`'s own.

    A part may be run again, on any machine: it writes what is missing. Without a plan the first part makes it and the
    others wait. Raises what `prepare` does.
    """
    config, part = resolved.value, Part.read(resolved.value.runtime.part, planned=True)
    part.check(fresh=fresh)
    source = open_source(config, folder=folder, quiet=quiet)
    identity = identity_of(resolved, source)
    output.finished(folder, identity)  # refuses a folder of another making before anything is written there
    job = job_of(config, source, folder)
    with output.claim_part(folder, f"{part.step}-{part.number}-of-{part.of}"):
        with output.in_turn(folder, lambda: _waiting(quiet)):
            if output.finished(folder, identity) is not None:
                output.release(folder)
                return PartDone(already=True)
            if not output.begun(folder):
                begin(resolved, folder, source, identity)
        return _work(job, config, part, plugins_of(resolved), quiet)


def _work(job: Job, config: PrepConfig, part: Part, plugins: list[tuple[str, str]], quiet: bool) -> PartDone:
    with pool(job, config, plugins) as engine:
        if part.step == "hash":
            if not job.source.distinct and job.source.keys() is None:
                hash_share(job, engine, part.share(job.source.count), quiet=quiet)
            return PartDone()
        with output.in_turn(job.folder, lambda: _waiting(quiet)):
            plan = planned(job, engine, quiet)
        shards = plan.shards(config.shards.samples)
        if part.step == "plan":
            return PartDone(shards)
        with output.claim_shards(job.folder, part.of):
            receipts = write_shards(job, config, engine, plan, part.share(shards), quiet)
    rejected = sum(sum(receipt["rejects"].values()) for receipt in receipts)
    return PartDone(len(receipts), sum(receipt["samples"] for receipt in receipts), rejected)


def _waiting(quiet: bool) -> None:
    if not quiet:
        print("prep: waiting for the part that makes the plan", file=sys.stderr, flush=True)
