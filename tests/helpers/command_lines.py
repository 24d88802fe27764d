"""Checks a command line as the command would, before it reads any data."""

from __future__ import annotations

import shlex
from pathlib import Path

import clipwright.cli  # noqa: F401  registers the verbs
from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.launch.plan import split

FLAGS = {"--dry-run": "dry_run", "--fresh": "fresh", "--json": "json", "--quiet": "quiet", "--debug": "debug"}


def check_command(line: str) -> None:
    """Raises the error that `clipwright LINE` would end with before it reads any data."""
    given = shlex.split(line)
    verb = " ".join(given[:2]) if " ".join(given[:2]) in COMMANDS else given[0]
    assert verb in COMMANDS, f"unknown verb: {line}"
    given = given[len(verb.split()) :]
    if not given:
        return  # a page names the verb, not a complete command
    options: dict[str, object] = {}
    arguments: list[str] = []
    while given:
        word = given.pop(0)
        if word == "-o":
            options["out"] = Path(given.pop(0))
        elif word in FLAGS:
            options[FLAGS[word]] = True
        else:
            assert not word.startswith("-"), f"unknown flag {word}: {line}"
            arguments.append(word)
    call = COMMANDS[verb].call(arguments, **options)
    call.check()
    overrides = call.overrides
    if verb == "launch":
        overrides, inner = split(call)
        check_command(shlex.join(inner))
    if verb == "doctor":
        overrides = [word for word in overrides if not word.startswith("check=")]
    if call.command.kind is not None:
        call.load(overrides=overrides, partial=True)
