"""The last step of every dataset: write the rejects, check that no row is lost, compute the fingerprint, write the
manifest. Used for prepared datasets and for foreign tars.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.folders.output import DECISIONS, PLAN, REJECTS
from clipwright.pipeline.folders.records import DatasetFingerprint, file_entries, write_manifest
from clipwright.pipeline.folders.schema import BLANK, DECISIONS_SCHEMA, parquet_bytes

# What the manifest lists per shard.
SHARD_FIELDS = ("sidecar", "sidecar_bytes", "sidecar_sha256", "tar", "tar_bytes", "tar_sha256", "samples")


@dataclass(frozen=True)
class Contents:
    """Everything a finished dataset consists of.

    `shards` are records with at least SHARD_FIELDS, in order and without empty ones; their sidecars are on disk under
    their final names. `rejects` has REJECTS_SCHEMA and is sorted by row. `blank` are the keys of samples whose image
    has one color only. `foreign` marks tars that clipwright did not write.
    """

    name: str
    rows_in: int
    shards: list[dict[str, Any]]
    rejects: pa.Table
    captions_dropped: int
    blank: list[str]
    identity: dict[str, Any]
    foreign: bool = False


def finish(folder: Path, contents: Contents) -> dict[str, Any]:
    """Writes rejects, decisions and, last, the manifest, which makes the folder a dataset. Returns the manifest.

    Every plan row must be in exactly one sidecar or in the rejects.
    """
    write_rejects(folder, contents.rejects)
    fingerprint = DatasetFingerprint()
    seen = np.zeros(contents.rows_in, dtype=np.int64)
    np.add.at(seen, contents.rejects["row"].to_numpy(), 1)
    captions = 0
    for shard in contents.shards:
        sidecar = pq.read_table(folder / shard["sidecar"], columns=["row", "key", "sha256", "captions"])
        np.add.at(seen, sidecar["row"].to_numpy(), 1)
        captions += add_to_fingerprint(fingerprint, sidecar)
    assert (seen == 1).all(), "a plan row is missing or occurs twice"
    reasons = count_reasons(contents.rejects)
    merged = reasons.pop("merged", 0)
    hashed_files = [REJECTS]
    if not contents.foreign and (folder / PLAN).is_file():
        hashed_files.append(PLAN)
    if contents.blank:
        decisions = [{"key": key, "rule": BLANK, "value": "", "keep": True} for key in contents.blank]
        table = pa.Table.from_pylist(decisions, schema=DECISIONS_SCHEMA)
        atomic_write(folder / DECISIONS, parquet_bytes(table))
        hashed_files.append(DECISIONS)
    body: dict[str, Any] = {
        "name": contents.name,
        "shards": [{name: shard[name] for name in SHARD_FIELDS} for shard in contents.shards],
        "rows_in": contents.rows_in,
        "written": sum(shard["samples"] for shard in contents.shards),
        "merged": merged,
        "rejected": reasons.total(),
        "rejects": dict(sorted(reasons.items())),
        "captions": captions,
        "captions_dropped": contents.captions_dropped,
        "files": file_entries(folder, hashed_files),
        "identity": contents.identity,
    }
    if contents.blank:
        body["decisions"] = {BLANK: len(contents.blank)}
    if contents.foreign:
        body["foreign"] = True
    return write_manifest(folder, "dataset", fingerprint.hexdigest(), body)


def write_rejects(folder: Path, rejects: pa.Table) -> None:
    atomic_write(folder / REJECTS, parquet_bytes(rejects))


def add_to_fingerprint(fingerprint: DatasetFingerprint, sidecar: pa.Table) -> int:
    """Adds the samples of one shard's sidecar to the fingerprint and returns their number of captions."""
    keys = sidecar["key"].to_pylist()
    hashes = sidecar["sha256"].to_pylist()
    captions = sidecar["captions"].to_pylist()
    for key, sha256, texts in zip(keys, hashes, captions, strict=True):
        fingerprint.sample(key, sha256, texts)
    fingerprint.shard(sidecar.num_rows)
    return sum(map(len, captions))


def count_reasons(rejects: pa.Table) -> Counter[str]:
    return Counter(rejects["reason"].to_pylist())


def no_samples(where: Path, rejects: pa.Table, *, fix: str) -> ClipwrightError:
    """Returns E_PREP_EMPTY for an input of which every row was rejected."""
    counts = ", ".join(f"{reason} {rows}" for reason, rows in count_reasons(rejects).most_common())
    found = f"{format_count(rejects.num_rows, 'row')} in, all rejected: {counts}"
    for first in rejects.slice(0, 1).to_pylist():
        found += f"; the first is {first['source']}: {first['detail']}"
    return ClipwrightError(
        "E_PREP_EMPTY",
        "the input has no usable sample",
        where=where,
        found=found if rejects.num_rows else "no rows in the input",
        fix=fix,
    )
