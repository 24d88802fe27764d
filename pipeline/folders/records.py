"""What a folder records of itself: manifest, hashes of its files, fingerprints, and where its inputs were."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, file_sha256, write_json
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import shorten
from clipwright.pipeline.folders.describe import wrong_kind
from clipwright.pipeline.folders.remote import is_remote

VERSION = 1
MANIFEST, ORIGIN = "manifest.json", "origin.json"
_SHOWN_CHARACTERS = 60  # of a value in an error


def write_manifest(folder: Path, kind: str, fingerprint: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `manifest.json`, the last file of a folder, which makes it complete. Returns the manifest."""
    manifest = {"format": kind, "version": VERSION, "fingerprint": fingerprint, **body}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Returns the manifest of a folder of format `kind`. Raises E_INPUT, E_MANIFEST, which name what `folder` is."""
    path = folder / MANIFEST
    if not path.is_file():
        raise wrong_kind(folder, kind)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ClipwrightError(
            "E_MANIFEST", "the manifest cannot be read", where=path, found=str(error), fix="make the folder again"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise wrong_kind(folder, kind)
    if manifest.get("version") != VERSION:
        raise ClipwrightError(
            "E_MANIFEST",
            "the folder has another version of its format",
            where=path,
            found=f"version {manifest.get('version')!r} (expected {VERSION})",
            fix="read it with the clipwright that wrote it, or make the folder again",
        )
    return manifest


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], code: str) -> None:
    """Compares files with a manifest's `{name: {bytes, sha256}}`; raises `code` for the first that differs."""
    for name, entry in files.items():
        found = file_difference(folder / name, entry)
        if found is not None:
            raise ClipwrightError(
                code,
                "the file does not match its manifest",
                where=folder / name,
                found=found,
                fix="restore it, or make the folder again",
            )


def file_difference(path: Path, entry: Mapping[str, Any]) -> str | None:
    """Returns how a file differs from its manifest entry `{bytes, sha256}`, or None."""
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{format_count(size, 'byte')}, the manifest states {entry['bytes']}"
    sha256 = file_sha256(path)
    if sha256 != entry["sha256"]:
        return f"SHA-256 {sha256[:16]}…, the manifest states {entry['sha256'][:16]}…"
    return None


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns `{name: {bytes, sha256}}` of files, for a manifest."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in sorted(names)
    }


class DatasetFingerprint:
    """Streaming SHA-256 over the content and the order of a dataset: keys, stored bytes, captions, ends of shards."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def sample(self, key: str, sha256: str, captions: list[str]) -> None:
        self._hash.update(f"{key}\t{sha256}\t{digest(captions)}\n".encode())

    def shard(self, samples: int) -> None:
        self._hash.update(f"#{samples}\n".encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Returns `key: old → new` for every leaf in which two identities differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            inner = f"{place}.{key}" if place else str(key)
            lines += differences(old.get(key), new.get(key), inner)
        return lines
    # Compared as JSON, which has no tuples.
    left = json.dumps(old, ensure_ascii=False, sort_keys=True)
    right = json.dumps(new, ensure_ascii=False, sort_keys=True)
    if left == right:
        return []
    return [f"{place}: {shorten(left, _SHOWN_CHARACTERS)} → {shorten(right, _SHOWN_CHARACTERS)}"]


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
