"""What all commands share: arguments, flags, errors and signals.

A part's `cli.py` writes `@Command(app, "prep", kind="module:Config")` over a function that takes a `Call` and returns
an `Outcome`. The command line is then `clipwright prep CONFIG [section.key=value ...]` with the common flags.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from clipwright.pipeline.core import lock
from clipwright.pipeline.core.activity import working
from clipwright.pipeline.core.command_help import VerbCommand
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import silence_libraries
from clipwright.pipeline.core.status import (
    DONE,
    FAILED,
    INTERRUPTED,
    PREEMPTED,
    STOPPED,
    StatusFile,
    stop_error,
    stop_line,
)
from clipwright.pipeline.core.streams import (
    escape_controls,
    json_line,
    print_note,
    print_result,
    reserved_stdout,
    result_stream,
)
from clipwright.pipeline.core.tables import StyledText

# Flags that only some verbs support; --json, --quiet and --debug are common to all.
OPTIONAL_FLAGS = ("-o", "--dry-run", "--fresh")


class Preempted(BaseException):
    """SIGTERM or SIGUSR1 arrived: save and stop. A BaseException, so that no library catches it."""


class StopFlag:
    """Signals as a flag, read once per step: SIGTERM and SIGUSR1 save and exit 85, Ctrl-C saves and exits 130."""

    def __init__(self) -> None:
        self.cause: type[BaseException] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        self.cause = KeyboardInterrupt if number == signal.SIGINT else Preempted


@dataclass(frozen=True)
class Outcome:
    """The result of a command: the runner prints it, then the command ends.

    `result` is printed with --json, `text` otherwise; `next` is the command that usually follows, or several. With
    `error` the command fails with it after printing; else `exit_code` decides.
    """

    result: dict[str, Any] | None = None
    text: str = ""
    next: str | tuple[str, ...] = ""
    error: ClipwrightError | None = None
    exit_code: int = DONE


@dataclass(frozen=True, kw_only=True)
class Call:
    """One parsed command line: arguments, overrides and flags."""

    command: Command
    arguments: list[str]  # without the overrides
    overrides: list[str]
    given: tuple[str, ...] = ()  # arguments and overrides in the order they were typed
    out: Path | None = None
    json: bool = False
    quiet: bool = False
    debug: bool = False
    dry_run: bool = False
    fresh: bool = False
    status: StatusFile = field(init=False)

    def __post_init__(self) -> None:
        enabled = self.command.writes_status and not self.dry_run
        object.__setattr__(self, "status", StatusFile(self.out, self.command.verb, enabled=enabled))

    @property
    def config(self) -> str | None:
        """The first argument: a config's name or path, or the value of the verb's subject."""
        return self.arguments[0] if self.arguments else None

    def check(self) -> None:
        """Raises E_USAGE for an argument or flag that the verb ignores: a lost `=` must not train on the defaults."""
        verb = self.command.verb
        unexpected = self.arguments[self.command.max_arguments :]
        if not self.command.takes_overrides:
            unexpected += self.overrides
        if unexpected:
            value = unexpected[1] if len(unexpected) > 1 else "VALUE"
            is_key = re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", unexpected[0])
            raise ClipwrightError(
                "E_USAGE",
                f"unexpected argument {unexpected[0]!r}",
                where=" ".join(["clipwright", verb, *unexpected]),
                found="it is neither the argument of this verb nor section.key=value",
                fix=f"write {unexpected[0]}={value}" if is_key else f"see clipwright {verb} --help",
            )
        used = {"-o": self.out is not None, "--dry-run": self.dry_run, "--fresh": self.fresh}
        for flag in OPTIONAL_FLAGS:
            if used[flag] and not self.command.supports(flag):
                raise ClipwrightError(
                    "E_USAGE",
                    f"clipwright {verb} does not support {flag}",
                    where=" ".join(["clipwright", *sys.argv[1:]]),
                    fix=f"leave out {flag}; clipwright {verb} --help lists the flags",
                )

        self._check_names()

    def _check_names(self) -> None:
        """Raises an error for a config, key or preset that does not exist, before anything heavy is imported."""
        spec = self.command
        if spec.kind is None or spec.wraps_command:
            return
        # Imported here: YAML costs 20 ms that `clipwright --help` need not pay.
        from clipwright.pipeline.core.config_names import check_names  # noqa: PLC0415

        config, overrides = self._config_and_overrides(self.overrides)
        own = [override for override in overrides if override.partition("=")[0] not in spec.other_overrides]
        check_names(spec.kind, verb=spec.verb, folder=spec.config_folder, config=config, overrides=own)

    def _config_and_overrides(self, overrides: Sequence[str]) -> tuple[str | None, list[str]]:
        """Returns the config's name or path, and the overrides with the verb's subject among them."""
        chosen, config = list(overrides), self.config
        if self.command.subject is not None:
            if config is not None:
                given = next((word for word in chosen if word.startswith(f"{self.command.subject}=")), None)
                if given is not None:
                    raise ClipwrightError(
                        "E_USAGE",
                        f"{self.command.subject} is given twice",
                        where=f"clipwright {self.command.verb}",
                        found=f"{config} and {given}",
                        fix="remove one of them",
                    )
                chosen.insert(0, f"{self.command.subject}={config}")
            config = None
        return config, chosen

    def load(
        self, base: dict[str, Any] | None = None, overrides: Sequence[str] | None = None, *, partial: bool = False
    ) -> Any:
        """Returns the `Resolved` config of this command line, or of other `overrides` in place of its own.

        base, partial: as in `config.resolve`.
        """
        # Imported here: pydantic costs 80 ms that `clipwright --help` need not pay.
        from clipwright.pipeline.core.config import resolve  # noqa: PLC0415

        config, chosen = self._config_and_overrides(self.overrides if overrides is None else overrides)
        kind, verb = self.command.load_kind(), self.command.config_folder
        return resolve(kind, verb=verb, config=config, overrides=chosen, base=base, partial=partial)

    def output(self) -> Path:
        """Returns the folder given with -o; raises E_USAGE without it."""
        if self.out is None:
            raise ClipwrightError(
                "E_USAGE", "no output folder is given", where=f"clipwright {self.command.verb}", fix="add -o DIR"
            )
        return self.out

    def after_stop(self) -> str:
        """What to do after the command was stopped: some commands keep what they have finished, others nothing."""
        verbs = self.arguments if self.command.verb == "launch" else [self.command.verb]
        if not any(COMMANDS[verb].resumes for verb in verbs if verb in COMMANDS):
            return "nothing was kept, run the same command again"
        without = " without --fresh" if self.fresh else ""
        return f"run the same command again{without} to resume"

    def say(self, text: str) -> None:
        """Prints a line for people: on stdout, or on stderr if stdout is for JSON."""
        if self.quiet:
            return
        if self.json:
            print_note(text)
        else:
            print_result(escape_controls(text))

    def show(self, outcome: Outcome) -> None:
        """Prints the outcome: with --json as the only JSON object, else its text and the command that usually follows.

        An error is part of the JSON object; without --json `conclude` prints it.
        """
        if self.json:
            error = {} if outcome.error is None else {"error": outcome.error.to_dict()}
            print_result(json_line({**(outcome.result or {}), **error}))
            return
        if outcome.text:
            print_result(outcome.text if isinstance(outcome.text, StyledText) else escape_controls(outcome.text))
        following = (outcome.next,) if isinstance(outcome.next, str) else outcome.next
        for command in following if outcome.error is None else ():
            if command:
                self.say(f"next: {command}")


def load_name(name: str) -> Any:
    """Imports and returns the attribute that `MODULE:NAME` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


