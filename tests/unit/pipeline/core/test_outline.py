"""Keys, presets and descriptions that are read from the source equal those of the imported classes."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest

from clipwright.cli import REGISTRIES
from clipwright.pipeline.core import outline
from clipwright.pipeline.core.command import COMMANDS, load_name
from clipwright.pipeline.core.config import choice_of, list_choice
from clipwright.pipeline.core.field_docs import field_docs
from clipwright.pipeline.core.values import bare_type

KINDS = sorted({command.kind for command in COMMANDS.values() if command.kind is not None})


@pytest.mark.parametrize("name", [name for names in REGISTRIES.values() for name in names])
def test_an_outlined_registry_equals_the_imported_one(name: str) -> None:
    registry = load_name(name)
    # Other tests may have loaded plugins in this process.
    entries = {
        preset: entry
        for preset, entry in registry.entries.items()
        if entry.config.__module__.startswith(f"{registry.package}.")
    }
    outlined = outline.registry(name)
    assert outlined.kind == registry.kind
    assert sorted(outlined.presets) == sorted(entries)
    for preset, entry in entries.items():
        family = outlined.family(preset)
        assert family is not None
        assert (family.family, family.source) == (entry.family, entry.source)
        assert family.config == f"{entry.config.__module__}:{entry.config.__qualname__}"
        assert list(outline.fields(family.config)) == [field.name for field in dataclasses.fields(entry.config)]


def _keys(kind: type[Any], place: str) -> Iterator[str]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        choice, section = choice_of(hints[field.name]), bare_type(hints[field.name])
        inner = f"{place}{field.name}"
        if choice is not None:
            for entry in choice.registry.families:
                if entry.config.__module__.startswith("clipwright."):
                    yield from _keys(entry.config, f"{inner}.")
        elif dataclasses.is_dataclass(section):
            yield from _keys(section, f"{inner}.")  # pyright: ignore[reportArgumentType]
        else:
            yield inner


@pytest.mark.parametrize("name", KINDS)
def test_outlined_keys_equal_those_of_the_imported_config(name: str) -> None:
    kind = load_name(name)
    assert set(outline.keys(name)) == set(_keys(kind, ""))
    hints = get_type_hints(kind, include_extras=True)
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        found = outline.fields(name)[field.name]
        missing = dataclasses.MISSING
        assert found.doc == docs[field.name]
        assert found.has_default == (field.default is not missing or field.default_factory is not missing)
        choice = choice_of(hints[field.name]) or list_choice(hints[field.name])
        assert (found.registry != "") == (choice is not None)
        if choice is not None:
            assert load_name(found.registry) is choice.registry and found.default == choice.default


def test_nothing_heavy_is_imported_for_help_lists_and_wrong_names() -> None:
    """One interpreter each: torch must not be loaded when these end."""
    code = (
        "import sys, contextlib; sys.argv[1:] = {words!r}\n"
        "from clipwright.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('loaded', [name for name in ('torch', 'numpy', 'pyarrow', 'PIL') if name in sys.modules])\n"
    )
    lines = [
        ["help", "train"],
        ["list", "losses"],
        ["doctor", "photos", "runtime.zer=1"],
        ["eval", "zeroshott"],
    ]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(words=words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for words in lines
    ]
    for words, child in zip(lines, children, strict=True):
        printed = child.communicate()[0]
        assert printed.rstrip().endswith("loaded []"), (words, printed[-200:])


def test_every_list_but_that_of_towers_is_read_from_the_source(cli: Any) -> None:
    assert {row["name"] for row in cli.json("list", "losses")["losses"]} == {"sigmoid", "softmax"}
    assert {(row["name"], row["family"]) for row in cli.json("list", "sources")["sources"]} == {
        ("folder", "folder"),
        ("scenes", "scenes"),
        ("table", "table"),
    }
    assert re.search(r"^softmax +softmax +loss +Radford", cli("list", "losses").stdout, re.MULTILINE)
