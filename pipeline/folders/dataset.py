"""A dataset folder as bytes: sidecars and image members by offset, checked against the manifest."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, file_sha256
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.folders.cache import CacheConfig, RemoteShard, ShardCache, dataset_folder, sidecar_beside
from clipwright.pipeline.folders.records import read_manifest
from clipwright.pipeline.folders.remote import fetch_known, is_remote

OPEN_TARS = 256  # descriptors kept; the usual limit of a process is 1,024
TABLES = 8  # whole sidecars kept
ROWS = 64  # shards whose `Rows` are kept where nobody says how many


@dataclass(frozen=True)
class Texts:
    """The texts of a column, those of row i at starts[i] … starts[i + 1] − 1 of `flat`."""

    starts: np.ndarray
    flat: pa.Array

    def count(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def text(self, row: int, number: int) -> str:
        return self.flat[int(self.starts[row]) + number].as_py()


@dataclass(frozen=True)
class Rows:
    """What training reads of a shard's samples, in arrays: a Python object a row would be ten times as large.

    key: ASCII, (n); offset, size: of the image member, int64 (n); sha256: of its bytes, uint8 (n, 32);
    checked: whether they have had it since the shard's rows were read, bool (n).
    """

    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    sha256: np.ndarray
    checked: np.ndarray
    captions: Texts
    negatives: Texts | None


class _Tar:
    """An open tar; closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


