"""A bounded local cache of remote shards: fetched ahead in the order they are read, evicted when no longer used."""

from __future__ import annotations

import fcntl
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest, file_sha256
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.records import MANIFEST
from clipwright.pipeline.folders.remote import fetch, fetch_checked, fetch_shard

FETCH_THREADS = 2
GB = 10**9
LOCK = "lock"


@configclass
class CacheConfig:
    """Where a process keeps remote shards on this machine, and how much of them."""

    folder: str = ""
    """Cache folder; empty: clipwright/ in $XDG_CACHE_HOME or ~/.cache."""
    gb: float = 20.0
    """Gigabytes per remote dataset and process."""

    def root(self) -> Path:
        if self.folder:
            return Path(self.folder)
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(home) / "clipwright"


@configclass
class CachedRuntime:
    """The fields of a section `runtime` that concern remote shards."""

    cache_dir: str = ""
    """Folder for the shards of remote datasets; empty: clipwright/ in $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Gigabytes of each remote dataset that each process may keep."""

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(folder=self.cache_dir, gb=self.cache_gb)


def dataset_folder(place: str, cache: CacheConfig) -> Path:
    """Returns the local folder of a remote dataset, with the manifest, which is fetched now."""
    folder = cache.root() / digest(place)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / MANIFEST, fetch(f"{place.rstrip('/')}/{MANIFEST}"))
    return folder


def sidecar_path(tar: Path) -> Path:
    """Returns the path of the sidecar of a cached tar."""
    return tar.with_suffix(".parquet")


def bytes_needed(sizes: Sequence[int], shards: int) -> int:
    """Returns the bytes that any `shards` shards take at most."""
    return sum(sorted(sizes, reverse=True)[:shards])


def gb_for(size: int) -> float:
    """Returns bytes in gigabytes for a config, rounded up."""
    return math.ceil(size / GB * 1e6) / 1e6


@dataclass(frozen=True)
class RemoteShard:
    """A shard's manifest entry, the address of its tar, and that of its sidecar, or None if the sidecar is local."""

    entry: dict[str, Any]
    tar: str
    sidecar: str | None

    @property
    def bytes(self) -> int:
        sidecar_bytes = 0 if self.sidecar is None else self.entry.get("sidecar_bytes", 0)
        return self.entry["tar_bytes"] + sidecar_bytes


