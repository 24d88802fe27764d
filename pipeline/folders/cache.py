"""A bounded folder of whole shards that lie elsewhere: fetched ahead in the order they are read, evicted when done."""

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
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.records import MANIFEST
from clipwright.pipeline.folders.remote import fetch, fetch_known, fetch_shard

FETCHERS = 2  # threads that fetch ahead
GB = 10**9
LOCK = "lock"


@configclass
class CacheConfig:
    """Where remote shards are kept on this machine, and how many gigabytes of them a process may keep."""

    folder: str = ""  # by default clipwright/ in $XDG_CACHE_HOME or ~/.cache
    gb: float = 20.0

    def root(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(self.folder) if self.folder else Path(home) / "clipwright"


@configclass
class CachedRuntime:
    """What a section `runtime` says of remote shards."""

    cache_dir: str = ""
    """Folder for the shards of remote datasets; empty: clipwright/ in $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Gigabytes of each remote dataset that each process may keep."""

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(folder=self.cache_dir, gb=self.cache_gb)


def dataset_folder(place: str, cache: CacheConfig) -> Path:
    """The folder that stands here for a remote dataset: it holds the manifest, fetched now."""
    folder = cache.root() / digest(place)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / MANIFEST, fetch(f"{place.rstrip('/')}/{MANIFEST}"))
    return folder


def sidecar_beside(tar: Path) -> Path:
    """Where the sidecar of a tar in a cache is."""
    return tar.with_suffix(".parquet")


def bytes_needed(sizes: Sequence[int], shards: int) -> int:
    """What `shards` shards take at most."""
    return sum(sorted(sizes, reverse=True)[:shards])


def gb_for(size: int) -> float:
    """Bytes as a number of gigabytes for a config, rounded up."""
    return math.ceil(size / GB * 1e6) / 1e6


@dataclass(frozen=True)
class RemoteShard:
    """A shard's entry in the manifest, where its tar lies, and its sidecar; None where that is no remote file."""

    entry: dict[str, Any]
    tar: str
    sidecar: str | None

    @property
    def bytes(self) -> int:
        return self.entry["tar_bytes"] + (0 if self.sidecar is None else self.entry.get("sidecar_bytes", 0))