class Dataset:
    """A dataset folder, whole or cut, or a bucket's (s3, gs, http). Threads may share it.

    Opening checks the manifest and the existence and size of every tar and sidecar (E_INPUT, E_MANIFEST,
    E_DATA_HASH); a sidecar's hash is checked when it is first read, a sample's bytes by `image`. negatives: a column
    of texts that `rows` reads as well (E_COLUMN). keep: how many shards' `rows` are kept in memory. cache: where
    remote shards are kept here; their existence is not asked for beforehand.
    """

    def __init__(
        self, place: Path | str, *, negatives: str | None = None, keep: int = ROWS, cache: CacheConfig | None = None
    ) -> None:
        self.place, self.negatives, self.cache = str(place), negatives, cache or CacheConfig()
        self.folder = dataset_folder(self.place, self.cache) if is_remote(self.place) else Path(place)
        self.manifest = read_manifest(self.folder, "dataset")
        self.fingerprint: str = self.manifest["fingerprint"]
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        self.sizes: list[int] = [shard["samples"] for shard in self._shards]
        self.samples = sum(self.sizes)
        self.remote = is_remote(self.place) or any(is_remote(shard["tar"]) for shard in self._shards)
        self._cache: ShardCache | None = None
        self._known = np.zeros(len(self._shards), bool)  # sidecars whose hash was checked
        self._check_files()
        self.sidecar = lru_cache(TABLES)(self._read_sidecar)
        self._tar = lru_cache(OPEN_TARS)(lambda shard: _Tar(self.tar_path(shard)))
        self.keep_rows(keep)
        if negatives is not None and self._shards:
            with self._sidecar_file(0) as file:
                self._texts(0, pq.read_schema(file).empty_table(), negatives)

    def open_cache(self, need: int) -> None:
        """Makes room for the tars of a remote dataset, of which `need` are in use at a time. Raises E_CACHE."""
        if self.remote:
            folder = self.cache.root() / digest(self.fingerprint)[:16]
            self._cache = ShardCache(folder, self.remote_shards(), gb=self.cache.gb, need=need)

    def remote_shards(self) -> list[RemoteShard]:
        """What a cache is told of each shard."""
        made = []
        for entry in self._shards:
            tar, sidecar = self._address(entry["tar"]), self._address(entry["sidecar"])
            made.append(RemoteShard(entry, tar, sidecar if is_remote(sidecar) else None))
        return made

    def expect(self, shards: Sequence[int]) -> None:
        """Which shards are read next, in order: a remote dataset fetches them ahead; none: it stops that."""
        if self.remote:
            self._opened_cache().want(shards)

    @contextmanager
    def held(self, shard: int) -> Iterator[Path]:
        """The shard's tar, which is there meanwhile. Of a remote one, raises E_REMOTE and E_DATA_HASH."""
        if not self.remote:
            yield self.tar_path(shard)
            return
        with self._opened_cache().hold(shard) as path:
            yield path

    def _opened_cache(self) -> ShardCache:
        if self._cache is None:
            self.open_cache(1)
        assert self._cache is not None
        return self._cache

    def _address(self, name: str) -> str:
        return name if is_remote(name) or not is_remote(self.place) else f"{self.place.rstrip('/')}/{name}"

    def _check_files(self) -> None:
        """Tars and sidecars; what lies elsewhere is not asked for. A manifest need not say a sidecar's size."""
        seen: set[str] = set()
        for shard, kind in itertools.product(self._shards, ("tar", "sidecar")):
            name, wanted = shard[kind], shard.get(f"{kind}_bytes")
            path = os.path.join(self.folder, name)  # noqa: PTH118  a hundred thousand Paths take a second
            if not self.remote or not is_remote(self._address(name)):
                try:
                    size = os.stat(path).st_size  # noqa: PTH116
                except OSError:
                    raise self._wrong(Path(path), "the file is missing") from None
                if wanted not in (None, size):
                    raise self._wrong(Path(path), f"{size} bytes, the manifest says {wanted}")
            if name in seen:
                raise self._wrong(Path(path), "the manifest names it twice")
            seen.add(name)

    def keep_rows(self, shards: int) -> None:
        """Sets how many shards' `rows` are kept in memory, the latest used."""
        self.rows = lru_cache(max(shards, 1))(self._read_rows)

    def tar_name(self, shard: int) -> str:
        """The shard's tar as the manifest names it, relative to the folder."""
        return self._shards[shard]["tar"]

    def tar_path(self, shard: int) -> Path:
        return self.folder / self.tar_name(shard)

    def captions(self, shard: int) -> pa.Array:
        """All captions of a shard, one after another; unlike `sidecar` it leaves nothing in memory."""
        return self._read_sidecar(shard, ("captions",))["captions"].combine_chunks().flatten()

    def _read_sidecar(self, shard: int, columns: tuple[str, ...] | None = None, *, cached: bool = False) -> pa.Table:
        """The shard's sidecar: one row a sample, in the tar's order."""
        entry = self._shards[shard]
        with self._sidecar_file(shard, cached=cached) as file:
            table = pq.read_table(file, columns=None if columns is None else list(columns))
        assert table.num_rows == entry["samples"], entry["sidecar"]
        return table

    @contextmanager
    def _sidecar_file(self, shard: int, *, cached: bool = False) -> Iterator[Path | pa.BufferReader]:
        """A sidecar whose hash was checked. A remote one is held in memory or, `cached`, together with its tar."""
        entry = self._shards[shard]
        address, path, sha256 = self._address(entry["sidecar"]), self.folder / entry["sidecar"], entry["sidecar_sha256"]
        if not is_remote(address):
            if not self._known[shard] and not (path.is_file() and file_sha256(path) == sha256):
                raise self._wrong(path, "the file is missing or its sha256 is not the manifest's")
            self._known[shard] = True
            yield path
        elif not cached:
            yield pa.BufferReader(fetch_known(address, sha256))
        else:
            with self.held(shard) as tar:
                yield sidecar_beside(tar)

    def _read_rows(self, shard: int) -> Rows:
        """The shard's samples as arrays."""
        wanted = ("key", "offset", "size", "sha256", "captions")
        # All columns where one may be missing, since parquet passes over it without a word.
        table = self._read_sidecar(shard, wanted if self.negatives is None else None, cached=True)
        digests = bytes.fromhex("".join(table["sha256"].to_pylist()))
        return Rows(
            key=np.array(table["key"].to_pylist(), dtype=np.bytes_),
            offset=table["offset"].to_numpy().astype(np.int64),
            size=table["size"].to_numpy().astype(np.int64),
            sha256=np.frombuffer(digests, np.uint8).reshape(-1, 32),
            checked=np.zeros(len(table), bool),
            captions=self._texts(shard, table, "captions"),
            negatives=None if self.negatives is None else self._texts(shard, table, self.negatives),
        )

    def _texts(self, shard: int, table: pa.Table, name: str) -> Texts:
        """A column of texts, or of lists of them; an empty cell holds none."""
        if name not in table.column_names:
            raise self._no_texts(
                shard, name, "it is not there", nearest(name, table.column_names) or "name a column of the sidecar"
            )
        column = table[name].combine_chunks()
        kind = column.type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        inner = kind.value_type if listed else kind
        # A column of nulls is one that is empty in every row of this shard.
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
            raise self._no_texts(shard, name, f"its type is {kind}", "name a column of texts or of lists of texts")
        lengths = column.value_lengths() if listed else column.is_valid().cast(pa.int64())
        starts = np.zeros(len(column) + 1, np.int64)
        np.cumsum(lengths.fill_null(0).to_numpy(), out=starts[1:])
        flat = column.flatten() if listed else column.drop_null()
        if flat.null_count:
            raise self._no_texts(shard, name, "a list in it has an empty place", "write lists of texts only")
        return Texts(starts, flat)

    def record(self, shard: int, row: int) -> dict[str, Any]:
        """Key, captions, offset, size and sha256 of one sample."""
        rows = self.rows(shard)
        return {
            "key": rows.key[row].decode(),
            "captions": [rows.captions.text(row, i) for i in range(rows.captions.count(row))],
            "offset": int(rows.offset[row]),
            "size": int(rows.size[row]),
            "sha256": rows.sha256[row].tobytes().hex(),
        }

    def image(self, shard: int, row: int) -> bytes:
        """The stored bytes of one image, read by `pread` at the sidecar's offset; their SHA-256 is checked once.

        Not mmap: a truncated network file under mmap is a SIGBUS, not an error.
        """
        rows = self.rows(shard)
        size, offset = int(rows.size[row]), int(rows.offset[row])
        if self.remote:
            with self.held(shard) as path:
                tar = _Tar(path)  # each time anew: a tar that is evicted must not stay on disk through an open handle
                data = os.pread(tar.handle, size, offset)
        else:
            tar = self._tar(shard)
            data = os.pread(tar.handle, size, offset)
        if len(data) != size or not (rows.checked[row] or _matches(data, rows.sha256[row])):
            raise self._wrong(
                self.tar_path(shard),
                f"the bytes of sample {rows.key[row].decode()} at offset {offset} have changed",
            )
        rows.checked[row] = True
        return data

    def _wrong(self, path: Path, found: str) -> ClipwrightError:
        return ClipwrightError(
            "E_DATA_HASH",
            "a shard that is not what its manifest says",
            where=path,
            found=found,
            fix="restore the file or run `clipwright prep` again with --fresh",
        )

    def _no_texts(self, shard: int, name: str, found: str, fix: str) -> ClipwrightError:
        where = f"{self.folder / self._shards[shard]['sidecar']}: {name}"
        return ClipwrightError("E_COLUMN", "a column without texts", where=where, found=found, fix=fix)


def _matches(data: bytes, sha256: np.ndarray) -> bool:
    return hashlib.sha256(data).digest() == sha256.tobytes()
