"""Reader of embedding folders: float16 unit rows, and a table of the rows they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.unsafe import refuse_code, unsafe
from clipwright.pipeline.folders.records import check_files, read_manifest

BLOCK_ROWS = 1 << 16  # embeddings that are held as float32 at a time
EMBED_AGAIN = "run `clipwright embed` again with --fresh"


@dataclass(frozen=True)
class EmbeddingPart:
    """One part of an embedding folder: its embeddings as stored, float16 (n, E), memory-mapped, and its row table."""

    embeddings: np.ndarray
    rows_path: Path

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """The table of the rows: `schema.EMBEDDING_SCHEMA`, and `metadata` if the user has own columns."""
        return pq.read_table(self.rows_path, columns=columns)


class Embeddings:
    """An embedding folder. Opening checks the manifest, then size and SHA-256 of every file.

    Raises E_INPUT, E_MANIFEST, E_EMBED_HASH, E_UNSAFE, and E_INDEX_ROWS for a part whose embeddings and rows do not
    match.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_manifest(self.folder, "embedding")
        check_files(self.folder, self.manifest["files"], "E_EMBED_HASH")
        refuse_code(self.folder, "an embedding folder")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.rows: int = self.manifest["rows"]
        self.dimension: int = self.manifest["dimension"]

    def parts(self) -> list[EmbeddingPart]:
        """All parts that have rows, in order."""
        names = sorted(name for name in self.manifest["files"] if name.endswith(".npy"))
        return [self._part(self.folder / name) for name in names]

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[np.ndarray]:
        """Yields all embeddings in order, as float32 unit rows (n, E) of at most `rows` rows."""
        for part in self.parts():
            for start in range(0, len(part.embeddings), rows):
                yield unit_rows(part.embeddings[start : start + rows])

    def _part(self, path: Path) -> EmbeddingPart:
        rows_path = path.with_suffix(".parquet")
        embeddings = _map_array(path)
        rows = pq.read_metadata(rows_path).num_rows
        if embeddings.shape != (rows, self.dimension):
            found = (
                f"embeddings {embeddings.shape}, {format_count(rows, 'row')}, dimension {self.dimension} "
                "in the manifest"
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


def _map_array(path: Path) -> np.ndarray:
    """Memory-maps an npy file. Raises E_UNSAFE for an array of Python objects, which is a pickle."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if "object" in str(error).lower():  # NumPy names the dtype in its message
            raise unsafe(path, "a part of an embedding folder", str(error)) from None
        raise rows_error(path, str(error), EMBED_AGAIN) from None
