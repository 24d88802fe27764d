"""Output folders: which may be written into, and where what they were made from lies."""

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
    """Writes `origin.json`: where inputs lay, relative to `folder`, for readers that want to find them again.

    Not part of any identity: a moved folder is the same folder, only its inputs must then be named.
    """
    found = {
        name: str(place) if is_remote(str(place)) else os.path.relpath(Path(place).resolve(), folder.resolve())
        for name, place in places.items()
    }
    write_json(folder / ORIGIN, found)


def read_origin(folder: Path) -> dict[str, str]:
    """Name → path or address of what `folder` was made from, as recorded; empty if nothing was."""
    try:
        places = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        name: place if is_remote(place) else os.path.normpath(folder.resolve() / place)
        for name, place in places.items()
    }
