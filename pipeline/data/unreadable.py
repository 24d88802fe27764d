"""Shards that a rank cannot read: each is given up once, and its samples are replaced at once from then on."""

from __future__ import annotations

import errno
import threading
from collections import Counter

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.system_errors import error_name, rank_name, system_error
from clipwright.pipeline.data.datasets import Datasets
from clipwright.pipeline.folders.records import MANIFEST

VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EACCES, errno.EPERM)  # of a file, for all of its samples
SHARD_FAILURES = 4  # failed reads in a row, each with its retries, after which a shard is given up
DATASET_FAILURES = 8  # the same for a dataset: its disk or mount has failed on this rank


class UnreadableShards:
    """The shards that this rank has given up. Threads may share it."""

    def __init__(self, data: Datasets, rank: int) -> None:
        self.data, self.rank = data, rank
        self._codes: dict[tuple[int, int], str] = {}  # (dataset, shard) → E_ code
        self._in_a_row: Counter[int | tuple[int, int]] = Counter()  # of a dataset and of a shard
        self._lock = threading.Lock()

    def code(self, dataset: int, shard: int) -> str | None:
        """Returns why a shard was given up, or None if it was not."""
        return self._codes.get((dataset, shard))

    def read(self, dataset: int, shard: int) -> None:
        """A sample of the shard was read."""
        if self._in_a_row:
            with self._lock:
                self._in_a_row.pop(dataset, None)
                self._in_a_row.pop((dataset, shard), None)

    def failed(self, dataset: int, shard: int, error: OSError | ClipwrightError) -> str | None:
        """A read of the shard has failed, retries included; returns the reason if it is given up now.

        error: of the operating system, or of the shard's sidecar. Raises E_SYSTEM if the complete dataset cannot be
        read by this rank.
        """
        with self._lock:
            if isinstance(error, ClipwrightError):
                return self._give_up(dataset, shard, error.code, f"{error.code} ({error.found})")
            error.filename = error.filename or self.data.datasets[dataset].tar_path(shard)
            self._check_dataset(dataset, error)
            self._in_a_row[dataset, shard] += 1
            if error.errno in VANISHED or self._in_a_row[dataset, shard] >= SHARD_FAILURES:
                return self._give_up(dataset, shard, "E_SYSTEM", error_name(error))
            return None

    def _check_dataset(self, dataset: int, error: OSError) -> None:
        """Raises E_SYSTEM if the dataset's folder is gone, or if so many reads in a row failed that its disk has."""
        folder = self.data.datasets[dataset].folder
        what = f"the dataset {folder} cannot be read on one rank"
        try:
            (folder / MANIFEST).stat()
        except OSError as of_folder:
            raise system_error(of_folder, self.rank, what) from None
        if error.errno not in VANISHED:  # a missing shard is no sign that the others are
            self._in_a_row[dataset] += 1
        if self._in_a_row[dataset] >= DATASET_FAILURES:
            raise system_error(error, self.rank, what)

    def _give_up(self, dataset: int, shard: int, code: str, found: str) -> str | None:
        if (dataset, shard) in self._codes:
            return None
        self._codes[dataset, shard] = code
        return f"{found} on {rank_name(self.rank)}"
