"""A bounded folder of whole shards that lie elsewhere: fetched ahead in the order they are read, evicted when done."""

from __future__ import annotations

import fcntl
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.records import MANIFEST, atomic_write, digest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.remote import fetch, fetch_shard

FETCHERS = 2  # threads that fetch ahead
GB = 10**9


@configclass
class CacheConfig:
    """Where remote shards are kept on this machine, and how many gigabytes of them a process may keep."""

    folder: str = ""  # by default clipwright/ in $XDG_CACHE_HOME or ~/.cache
    gb: float = 20.0

    def root(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(self.folder) if self.folder else Path(home) / "clipwright"


def dataset_folder(place: str, cache: CacheConfig) -> Path:
    """The folder that stands here for a remote dataset: its manifest, fetched now, and sidecars as they are read."""
    folder = cache.root() / digest(place)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / MANIFEST, fetch(f"{place.rstrip('/')}/{MANIFEST}"))
    return folder


def bytes_needed(sizes: Sequence[int], shards: int) -> int:
    """What `shards` shards take at most."""
    return sum(sorted(sizes, reverse=True)[:shards])


def gb_for(size: int) -> float:
    """Bytes as a number of gigabytes for a config, rounded up."""
    return math.ceil(size / GB * 1e6) / 1e6


class ShardCache:
    """The tars of one dataset that this process keeps; threads may share it.

    addresses, entries: of each shard, where its tar lies and what the manifest says of it. bound: bytes on disk, what
    is being fetched included. need: how many shards are in use at a time; E_CACHE if they do not fit.
    """

    def __init__(
        self, folder: Path, addresses: Sequence[str], entries: Sequence[dict[str, Any]], *, gb: float, need: int
    ) -> None:
        self.addresses, self.entries, self.bound = addresses, entries, round(gb * GB)
        wanted = bytes_needed([entry["tar_bytes"] for entry in entries], need)
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

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}-{digest(self.entries[shard]['tar_sha256'])[:16]}.tar"

    def want(self, shards: Sequence[int]) -> None:
        """Says which shards are read next, in order; they are fetched as far as there is room."""
        with self._change:
            self._wanted = list(dict.fromkeys(shards))
            self._change.notify_all()
        while len(self._threads) < FETCHERS:
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
        known = {self.path(shard).name: shard for shard in range(len(self.entries))}
        have: dict[int, int] = {}
        for path in sorted(self.folder.glob("*.tar*"), key=lambda path: path.stat().st_mtime):
            shard = known.get(path.name)
            size = path.stat().st_size
            if shard is None or size != self.entries[shard]["tar_bytes"] or sum(have.values()) + size > self.bound:
                path.unlink()
            else:
                have[shard] = size
        return have

    def _room(self, shard: int, keep: frozenset[int]) -> bool:
        """Evicts the longest unused, but those in `keep` and in use, until a shard fits; whether it does."""
        size = self.entries[shard]["tar_bytes"]
        used = sum(self._have.values()) + sum(self.entries[other]["tar_bytes"] for other in self._loading)
        free = [other for other in self._have if not self._pins.get(other) and other not in keep]
        if used + size - sum(self._have[other] for other in free) > self.bound:
            return False
        for other in free:
            if used + size <= self.bound:
                break
            used -= self._have.pop(other)
            self.path(other).unlink(missing_ok=True)
        return True

    def _load(self, shard: int) -> None:
        """Fetches a shard for which there is room; called and left with the lock held, which is free meanwhile."""
        self._loading.add(shard)
        self._change.release()
        try:
            entry = self.entries[shard]
            fetch_shard(self.addresses[shard], self.path(shard), entry["tar_bytes"], entry["tar_sha256"])
        finally:
            self._change.acquire()
            self._loading.discard(shard)
            self._change.notify_all()
        self._have[shard] = entry["tar_bytes"]

    def _fetch_ahead(self) -> None:
        while True:
            with self._change:
                shard = self._next()
                if shard is None:
                    self._change.wait()
                    continue
                try:
                    self._load(shard)
                except (ClipwrightError, OSError):
                    self._failed.add(shard)  # whoever needs it tries again and is told

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
        lock = (mine / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        return mine, lock
    raise AssertionError(folder)
