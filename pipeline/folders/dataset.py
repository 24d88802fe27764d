"""Reader of dataset folders: manifest, sidecars, and image members by offset, all checked against the manifest."""

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
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.folders.cache import CacheConfig, RemoteShard, ShardCache, dataset_folder, sidecar_path
from clipwright.pipeline.folders.records import MANIFEST, read_manifest
from clipwright.pipeline.folders.remote import fetch_checked, is_remote

OPEN_TARS = 256  # open files kept; the usual limit of a process is 1,024
CACHED_TABLES = 8  # complete sidecars kept in memory
CACHED_ROWS = 64  # shards whose `Rows` are kept in memory by default
# What every shard's entry in the manifest states, and what the manifest of a complete dataset states beside the shards.
_SHARD = {"tar": str, "tar_bytes": int, "tar_sha256": str, "sidecar": str, "sidecar_sha256": str, "samples": int}
_COUNTS = ("rows_in", "written", "merged", "rejected", "captions", "captions_dropped")
_MAKE_AGAIN = "restore it, or make the dataset again with --fresh"


def read_dataset_manifest(folder: Path, *, totals: bool = False) -> dict[str, Any]:
    """Returns the manifest of a dataset folder; raises E_INPUT, E_MANIFEST.

    totals: it must list shards, and also state the counts of rows, the rejects, the files and the identity.
    """
    manifest = read_manifest(folder, "dataset")
    shards = manifest.get("shards")
    missing = [] if isinstance(manifest.get("fingerprint"), str) else ["fingerprint"]
    if not isinstance(shards, list) or (totals and not shards) or not all(_is_shard(shard) for shard in shards):
        missing.append("shards")
    if totals:
        missing += [name for name in _COUNTS if not isinstance(manifest.get(name), int)]
        missing += [name for name in ("rejects", "files", "identity") if not isinstance(manifest.get(name), dict)]
        if "rejects" not in missing and not all(isinstance(count, int) for count in manifest["rejects"].values()):
            missing.append("rejects")
        if "files" not in missing and not all(_is_file_entry(entry) for entry in manifest["files"].values()):
            missing.append("files")
    if missing:
        raise ClipwrightError(
            "E_MANIFEST",
            "the dataset manifest is malformed",
            where=folder / MANIFEST,
            found=f"missing or of the wrong type: {', '.join(missing)}",
            fix=_MAKE_AGAIN,
        )
    return manifest


def _is_shard(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _SHARD.items())


def _is_file_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"}


def read_table(path: Path, columns: Sequence[str] | None = None, *, data: pa.BufferReader | None = None) -> pa.Table:
    """Reads a table of a dataset, or some of its columns, none of which may be missing. Raises E_DATA_HASH.

    data: the file's content, where it is in memory.
    """
    try:
        with pq.ParquetFile(path if data is None else data) as file:
            missing = set(columns or ()) - set(file.schema_arrow.names)
            if not missing:
                return file.read(None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from None
    raise _unreadable(path, f"it has no column {', '.join(sorted(missing))}")


def read_sidecar(
    path: Path, entry: dict[str, Any], columns: Sequence[str] | None = None, *, data: pa.BufferReader | None = None
) -> pa.Table:
    """Reads a shard's sidecar and checks the number of rows against the shard's manifest entry. Raises E_DATA_HASH.

    columns: those to read, none of which may be missing or have nulls. data: the file's content, where it is in memory.
    """
    table = read_table(path, columns, data=data)
    if table.num_rows != entry["samples"]:
        raise _unreadable(path, f"{format_count(table.num_rows, 'row')}, the manifest states {entry['samples']}")
    with_nulls = [name for name in columns or () if table[name].null_count]
    if with_nulls:
        raise _unreadable(path, f"rows without {', '.join(with_nulls)}")
    return table


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_DATA_HASH",
        "a table of the dataset is missing or cannot be read",
        where=path,
        found=found,
        fix=f"{_MAKE_AGAIN}; `clipwright data verify` checks the rest",
    )