Body = Callable[[Call], Outcome | None]


@dataclass(frozen=True)
class Command:
    """A verb and what its command line may hold. As a decorator, it registers the function that runs the verb."""

    app: typer.Typer
    verb: str
    _: KW_ONLY
    kind: str | None = None  # MODULE:CLASS of its config
    subject: str | None = None  # the config key that the first argument sets, if that does not name a config
    metavar: str = "CONFIG"  # its arguments in --help
    max_arguments: int = 1  # beside the overrides
    takes_overrides: bool = True
    configs: str = ""  # the verb whose shipped configs a name means (`doctor photos`: configs/train/photos.yaml)
    flags: tuple[str, ...] = ()  # which of OPTIONAL_FLAGS it supports
    examples: tuple[str, ...] = ()  # complete commands for --help
    other_overrides: tuple[str, ...] = ()  # names of overrides that are no config keys
    wraps_command: bool = False  # its arguments hold the command line of another verb
    default_out: str | None = None  # the output folder without -o
    # MODULE:FUNCTION that returns the context of a rank and yields its number, for verbs that run under launchers; only
    # rank 0 prints the outcome and writes the status file.
    rank: str = ""
    # MODULE:FUNCTION(call, resolved config) that raises the errors of inputs and output folder without doing the work;
    # `launch` calls it before it starts or prints anything.
    inputs: str = ""
    resumes: bool = False  # whether it keeps what it has finished when it is stopped, and continues from there
    writes_status: bool = True  # whether it writes status.json into its output folder

    @property
    def config_folder(self) -> str:
        """The folder of configs/ that it reads."""
        return self.configs or self.verb.split()[0]

    def supports(self, flag: str) -> bool:
        """Returns whether the verb supports one of OPTIONAL_FLAGS."""
        return flag in self.flags

    def load_kind(self) -> type[Any]:
        """Imports and returns the config class of a verb that has one."""
        assert self.kind is not None, self.verb
        return load_name(self.kind)

    def call(self, given: Sequence[str], **flags: Any) -> Call:
        """Returns a command line of this verb; `given`: arguments and overrides in the order they were typed."""
        overrides = [argument for argument in given if re.match(r"[A-Za-z_][\w.-]*=", argument)]
        arguments = [argument for argument in given if argument not in overrides]
        return Call(command=self, arguments=arguments, overrides=overrides, given=tuple(given), **flags)

    def __call__(self, body: Body) -> Body:
        metavar = f"[{self.metavar}] [SECTION.KEY=VALUE]..." if self.takes_overrides else self.metavar
        arguments = typer.Argument(None, metavar=metavar, show_default=False, hidden=not metavar)
        # An unsupported flag is parsed, so that `Call.check` can refuse it with a remedy, but not shown.
        hidden = {flag: not self.supports(flag) for flag in OPTIONAL_FLAGS}
        out_flag = typer.Option(self.default_out, "-o", metavar="DIR", help="The folder to write.", hidden=hidden["-o"])
        dry_run_flag = typer.Option(
            False, "--dry-run", help="Print what would be done; write nothing.", hidden=hidden["--dry-run"]
        )
        fresh_flag = typer.Option(False, "--fresh", help="Start over instead of resuming.", hidden=hidden["--fresh"])

        def run(
            args: list[str] | None = arguments,
            out: Path | None = out_flag,
            as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
            quiet: Annotated[bool, typer.Option("--quiet", help="Print results and errors only.")] = False,
            debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
            dry_run: bool = dry_run_flag,
            fresh: bool = fresh_flag,
        ) -> None:
            call = self.call(args or (), out=out, json=as_json, quiet=quiet, debug=debug, dry_run=dry_run, fresh=fresh)
            raise typer.Exit(_run(call, body))

        COMMANDS[self.verb] = self
        self.app.command(self.verb.split()[-1], cls=VerbCommand, help=body.__doc__, context_settings={"obj": self})(run)
        return body


