"""The part of `clipwright doctor` that needs torch: its checks, on every rank of a group."""

from __future__ import annotations

import os

from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.distributed.group import all_gather_object, barrier, process_group
from clipwright.pipeline.distributed.launcher_env import read_launcher_env
from clipwright.pipeline.doctor.base import GROUPS, Check, Context, Found, checks, chosen, report
from clipwright.pipeline.doctor.network import silent

JOIN = 600.0  # seconds that ranks may take to meet
_WORST = ("FAIL", "warn", "skip", "ok")


def examine(context: Context) -> None:
    """Runs the checks behind `environment` and reports; under a launcher the first rank speaks for all."""
    todo = chosen(context.only) if context.only else []
    if not context.only:
        todo = [one for group in (GROUPS[1:] if context.asked else GROUPS[1:3]) for one in checks(group)]
    context.without_data = all(one.name != "dataset" for one in todo)
    if context.asked and read_launcher_env(os.environ).world_size > 1:
        context.load()  # a refused config waits for no peer
    with process_group(JOIN) as world:
        context.world = world
        if (nobody := silent(world)) is not None:
            context.rows["ping"] = nobody
            if world.is_rank0:
                report(context)
            return
        with Progress("doctor", len(todo), "checks", quiet=context.call.quiet or not world.is_rank0) as progress:
            for one in todo:
                progress.rename(f"doctor: {one.name}")
                context.rows[one.name] = agreed(one, context)
                progress.add(1, failed=int(context.rows[one.name].status == "FAIL"))
        if world.is_rank0:
            report(context)
        barrier()  # the others wait: a launcher stops all when one ends


def agreed(one: Check, context: Context) -> Found:
    """The worst of what the ranks found, so that all of them go on alike."""
    return min(all_gather_object(one.outcome(context)), key=lambda found: _WORST.index(found.status))