class ShardCache:
    """The shards of one dataset that this process has on disk: tars, and sidecars where these are remote too.

    gb: the limit, which includes shards being fetched. need: how many shards are in use at a time; raises E_CACHE if
    they do not fit. Threads may share a cache.
    """

    def __init__(self, folder: Path, shards: Sequence[RemoteShard], *, gb: float, need: int) -> None:
        self.shards = shards
        self.limit_bytes = round(gb * GB)
        needed = bytes_needed([shard.bytes for shard in shards], need)
        if needed > self.limit_bytes:
            raise ClipwrightError(
                "E_CACHE",
                "the cache cannot hold the shards in use",
                where=f"runtime.cache_gb={gb:g}",
                found=f"{format_count(need, 'shard')} of at most {needed / GB:.6g} GB in total in use at a time",
                fix=f"set runtime.cache_gb={gb_for(needed):g} or more, or a smaller data.window or data.streams",
            )
        self.folder, self._lock = _claim_folder(folder)
        self._change = threading.Condition()
        self._pins: dict[int, int] = {}  # shard → number of readers
        self._loading: set[int] = set()
        self._wanted: list[int] = []  # to be fetched ahead, in order
        self._failed: set[int] = set()  # not fetched ahead again
        self._cached = self._find_cached()  # shard → bytes, least recently used first
        self._threads: list[threading.Thread] = []
        self._started = False

    def path(self, shard: int) -> Path:
        """Returns where a shard's tar is cached, with its sidecar next to it."""
        return self.folder / f"{shard:06d}-{digest(self.shards[shard].entry['tar_sha256'])[:16]}.tar"

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetches shards in the order they are read next, as far as there is room; an empty sequence stops it."""
        if shards and not self._started:  # by now the other ranks have claimed their folders
            self._started = True
            _empty_unused_folders(self.folder.parent)
        with self._change:
            self._wanted = list(dict.fromkeys(shards))
            self._change.notify_all()
            while self._wanted and len(self._threads) < FETCH_THREADS:
                thread = threading.Thread(target=self._fetch_ahead, name=f"fetch-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    @contextmanager
    def pinned(self, shard: int) -> Iterator[Path]:
        """Yields the path of a shard's tar, which is not evicted meanwhile. Raises E_REMOTE, E_DATA_HASH."""
        with self._change:
            while shard not in self._cached:
                if shard not in self._loading and self._make_room(shard, frozenset((shard,))):
                    self._load(shard)
                else:
                    self._change.wait(1.0)
            self._cached[shard] = self._cached.pop(shard)  # the most recently used is last
            self._pins[shard] = self._pins.get(shard, 0) + 1
        try:
            yield self.path(shard)
        finally:
            with self._change:
                self._pins[shard] -= 1
                self._change.notify_all()

    def _find_cached(self) -> dict[int, int]:
        """Finds the valid shards that an earlier start left, and removes everything else."""
        shard_of = {self.path(shard).stem: shard for shard in range(len(self.shards))}
        cached: dict[int, int] = {}
        total = 0
        for path in sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime):
            shard = shard_of.get(path.stem)
            if shard is not None and self._is_valid(shard) and total + self.shards[shard].bytes <= self.limit_bytes:
                cached[shard] = self.shards[shard].bytes
                total += cached[shard]
        for path in self.folder.iterdir():
            if path.name != LOCK and shard_of.get(path.stem) not in cached:
                path.unlink()
        return cached

    def _is_valid(self, shard: int) -> bool:
        """Whether a shard is complete. A sidecar is hashed only here; an image's hash is checked when it is read."""
        entry, tar = self.shards[shard].entry, self.path(shard)
        if tar.stat().st_size != entry["tar_bytes"]:
            return False
        if self.shards[shard].sidecar is None:
            return True
        sidecar = sidecar_path(tar)
        return sidecar.is_file() and file_sha256(sidecar) == entry["sidecar_sha256"]

    def _make_room(self, shard: int, keep: frozenset[int]) -> bool:
        """Evicts the least recently used shards that are not pinned nor in `keep` until a shard fits; whether it does.

        Evicts nothing if it cannot fit.
        """
        size = self.shards[shard].bytes
        used = sum(self._cached.values()) + sum(self.shards[other].bytes for other in self._loading)
        evictable = [other for other in self._cached if not self._pins.get(other) and other not in keep]
        if used + size - sum(self._cached[other] for other in evictable) > self.limit_bytes:
            return False
        for other in evictable:
            if used + size <= self.limit_bytes:
                break
            used -= self._cached.pop(other)
            self._remove(other)
        return True

    def _remove(self, shard: int) -> None:
        for path in (self.path(shard), sidecar_path(self.path(shard))):
            path.unlink(missing_ok=True)

    def _load(self, shard: int) -> None:
        """Fetches a shard for which there is room. Called with the lock held, which is released while it fetches."""
        self._loading.add(shard)
        self._change.release()
        try:
            wanted, path = self.shards[shard], self.path(shard)
            if wanted.sidecar is not None:
                atomic_write(sidecar_path(path), fetch_checked(wanted.sidecar, wanted.entry["sidecar_sha256"]))
            fetch_shard(wanted.tar, path, wanted.entry["tar_bytes"], wanted.entry["tar_sha256"])
        except BaseException:
            self._remove(shard)
            raise
        finally:
            self._change.acquire()
            self._loading.discard(shard)
            self._change.notify_all()
        self._cached[shard] = wanted.bytes

    def _fetch_ahead(self) -> None:
        with self._change:
            while self._wanted:
                shard = self._next_to_fetch()
                if shard is None:
                    self._change.wait()
                    continue
                try:
                    self._load(shard)
                except (ClipwrightError, OSError):
                    self._failed.add(shard)  # the reader that needs it retries, and raises the error
            self._threads.remove(threading.current_thread())

    def _next_to_fetch(self) -> int | None:
        """Returns the first wanted shard that is missing, if there is room without evicting another wanted shard."""
        keep = frozenset(self._wanted)
        for shard in self._wanted:
            if shard in self._cached or shard in self._loading or shard in self._failed:
                continue
            return shard if self._make_room(shard, keep) else None
        return None


def _claim_folder(folder: Path) -> tuple[Path, IO[str]]:
    """Returns a locked folder for this process alone: one that an ended process left, if there is one."""
    for number in range(10_000):
        candidate = folder / f"tars-{number}"
        candidate.mkdir(parents=True, exist_ok=True)
        lock = _try_lock(candidate)
        if lock is not None:
            return candidate, lock
    raise AssertionError(folder)


def _empty_unused_folders(folder: Path) -> None:
    """Removes the shards of ended processes whose folders no process has claimed, as after a run on fewer ranks."""
    for unused in folder.glob("tars-*"):
        lock = _try_lock(unused)
        if lock is not None:
            with lock:  # the lock file stays: a process that waits for it must not hold a deleted file
                for path in unused.iterdir():
                    if path.name != LOCK:
                        path.unlink()


def _try_lock(folder: Path) -> IO[str] | None:
    """Locks a process's folder; None if its process is still running."""
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
