"""Embedding folders: float16 unit rows, a table of the rows they belong to, and the hashes that bind the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.unsafe import refuse_code, unsafe
from clipwright.pipeline.folders.records import MANIFEST, check_files, read_manifest

BLOCK_ROWS = 1 << 16  # embeddings that are held as float32 at a time
EMBED_AGAIN = "restore the folder, or run `clipwright embed` again with --fresh"
# What the manifest states, and what it states of each part.
_MANIFEST = {"fingerprint": str, "identity": dict, "dimension": int, "rows": int, "samples": int, "parts": list}
_PART = {"name": str, "samples": int, "rows": int, "binding": str}
_IDENTITY = ("model", "data", "what", "part_samples")


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def binding(identity: Mapping[str, Any], first: int, rows: pa.Table, embeddings_sha256: str) -> str:
    """Returns the hash that binds the rows of a part to its embeddings.

    It covers the model, the dataset, the position of the part's first sample in the dataset, the keys and captions of
    the rows in order, and the SHA-256 of the file of embeddings.
    """
    columns = [rows["key"].to_pylist(), rows["caption"].to_pylist()]
    return digest([dict(identity), first, columns, embeddings_sha256])


def fingerprint(body: Mapping[str, Any]) -> str:
    """Returns the fingerprint of an embedding folder: a hash of its manifest without the sizes of files."""
    files = {name: entry["sha256"] for name, entry in body["files"].items()}
    stated = {name: body[name] for name in ("identity", "dimension", "rows", "samples", "parts")}
    return digest({**stated, "files": files})


@dataclass(frozen=True)
class EmbeddingPart:
    """One part of an embedding folder: its embeddings as stored, float16 (n, E), memory-mapped, and its row table."""

    embeddings: np.ndarray
    rows_path: Path

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """The table of the rows: `schema.EMBEDDING_SCHEMA`, and `metadata` if the user has own columns."""
        return pq.read_table(self.rows_path, columns=columns)


class Embeddings:
    """An embedding folder. Opening checks the manifest, then size and SHA-256 of every file, then every part.

    Raises E_INPUT, E_MANIFEST, E_EMBED_HASH, E_UNSAFE, and E_INDEX_ROWS for a part whose embeddings and rows are not
    those that were embedded together, and for parts that are missing or in another order.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        check_files(self.folder, self.manifest["files"], "E_EMBED_HASH")
        refuse_code(self.folder, "an embedding folder")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.rows: int = self.manifest["rows"]
        self.dimension: int = self.manifest["dimension"]
        self._check_parts()

    def parts(self) -> Iterator[EmbeddingPart]:
        """Yields all parts that have rows, in order."""
        for entry in self.manifest["parts"]:
            if entry["rows"]:
                yield self._open(entry)

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[np.ndarray]:
        """Yields all embeddings in order, as float32 unit rows (n, E) of at most `rows` rows."""
        for part in self.parts():
            for start in range(0, len(part.embeddings), rows):
                yield unit_rows(part.embeddings[start : start + rows])

    def _check_parts(self) -> None:
        """Checks that the parts are those that were embedded, in that order, each with its own rows."""
        first = rows = 0
        for number, entry in enumerate(self.manifest["parts"]):
            path = self.folder / f"{entry['name']}.npy"
            if entry["name"] != part_name(number):
                raise rows_error(path, f"it is listed in the place of {part_name(number)}", EMBED_AGAIN)
            if entry["rows"]:
                part = self._open(entry)
                stored = self.manifest["files"][path.name]["sha256"]
                if binding(self.identity, first, part.rows(["key", "caption"]), stored) != entry["binding"]:
                    samples = f"samples {first} to {first + entry['samples'] - 1}"
                    found = f"its keys, captions or embeddings are not those embedded together as {samples}"
                    raise rows_error(path, found, EMBED_AGAIN)
            first += entry["samples"]
            rows += entry["rows"]
        stated = (self.manifest["samples"], self.rows)
        if (first, rows) != stated:
            found = (
                f"its parts have {format_count(first, 'sample')} and {format_count(rows, 'row')}, the manifest states "
                f"{stated[0]:,} and {stated[1]:,}"
            )
            raise rows_error(self.folder, found, EMBED_AGAIN)
        if fingerprint(self.manifest) != self.fingerprint:
            found = "the fingerprint in the manifest is not that of its parts: the manifest was changed"
            raise rows_error(self.folder / MANIFEST, found, EMBED_AGAIN)

    def _open(self, entry: Mapping[str, Any]) -> EmbeddingPart:
        path = self.folder / f"{entry['name']}.npy"
        rows_path = path.with_suffix(".parquet")
        for file in (path, rows_path):
            if file.name not in self.manifest["files"]:
                raise rows_error(file, "the manifest lists no such file", EMBED_AGAIN)
        embeddings = _map_array(path)
        rows = _count_rows(rows_path)
        if embeddings.shape != (rows, self.dimension) or rows != entry["rows"] or embeddings.dtype != np.float16:
            found = (
                f"embeddings {embeddings.shape} {embeddings.dtype}, {format_count(rows, 'row')}; the manifest states "
                f"{format_count(entry['rows'], 'row')} of dimension {self.dimension}"
            )
            raise rows_error(path, found, EMBED_AGAIN)
        return EmbeddingPart(embeddings, rows_path)


