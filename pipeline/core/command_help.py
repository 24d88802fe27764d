"""`clipwright VERB --help`: after the flags, example commands, the config keys, and where all of them are listed."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from clipwright.pipeline.core.field_docs import unimported_docs

if TYPE_CHECKING:
    from clipwright.pipeline.core.command import Command


class VerbCommand(TyperCommand):
    """A verb whose help ends with `help_text`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        typer.echo(help_text(ctx.obj))  # its `Command`


def help_text(command: Command) -> str:
    """Examples and config keys of a verb; nothing heavy is imported for it."""
    lines: list[str] = []
    if command.examples:
        lines += ["Examples:", *(f"  {example}" for example in command.examples), ""]
    if command.kind is not None:
        docs = unimported_docs(command.kind)
        width = max(len(name) for name in docs)
        lines += ["Config keys and sections:"]
        lines += [f"  {name:<{width}}  {text}".rstrip() for name, text in docs.items()]
        lines += ["", *_where_keys_are_listed(command)]
    return "\n".join(lines)


def _where_keys_are_listed(command: Command) -> list[str]:
    from clipwright.pipeline.core.config_files import shipped_configs  # noqa: PLC0415

    names = sorted(shipped_configs().get(command.config_folder, {}))
    if not names or command.subject is not None:
        return [f"All keys and their values: clipwright config show {command.verb}"]
    return [
        f"All keys and their values: clipwright config show {command.verb} NAME",
        *textwrap.wrap(f"NAME: {', '.join(names)}", 100, initial_indent="  ", subsequent_indent="    "),
    ]