COMMANDS: dict[str, Command] = {}
early_signals: Sequence[int] = ()  # stop signals that arrived before a command could handle them


def _run(call: Call, body: Body) -> int:
    """Runs a command to its end: its outcome or error is printed, the status file written; returns the exit code."""
    # OpenMP reads it when torch is loaded, which no command has done yet. Waiting threads that spin cost a factor of 7
    # if another process needs the cores (36 against 260 samples/s measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    silence_libraries(completely=call.quiet)
    signal.signal(signal.SIGTERM, _preempt)
    signal.signal(signal.SIGUSR1, _preempt)
    lock.report_lost = lambda lost: conclude(call, lost.exit_code, lost)
    is_rank0, shown = True, False
    error: ClipwrightError | None = None
    code = FAILED
    with reserved_stdout(quiet=call.quiet):
        try:
            call.check()
            with load_name(call.command.rank)() if call.command.rank else nullcontext(0) as rank:
                is_rank0 = rank == 0
                outcome = _run_body(call, body, is_rank0)
            if is_rank0:
                call.show(outcome)
            shown = True
            error, code = outcome.error, outcome.exit_code if outcome.error is None else outcome.error.exit_code
        except BrokenPipeError:
            # The reader of our output (`| head`) has gone: no message can reach it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), result_stream().fileno())
        except BaseException as caught:
            error = _as_error(caught, call)
            code = error.exit_code
            if error.code == "E_INTERNAL" or (call.debug and code not in STOPPED):
                print_note(traceback.format_exc().rstrip())
        conclude(call, code, error, shown=shown or not (is_rank0 or call.status.enabled))
    return code


