"""What holds for the output of every command that a test runs, and which error codes and flags the tests have used.

The helpers that run `clipwright` call `check_output`, so that each test of a command is also one of its output.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence

from command_lines import check_command

from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.core.errors import CODES
from clipwright.pipeline.core.status import DONE, STOPPED
from clipwright.pipeline.core.tables import display_width

# By commands of this test process: codes of errors and of rejected rows, and `VERB FLAG` of commands that succeeded.
SEEN: set[str] = set()
OUTPUT_FLAGS = ("--json", "--quiet")
ERROR_KEYS = {"allowed", "code", "fix", "found", "what", "where"}


def check_output(command: Sequence[str], code: int, stdout: str, stderr: str, *, ranks: int = 0) -> None:
    """Checks what a command printed, given its exit code: JSON, the error line, --quiet."""
    if "--help" in command or "-h" in command or code < 0:  # killed by the test
        return
    if "--json" in command:
        check_json(code, stdout)
    if "--quiet" in command and "--debug" not in command:
        check_quiet(stdout, stderr)
    for line in stdout.splitlines():
        if line.startswith("next: "):
            check_next(line.removeprefix("next: "))
    if "--json" not in command:
        check_tables(stdout)
    if code == DONE:
        SEEN.update(f"{verb_of(command)} {flag}" for flag in OUTPUT_FLAGS if flag in command)
    elif code not in STOPPED:
        check_error(command, code, stderr, ranks)


def verb_of(command: Sequence[str]) -> str:
    """Returns the verb of a command line, of one or two words."""
    two = " ".join(command[:2])
    return two if two in COMMANDS else command[0]


def check_json(code: int, stdout: str) -> None:
    """Stdout holds one JSON object and nothing else; that of a failed command states the error."""
    lines = stdout.splitlines()
    assert len(lines) == 1, f"--json printed {len(lines)} lines: {stdout[:500]}"
    result = json.loads(lines[0], parse_constant=lambda name: f"{name} in JSON")
    assert isinstance(result, dict), stdout[:500]
    assert " in JSON" not in lines[0]
    SEEN.update(result.get("rejects", {}).keys() & CODES.keys())
    if code != DONE:
        error = result["error"]
        assert error.keys() == ERROR_KEYS and error["code"] in CODES and error["what"], error


def check_quiet(stdout: str, stderr: str) -> None:
    """With --quiet, stderr holds warnings and errors only, and stdout no advice."""
    chatter = [
        line for line in stderr.splitlines() if not re.match(r"(warning: |error\[|interrupted: |stopped )", line)
    ]
    assert not chatter, stderr
    assert "next: " not in stdout, stdout


def check_tables(stdout: str) -> None:
    """Rows of a table, whose columns stand two spaces apart, take at most 80 cells; a step of training is one line."""
    for line in stdout.splitlines():
        if re.search(r"\S  +\S", line) and not line.startswith("step "):
            assert display_width(line) <= 80, line


@functools.cache
def check_next(command: str) -> None:
    """The command that usually follows can be pasted."""
    assert command.startswith("clipwright "), command
    check_command(command.removeprefix("clipwright "))


def check_error(command: Sequence[str], code: int, stderr: str, ranks: int = 0) -> None:
    """The last line on stderr is an error with a culprit and a remedy, and its code has this exit code."""
    lines = stderr.strip().splitlines()
    assert lines, f"exit code {code} without a message: {command}"
    line = lines[-1]
    found = re.match(r"error\[(E_\w+)\]: ", line)
    assert found, f"the last line is not an error: {stderr}"
    assert found[1] in CODES, line
    if not ranks:  # a launcher turns every failure into 1
        assert CODES[found[1]][0] == code, (code, line)
    what_where_found_fix = line.split(" — ")
    assert len(what_where_found_fix) >= 3, f"an error without culprit or remedy: {line}"
    assert line.isprintable(), ascii(line)
    SEEN.update(set(re.findall(r"\bE_[A-Z_]+", line)) & CODES.keys())  # its own code, and those of the rows it counts


def never_seen(seen: Collection[str]) -> list[str]:
    """Returns what a complete run of the tests should have seen: each error code, and each verb with each flag."""
    codes = [code for code in CODES if CODES[code][0] not in STOPPED]
    return [
        name for name in [*codes, *(f"{verb} {flag}" for verb in COMMANDS for flag in OUTPUT_FLAGS)] if name not in seen
    ]
