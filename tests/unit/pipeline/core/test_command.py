"""What all commands share: flags, help, and names that are hard to print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import clipwright.cli  # noqa: F401  registers the verbs
from clipwright.pipeline.core import outline
from clipwright.pipeline.core.command import COMMANDS, OPTIONAL_FLAGS, Command


def test_closed_stdout_gives_no_error() -> None:
    """`clipwright config schema train | head -1`: neither a traceback nor a coded line."""
    command = [sys.executable, "-m", "clipwright", "config", "schema", "demo"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 1
    assert errors == ""


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, cli: Any) -> None:
    line = cli.error("prep", "scenes", "-o", os.fsdecode(b"out\xff"), code=2)
    assert line.startswith("error[E_USAGE]") and "out\\udcff" in line and "rename" in line
    assert not any(tmp_path.iterdir())


def test_unprintable_output_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "빨간").mkdir()
    arguments = ["data", "view", "빨간", "-o", "쪽", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "clipwright", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "would write \\ucabd/view.html for \\ube68\\uac04\n"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["list", "towers", "-o", "out"], "-o"),
        (["search", "index", "text=a", "--dry-run"], "--dry-run"),
        (["export", "run", "-o", "out", "--fresh"], "--fresh"),
    ],
)
def test_an_unsupported_flag_is_refused(arguments: list[str], flag: str, tmp_path: Path, cli: Any) -> None:
    line = cli.error(*arguments, code=2)
    assert line.startswith("error[E_USAGE]: ") and f"does not support {flag}" in line and f"leave out {flag}" in line
    assert not any(tmp_path.iterdir())


def test_an_unexpected_argument_is_refused(cli: Any) -> None:
    line = cli.error("export", "run", "model", code=2)
    assert line.startswith("error[E_USAGE]: unexpected argument 'model'") and "clipwright export --help" in line


@pytest.mark.parametrize("verb", ["report", "config schema", "config reference"])
def test_an_override_is_refused_by_a_verb_without_overrides(verb: str, cli: Any) -> None:
    arguments = ["train"] if verb == "config schema" else []
    line = cli.error(*verb.split(), *arguments, "optim.lr=1", code=2)
    assert line.startswith("error[E_USAGE]: unexpected argument 'optim.lr=1'") and f"clipwright {verb} --help" in line


def test_config_show_reads_a_command_line_as_its_verb_does(cli: Any) -> None:
    assert cli.json("config", "show", "export", "run")["run"] == "run"
    line = cli.error("config", "show", "train", "photos", "lr", code=2)
    assert line.startswith("error[E_USAGE]: unexpected argument 'lr'") and "clipwright train --help" in line


@pytest.mark.parametrize(("verb", "words"), [
    ("train", ["train", "--help"]),
    ("index build", ["help", "index", "build"]),
    ("report", ["report", "-h"]),
])  # fmt: skip
def test_help_shows_flags_examples_configs_and_keys(verb: str, words: list[str], cli: Any) -> None:
    spec = COMMANDS[verb]
    text = cli(*words).stdout
    for flag in OPTIONAL_FLAGS:
        assert (re.search(rf"\s{flag}\s", text) is not None) == spec.supports(flag), flag
    assert "--yes" not in text
    for example in spec.examples:
        assert f"\n  {example}\n" in text
    configs = {"train": "cifar10, photos", "index build": "flat"}
    assert (f"Shipped configs: {configs.get(verb)}" in text) == (verb in configs)
    if spec.kind is not None:
        assert f"clipwright config show {verb}" in text
        for key, field in outline.fields(spec.kind).items():
            written = rf"^{key}: " if field.section or (field.registry and not field.is_list) else rf"^ *{key} +"
            assert re.search(written + re.escape(field.doc.split()[0]), text, re.MULTILINE), key


def test_help_lists_keys_of_sections_with_their_descriptions(cli: Any) -> None:
    text = cli("help", "train").stdout
    assert re.search(r"^  optim\.lr +Peak learning rate\.$", text, re.MULTILINE)
    assert re.search(r"^  runtime\.activation_checkpointing\.image +Blocks of the image tower", text, re.MULTILINE)
    text = cli("help", "prep").stdout
    table = text.partition("with source.name=table:")[2]
    assert re.search(r"^  source\.path +Table file", table, re.MULTILINE)


def test_help_and_version_of_the_front_door(cli: Any) -> None:
    texts = {cli(*words).stdout for words in ([], ["help"], ["-h"], ["--help"])}
    assert len(texts) == 1 and "clipwright help COMMAND" in texts.pop()
    assert re.fullmatch(r"clipwright \d+\.\d+\.\d+\S*\n", cli("--version").stdout)


@pytest.mark.parametrize("spec", COMMANDS.values(), ids=lambda spec: spec.verb)
def test_every_verb_has_examples_that_name_it(spec: Command) -> None:
    assert spec.examples
    for example in spec.examples:
        assert f"clipwright {spec.verb}" in example
        flags = [argument for argument in shlex.split(example) if argument in OPTIONAL_FLAGS]
        assert all(spec.supports(flag) for flag in flags), example
