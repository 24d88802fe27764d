"""The parts of `clipwright doctor`: checks in groups, their results, and the table that shows them.

A new check is one decorated function in the file of its group; a new group is one file and its name in GROUPS. This
file imports no torch, so that doctor can report a machine on which torch does not load.
"""

from __future__ import annotations

import dataclasses
import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import command_line, format_count
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.tables import wrap

if TYPE_CHECKING:
    from clipwright.pipeline.core.config import Resolved
    from clipwright.pipeline.data.batch import Batch
    from clipwright.pipeline.data.datasets import Datasets
    from clipwright.pipeline.distributed.group import World
    from clipwright.pipeline.tokenizers.base import Tokenizer
    from clipwright.pipeline.train.config import Components, RunConfig

# Modules of this package, in the order they run. The first needs no torch; those after `network` need a config.
GROUPS = ("environment", "device", "network", "data", "model", "speed", "loss", "gradients")

Status = Literal["ok", "warn", "FAIL", "skip"]
_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "red", "skip": "dim"}


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: what was found, what is needed, and the fix if the two differ."""

    status: Status
    found: str
    need: str = ""
    fix: str = ""


@dataclass
class DoctorContext:
    """State shared by the checks of one command. A field without default is set by the check named beside it."""

    call: Call
    only: str = ""  # the requested check; empty: all checks
    results: dict[str, CheckResult] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)  # figures for --json
    world: World = field(init=False)
    without_data: bool = False  # no check reads the dataset, so data.train may be missing
    resolved: Resolved[RunConfig] = field(init=False)  # by `config`
    dataset: Datasets = field(init=False)  # by `dataset`
    tokenizer: Tokenizer = field(init=False)  # by `tokenizer`
    unknown_share: float = field(init=False)  # by `captions`: share of unknown tokens
    components: Components = field(init=False)  # by `step`
    batch: Batch = field(init=False)  # by `step`: the first batch of this rank

    @property
    def config(self) -> RunConfig:
        return self.resolved.value

    def load(self) -> Resolved[RunConfig]:
        """Resolves the training config of the command line."""
        return self.call.load({"data": {"train": "none"}} if self.without_data else None)

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints the report; true before the process group exists."""
        return not hasattr(self, "world") or self.world.is_rank0

    @property
    def has_config(self) -> bool:
        """Whether the command line names a config or a check; otherwise only the machine is checked."""
        return self.call.config is not None or bool(self.call.overrides) or bool(self.only)


CheckFunction = Callable[[DoctorContext], CheckResult]


@dataclass(frozen=True)
class Check:
    """A check; `needs` names earlier checks that must have passed."""

    name: str
    needs: tuple[str, ...]
    run: CheckFunction

    def evaluate(self, context: DoctorContext) -> CheckResult:
        """Runs the check. An exception becomes a FAIL result with its message, never a traceback."""
        for name in self.needs:
            earlier = context.results[name]
            if earlier.status == "skip":
                return earlier
            if earlier.status == "FAIL":
                return CheckResult("skip", f"not run: check `{name}` failed")
        try:
            return self.run(context)
        except ClipwrightError as error:
            return CheckResult("FAIL", f"{error.code}: {error.what} — {error.where} — {error.found}", fix=error.fix)
        except Exception as error:  # doctor's job is to report any failure
            if context.call.debug:
                traceback.print_exc()
            return CheckResult("FAIL", f"{type(error).__name__}: {error}", fix="run again with --debug to see where")


_CHECKS: dict[str, dict[str, Check]] = {}


def check(name: str, *needs: str) -> Callable[[CheckFunction], CheckFunction]:
    """Registers a function as check `name` in the group of its file."""

    def register(run: CheckFunction) -> CheckFunction:
        group = run.__module__.rpartition(".")[2]
        _CHECKS.setdefault(group, {})[name] = Check(name, needs, run)
        return run

    return register


def checks(group: str) -> list[Check]:
    """Returns the checks of a group, in the order of its file."""
    importlib.import_module(f"{__package__}.{group}")
    return list(_CHECKS[group].values())


def requested_check(overrides: list[str]) -> tuple[str, list[str]]:
    """Returns NAME of `check=NAME` (or "") and the other overrides: `check` is not a key of the training config."""
    names = [override.removeprefix("check=") for override in overrides if override.startswith("check=")]
    others = [override for override in overrides if not override.startswith("check=")]
    return (names[-1] if names else ""), others


def with_prerequisites(name: str) -> list[Check]:
    """Returns check `name` preceded by all checks it needs; E_CONFIG_CHOICE if there is no such check."""
    all_checks = {item.name: item for group in GROUPS for item in checks(group)}
    if name not in all_checks:
        raise ClipwrightError(
            "E_CONFIG_CHOICE",
            "unknown check",
            where=f"check={name}",
            found="doctor has no check of this name",
            fix=nearest(name, all_checks) or f"choose one of {', '.join(all_checks)}",
        )
    wanted = {name}
    for item in reversed(all_checks.values()):
        if item.name in wanted:
            wanted |= set(item.needs)
    return [item for item in all_checks.values() if item.name in wanted]


def report(context: DoctorContext) -> Outcome:
    """Returns the table and the JSON object of all checks, with an error if one of them failed."""
    call, results = context.call, context.results
    rows = [{"name": name, **dataclasses.asdict(result)} for name, result in results.items()]
    next_command = ["doctor", "photos", "data.train=DIR"]
    if context.has_config:
        next_command = ["train", *call.arguments, *call.overrides, "-o", "RUN"]
    error = failure(context)
    return Outcome(
        {"checks": rows, **context.predicted},
        table(results),
        next=command_line(*next_command) if error is None else "",
        error=error,
    )


def table(results: dict[str, CheckResult]) -> str:
    """Formats status, check, found and need in columns, and below them what to do."""
    rows = [[result.status, name, result.found, result.need, result.fix] for name, result in results.items()]
    return wrap(["", "check", "found", "need"], rows, below="fix", styles=_STYLES)


def failure(context: DoctorContext) -> ClipwrightError | None:
    """Returns the error that ends the command if a check failed."""
    failed = {name: result for name, result in context.results.items() if result.status == "FAIL"}
    if not failed:
        return None
    name, result = next(iter(failed.items()))
    count = f"{len(failed)} of {format_count(len(context.results), 'check')} failed"
    return ClipwrightError(
        "E_DOCTOR",
        count,
        where=", ".join(failed),
        found=f"{name}: {result.found}",
        fix=result.fix or "fix what the table lists",
    )
