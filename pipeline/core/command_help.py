"""`clipwright VERB --help`: after the flags, example commands, shipped configs, and the config keys."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from clipwright.pipeline.core import outline

if TYPE_CHECKING:
    from clipwright.pipeline.core.command import Command

MIN_WIDTH, MAX_WIDTH = 80, 100  # of a line


class VerbCommand(TyperCommand):
    """A verb whose help ends with `help_text`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        typer.echo(help_text(ctx.obj))  # its `Command`


def help_text(command: Command) -> str:
    """Examples, shipped configs and config keys of a verb; nothing heavy is imported for it."""
    lines: list[str] = []
    if command.examples:
        lines += ["Examples:", *(f"  {example}" for example in command.examples), ""]
    if command.kind is not None:
        lines += [
            *_shipped(command),
            "Config keys, written KEY=VALUE:",
            "",
            *_key_lines(command.kind),
            "",
            *_more(command),
        ]
    return "\n".join(lines)


def _key_lines(kind: str) -> list[str]:
    width = min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH)
    lines: list[str] = []
    for heading, rows in _sections(kind, "", ""):
        indent = "  " if heading else ""
        if heading:
            lines += ["", *textwrap.wrap(heading, width, subsequent_indent="  ")]
        column = max((len(key) for key, _ in rows), default=0)
        for key, doc in rows:
            margin = " " * (len(indent) + column + 2)
            start = f"{indent}{key:<{column}}  "
            lines += textwrap.wrap(doc, width, initial_indent=start, subsequent_indent=margin) or [start.rstrip()]
    return lines


def _sections(kind: str, place: str, heading: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields heading and keys of a config, then of each of its sections.

    Of a choice, these are the keys that all its families have, or the keys of each family if they have none in common.
    """
    inner: list[tuple[str, str, str]] = []
    rows: list[tuple[str, str]] = []
    for name, field in outline.fields(kind).items():
        key = f"{place}{name}"
        section = field.base if field.registry and not field.is_list else field.section
        if section:
            inner.append((section, f"{key}.", f"{key}: {field.doc}"))
        else:
            rows.append((key, field.doc))
        if field.registry and section and list(outline.fields(section)) == ["name"]:
            for family in outline.registry(field.registry).families:
                if list(outline.fields(family.config)) != ["name"]:
                    inner.append((family.config, f"{key}.", f"with {key}.name={family.presets[0]}:"))
    yield heading, [row for row in rows if not (heading.startswith("with ") and row[0] == f"{place}name")]
    for section in inner:
        yield from _sections(*section)


def _shipped(command: Command) -> list[str]:
    from clipwright.pipeline.core.config_files import shipped_configs  # noqa: PLC0415

    names = sorted(shipped_configs().get(command.config_folder, {}))
    if not names or command.subject is not None:
        return []
    text = f"Shipped configs: {', '.join(names)}"
    return [*textwrap.wrap(text, MIN_WIDTH, subsequent_indent="  "), ""]


def _more(command: Command) -> list[str]:
    """Where values, types and the keys of single families are shown."""
    name = " NAME" if _shipped(command) else ""
    return [
        f"Values and where each is set: clipwright config show {command.verb}{name}",
        "Types, limits and keys of single presets: clipwright config reference",
    ]
