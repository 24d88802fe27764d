"""The columns of every table that we write: sidecars, rejects, embedding rows and index rows; and their bytes."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

SIDECAR_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the plan
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("offset", pa.int64()),  # of the image member's data in the tar
        ("size", pa.int64()),  # of the stored image in bytes
        ("sha256", pa.string()),  # of the stored image
        ("dhash", pa.uint64()),
        ("source", pa.string()),
        ("source_key", pa.string()),
    ]
)
"""A sidecar: one row per sample, in the order of the tar. The user's own columns follow."""

# What KEY.json repeats of the sidecar's row, beside the user's columns.
JSON_COLUMNS = ("key", "captions", "width", "height", "sha256", "source", "source_key")

# The columns without which a sidecar is not valid.
SIDECAR_REQUIRED = ("row", *JSON_COLUMNS, "offset", "size")

REJECTS_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("kept_row", pa.int64()),
        ("kept_key", pa.string()),
        ("record", pa.string()),  # JSON of a merged or duplicate row
    ]
)
"""`rejects.parquet`: one row per row of the plan that is in no sidecar."""

BLANK = "blank"  # rule: all pixels have one color, as those of a transparent image have
DECISIONS_SCHEMA = pa.schema(
    [("key", pa.string()), ("rule", pa.string()), ("value", pa.string()), ("keep", pa.bool_())]
)
"""`decisions.parquet`: what soft rules found in samples, which are kept. Only there if a rule found something."""


def sidecar_schema(own: pa.Schema) -> pa.Schema:
    """A sidecar with the user's columns `own`, which are renamed as `user_columns` does."""
    return pa.schema([*SIDECAR_SCHEMA, *user_columns(own)])


def user_columns(schema: pa.Schema) -> pa.Schema:
    """A source's columns as the sidecar names them: `input_` is put before a name that the sidecar uses itself."""
    taken = {*SIDECAR_SCHEMA.names, *schema.names}
    fields: list[pa.Field] = []
    for field in schema:
        name = field.name
        if name in SIDECAR_SCHEMA.names:
            while name in taken:
                name = f"input_{name}"
            taken.add(name)
        fields.append(pa.field(name, field.type))
    return pa.schema(fields)


EMBEDDING_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),  # the embedded caption; for images the first
        ("captions", pa.list_(pa.string())),
        ("tar", pa.string()),  # as the dataset's manifest names it
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source", pa.string()),
        ("source_key", pa.string()),  # the image's name in the input of preparation
        ("canary", pa.binary()),  # of a few images: the stored bytes, from which the embedding can be computed again
    ]
)
"""The row table of an embedding part: one row per embedding. The user's own columns follow as the struct `metadata`."""

METADATA, CANARY = "metadata", "canary"
INDEX_ID = pa.field("id", pa.int64())

CANARY_SCHEMA = pa.schema(
    [
        INDEX_ID,
        ("top1", pa.int64()),  # the id that a search for the row's embedding finds first
        ("key", pa.string()),
        ("caption", pa.string()),
        ("image", pa.binary()),  # the stored bytes; null in an index of captions
        ("embedding", pa.list_(pa.float32())),  # as the embedding folder has it
    ]
)
"""`canaries.parquet` of an index version: rows whose embeddings the model computes again when the index is opened."""


def own_columns(sidecar: pa.Schema) -> list[pa.Field]:
    """The user's own columns in a sidecar."""
    return [field for field in sidecar if field.name not in SIDECAR_SCHEMA.names]


def index_schema(embedding_rows: pa.Schema) -> pa.Schema:
    """The row table of an index version: an embedding's row with its id in the index. Canaries have their own table."""
    return pa.schema([INDEX_ID, *(field for field in embedding_rows if field.name != CANARY)])


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a parquet file: equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
