"""Folder formats: manifests, status files, fingerprints, and atomic writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import canonical_json, file_sha256, write_json

VERSION = 1
MANIFEST, ORIGIN = "manifest.json", "origin.json"


def write_manifest(folder: Path, kind: str, fingerprint: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `manifest.json`, the last file of a folder: with it the folder is whole, without it it is not."""
    manifest = {"format": kind, "version": VERSION, "fingerprint": fingerprint, **body}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder of format `kind`; E_INPUT, E_MANIFEST say what else was found."""
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise ClipwrightError("E_INPUT", f"no {kind} folder", where=folder, found=found, fix="check the path")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ClipwrightError(
            "E_MANIFEST",
            f"a {kind} folder without manifest",
            where=folder,
            found=f"no manifest.json: it is no {kind} folder, or the command that writes it did not finish",
            fix="check the path, or run that command again; it goes on where it stopped",
        ) from None
    except (OSError, ValueError) as error:
        raise ClipwrightError(
            "E_MANIFEST", "a manifest that cannot be read", where=path, found=str(error), fix="make the folder again"
        ) from None
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (kind, VERSION):
        raise ClipwrightError(
            "E_MANIFEST",
            "a folder of another format",
            where=path,
            found=f"format {found[0]!r} version {found[1]!r}, wanted {kind!r} version {VERSION}",
            fix=f"give a {kind} folder",
        )
    return manifest


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], code: str) -> None:
    """Compares files with a manifest's `{name: {bytes, sha256}}`; raises `code` at the first that differs."""
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "the file is missing" if size is None else f"{size} bytes, the manifest says {entry['bytes']}"
        elif (sha256 := file_sha256(path)) != entry["sha256"]:
            found = f"sha256 {sha256[:16]}…, the manifest says {entry['sha256'][:16]}…"
        else:
            continue
        raise ClipwrightError(
            code, "a file that is not what its manifest says", where=path, found=found, fix="restore or make it again"
        )


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`{name: {bytes, sha256}}` of files, for a manifest."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in sorted(names)
    }


class DatasetFingerprint:
    """Streaming SHA-256 over what is in a dataset and in which order: keys, stored bytes, captions, shard ends."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def sample(self, key: str, sha256: str, captions: list[str]) -> None:
        texts = hashlib.sha256(canonical_json(captions).encode()).hexdigest()
        self._hash.update(f"{key}\t{sha256}\t{texts}\n".encode())

    def shard(self, samples: int) -> None:
        self._hash.update(f"#{samples}\n".encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """`key: old → new` for every leaf in which two identities differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
        ]
    # By their JSON: tuples and lists are one thing once written.
    left, right = (json.dumps(value, ensure_ascii=False, sort_keys=True) for value in (old, new))
    return [] if left == right else [f"{place}: {_short(left)} → {_short(right)}"]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
