"""The row table of an index version: what each id of the index refers to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.folders.embeddings import EmbeddingPart
from clipwright.pipeline.folders.schema import INDEX_ID, index_schema

ROWS = "rows-00000.parquet"


def write_rows(folder: Path, parts: Sequence[EmbeddingPart], first_id: int) -> int:
    """Writes the row tables of embedding parts to one table with a leading column `id`; returns the next free id.

    Ids are consecutive, in the order of `parts`, of which there must be at least one.
    """
    assert parts, "no rows to write"
    schema = index_schema(pq.read_schema(parts[0].rows_path))
    next_id = first_id
    with pq.ParquetWriter(folder / ROWS, schema) as writer:
        for part in parts:
            rows = part.rows()
            ids = np.arange(next_id, next_id + rows.num_rows, dtype=np.int64)
            writer.write_table(rows.add_column(0, INDEX_ID, pa.array(ids)).cast(schema))
            next_id += rows.num_rows
    return next_id


def read_rows(folder: Path) -> tuple[pa.Table, np.ndarray]:
    """Returns the row table of a version and its ids (N,) int64."""
    rows = pq.read_table(folder / ROWS)
    return rows, np.asarray(rows[INDEX_ID.name])
