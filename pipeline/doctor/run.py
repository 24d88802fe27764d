"""Runs the checks that need torch, on every rank of the process group."""

from __future__ import annotations

import os

from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.distributed.group import all_gather_object, barrier, process_group
from clipwright.pipeline.distributed.launcher_env import read_launcher_env
from clipwright.pipeline.doctor.base import GROUPS, Check, CheckResult, DoctorContext, checks, with_prerequisites
from clipwright.pipeline.doctor.network import find_silent_ranks

RENDEZVOUS_SECONDS = 600.0
_WORST_FIRST = ("FAIL", "warn", "skip", "ok")


def run_checks(context: DoctorContext) -> None:
    """Runs the checks after `environment`; their results are the same on all ranks."""
    if context.only:
        selected = with_prerequisites(context.only)
    else:
        groups = GROUPS[1:] if context.has_config else GROUPS[1:3]
        selected = [item for group in groups for item in checks(group)]
    context.without_data = all(item.name != "dataset" for item in selected)
    if context.has_config and read_launcher_env(os.environ).world_size > 1:
        context.load()  # refuse a bad config before the rendezvous
    with process_group(RENDEZVOUS_SECONDS) as world:
        context.world = world
        silent = find_silent_ranks(world)
        if silent is not None:
            context.results["ping"] = silent
            return
        quiet = context.call.quiet or not world.is_rank0
        with Progress("doctor", len(selected), "check", quiet=quiet) as progress:
            for item in selected:
                progress.rename(f"doctor: {item.name}")
                result = worst_over_ranks(item, context)
                context.results[item.name] = result
                progress.add(1, failed=int(result.status == "FAIL"))
        barrier()  # a launcher stops all ranks when one exits


def worst_over_ranks(item: Check, context: DoctorContext) -> CheckResult:
    """Runs a check on every rank and returns the worst result, the same on all ranks."""
    results = all_gather_object(item.evaluate(context))
    return min(results, key=lambda result: _WORST_FIRST.index(result.status))
