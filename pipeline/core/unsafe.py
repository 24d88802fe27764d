"""Files that can run code when a library opens them, told by their names and first bytes, and refused unopened."""

from __future__ import annotations

from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError

# Pickles as torch, transformers and scikit-learn write them; code itself.
SUFFIXES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill"))
CODE = frozenset((".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"))
_HEAD = 16  # bytes that are looked at


def kind_of(head: bytes) -> str:
    """What a file that begins with `head` is, if it can run code; else nothing."""
    # A safetensors file whose header is 640 bytes long begins like a pickle; behind the length stands its brace.
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and head[8:9] != b"{":
        return "a pickle"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, as torch writes pickles"
    return "a program" if head.startswith((b"\x7fELF", b"MZ")) else ""


def refuse_code(folder: Path, what: str) -> None:
    """E_UNSAFE if a folder that came from elsewhere holds a file that can run code, whether or not it would be read."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            refuse_file(path, what)


def refuse_file(path: Path, what: str) -> None:
    """The same for one file."""
    found = f"a file that ends in {path.suffix}" if path.suffix.lower() in SUFFIXES | CODE else ""
    if not found:
        with path.open("rb") as file:
            found = kind_of(file.read(_HEAD))
    if found:
        raise unsafe(path, what, found)


def unsafe(where: object, what: str, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_UNSAFE",
        f"{what} that could run code",
        where=where,
        found=f"{found}; only data is read: safetensors, npy, parquet, JSON",
        fix="take it away, or make the folder again; convert weights where you trust them",
    )
