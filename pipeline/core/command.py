"""What every command shares: its arguments, flags, errors, exit codes and status file.

A folder's `cli.py` writes `@command(app, "prep", kind="module:Config")` over a function of one `Call`. The command
line is then `clipwright prep CONFIG [section.key=value ...]` with the common flags and no others.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import re
import shlex
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from clipwright.pipeline.core.errors import ClipwrightError

DONE, FAILED, INTERRUPTED, PREEMPTED = 0, 1, 130, 85
STOPPED = {
    INTERRUPTED: "interrupted: run the same command again to go on",
    PREEMPTED: "stopped by a signal: run the same command again to go on",
}


class Preempted(BaseException):
    """SIGTERM or SIGUSR1 arrived; whoever catches it saves what it has. A BaseException so that no library eats it."""


class StopFlag:
    """Signals as a flag, asked once a step: SIGTERM and SIGUSR1 save and exit 85, Ctrl-C saves and exits 130."""

    def __init__(self) -> None:
        self.cause: type[BaseException] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        self.cause = KeyboardInterrupt if number == signal.SIGINT else Preempted


@dataclass
class Command:
    """A registered verb: where its configs lie and which class they make."""

    verb: str
    kind: str | None
    subject: str | None
    words: int  # how many words may stand beside the overrides
    configs: str = ""  # whose folder of configs/ it reads
    output: bool = True  # whether it has a use for -o


COMMANDS: dict[str, Command] = {}


@dataclass
class Call:
    """One command line, parsed: its config, overrides and common flags."""

    command: Command
    config: str | None
    words: list[str]
    overrides: list[str]
    out: Path | None
    json: bool
    quiet: bool
    debug: bool
    dry_run: bool
    yes: bool
    fresh: bool
    writes_status: bool = True  # False on ranks other than the first
    given: tuple[str, ...] = ()  # words and overrides in the order they were written
    owned: bool = True  # whether the output folder was this command's before it started
    started: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))

    def check(self) -> None:
        """E_USAGE for words nobody would read: a lost `=` must not train on the defaults."""
        spare = self.words[self.command.words :]
        if self.command.kind is None and self.command.words == 1:
            spare += self.overrides
        if spare:
            raise ClipwrightError(
                "E_USAGE",
                "a word too many",
                where=" ".join([self.command.verb, *spare]),
                found=f"'{spare[0]}' is neither the one word this verb takes nor section.key=value",
                fix=f"see clipwright {self.command.verb} --help",
            )
        if self.out is not None and not self.command.output:
            raise ClipwrightError(
                "E_USAGE",
                "an output folder that nobody would write",
                where=f"{self.command.verb} -o {self.out}",
                found="this verb only prints, or writes into the folder it is given",
                fix="leave out -o",
            )

    def load(self, base: dict[str, Any] | None = None) -> Any:
        """The `Resolved` config of this command line."""
        # Imported here: pydantic costs 80 ms that `clipwright --help` need not pay.
        from clipwright.pipeline.core.config import resolve  # noqa: PLC0415

        overrides = list(self.overrides)
        if self.command.subject is not None and self.config is not None:
            overrides.insert(0, f"{self.command.subject}={self.config}")
        config = None if self.command.subject is not None else self.config
        verb = self.command.configs
        return resolve(load_kind(self.command), verb=verb, config=config, overrides=overrides, base=base)

    def output(self) -> Path:
        """The folder given with -o."""
        if self.out is None:
            raise ClipwrightError(
                "E_USAGE", "no output folder", where=self.command.verb, found="no -o", fix="add -o DIR"
            )
        return self.out

    def say(self, text: str) -> None:
        """Words for a person: stdout, or stderr when stdout is for JSON."""
        if not self.quiet:
            print(text, file=sys.stderr if self.json else sys.stdout, flush=True)

    def finish(self, result: dict[str, Any] | list[Any], text: str = "", then: str = "") -> None:
        """The command's result: as JSON with --json, else `text`; then the command that usually follows."""
        if self.json:
            print(json.dumps(result, sort_keys=True, ensure_ascii=False, allow_nan=False), flush=True)
        elif text:
            print(text, flush=True)
        if then and not self.json:
            self.say(f"next: {then}")


def load_kind(command: Command) -> type[Any]:
    assert command.kind is not None, command.verb
    return load_name(command.kind)


def load_name(name: str) -> Any:
    """What `MODULE:NAME` stands for, imported only now."""
    module, _, inside = name.partition(":")
    return getattr(importlib.import_module(module), inside)


