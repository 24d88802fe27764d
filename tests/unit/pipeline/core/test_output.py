"""What every command prints: one JSON object with --json, only its result with --quiet, and `next:` to paste.

The helpers that run commands check their output, see output_checks.py; here every verb is run with each flag.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from output_checks import check_output

import clipwright.cli
from clipwright.pipeline.core.command import COMMANDS, Preempted

Here = Callable[..., SimpleNamespace]


@pytest.mark.parametrize("verb", COMMANDS)
def test_errors_are_one_json_object(verb: str, here: Here, tmp_path: Path) -> None:
    done = here(tmp_path, *verb.split(), *["not", "an", "argument"] * 2, "--json", code=2)
    error = json.loads(done.out)["error"]
    assert error["code"] == "E_USAGE" and error["fix"] in done.error and not any(tmp_path.iterdir())


def test_every_command_prints_one_json_object_or_only_its_result(
    here: Here, small: Any, scenes: Path, tmp_path: Path
) -> None:
    """In a folder and with names that a shell must quote."""
    folder = tmp_path / "it's 폴더"
    (folder / "-tars").mkdir(parents=True)
    shutil.copytree(scenes, folder / "my data")
    for path in scenes.glob("*.tar"):
        (folder / "-tars" / path.name).symlink_to(path)

    def run(*arguments: object, result: str) -> str:
        """With --json, with --quiet, and without: a command that writes a folder resumes. Returns what follows."""
        made = json.loads(here(folder, *arguments, "--json").out)
        assert result in made, made.keys()
        quiet = here(folder, *arguments, "--quiet").out.splitlines()
        plain = here(folder, *arguments).out.splitlines()
        assert quiet == [line for line in plain if not line.startswith("next: ")]
        return "\n".join(line for line in plain if line.startswith("next: "))

    assert run("data", "verify", "my data", result="fingerprint") == "next: clipwright data stats 'my data'"
    run("data", "stats", "my data", result="samples")
    run("data", "view", "my data", "-o", "pages", result="page")
    here(folder, "data", "index", "./-tars", "--quiet")
    assert run("data", "index", "./-tars", result="written") == "next: clipwright data verify ./-tars"
    small(folder, "data.train=my data", "runtime.stop_at=1", "-o", "my run", "--quiet")
    run("data", "ledger", "my run", result="steps")
    json.loads(here(folder, "export", "my run", "-o", "model 1", "--json").out)["fingerprint"]
    here(folder, "export", "my run", "-o", "model 2", "--quiet")
    here(folder, "embed", "model=model 1", "data=my data", "-o", "vec tors", "--quiet")
    run("embed", "model=model 1", "data=my data", "-o", "vec tors", result="rows")
    here(folder, "index", "build", "flat", "embeddings=vec tors", "-o", "in dex", "--quiet")
    run("index", "build", "flat", "embeddings=vec tors", "-o", "in dex", result="rows")
    run("search", "in dex", "text=빨간 원", result="hits")
    run("eval", "retrieval", "model=model 1", "data=my data", result="retrieval")
    run("report", "my run", result="page")
    run("list", "losses", result="losses")
    run("doctor", "check=ping", result="checks")
    run("config", "show", "train", "photos", result="optim")
    run("config", "schema", "demo", result="properties")
    run("config", "reference", result="markdown")
    run("demo", "--dry-run", "-o", "de mo", result="steps")
    job = ["launch", "slurm", "nodes=1", "processes=2", "train", "photos", "data.train=my data", "-o", "RUN"]
    assert "'data.train=my data' -o RUN --json" in json.loads(here(folder, *job, "--json").out)["file"]
    assert here(folder, *job, "--quiet").out.startswith("#!/bin/bash")


@pytest.mark.parametrize(
    ("raised", "code", "name", "line"),
    [
        (
            ValueError("a\nb"),
            1,
            "E_INTERNAL",
            "error[E_INTERNAL]: the command failed unexpectedly — clipwright list",
        ),
        (FileNotFoundError(2, "gone", "x\x1b[31m"), 1, "E_SYSTEM", "error[E_SYSTEM]: the operating system refused"),
        (KeyboardInterrupt(), 130, "E_INTERRUPTED", "interrupted: nothing was kept, run the same command again"),
        (Preempted(), 85, "E_STOPPED", "stopped by a signal: nothing was kept, run the same command again"),
    ],
)
def test_failures_and_stops_are_one_json_object_and_a_last_line(
    raised: BaseException,
    code: int,
    name: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        print("a library prints")
        os.write(1, b"a worker prints\n")
        raise raised

    monkeypatch.setattr("clipwright.cli._prompts", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert clipwright.cli.app(["list", "prompts", "--json"], standalone_mode=False) == code
    printed = capfd.readouterr()
    check_output(["list", "prompts", "--json"], code, printed.out, printed.err)
    assert json.loads(printed.out)["error"]["code"] == name and printed.err.splitlines()[-1].startswith(line)
    assert "a library prints" in printed.err and "a worker prints" in printed.err and "\x1b" not in printed.err
    assert ("Traceback" in printed.err) == (name == "E_INTERNAL")
    assert clipwright.cli.app(["list", "prompts", "--quiet"], standalone_mode=False) == code
    printed = capfd.readouterr()
    assert printed.out == "" and "prints" not in printed.err and printed.err.splitlines()[-1].startswith(line)


def test_results_are_safe_to_print(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """NaN is null; control characters reach neither the terminal nor the JSON; stdout is the command's again later."""
    rows = [{"name": "a\x1b[31m\x9b\u202e", "kind": math.nan, "n": [math.inf, -1.5]}]
    monkeypatch.setattr("clipwright.cli._prompts", lambda: rows)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert clipwright.cli.app(["list", "prompts", "--json"], standalone_mode=False) == 0
    text = capfd.readouterr().out
    assert text.strip().isprintable() and json.loads(text) == {
        "prompts": [{**rows[0], "kind": None, "n": [None, -1.5]}]
    }
    assert clipwright.cli.app(["list", "prompts"], standalone_mode=False) == 0
    assert "a\\x1b[31m\\x9b\\u202e" in capfd.readouterr().out
    print("after")
    os.write(1, b"after\n")
    assert capfd.readouterr().out.count("after") == 2


def test_launcher_variables_that_are_incomplete_are_refused(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = json.loads(here(tmp_path, "train", "photos", "data.train=data", "-o", "run", "--json", code=2).out)["error"]
    assert error["code"] == "E_WORLD" and "MASTER_ADDR" in error["what"] + error["found"] + error["fix"]
