"""What `clipwright doctor` is made of: checks in groups, what they found, and the table they are told in.

A new check is one decorated function in its group's file; a new group is a file and its name in GROUPS. Nothing here
imports torch: a machine where torch cannot be loaded is one to be told so.
"""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipwright.pipeline.core.command import Call
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest

if TYPE_CHECKING:
    from clipwright.pipeline.core.config import Resolved
    from clipwright.pipeline.data.batch import Batch
    from clipwright.pipeline.data.datasets import Datasets
    from clipwright.pipeline.distributed.group import World
    from clipwright.pipeline.tokenizers.base import Tokenizer
    from clipwright.pipeline.train.config import Parts, RunConfig

# Each a module of this folder, in the order they are run; the first needs no torch, those after `network` a config.
GROUPS = ("environment", "device", "network", "data", "model", "speed", "loss", "gradients")

Status = Literal["ok", "warn", "FAIL", "skip"]
_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red", "skip": "dim"}


@dataclass(frozen=True)
class Found:
    """What one check found, what it needs, and what to do where the two differ."""

    status: Status
    found: str
    need: str = ""
    fix: str = ""


@dataclass
class Context:
    """What checks know. Those behind `rows` and `predicted` are made by the check that bears their name."""

    call: Call
    only: str = ""  # the check that was asked for; with it goes what it needs
    rows: dict[str, Found] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    world: World = field(init=False)
    without_data: bool = False  # whether no check looks at the dataset, which then need not be named
    resolved: Resolved[RunConfig] = field(init=False)  # by `config`
    dataset: Datasets = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    odd_tokens: float = field(init=False)  # by `captions`: share of tokens for what the vocabulary lacks
    parts: Parts = field(init=False)  # by `step`
    batch: Batch = field(init=False)  # by `step`: this rank's first

    @property
    def config(self) -> RunConfig:
        return self.resolved.value

    def load(self) -> Resolved[RunConfig]:
        """The training config as the command line says it."""
        return self.call.load({"data": {"train": "none"}} if self.without_data else None)

    @property
    def is_rank0(self) -> bool:
        """Whether this process is the one that speaks."""
        return not hasattr(self, "world") or self.world.is_rank0

    @property
    def asked(self) -> bool:
        """Whether a config was given; without one the environment alone is looked at."""
        return self.call.config is not None or bool(self.call.overrides) or bool(self.only)


@dataclass(frozen=True)
class Check:
    """A check: `needs` are the names of earlier ones without which it cannot be tried."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[Context], Found]

    def outcome(self, context: Context) -> Found:
        """What it found; an error it met is a failure with the error's words, never a traceback."""
        unmet = next((name for name in self.needs if context.rows[name].status in ("FAIL", "skip")), None)
        if unmet is not None:
            before = context.rows[unmet]
            return before if before.status == "skip" else Found("skip", f"not tried: `{unmet}` failed")
        try:
            return self.run(context)
        except ClipwrightError as error:
            return Found("FAIL", f"{error.code}: {error.what} — {error.where} — {error.found}", fix=error.fix)
        except Exception as error:  # whatever is broken here is what doctor is asked about
            if context.call.debug:
                traceback.print_exc()
            return Found("FAIL", f"{type(error).__name__}: {error}", fix="run again with --debug to see where")


_CHECKS: dict[str, dict[str, Check]] = {}


def check(name: str, *needs: str) -> Callable[[Callable[[Context], Found]], Callable[[Context], Found]]:
    """Registers a function as the check `name` of its file's group."""

    def register(run: Callable[[Context], Found]) -> Callable[[Context], Found]:
        group = run.__module__.rpartition(".")[2]
        _CHECKS.setdefault(group, {})[name] = Check(name, needs, run)
        return run

    return register


def checks(group: str) -> list[Check]:
    """The checks of a group, in the order they stand in its file."""
    importlib.import_module(f"{__package__}.{group}")
    return list(_CHECKS[group].values())


def asked_for(call: Call) -> str:
    """NAME of `check=NAME` on the command line, which is no part of the training config and is taken out of it."""
    names = [word.removeprefix("check=") for word in call.overrides if word.startswith("check=")]
    call.overrides = [word for word in call.overrides if not word.startswith("check=")]
    return names[-1] if names else ""


def chosen(only: str) -> list[Check]:
    """The check `only` behind all that it needs, in order; E_CONFIG_CHOICE when there is none of this name."""
    every = {one.name: one for group in GROUPS for one in checks(group)}
    if only not in every:
        raise ClipwrightError(
            "E_CONFIG_CHOICE",
            "unknown check",
            where=f"check={only}",
            found="doctor has no check of this name",
            fix=nearest(only, every) or f"choose one of {', '.join(every)}",
        )
    wanted = {only}
    for one in reversed(every.values()):
        wanted |= set(one.needs) if one.name in wanted else set()
    return [one for one in every.values() if one.name in wanted]


def report(context: Context) -> None:
    """Prints the table or, with --json, the object."""
    call, rows = context.call, context.rows
    listed = [{"name": name, **dataclasses.asdict(found)} for name, found in rows.items()]
    then = ["train", *call.words, *call.overrides, "-o", "RUN"]
    if not context.asked:
        then = ["doctor", "photos", "data.train=DIR"]
    good = all(found.status != "FAIL" for found in rows.values())
    text = "" if call.quiet else table(rows)
    call.finish({"checks": listed, **context.predicted}, text, then=f"clipwright {shlex.join(then)}" if good else "")


def table(rows: dict[str, Found]) -> str:
    """Status, check, found, need, fix; as wide as the terminal, elsewhere one line a check."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "check", "found", "need", "fix"):
        made.add_column(title, no_wrap=title in ("", "check"), overflow="fold")
    for name, found in rows.items():
        cells = (name, found.found, found.need, found.fix)
        made.add_row(Text(found.status, _COLOURS[found.status]), *(Text(" ".join(cell.split())) for cell in cells))
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else 10_000, highlight=False)
    with console.capture() as captured:
        console.print(made)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def failure(context: Context) -> ClipwrightError | None:
    """The error that doctor ends with if a check failed."""
    failed = {name: found for name, found in context.rows.items() if found.status == "FAIL"}
    if not failed:
        return None
    first, found = next(iter(failed.items()))
    return ClipwrightError(
        "E_DOCTOR",
        "checks that failed",
        where=", ".join(failed),
        found=f"{len(failed)} of {len(context.rows)}; {first}: {found.found}",
        fix=found.fix or "mend what the table names",
    )