def unit_rows(stored: np.ndarray) -> np.ndarray:
    """Returns stored float16 rows as float32 unit rows: rounding to float16 changed their length by up to 5e-4."""
    rows = stored.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_error(where: Path, found: str, fix: str) -> ClipwrightError:
    """E_INDEX_ROWS: embeddings and rows that do not belong together."""
    return ClipwrightError("E_INDEX_ROWS", "embeddings and rows do not match", where=where, found=found, fix=fix)


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder, "embedding")
    wrong = [name for name, kind in _MANIFEST.items() if not isinstance(manifest.get(name), kind)]
    files: Any = manifest.get("files")
    if not isinstance(files, dict) or not all(_has(entry, {"bytes": int, "sha256": str}) for entry in files.values()):
        wrong.append("files")
    if "parts" not in wrong and not all(_has(entry, _PART) for entry in manifest["parts"]):
        wrong.append("parts")
    if "identity" not in wrong:
        wrong += [f"identity.{name}" for name in _IDENTITY if name not in manifest["identity"]]
    if wrong:
        raise ClipwrightError(
            "E_MANIFEST",
            "the embedding manifest is malformed",
            where=folder / MANIFEST,
            found=f"missing or of the wrong type: {', '.join(wrong)}",
            fix=EMBED_AGAIN,
        )
    return manifest


def _has(entry: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())


def _map_array(path: Path) -> np.ndarray:
    """Memory-maps an npy file. Raises E_UNSAFE for an array of Python objects, which is a pickle."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if "object" in str(error).lower():  # NumPy names the dtype in its message
            raise unsafe(path, "a part of an embedding folder", str(error)) from None
        raise rows_error(path, str(error), EMBED_AGAIN) from None


def _count_rows(path: Path) -> int:
    """Returns the number of rows of a row table, which must have keys and captions."""
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise rows_error(path, str(error), EMBED_AGAIN) from None
    missing = {"key", "caption"} - set(metadata.schema.to_arrow_schema().names)
    if missing:
        raise rows_error(path, f"it has no column {', '.join(sorted(missing))}", EMBED_AGAIN)
    return metadata.num_rows


def canary_samples(samples: int, parts: int, minimum: int = 8) -> Sequence[int]:
    """Returns the samples of a dataset whose images an embedding folder keeps, ascending.

    There is at least one for each part of equal length, and at least `minimum`, evenly spread.
    """
    count = min(samples, max(minimum, parts))
    return [(2 * i + 1) * samples // (2 * count) for i in range(count)]
