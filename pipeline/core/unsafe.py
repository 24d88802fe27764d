"""Refuses files that could run code when a library opens them: recognized by name and first bytes, never opened."""

from __future__ import annotations

from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError

# Pickles, as torch, transformers and scikit-learn write them.
SUFFIXES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill"))
CODE = frozenset((".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"))
_HEAD_BYTES = 16


def kind_of(head: bytes) -> str:
    """Returns what a file that starts with `head` is if it can run code, else an empty string."""
    # A safetensors file whose header is 640 bytes long starts like a pickle, but has a brace after the length.
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and head[8:9] != b"{":
        return "a pickle"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, as torch writes pickles"
    if head.startswith((b"\x7fELF", b"MZ")):
        return "a program"
    return ""


def refuse_code(folder: Path, what: str) -> None:
    """Raises E_UNSAFE if an untrusted folder holds a file that can run code, even one that would never be read."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            refuse_file(path, what)


def refuse_file(path: Path, what: str) -> None:
    """Raises E_UNSAFE if an untrusted file can run code."""
    if path.suffix.lower() in SUFFIXES | CODE:
        raise unsafe(path, what, f"the file name ends in {path.suffix}")
    with path.open("rb") as file:
        kind = kind_of(file.read(_HEAD_BYTES))
    if kind:
        raise unsafe(path, what, f"the file is {kind}")


def unsafe(where: object, what: str, found: str) -> ClipwrightError:
    """Returns the error for `what`, a noun with its article, that could run code."""
    return ClipwrightError(
        "E_UNSAFE",
        f"{what} could run code",
        where=where,
        found=f"{found}; only data is read: safetensors, npy, parquet, JSON",
        fix="remove the file or make the folder again; convert weights on a machine where you trust them",
    )