def _run_body(call: Call, body: Body, is_rank0: bool) -> Outcome:
    if not is_rank0:
        call.status.disable()
    if early_signals:
        raise Preempted
    with working(call.command.verb, hidden=call.quiet or not is_rank0):
        try:
            return body(call) or Outcome()
        finally:
            # The work is done: a signal from now on, such as a launcher's second one, has nothing left to stop.
            ignore_stop_signals()
            lock.release_held()


def _as_error(caught: BaseException, call: Call) -> ClipwrightError:
    """Returns the coded error that reports an exception, or raises one that is none of a command's."""
    if isinstance(caught, ClipwrightError):
        return caught
    if isinstance(caught, KeyboardInterrupt):
        return stop_error(INTERRUPTED, call.after_stop())
    if isinstance(caught, Preempted):
        return stop_error(PREEMPTED, call.after_stop())
    if isinstance(caught, OSError):
        return ClipwrightError(
            "E_SYSTEM",
            "the operating system refused an operation",
            where=caught.filename or f"clipwright {call.command.verb}",
            found=caught.strerror or str(caught),
            fix="free disk space or fix the path or its permissions, then run the same command again",
        )
    if not isinstance(caught, Exception):
        raise caught
    reason = str(caught).strip().splitlines() or [""]
    return ClipwrightError(
        "E_INTERNAL",
        "the command failed unexpectedly",
        where=f"clipwright {call.command.verb}",
        found=f"{type(caught).__name__}: {reason[0]}",
        fix="if it is not a plugin of yours, report the traceback above as a bug of clipwright",
    )


def leave_error_to_rank0(error: ClipwrightError) -> Outcome:
    """Returns the outcome of a rank other than 0 that fails together with rank 0, which prints the error.

    It waits: a launcher stops all ranks as soon as one exits, and rank 0 needs time to print.
    """
    time.sleep(2)
    return Outcome(exit_code=error.exit_code)


def ignore_stop_signals() -> None:
    """Ignores SIGTERM and SIGUSR1 from now on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def conclude(call: Call, code: int, error: ClipwrightError | None, *, shown: bool = False) -> None:
    """Prints the error and writes the status file. shown: the command's JSON object is printed, or not this rank's."""
    if error is not None:
        print_error(error, as_json=call.json and not shown)
    call.status.write(code, error)


def print_error(error: ClipwrightError, *, as_json: bool) -> None:
    """Prints an error on stderr; as_json: also as the command's JSON object on stdout."""
    if as_json:
        with suppress(BrokenPipeError):
            print_result(json_line({"error": error.to_dict()}))
    print_note(stop_line(error) if error.exit_code in STOPPED else error)


def _preempt(number: int, frame: object) -> None:
    raise Preempted(number)
