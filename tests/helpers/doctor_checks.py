"""Runs single checks of doctor."""

from __future__ import annotations

from pathlib import Path

from clipwright.pipeline.core.command import COMMANDS, Call
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.doctor.base import GROUPS, CheckResult, DoctorContext, checks


def call(*overrides: str, out: Path | None = None, config: str | None = None) -> Call:
    import clipwright.cli  # noqa: F401  registers the verb

    arguments = [config] if config else []
    return Call(command=COMMANDS["doctor"], arguments=arguments, overrides=list(overrides), out=out, quiet=True)


def context(world: World, *overrides: str, out: Path | None = None) -> DoctorContext:
    state = DoctorContext(call(*overrides, out=out))
    state.world = world
    return state


def run(state: DoctorContext, *until: str) -> CheckResult:
    """Runs the checks named in `until`, in order; returns the result of the last."""
    for group in GROUPS:
        for item in checks(group):
            if group == "environment" or item.name not in until:
                continue
            state.results[item.name] = item.evaluate(state)
    return state.results[until[-1]]


DATA = ("config", "dataset")
MODEL = (*DATA, "samples", "tokenizer", "captions", "images", "threads", "towers", "weights")
