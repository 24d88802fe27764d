"""A dataset folder as bytes: sidecars and image members by offset, checked against the manifest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.records import file_sha256, read_manifest


class Dataset:
    """A dataset folder, whole or cut.

    Opening checks the manifest and the existence and size of every shard (E_INPUT, E_MANIFEST, E_DATA_HASH); a
    sidecar's hash is checked when it is first read, a sample's bytes by `image`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, "dataset")
        self.fingerprint: str = self.manifest["fingerprint"]
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        self.sizes: list[int] = [shard["samples"] for shard in self._shards]
        self.samples = sum(self.sizes)
        self._sidecars: dict[int, pa.Table] = {}
        self._columns: dict[int, dict[str, Any]] = {}
        for index, shard in enumerate(self._shards):
            path = self.tar_path(index)
            size = path.stat().st_size if path.is_file() else None
            if size != shard["tar_bytes"]:
                found = (
                    "the file is missing" if size is None else f"{size} bytes, the manifest says {shard['tar_bytes']}"
                )
                raise self._wrong(path, found)

    def tar_name(self, shard: int) -> str:
        """The shard's tar as the manifest names it, relative to the folder."""
        return self._shards[shard]["tar"]

    def tar_path(self, shard: int) -> Path:
        return self.folder / self.tar_name(shard)

    def sidecar(self, shard: int) -> pa.Table:
        """The shard's sidecar: one row a sample, in the tar's order."""
        if shard not in self._sidecars:
            self._sidecars[shard] = self._read_sidecar(shard)
        return self._sidecars[shard]

    def captions(self, shard: int) -> pa.Array:
        """All captions of a shard, one after another; unlike `sidecar` it leaves nothing in memory."""
        return self._read_sidecar(shard, ["captions"])["captions"].combine_chunks().flatten()

    def _read_sidecar(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        entry = self._shards[shard]
        path = self.folder / entry["sidecar"]
        if not path.is_file() or file_sha256(path) != entry["sidecar_sha256"]:
            raise self._wrong(path, "the file is missing or its sha256 is not the manifest's")
        table = pq.read_table(path, columns=columns)
        assert table.num_rows == entry["samples"], path
        return table

    def record(self, shard: int, row: int) -> dict[str, Any]:
        """Key, captions, offset, size and sha256 of one sample."""
        columns = self._columns.get(shard)
        if columns is None:
            table = self.sidecar(shard)
            columns = {name: table[name].combine_chunks() for name in ("key", "captions", "offset", "size", "sha256")}
            self._columns[shard] = columns
        return {name: column[row].as_py() for name, column in columns.items()}

    def image(self, shard: int, row: int, *, verify: bool = True) -> bytes:
        """The stored bytes of one image, read by `pread` at the sidecar's offset and checked against its SHA-256.

        Not mmap: a truncated network file under mmap is a SIGBUS, not an error.
        """
        record = self.record(shard, row)
        # Opened for each: a descriptor kept for every shard would meet the limit of open files on a large set.
        handle = os.open(self.tar_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(handle, record["size"], record["offset"])
        finally:
            os.close(handle)
        if verify and hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise self._wrong(
                self.tar_path(shard), f"the bytes of sample {record['key']} at offset {record['offset']} have changed"
            )
        return data

    def _wrong(self, path: Path, found: str) -> ClipwrightError:
        return ClipwrightError(
            "E_DATA_HASH",
            "a shard that is not what its manifest says",
            where=path,
            found=found,
            fix="restore the file or run `clipwright prep` again with --fresh",
        )