def command(
    app: typer.Typer,
    verb: str,
    *,
    kind: str | None = None,
    subject: str | None = None,
    metavar: str = "CONFIG",
    words: int = 1,
    configs: str = "",
    output: bool = True,
) -> Callable[[Callable[[Call], None]], Callable[..., None]]:
    """Registers `verb` on `app`.

    With `subject`, the first word sets that config key instead of naming a config. `configs`: whose shipped configs a
    name means, where they are not the verb's own (`doctor photos` reads configs/train/photos.yaml). `output`: whether
    the verb takes -o.
    """
    spec = COMMANDS[verb] = Command(verb, kind, subject, words, configs or verb.split()[0], output)
    listed = typer.Argument(None, metavar=f"[{metavar}] [SECTION.KEY=VALUE]...", show_default=False)

    def decorate(body: Callable[[Call], None]) -> Callable[..., None]:
        def run(
            args: list[str] | None = listed,
            out: Annotated[Path | None, typer.Option("-o", metavar="DIR", help="The folder to write.")] = None,
            as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
            quiet: Annotated[bool, typer.Option("--quiet", help="Print results and errors only.")] = False,
            debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
            dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")] = False,
            yes: Annotated[bool, typer.Option("--yes", help="Answer every question with yes.")] = False,
            fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
        ) -> None:
            given = args or []
            overrides = [w for w in given if re.match(r"[A-Za-z_][\w.-]*=", w)]
            plain = [w for w in given if w not in overrides]
            first = plain[0] if plain else None
            call = Call(spec, first, plain, overrides, out, as_json, quiet, debug, dry_run, yes, fresh)
            call.given = tuple(given)
            raise typer.Exit(_run(call, body))

        run.__doc__ = body.__doc__
        app.command(verb.split()[-1])(run)
        return run

    return decorate


def _run(call: Call, body: Callable[[Call], None]) -> int:
    error: ClipwrightError | None = None
    words = ""
    call.owned = _owns(call)
    # Read when OpenMP loads with torch, which no command has done yet. Waiting threads that spin cost a factor of 7
    # where another process wants the cores (36 against 260 samples/s seen).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _preempt)
    signal.signal(signal.SIGUSR1, _preempt)
    try:
        call.check()
        try:
            body(call)
        finally:
            # The outcome stands: a signal now, such as a launcher's second one, has nothing left to stop.
            deafen()
        code = DONE
    except ClipwrightError as caught:
        error, code = caught, caught.exit_code
        if call.debug:
            traceback.print_exc()
    except BrokenPipeError:
        # Whoever read our output (`| head`) has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except OSError as caught:
        error = ClipwrightError(
            "E_SYSTEM",
            "the operating system refused",
            where=caught.filename or call.command.verb,
            found=caught.strerror or str(caught),
            fix="free space or mend the path or its permissions, and run the same command again",
        )
        code = error.exit_code
        if call.debug:
            traceback.print_exc()
    except typer.Exit as stop:
        code = stop.exit_code
    except KeyboardInterrupt:
        code, words = INTERRUPTED, STOPPED[INTERRUPTED]
    except Preempted:
        code, words = PREEMPTED, STOPPED[PREEMPTED]
    conclude(call, code, error, words)
    return code


def deafen() -> None:
    """Signals to stop are not heard any more."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def conclude(call: Call, code: int, error: ClipwrightError | None, words: str = "") -> None:
    """A command's last words and its status file."""
    if error is not None or words:
        print(error or words, file=sys.stderr, flush=True)
    mine = call.owned or code == DONE or (code in STOPPED and not _has_status(call))
    if mine and call.writes_status and not call.dry_run and call.out is not None and call.out.is_dir():
        _write_status(call, code, error)


def _owns(call: Call) -> bool:
    """Whether the output folder is this command's before it starts: absent, empty, or begun by the same verb.

    A command that was refused must not leave a status in a folder that belongs to somebody else.
    """
    folder = call.out
    if folder is None or not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))["verb"] == call.command.verb
    except (OSError, ValueError, KeyError):
        return False


def _has_status(call: Call) -> bool:
    return call.out is not None and (call.out / "status.json").exists()


def _preempt(number: int, frame: object) -> None:
    raise Preempted(number)


def _write_status(call: Call, code: int, error: ClipwrightError | None) -> None:
    from clipwright.pipeline.core.files import STATUS, write_json  # noqa: PLC0415

    assert call.out is not None
    status = {
        "command": shlex.join(["clipwright", *sys.argv[1:]]),
        "verb": call.command.verb,
        "started": call.started.isoformat(timespec="seconds"),
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "versions": _versions(),
        "exit_code": code,
        "error": None if error is None else {"code": error.code, "message": str(error)},
    }
    write_json(call.out / STATUS, status)


def _versions() -> dict[str, str]:
    """Versions of the libraries this process has loaded."""
    names = ("torch", "deepspeed", "webdataset", "accelerate", "numpy", "pyarrow", "PIL", "faiss")
    loaded = {name: getattr(sys.modules[name], "__version__", "?") for name in names if name in sys.modules}
    return {"python": platform.python_version(), **{k: str(v) for k, v in loaded.items()}}
