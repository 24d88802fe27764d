"""Command lines that name no verb of ours, and flags that do not exist: what was probably meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clipwright.pipeline.core import outline
from clipwright.pipeline.core.command import Command
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.hints import flag_hint
from clipwright.pipeline.core.nearest import nearest

# What other tools and habit call the verbs.
VERBS = {
    "prepare": "prep",
    "preprocess": "prep",
    "convert": "prep",
    "download": "prep",
    "verify": "data verify",
    "stats": "data stats",
    "view": "data view",
    "fit": "train",
    "finetune": "train",
    "pretrain": "train",
    "resume": "train",
    "evaluate": "eval",
    "benchmark": "eval",
    "test": "eval",
    "zeroshot": "eval zeroshot",
    "retrieval": "eval retrieval",
    "inference": "embed",
    "encode": "embed",
    "build": "index build",
    "query": "search",
    "save": "export",
    "check": "doctor",
    "version": "--version",
}


def verb_of(words: Sequence[str], commands: Mapping[str, Command]) -> str:
    """Returns the verb that a command line starts with, of one or two words; empty if there is none."""
    for count in (2, 1):
        verb = " ".join(words[:count])
        if len(words) >= count and verb in commands:
            return verb
    return ""


def check_verb(words: Sequence[str], commands: Mapping[str, Command]) -> None:
    """Raises E_USAGE for a command line whose first words are no verb, with the nearest one."""
    groups = {verb.split()[0] for verb in commands if " " in verb}
    if not words or words[0].startswith("-") or verb_of(words, commands):
        return
    count = 1 if words[0] not in groups else 2
    if len(words) < count or words[count - 1].startswith("-"):
        return
    written = " ".join(words[:count])
    prefix = f"{words[0]} " if count == 2 else ""
    known = [verb for verb in commands if verb.startswith(prefix)]
    firsts = list(dict.fromkeys(verb if count == 2 else verb.split()[0] for verb in known))
    meant = VERBS.get(written)
    raise ClipwrightError(
        "E_USAGE",
        "there is no command of this name",
        where=f"clipwright {written}",
        found=f"the commands are {', '.join(firsts)}",
        fix=(f"use clipwright {meant}" if meant else nearest(written, known)) or "clipwright --help describes them",
    )


def flag_error(flag: str, words: Sequence[str], commands: Mapping[str, Command]) -> ClipwrightError:
    """Returns E_USAGE for a flag that no command has, with the config key that does the same."""
    verb = verb_of(words, commands)
    command = commands.get(verb)
    kind = None if command is None else command.kind
    hint = "" if kind is None else flag_hint(flag, verb, outline.keys(kind))
    place = f"clipwright {verb}".strip()
    return ClipwrightError(
        "E_USAGE",
        "the flag does not exist",
        where=f"{place} {flag}",
        found="settings are written section.key=value",
        fix=hint or f"{place} --help lists flags and keys",
    )
