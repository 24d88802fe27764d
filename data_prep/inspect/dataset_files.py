"""Access to the files of a dataset folder for the commands that inspect it, with errors for what is missing."""

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
_SHARD_FIELDS = {
    "tar": str,
    "tar_bytes": int,
    "tar_sha256": str,
    "sidecar": str,
    "sidecar_sha256": str,
    "samples": int,
}
_FILE_FIELDS = {"bytes", "sha256"}


@configclass
class DatasetArgument:
    """The dataset that a command inspects."""

    data: str
    """Dataset folder."""


def open_dataset(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a dataset folder with every field that its readers need. Raises E_INPUT, E_MANIFEST."""
    manifest = read_manifest(folder, "dataset")
    invalid = [name for name in _COUNTS if not isinstance(manifest.get(name), int)]
    invalid += [name for name in ("rejects", "files", "identity") if not isinstance(manifest.get(name), dict)]
    if "rejects" not in invalid and not all(isinstance(count, int) for count in manifest["rejects"].values()):
        invalid.append("rejects")
    if "files" not in invalid and not all(_is_file_entry(entry) for entry in manifest["files"].values()):
        invalid.append("files")
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not shards or not all(map(_is_shard_entry, shards)):
        invalid.append("shards")
    if invalid:
        raise ClipwrightError(
            "E_MANIFEST",
            "the dataset manifest is malformed",
            where=folder / "manifest.json",
            found=f"missing or of the wrong type: {', '.join(invalid)}",
            fix="restore it, or make the dataset again with --fresh",
        )
    return manifest


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns (some columns of) a sidecar or of the rejects. Raises E_DATA_HASH if it is missing or unreadable."""
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from None


def read_sidecar(folder: Path, shard: dict[str, Any], columns: Sequence[str]) -> pa.Table:
    """Returns columns of one shard's sidecar, which must have a value in every row. Raises E_DATA_HASH."""
    path = folder / shard["sidecar"]
    table = read_parquet(path, columns)
    missing = set(columns) - set(table.column_names)
    if missing:
        raise _unreadable(path, f"missing columns: {', '.join(sorted(missing))}")
    if table.num_rows != shard["samples"]:
        raise _unreadable(path, f"{table.num_rows} rows, the manifest has {shard['samples']}")
    incomplete = [name for name in columns if table[name].null_count]
    if incomplete:
        raise _unreadable(path, f"rows without {', '.join(incomplete)}")
    return table


def _is_file_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() >= _FILE_FIELDS


def _is_shard_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    return all(isinstance(entry.get(name), kind) for name, kind in _SHARD_FIELDS.items())


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_DATA_HASH",
        "a file of the dataset is missing or cannot be read",
        where=path,
        found=found,
        fix="restore it, or make the dataset again with --fresh; `clipwright data verify` checks the rest",
    )
