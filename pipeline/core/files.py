"""Canonical JSON, hashes and atomic writes."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # ends the names of staged files and folders


def canonical_json(value: Any) -> str:
    """Returns JSON with sorted keys, separators `,` `:`, no NaN, floats by repr: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Returns the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk: renames in a folder then survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def staged_path(final: Path) -> Path:
    """Where a file or folder is written until it is complete; hidden, so that no pattern such as `*.tar` matches it."""
    return final.with_name(f".{final.name}{PARTIAL}")


def is_staged(name: str) -> bool:
    """Whether a name is that of a staged file or folder."""
    return name.startswith(".") and name.endswith(PARTIAL)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a complete file or leaves the old one: staged file, fsync, rename."""
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with staged.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        fsync_path(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """Returns indented JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text(value)` to a file, atomically."""
    atomic_write(path, json_text(value))
