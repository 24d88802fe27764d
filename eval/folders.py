"""Output folders: which of them may be written to, and the paths of the inputs they were made from."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Sequence
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import STATUS, write_json
from clipwright.pipeline.folders.remote import is_remote

CONFIG, ORIGIN = "config.yaml", "origin.json"


def claim(folder: Path, own: Sequence[str]) -> None:
    """Makes `folder`, or refuses one that holds a name that is not among the patterns `own` (E_OUTPUT).

    Whoever writes `-o .` by mistake keeps what lies there.
    """
    if folder.exists() and not folder.is_dir():
        raise _refused(folder, "a file")
    folder.mkdir(parents=True, exist_ok=True)
    allowed = (STATUS, CONFIG, ORIGIN, "*.partial", *own)
    for entry in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in allowed):
            raise _refused(folder, f"it holds {entry.name}")


def _refused(folder: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_OUTPUT", "an output folder that holds something else", where=folder, found=found, fix="name a new folder"
    )


def write_origin(folder: Path, **places: str | Path) -> None:
    """Writes `origin.json`: the paths of the inputs, relative to `folder`, so that later commands find them.

    It is not part of any identity: a moved folder stays the same, but its inputs must then be named.
    """
    recorded = {}
    for name, place in places.items():
        if is_remote(str(place)):
            recorded[name] = str(place)
        else:
            recorded[name] = os.path.relpath(Path(place).resolve(), folder.resolve())
    write_json(folder / ORIGIN, recorded)


def read_origin(folder: Path) -> dict[str, str]:
    """Returns the recorded inputs of `folder`: name → path or address. Empty if none are recorded."""
    try:
        places = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        name: place if is_remote(place) else os.path.normpath(folder.resolve() / place)
        for name, place in places.items()
    }
