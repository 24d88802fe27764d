"""A batch in progress."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import torch

from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.data.batch_samples import ReplacedSample
from clipwright.pipeline.data.order import SampleLocation

SAMPLES_PER_JOB = 8

DatasetRow = tuple[int, int, int]  # dataset, shard, row


class PendingBatch:
    """A batch in progress, filled by several jobs; the job that finishes last collates it."""

    def __init__(self, positions: np.ndarray, location: SampleLocation, image_size: int) -> None:
        count = len(positions)
        self.positions: list[int] = positions.tolist()
        self.dataset: list[int] = location.dataset.tolist()
        self.shard: list[int] = location.shard.tolist()
        self.row: list[int] = location.row.tolist()
        self.epoch: list[int] = location.epoch.tolist()
        self.replaced: list[ReplacedSample] = []
        self.unreadable: dict[str, str] = {}  # shards given up during this batch, and why
        self.unreadable: dict[str, str] = {}  # shards given up during this batch, and why
        # Page-locked memory is copied to a GPU while it computes.
        self.views = torch.empty(
            (count, image_size, image_size, 3), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
        )
        self.pixels = self.views.numpy()
        self.color_jitter = np.empty((count, 4), np.float32)
        self.future: Future[Batch] = Future()
        self._jobs_left = -(-count // SAMPLES_PER_JOB)
        self._lock = threading.Lock()

    def dataset_row(self, index: int) -> DatasetRow:
        return self.dataset[index], self.shard[index], self.row[index]

    def finish_job(self) -> bool:
        """Counts a job as done and returns whether it was the last one."""
        with self._lock:
            self._jobs_left -= 1
            return self._jobs_left == 0
