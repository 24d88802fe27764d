"""README, docs and the examples of --help: commands are valid, links lead to files, pages stay short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipwright.cli  # noqa: F401  registers the verbs
from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.launch.plan import split

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = {"--dry-run": "dry_run", "--fresh": "fresh", "--json": "json", "--quiet": "quiet", "--debug": "debug"}


def commands(text: str) -> Iterator[str]:
    """Yields the complete `clipwright` commands in code blocks and in inline code."""
    lines = re.findall(r"^(?:    |\$ )(.+)$", text, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", text)
    for line in lines + spans:
        command = line.split(" | ")[0].split("  #")[0].split(" > ")[0].strip()
        match = re.match(r"(?:torchrun [^|]*-m )?clipwright ([a-z].*)", command)
        if match and "…" not in command and "VERB" not in command:
            yield match[1]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_valid(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        check_command(line)


def test_examples_of_help_are_valid() -> None:
    examples = [example for command in COMMANDS.values() for example in command.examples]
    assert len(examples) >= len([command for command in COMMANDS.values() if command.kind is not None])
    for example in examples:
        for line in commands(f"    {example}"):
            check_command(line)


def test_commands_are_found_and_wrong_ones_are_refused() -> None:
    text = "text `clipwright list towers` text\n\n    clipwright train photos data.train=D -o R | tee log  # note\n"
    assert list(commands(text)) == ["train photos data.train=D -o R", "list towers"]
    for line in ("trian photos", "train photoss", "train photos data.trian=D", "search I --fresh", "train a b"):
        with pytest.raises((AssertionError, ClipwrightError)):
            check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))  # a pattern in code is no link
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+://", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_and_contributing_are_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 120
