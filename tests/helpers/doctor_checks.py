"""Runs single checks of doctor for its tests."""

from __future__ import annotations

from pathlib import Path

from clipwright.pipeline.core.command import COMMANDS, Call
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.doctor.base import GROUPS, Context, Found, checks


def call(*overrides: str, out: Path | None = None, config: str | None = None) -> Call:
    import clipwright.cli  # noqa: F401  registers the verb

    words = [config] if config else []
    return Call(COMMANDS["doctor"], config, words, list(overrides), out, False, True, False, False, False, False)


def context(world: World, *overrides: str, out: Path | None = None) -> Context:
    made = Context(call(*overrides, out=out))
    made.world = world
    return made


def run(made: Context, *until: str) -> Found:
    """Runs checks in order until the last of `until`, which it gives."""
    for group in GROUPS:
        for one in checks(group):
            if group == "environment" or one.name not in until:
                continue
            made.rows[one.name] = one.outcome(made)
    return made.rows[until[-1]]


DATA = ("config", "dataset")
MODEL = (*DATA, "samples", "tokenizer", "captions", "images", "threads", "towers", "weights")
