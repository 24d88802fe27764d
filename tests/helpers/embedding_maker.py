"""Small embedding folders, written without a model; and folders whose hashes are made to fit changed content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.folders.embeddings import binding, fingerprint, part_name
from clipwright.pipeline.folders.records import file_entries, write_manifest
from clipwright.pipeline.folders.schema import EMBEDDING_SCHEMA


def make_embeddings(folder: Path, sizes: Sequence[int], dim: int = 24, seed: int = 0) -> np.ndarray:
    """Writes an embedding folder of random unit rows in parts of the given sizes; returns the rows as float32."""
    folder.mkdir(parents=True)
    rows = np.random.default_rng(seed).standard_normal((sum(sizes), dim)).astype(np.float32)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    start = 0
    for number, size in enumerate(sizes):
        np.save(folder / f"{part_name(number)}.npy", rows[start : start + size])
        records = [
            {"key": f"{i:032x}", "caption": f"caption {i}", "canary": b"image"} for i in range(start, start + size)
        ]
        pq.write_table(pa.Table.from_pylist(records, EMBEDDING_SCHEMA), folder / f"{part_name(number)}.parquet")
        start += size
    identity = {"model": f"{seed}" * 64, "data": "d" * 64, "what": "image", "part_samples": max(sizes)}
    parts = [{"name": part_name(number), "samples": size, "rows": size} for number, size in enumerate(sizes)]
    body = {"identity": identity, "dimension": dim, "rows": start, "samples": start, "parts": parts}
    write_manifest(folder, "embedding", "", body)
    seal(folder)
    return rows.astype(np.float32)


def rehash(folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes a manifest with the sizes and hashes of the files that its parts name; returns it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.update(changes)
    names = [f"{part['name']}{suffix}" for part in manifest["parts"] for suffix in (".npy", ".parquet")]
    manifest["files"] = file_entries(folder, names)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def seal(folder: Path, **changes: Any) -> None:
    """Makes every hash of an embedding folder fit its files, whatever they hold: only the model can tell."""
    manifest = rehash(folder, **changes)
    first = 0
    for part in manifest["parts"]:
        table = pq.read_table(folder / f"{part['name']}.parquet", columns=["key", "caption"])
        stored = manifest["files"][f"{part['name']}.npy"]["sha256"]
        part["binding"] = binding(manifest["identity"], first, table, stored)
        first += part["samples"]
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