@dataclass(frozen=True)
class Texts:
    """The texts of a column; those of row i are at starts[i] … starts[i + 1] − 1 of `flat`."""

    starts: np.ndarray
    flat: pa.Array

    def count(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def text(self, row: int, number: int) -> str:
        return self.flat[int(self.starts[row]) + number].as_py()


@dataclass(frozen=True)
class Rows:
    """What training reads of a shard's samples, as arrays: one Python object per row would be ten times as large.

    key: ASCII, (n); offset, size: of the image member, int64 (n); sha256: of its bytes, uint8 (n, 32); checked: whether
    its bytes were hashed since the rows were read, bool (n).
    """

    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    sha256: np.ndarray
    checked: np.ndarray
    captions: Texts
    negatives: Texts | None


class _OpenTar:
    """An open tar; closed when the last thread that reads from it drops it."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


class Dataset:
    """A dataset folder, complete or a cut, local or on an object store or web server. Threads may share it.

    Opening checks the manifest and the existence and size of every local tar and sidecar (E_INPUT, E_MANIFEST,
    E_DATA_HASH); a sidecar's hash is checked when it is first read, a sample's bytes by `image`. Remote shards are
    checked when they are fetched.

    negatives: a column of texts that `rows` also reads (E_COLUMN). keep: how many shards' `rows` are kept in memory.
    cache: where remote shards are cached.
    """

    def __init__(
        self,
        place: Path | str,
        *,
        negatives: str | None = None,
        keep: int = CACHED_ROWS,
        cache: CacheConfig | None = None,
    ) -> None:
        self.place, self.negatives, self.cache = str(place), negatives, cache or CacheConfig()
        self.folder = dataset_folder(self.place, self.cache) if is_remote(self.place) else Path(place)
        self.manifest = read_dataset_manifest(self.folder)
        self.fingerprint: str = self.manifest["fingerprint"]
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        self.sizes: list[int] = [shard["samples"] for shard in self._shards]
        self.samples = sum(self.sizes)
        self.remote = is_remote(self.place) or any(is_remote(shard["tar"]) for shard in self._shards)
        self._cache: ShardCache | None = None
        self._hash_checked = np.zeros(len(self._shards), bool)  # of local sidecars
        self._check_files()
        self.sidecar = lru_cache(CACHED_TABLES)(self._read_sidecar)
        self._open_tar = lru_cache(OPEN_TARS)(lambda shard: _OpenTar(self.tar_path(shard)))
        self.keep_rows(keep)
        if negatives is not None and self._shards:
            with self._sidecar_file(0) as file:
                self._texts(0, pq.read_schema(file).empty_table(), negatives)

    def require_captions(self, purpose: str) -> None:
        """Raises E_CAP_EMPTY if the dataset was prepared without captions. purpose: what needs them."""
        if self.manifest.get("captions") != 0 or not self.samples:
            return
        raise ClipwrightError(
            "E_CAP_EMPTY",
            "the dataset has no captions",
            where=self.place,
            found=f"{format_count(self.samples, 'image')} and 0 captions; {purpose} needs image-text pairs",
            fix="prepare the images with captions, without source.caption=none; `clipwright embed` with what=image and "
            "`clipwright search` need none",
        )

    def open_cache(self, need: int) -> None:
        """Makes room for the tars of a remote dataset, of which `need` are in use at a time. Raises E_CACHE."""
        if self.remote:
            folder = self.cache.root() / digest(self.fingerprint)[:16]
            self._cache = ShardCache(folder, self.remote_shards(), gb=self.cache.gb, need=need)

    def remote_shards(self) -> list[RemoteShard]:
        """Returns the addresses and sizes of all shards, for a cache."""
        shards: list[RemoteShard] = []
        for entry in self._shards:
            tar, sidecar = self._address(entry["tar"]), self._address(entry["sidecar"])
            shards.append(RemoteShard(entry, tar, sidecar if is_remote(sidecar) else None))
        return shards

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetches the shards of a remote dataset in the order they are read next; an empty sequence stops it."""
        if self.remote:
            self._opened_cache().prefetch(shards)

    @contextmanager
    def pinned(self, shard: int) -> Iterator[Path]:
        """Yields the path of a shard's tar, which exists meanwhile. Raises E_REMOTE, E_DATA_HASH for a remote shard."""
        if not self.remote:
            yield self.tar_path(shard)
            return
        with self._opened_cache().pinned(shard) as path:
            yield path

    def keep_rows(self, shards: int) -> None:
        """Sets how many shards' `rows` are kept in memory, the most recently used."""
        self.rows = lru_cache(max(shards, 1))(self._read_rows)

    def tar_name(self, shard: int) -> str:
        """Returns the shard's tar as the manifest names it, relative to the folder."""
        return self._shards[shard]["tar"]

    def tar_path(self, shard: int) -> Path:
        return self.folder / self.tar_name(shard)

    def has_sidecar(self, shard: int) -> bool:
        """Whether a shard's sidecar exists, as far as this machine shows; remote ones are taken to."""
        name = self._shards[shard]["sidecar"]
        return is_remote(self._address(name)) or (self.folder / name).is_file()

    def captions(self, shard: int) -> pa.Array:
        """Returns all captions of a shard, in order; unlike `sidecar` it keeps nothing in memory."""
        return self._read_sidecar(shard, ("captions",))["captions"].combine_chunks().flatten()

    def record(self, shard: int, row: int) -> dict[str, Any]:
        """Returns key, captions, offset, size and sha256 of one sample."""
        rows = self.rows(shard)
        return {
            "key": rows.key[row].decode(),
            "captions": [rows.captions.text(row, i) for i in range(rows.captions.count(row))],
            "offset": int(rows.offset[row]),
            "size": int(rows.size[row]),
            "sha256": rows.sha256[row].tobytes().hex(),
        }

    def image(self, shard: int, row: int) -> bytes:
        """Returns the stored bytes of one image, read by `pread` at the sidecar's offset; SHA-256 is checked once.

        It does not use mmap: a truncated network file under mmap is a SIGBUS, not an error.
        """
        rows = self.rows(shard)
        size, offset = int(rows.size[row]), int(rows.offset[row])
        if self.remote:
            with self.pinned(shard) as path:
                tar = _OpenTar(path)  # opened each time: an open file would keep an evicted tar on disk
                data = os.pread(tar.handle, size, offset)
        else:
            tar = self._open_tar(shard)
            data = os.pread(tar.handle, size, offset)
        if len(data) != size or not (rows.checked[row] or _matches(data, rows.sha256[row])):
            raise self._mismatch(
                self.tar_path(shard), f"the bytes of sample {rows.key[row].decode()} at offset {offset} have changed"
            )
        rows.checked[row] = True
        return data

    def _opened_cache(self) -> ShardCache:
        if self._cache is None:
            self.open_cache(1)
        assert self._cache is not None
        return self._cache

    def _address(self, name: str) -> str:
        return name if is_remote(name) or not is_remote(self.place) else f"{self.place.rstrip('/')}/{name}"

    def _check_files(self) -> None:
        """Checks existence and size of local tars and sidecars. A manifest need not state the size of a sidecar."""
        seen: set[str] = set()
        for shard, kind in itertools.product(self._shards, ("tar", "sidecar")):
            name, expected = shard[kind], shard.get(f"{kind}_bytes")
            path = os.path.join(self.folder, name)  # noqa: PTH118  a hundred thousand Paths take a second
            if not self.remote or not is_remote(self._address(name)):
                try:
                    size = os.stat(path).st_size  # noqa: PTH116
                except OSError:
                    raise self._mismatch(Path(path), "the file is missing") from None
                if expected not in (None, size):
                    raise self._mismatch(Path(path), f"{format_count(size, 'byte')}, the manifest states {expected}")
            if name in seen:
                raise self._mismatch(Path(path), "the manifest lists it twice")
            seen.add(name)

    def _read_sidecar(self, shard: int, columns: tuple[str, ...] | None = None, *, cached: bool = False) -> pa.Table:
        """Reads the shard's sidecar: one row per sample, in the order of the tar."""
        entry = self._shards[shard]
        with self._sidecar_file(shard, cached=cached) as file:
            if isinstance(file, Path):
                return read_sidecar(file, entry, columns)
            return read_sidecar(self.folder / entry["sidecar"], entry, columns, data=file)

    @contextmanager
    def _sidecar_file(self, shard: int, *, cached: bool = False) -> Iterator[Path | pa.BufferReader]:
        """Yields a sidecar whose hash was checked. A remote one is held in memory or, `cached`, next to its tar."""
        entry = self._shards[shard]
        address, path, sha256 = self._address(entry["sidecar"]), self.folder / entry["sidecar"], entry["sidecar_sha256"]
        if not is_remote(address):
            if not self._hash_checked[shard] and not (path.is_file() and file_sha256(path) == sha256):
                raise self._mismatch(path, "the file is missing or its SHA-256 differs from the manifest")
            self._hash_checked[shard] = True
            yield path
        elif not cached:
            yield pa.BufferReader(fetch_checked(address, sha256))
        else:
            with self.pinned(shard) as tar:
                yield sidecar_path(tar)

    def _read_rows(self, shard: int) -> Rows:
        """Reads the shard's samples as arrays."""
        columns = ("key", "offset", "size", "sha256", "captions")
        # The column of negatives may be missing in this shard: then all are read, and `_texts` reports it.
        table = self._read_sidecar(shard, columns if self.negatives is None else None, cached=True)
        digests = bytes.fromhex("".join(table["sha256"].to_pylist()))
        offset, size = table["offset"].to_numpy().astype(np.int64), table["size"].to_numpy().astype(np.int64)
        self._check_places(shard, table["key"].to_pylist(), offset, size)
        return Rows(
            key=np.array(table["key"].to_pylist(), dtype=np.bytes_),
            offset=offset,
            size=size,
            sha256=np.frombuffer(digests, np.uint8).reshape(-1, 32),
            checked=np.zeros(len(table), bool),
            captions=self._texts(shard, table, "captions"),
            negatives=None if self.negatives is None else self._texts(shard, table, self.negatives),
        )

    def _check_places(self, shard: int, keys: list[str], offset: np.ndarray, size: np.ndarray) -> None:
        """Raises E_DATA_HASH if an image lies outside the tar or overlaps another one; repeats of one are allowed."""
        entry = self._shards[shard]
        end = offset + size
        order = np.lexsort((end, offset))
        same = (offset[order[1:]] == offset[order[:-1]]) & (end[order[1:]] == end[order[:-1]])
        overlaps = np.flatnonzero((offset[order[1:]] < end[order[:-1]]) & ~same)
        outside = np.flatnonzero((offset < 0) | (size < 0) | (end > entry["tar_bytes"]))
        for row, found in (
            *((int(row), f"the tar has {format_count(entry['tar_bytes'], 'byte')}") for row in outside[:1].tolist()),
            *((int(order[place + 1]), f"it overlaps {keys[order[place]]}") for place in overlaps[:1].tolist()),
        ):
            problem = f"sample {keys[row]} has {format_count(int(size[row]), 'byte')} at offset {offset[row]}; {found}"
            raise self._mismatch(self.tar_path(shard), problem)

    def _texts(self, shard: int, table: pa.Table, name: str) -> Texts:
        """Returns a column of texts, or of lists of texts; a null cell holds none. Raises E_COLUMN."""
        if name not in table.column_names:
            fix = nearest(name, table.column_names) or "name a column of the sidecar"
            raise self._column_error(shard, name, "the sidecar has no such column", fix)
        column = table[name].combine_chunks()
        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        inner = kind.value_type if is_list else kind
        # The type is null if every row of this shard is null.
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
            fix = "name a column of texts or of lists of texts"
            raise self._column_error(shard, name, f"its type is {kind}", fix)
        lengths = column.value_lengths() if is_list else column.is_valid().cast(pa.int64())
        starts = np.zeros(len(column) + 1, np.int64)
        np.cumsum(lengths.fill_null(0).to_numpy(), out=starts[1:])
        flat = column.flatten() if is_list else column.drop_null()
        if flat.null_count:
            raise self._column_error(shard, name, "a list in it has a null", "write lists of texts only")
        return Texts(starts, flat)

    def _mismatch(self, path: Path, found: str) -> ClipwrightError:
        return ClipwrightError(
            "E_DATA_HASH",
            "the shard does not match its manifest",
            where=path,
            found=found,
            fix="restore the file or run `clipwright prep` again with --fresh",
        )

    def _column_error(self, shard: int, name: str, found: str, fix: str) -> ClipwrightError:
        where = f"{self.folder / self._shards[shard]['sidecar']}: {name}"
        return ClipwrightError("E_COLUMN", "the column has no texts", where=where, found=found, fix=fix)


def _matches(data: bytes, sha256: np.ndarray) -> bool:
    return hashlib.sha256(data).digest() == sha256.tobytes()
