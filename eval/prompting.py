"""Class names and prompt templates: shipped sets (prompts/*.json), files, or lists; and the columns in a template."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.nearest import nearest

Kind = Literal["classes", "templates"]

# The names of one class: the name it is reported under, then its synonyms. The prompts of all names are averaged.
ClassNames = tuple[str, ...]


@dataclass(frozen=True)
class PromptFile:
    """The prompt sets of one file in prompts/, by name."""

    source: str
    classes: dict[str, list[Any]]
    templates: dict[str, list[str]]


@cache
def prompt_files() -> list[PromptFile]:
    folder = Path(str(resources.files("clipwright") / "eval" / "prompts"))
    trees = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [PromptFile(tree["_source"], tree["classes"], tree["templates"]) for tree in trees]


def shipped_sets(kind: Kind) -> dict[str, list[Any]]:
    """Returns the shipped sets of classes or of templates by name."""
    return {name: entries for file in prompt_files() for name, entries in getattr(file, kind).items()}


def list_prompt_sets() -> list[dict[str, Any]]:
    """Returns one row per shipped set: `name`, the number of `classes` and `templates` (None if absent), `source`."""
    rows = []
    for file in prompt_files():
        for name in sorted(file.classes.keys() | file.templates.keys()):
            rows.append(
                {
                    "name": name,
                    "classes": len(file.classes[name]) if name in file.classes else None,
                    "templates": len(file.templates[name]) if name in file.templates else None,
                    "source": file.source.split()[0],  # the address; the file adds license and date
                }
            )
    return rows


def load_classes(given: str | Sequence[Any]) -> list[ClassNames]:
    """Returns classes in label order, from the name of a shipped set, a file, or a list of names."""
    entries = _load("classes", given)
    if not entries:
        raise _invalid("classes", "an empty list", "name at least one class")
    classes = [tuple(entry) if isinstance(entry, list) else (entry,) for entry in entries]
    for names in classes:
        if not names or not all(isinstance(name, str) for name in names):
            raise _invalid("classes", f"the entry {list(names)!r} in {given}", "write a name or a list of names")
    return classes


def load_templates(given: str | Sequence[str]) -> list[str]:
    """Returns templates with one `{}` for the class name, from the name of a shipped set, a file, or a list.

    `{c}`, which CLIP_benchmark uses, is read as `{}`. Raises E_CONFIG_VALUE for a template without a placeholder.
    """
    templates = _load("templates", given)
    if not templates:
        raise _invalid("templates", "an empty list", 'give at least one, such as "a photo of a {}"')
    for i, template in enumerate(templates):
        plain = template.replace("{c}", "{}") if isinstance(template, str) else ""
        if plain.count("{}") != 1:
            found = f"{template!r} has {format_count(plain.count('{}'), 'placeholder')} {{}} (allowed: 1)"
            raise _invalid("templates", found, "write {} where the class name goes")
        templates[i] = plain
    return templates


def template_columns(template: str) -> list[str]:
    """Returns the columns that a template names as `{column}`, each once. Raises ValueError with what is wrong."""
    columns: dict[str, None] = {}
    for _, name, format_spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or format_spec or conversion:
            raise ValueError(f"{name!r} is not a plain column name")
        columns[name] = None
    if not columns:
        raise ValueError("it names no column")
    return list(columns)


def _load(kind: Kind, given: str | Sequence[Any]) -> list[Any]:
    if not isinstance(given, str):
        return list(given)
    if "/" in given or given.endswith((".json", ".txt")):
        return _read(kind, Path(given))
    sets = shipped_sets(kind)
    if given in sets:
        return list(sets[given])
    if "{}" in given:
        raise _invalid(kind, f"the text {given!r}", f"write a list: benchmark.{kind}='[\"{given}\"]'")
    raise ClipwrightError(
        "E_CONFIG_CHOICE",
        f"no shipped set of {kind} has this name",
        where=f"benchmark.{kind}: {given}",
        found=f"shipped sets: {', '.join(sets)}",
        fix=nearest(given, sets) or "see `clipwright list prompts`, or give a .json or .txt file, or a [list]",
    )


def _read(kind: Kind, path: Path) -> list[Any]:
    """Returns the lines of a text file, a JSON list, or the list under `kind` of a JSON object."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        tree = json.loads(text)
    except (OSError, ValueError) as error:
        raise _unreadable(kind, path, getattr(error, "strerror", None) or str(error)) from None
    entries = tree.get(kind) if isinstance(tree, dict) else tree
    if not isinstance(entries, list):
        raise _unreadable(kind, path, f"neither a list nor an object with a list {kind!r}")
    return entries


def _unreadable(kind: Kind, path: Path, found: str) -> ClipwrightError:
    fix = "write one per line in a .txt file, or a list in a .json file"
    return ClipwrightError("E_INPUT", f"the file of {kind} cannot be read", where=path, found=found, fix=fix)


def _invalid(kind: Kind, found: str, fix: str) -> ClipwrightError:
    what = "the prompt templates are not valid" if kind == "templates" else "the classes are not valid"
    return ClipwrightError("E_CONFIG_VALUE", what, where=f"benchmark.{kind}", found=found, fix=fix)