class ShardCache:
    """The shards of one dataset that this process keeps, each a tar and, if that is remote too, its sidecar.

    shards: what is known of each. bound: bytes on disk, what is being fetched included. need: how many shards are in
    use at a time; E_CACHE if they do not fit. Threads may share it.
    """

    def __init__(self, folder: Path, shards: Sequence[RemoteShard], *, gb: float, need: int) -> None:
        self.shards, self.bound = shards, round(gb * GB)
        wanted = bytes_needed([shard.bytes for shard in shards], need)
        if wanted > self.bound:
            raise ClipwrightError(
                "E_CACHE",
                "a cache that cannot hold the shards in use",
                where=f"runtime.cache_gb={gb:g}",
                found=f"{need} shards of at most {wanted / GB:.6g} GB are in use at a time",
                fix=f"set runtime.cache_gb={gb_for(wanted):g} or more, or a smaller data.window or data.streams",
            )
        self.folder, self._lock = _claim(folder)
        self._change = threading.Condition()
        self._pins: dict[int, int] = {}
        self._loading: set[int] = set()
        self._wanted: list[int] = []
        self._failed: set[int] = set()
        self._have = self._left_before()
        self._threads: list[threading.Thread] = []
        self._begun = False

    def path(self, shard: int) -> Path:
        """Where a shard's tar is kept, its sidecar beside it."""
        return self.folder / f"{shard:06d}-{digest(self.shards[shard].entry['tar_sha256'])[:16]}.tar"

    def want(self, shards: Sequence[int]) -> None:
        """Says which shards are read next, in order; they are fetched as far as there is room. None: it stops."""
        if shards and not self._begun:  # by now the other ranks have claimed theirs
            self._begun = True
            _empty_idle(self.folder.parent)
        with self._change:
            self._wanted = list(dict.fromkeys(shards))
            self._change.notify_all()
            while self._wanted and len(self._threads) < FETCHERS:
                thread = threading.Thread(target=self._fetch_ahead, name=f"fetch-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    @contextmanager
    def hold(self, shard: int) -> Iterator[Path]:
        """The shard's tar, which stays where it is meanwhile. Raises E_REMOTE, E_DATA_HASH."""
        with self._change:
            while shard not in self._have:
                if shard not in self._loading and self._room(shard, frozenset((shard,))):
                    self._load(shard)
                else:
                    self._change.wait(1.0)
            self._have[shard] = self._have.pop(shard)  # the latest used stand last
            self._pins[shard] = self._pins.get(shard, 0) + 1
        try:
            yield self.path(shard)
        finally:
            with self._change:
                self._pins[shard] -= 1
                self._change.notify_all()

    def _left_before(self) -> dict[int, int]:
        """The shards that an earlier start left; anything else is removed."""
        known = {self.path(shard).stem: shard for shard in range(len(self.shards))}
        have: dict[int, int] = {}
        held = 0
        for path in sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime):
            shard = known.get(path.stem)
            if shard is not None and self._whole(shard) and held + self.shards[shard].bytes <= self.bound:
                have[shard] = self.shards[shard].bytes
                held += have[shard]
        for path in self.folder.iterdir():
            if path.name != LOCK and known.get(path.stem) not in have:
                path.unlink()
        return have

    def _whole(self, shard: int) -> bool:
        """Whether a shard is all there; an image's hash is checked when it is read, a sidecar's only here."""
        entry, tar = self.shards[shard].entry, self.path(shard)
        if tar.stat().st_size != entry["tar_bytes"]:
            return False
        sidecar = sidecar_beside(tar)
        beside = sidecar.is_file() and file_sha256(sidecar) == entry["sidecar_sha256"]
        return beside or self.shards[shard].sidecar is None

    def _room(self, shard: int, keep: frozenset[int]) -> bool:
        """Evicts the longest unused, but those in `keep` and in use, until a shard fits; whether it does."""
        size = self.shards[shard].bytes
        used = sum(self._have.values()) + sum(self.shards[other].bytes for other in self._loading)
        free = [other for other in self._have if not self._pins.get(other) and other not in keep]
        if used + size - sum(self._have[other] for other in free) > self.bound:
            return False
        for other in free:
            if used + size <= self.bound:
                break
            used -= self._have.pop(other)
            self._remove(other)
        return True

    def _remove(self, shard: int) -> None:
        for path in (self.path(shard), sidecar_beside(self.path(shard))):
            path.unlink(missing_ok=True)

    def _load(self, shard: int) -> None:
        """Fetches a shard for which there is room; called and left with the lock held, which is free meanwhile."""
        self._loading.add(shard)
        self._change.release()
        try:
            wanted, path = self.shards[shard], self.path(shard)
            if wanted.sidecar is not None:
                data = fetch_known(wanted.sidecar, wanted.entry["sidecar_sha256"])
                atomic_write(sidecar_beside(path), data)
            fetch_shard(wanted.tar, path, wanted.entry["tar_bytes"], wanted.entry["tar_sha256"])
        except BaseException:
            self._remove(shard)
            raise
        finally:
            self._change.acquire()
            self._loading.discard(shard)
            self._change.notify_all()
        self._have[shard] = wanted.bytes

    def _fetch_ahead(self) -> None:
        with self._change:
            while self._wanted:
                if (shard := self._next()) is None:
                    self._change.wait()
                    continue
                try:
                    self._load(shard)
                except (ClipwrightError, OSError):
                    self._failed.add(shard)  # whoever needs it tries again and is told
            self._threads.remove(threading.current_thread())

    def _next(self) -> int | None:
        """The first wanted shard that is not here, if there is room without taking away another that is wanted."""
        keep = frozenset(self._wanted)
        for shard in self._wanted:
            if shard in self._have or shard in self._loading or shard in self._failed:
                continue
            return shard if self._room(shard, keep) else None
        return None


def _claim(folder: Path) -> tuple[Path, IO[str]]:
    """A folder for this process alone: what an earlier one left, unless it is still running."""
    for number in range(10_000):
        mine = folder / f"tars-{number}"
        mine.mkdir(parents=True, exist_ok=True)
        if (lock := _locked(mine)) is not None:
            return mine, lock
    raise AssertionError(folder)


def _empty_idle(folder: Path) -> None:
    """Removes what processes left that run no more and that nobody took over: a run on fewer ranks."""
    for left in folder.glob("tars-*"):
        if (lock := _locked(left)) is not None:
            with lock:  # the file stays: who waits for it would hold one that nobody else sees
                for path in left.iterdir():
                    if path.name != LOCK:
                        path.unlink()


def _locked(folder: Path) -> IO[str] | None:
    """The lock of a process's folder, now held; none where its process runs."""
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
