"""Class names and prompt templates: shipped sets (prompts/*.json), files, or lists in the config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest

Kind = Literal["classes", "templates"]

# A class: its name, then other names for it; the prompts of all of them are averaged.
Names = tuple[str, ...]


@dataclass(frozen=True)
class Shipped:
    """The sets of one origin, by name."""

    source: str
    classes: dict[str, list[Any]]
    templates: dict[str, list[str]]


@cache
def shipped() -> list[Shipped]:
    """What prompts/ holds."""
    folder = Path(str(resources.files("clipwright") / "eval" / "prompts"))
    trees = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [Shipped(tree["_source"], tree["classes"], tree["templates"]) for tree in trees]


def shipped_sets(kind: Kind) -> dict[str, list[Any]]:
    return {name: found for origin in shipped() for name, found in getattr(origin, kind).items()}


def listing() -> list[dict[str, Any]]:
    """One row a set: its name, how many classes and templates it has (None: not of that kind), where it is from."""
    return [
        {
            "name": name,
            "classes": len(origin.classes[name]) if name in origin.classes else None,
            "templates": len(origin.templates[name]) if name in origin.templates else None,
            "source": origin.source.split()[0],  # the file itself says the rest
        }
        for origin in shipped()
        for name in sorted(origin.classes.keys() | origin.templates.keys())
    ]


def load_classes(given: str | Sequence[Any]) -> list[Names]:
    """Classes in label order, from a shipped set's name, a file, or a list of names."""
    entries = _load("classes", given)
    if not entries:
        raise _refused("classes", "an empty list", "name at least one class")
    classes = [tuple(entry) if isinstance(entry, list) else (entry,) for entry in entries]
    for names in classes:
        if not names or not all(isinstance(name, str) for name in names):
            raise _refused("classes", f"{list(names)!r}, entry of {given}", "write a name or a list of names")
    return classes


def load_templates(given: str | Sequence[str]) -> list[str]:
    """Templates with one `{}` each for the class name, from a shipped set's name, a file, or a list.

    `{c}`, as CLIP_benchmark writes it, is read as `{}`. E_CONFIG_VALUE names one that has no place for the name.
    """
    templates = _load("templates", given)
    if not templates:
        raise _refused("templates", "an empty list", 'give at least one, such as "a photo of a {}"')
    for i, template in enumerate(templates):
        plain = template.replace("{c}", "{}") if isinstance(template, str) else ""
        if plain.count("{}") != 1:
            found = f"{template!r} has {plain.count('{}')} times {{}}, wanted once"
            raise _refused("templates", found, "write {} where the class name goes")
        templates[i] = plain
    return templates


def _load(kind: Kind, given: str | Sequence[Any]) -> list[Any]:
    if not isinstance(given, str):
        return list(given)
    if "/" in given or given.endswith((".json", ".txt")):
        return _read(kind, Path(given))
    sets = shipped_sets(kind)
    if given not in sets and "{}" in given:
        raise _refused(kind, f"the text {given!r}", f"write a list: benchmark.{kind}='[\"{given}\"]'")
    if given not in sets:
        raise ClipwrightError(
            "E_CONFIG_CHOICE",
            f"no shipped {kind} of this name",
            where=f"benchmark.{kind}: {given}",
            found=f"there are {len(sets)}: {', '.join(sets)}",
            fix=nearest(given, sets) or "see clipwright list prompts, or give a .json or .txt file, or a [list]",
        )
    return list(sets[given])


def _read(kind: Kind, path: Path) -> list[Any]:
    """A text file's lines, or a JSON file's list; a JSON object's list of that kind."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        tree = json.loads(text)
    except (OSError, ValueError) as error:
        raise _unread(kind, path, getattr(error, "strerror", None) or str(error)) from None
    found = tree.get(kind) if isinstance(tree, dict) else tree
    if not isinstance(found, list):
        raise _unread(kind, path, f"no list, nor an object with a list {kind!r}")
    return found


def _unread(kind: Kind, path: Path, found: str) -> ClipwrightError:
    fix = "write one a line in a .txt, or a list in a .json"
    return ClipwrightError("E_INPUT", f"{kind} that cannot be read", where=path, found=found, fix=fix)


def _refused(kind: Kind, found: str, fix: str) -> ClipwrightError:
    what = "a prompt template that cannot be filled" if kind == "templates" else "a class without a name"
    return ClipwrightError("E_CONFIG_VALUE", what, where=f"benchmark.{kind}", found=found, fix=fix)
