"""The row table of an index version: what each id of the index refers to; and the rows chosen as canaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.folders.embeddings import EmbeddingPart, unit_rows
from clipwright.pipeline.folders.schema import CANARY, INDEX_ID, index_schema

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
            writer.write_table(rows.add_column(0, INDEX_ID, pa.array(ids)).select(schema.names).cast(schema))
            next_id += rows.num_rows
    return next_id


def read_rows(folder: Path) -> tuple[pa.Table, np.ndarray]:
    """Returns the row table of a version and its ids (N,) int64."""
    rows = pq.read_table(folder / ROWS)
    return rows, np.asarray(rows[INDEX_ID.name])


def choose_canaries(parts: Sequence[EmbeddingPart], what: str, first_id: int, count: int) -> pa.Table:
    """Returns up to `count` rows, evenly spread, with `id, key, caption, image` and float32 unit `embedding`.

    An index of images takes them from the rows whose image the embedding folder has, an index of captions from all.
    """
    sizes = [len(part.embeddings) for part in parts]
    candidates = np.concatenate([*_candidates(parts, what, sizes)])
    positions = candidates[np.unique(np.linspace(0, len(candidates) - 1, count).round().astype(np.int64))]
    tables: list[pa.Table] = []
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        chosen = positions[(positions >= start) & (positions < start + size)] - start
        if len(chosen):
            rows = part.rows(["key", "caption", *([CANARY] if what == "image" else [])]).take(chosen)
            columns = {
                INDEX_ID.name: pa.array(chosen + start + first_id),
                "key": rows["key"],
                "caption": rows["caption"],
                "image": rows[CANARY] if what == "image" else pa.nulls(len(chosen), pa.binary()),
                "embedding": pa.array(list(unit_rows(part.embeddings[chosen])), pa.list_(pa.float32())),
            }
            tables.append(pa.table(columns))
        start += size
    return pa.concat_tables(tables)


def _candidates(parts: Sequence[EmbeddingPart], what: str, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields the positions of the rows of each part that can be canaries."""
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        if what == "image":
            has_image = part.rows([CANARY])[CANARY].is_valid().to_numpy()
            yield start + np.flatnonzero(has_image)
        else:
            yield np.arange(start, start + size)
        start += size
