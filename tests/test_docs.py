"""README, docs and the examples of --help: commands are valid, links lead to files, pages stay short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import check_command

import clipwright.cli  # noqa: F401  registers the verbs
from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.core.errors import ClipwrightError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> Iterator[str]:
    """Yields the complete `clipwright` commands in code blocks and in inline code."""
    lines = re.findall(r"^(?:    |\$ )(.+)$", text, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", text)
    for line in lines + spans:
        command = line.split(" | ")[0].split("  #")[0].split(" > ")[0].strip()
        match = re.match(r"(?:torchrun [^|]*-m )?clipwright ([a-z].*)", command)
        if match and "…" not in command and "VERB" not in command:
            yield match[1]


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
