"""The reference of all config keys as Markdown: what `clipwright config reference` prints and docs/configs.md holds."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from clipwright.pipeline.core.command import Command
from clipwright.pipeline.core.config import Choice, choice_of, list_choice
from clipwright.pipeline.core.field_docs import field_docs
from clipwright.pipeline.core.type_text import type_text
from clipwright.pipeline.core.values import bare_type
from clipwright.pipeline.core.written_yaml import inline_yaml

HEADER = """\
# Config reference

Every key of every command's config: `clipwright VERB CONFIG section.key=value`. This page is the output of
`clipwright config reference`; `clipwright config show VERB CONFIG` prints the values of one config and where each was
set, and `clipwright config schema VERB` its JSON schema for editors.

Each config also takes `plugins`, a list of Python files that register further towers, losses, sources and so on.
A section that is chosen by `name` (`image: {name: vit_nano}`) starts with the values of that preset; a default in the
tables below is what a preset leaves unset.

The type of a key decides how its value is read, in files and on the command line. Text stays as it was written: `no`,
`007`, `12:30`. A number may be written in any notation: `0.001`, `1e-3`, `1_000`, `0x10`; leading zeros do not change
it. True is `true`, `yes`, `on` or `1`, and false `false`, `no`, `off` or `0`. A list is `[a, b]`, a mapping `{a: 1}`.
`null` and `~` mean no value where a key allows `null`. Where any type is allowed, `true`, `false`, `null` and plain
numbers such as 12 or 0.5 are what they look like, and all else is text.
"""


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    type: str
    default: str
    meaning: str


def reference(commands: Mapping[str, Command]) -> str:
    """Returns the complete page; the same text on every call."""
    blocks = [HEADER]
    described: dict[str, str] = {}  # config → the verb under which its keys are listed
    for verb, command in sorted(commands.items()):
        if command.kind is None:
            continue
        blocks.append(f"## {verb}\n")
        owner = commands.get(command.config_folder)
        if owner is not None and owner.kind == command.kind:
            described.setdefault(command.kind, owner.verb)
        same = described.setdefault(command.kind, verb)
        if same == verb:
            blocks += _section(command.load_kind(), place="", level=3)
        else:
            blocks.append(f"The same keys as [{same}](#{same.replace(' ', '-')}).\n")
    return "\n".join(blocks).rstrip("\n") + "\n"


def missing_docs(commands: Mapping[str, Command]) -> list[str]:
    """Returns `module.Class.field` of every config field without a description."""
    missing: set[str] = set()
    for command in commands.values():
        if command.kind is not None:
            for config in _classes(command.load_kind()):
                documented = field_docs(config)
                for field in dataclasses.fields(config):
                    if not documented.get(field.name):
                        owner = _owner(config, field.name)
                        missing.add(f"{owner.__module__}.{owner.__qualname__}.{field.name}")
    return sorted(missing)


def _owner(config: type[Any], field: str) -> type[Any]:
    """Returns the class that declares a field."""
    return next(base for base in config.__mro__ if field in inspect.get_annotations(base))


def _classes(config: type[Any]) -> Iterator[type[Any]]:
    """Yields a config class and all classes of its sections, as they are written in the source."""
    yield config
    for hint in get_type_hints(config, include_extras=True).values():
        choice = choice_of(hint) or list_choice(hint)
        if choice is not None:
            for entry in choice.registry.families:
                yield from _classes(entry.config)
        for section in _sections_in(hint):
            yield from _classes(section)


def _section(config: type[Any], place: str, level: int) -> list[str]:
    """Returns a table of the plain keys of a section, then its sub-sections."""
    hints = get_type_hints(config, include_extras=True)
    plain: list[Key] = []
    below: list[str] = []
    docs = field_docs(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        inner = f"{place}.{field.name}" if place else field.name
        meaning = docs.get(field.name, "")
        choice = choice_of(hint)
        if choice is not None:
            below += _choice_section(choice, bare_type(hint), inner, meaning, level)
        elif dataclasses.is_dataclass(bare_type(hint)):
            below += [_heading(inner, level), *_paragraph(meaning), *_section(bare_type(hint), inner, level)]
        else:
            plain.append(Key(inner, type_text(hint), _default(field), meaning))
            for section in _sections_in(hint):
                below += [_heading(f"{inner}[]", level), *_section(section, f"{inner}[]", level)]
            if (element := list_choice(hint)) is not None:
                below += _choice_section(element, bare_type(get_args(hint)[0]), f"{inner}[]", "", level)
    return [*_table(plain), *below]


def _choice_section(choice: Choice, base: Any, place: str, meaning: str, level: int) -> list[str]:
    """Returns the keys of every family of a registry: first the shared ones, then those of each family."""
    kind = choice.registry.kind
    default = f"`{choice.default}`" if choice.default is not None else "required"
    blocks = [_heading(place, level), *_paragraph(meaning)]
    name_key = Key(f"{place}.name", "one of the presets below", default, f"Preset of the {kind}.")
    shared: set[str] = set()
    keys = [name_key]
    if dataclasses.is_dataclass(base):
        shared = {field.name for field in dataclasses.fields(base)}
        keys += [key for key in _keys(base, place) if key.name != name_key.name]
    blocks += _table(keys)
    for entry in sorted(choice.registry.families, key=lambda entry: entry.family):
        own = [field.name for field in dataclasses.fields(entry.config) if field.name not in shared | {"name"}]
        names = ", ".join(f"`{name}`" for name in entry.presets)
        blocks.append(_heading(f"{place}, family {entry.family}", level + 1))
        blocks += _paragraph(f"Presets: {names}." + (f" Source: {entry.source}." if entry.source else ""))
        blocks += _table([key for key in _keys(entry.config, place) if key.name.rpartition(".")[2] in own])
        hints = get_type_hints(entry.config, include_extras=True)
        for name in own:
            if dataclasses.is_dataclass(bare_type(hints[name])):
                inner = f"{place}.{name}"
                blocks += [_heading(inner, level + 2), *_section(bare_type(hints[name]), inner, level + 2)]
    return blocks


def _keys(config: Any, place: str) -> list[Key]:
    """Returns the keys of a class that are not sections."""
    hints = get_type_hints(config, include_extras=True)
    docs = field_docs(config)
    return [
        Key(f"{place}.{field.name}", type_text(hints[field.name]), _default(field), docs.get(field.name, ""))
        for field in dataclasses.fields(config)
        if not dataclasses.is_dataclass(bare_type(hints[field.name]))
    ]


def _heading(text: str, level: int) -> str:
    return f"{'#' * level} {text}\n"


def _paragraph(text: str) -> list[str]:
    return [f"{text}\n"] if text else []


def _table(keys: Iterable[Key]) -> list[str]:
    rows = [f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(key.meaning)} |" for key in keys]
    if not rows:
        return []
    return ["\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{_yaml(field.default_factory())}`"
    return "required"


def _yaml(value: Any) -> str:
    return inline_yaml(list(value) if isinstance(value, tuple) else value)


def _sections_in(hint: Any) -> Iterator[type[Any]]:
    """Yields the config classes within a type: a section, or the elements of a list of sections."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if choice_of(hint) is None:
            yield from _sections_in(arguments[0])
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    elif origin is not Literal:
        for argument in arguments:
            yield from _sections_in(argument)
