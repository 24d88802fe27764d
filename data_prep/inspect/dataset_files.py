"""A dataset folder as prep left it, for the commands that look at one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.records import read_manifest

_COUNTS = ("rows_in", "written", "merged", "rejected", "captions", "captions_dropped")
_SHARD = {"tar": str, "tar_bytes": int, "tar_sha256": str, "sidecar": str, "sidecar_sha256": str, "samples": int}
_FILE = {"bytes", "sha256"}


@configclass
class DataConfig:
    """The dataset folder to look at."""

    data: str


def open_dataset(folder: Path) -> dict[str, Any]:
    """The manifest of a dataset folder, with all that its readers need in it. Raises E_INPUT, E_MANIFEST."""
    manifest = read_manifest(folder, "dataset")
    missing = [name for name in _COUNTS if not isinstance(manifest.get(name), int)]
    missing += [name for name in ("rejects", "files", "identity") if not isinstance(manifest.get(name), dict)]
    rejects = manifest.get("rejects")
    if isinstance(rejects, dict) and not all(isinstance(count, int) for count in rejects.values()):
        missing.append("rejects")
    files = manifest.get("files")
    if isinstance(files, dict) and not all(isinstance(e, dict) and e.keys() >= _FILE for e in files.values()):
        missing.append("files")
    shards = manifest.get("shards")
    if (
        not isinstance(shards, list)
        or not shards
        or not all(
            isinstance(shard, dict) and all(isinstance(shard.get(name), kind) for name, kind in _SHARD.items())
            for shard in shards
        )
    ):
        missing.append("shards")
    if missing:
        raise ClipwrightError(
            "E_MANIFEST",
            "a dataset manifest that is not of its form",
            where=folder / "manifest.json",
            found=f"missing or of another type: {', '.join(missing)}",
            fix="restore it, or make the dataset again with --fresh",
        )
    return manifest


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A sidecar, or the rejects; some of its columns. Raises E_DATA_HASH when it is missing or cannot be read."""
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None


def _damaged(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_DATA_HASH",
        "a part of a dataset that is missing or cannot be read",
        where=path,
        found=found,
        fix="restore it, or make the dataset again with --fresh; `clipwright data verify` checks the rest",
    )


def read_sidecar(folder: Path, shard: dict[str, Any], columns: Sequence[str]) -> pa.Table:
    """Columns of one shard's sidecar, of those that are never empty. Raises E_DATA_HASH."""
    table = read_part(folder / shard["sidecar"], columns)
    if table.num_rows != shard["samples"] or set(columns) - set(table.column_names):
        raise _damaged(folder / shard["sidecar"], f"{table.num_rows} rows, the manifest says {shard['samples']}")
    if empty := [name for name in columns if table[name].null_count]:
        raise _damaged(folder / shard["sidecar"], f"rows without {', '.join(empty)}")
    return table
