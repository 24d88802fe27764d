"""Batches from any position of the order; threads read and decode ahead."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import wait
from contextlib import suppress

import numpy as np
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.data.augment import View, draw_color_jitter
from clipwright.pipeline.data.batch import Batch, RankBatch
from clipwright.pipeline.data.batch_samples import (
    RECENT_POSITIONS,
    BatchSamples,
    ReplacedSample,
    key_sum,
    too_many_bad_samples,
)
from clipwright.pipeline.data.datasets import DataConfig, Datasets
from clipwright.pipeline.data.order import SampleLocation, SampleRng, caption_index, negative_index
from clipwright.pipeline.data.pending import SAMPLES_PER_JOB, DatasetRow, PendingBatch
from clipwright.pipeline.data.unreadable import UnreadableShards
from clipwright.pipeline.data.workers import Workers
from clipwright.pipeline.folders.cache import CacheConfig
from clipwright.pipeline.folders.dataset import Dataset, Rows
from clipwright.pipeline.pixels import PixelError
from clipwright.pipeline.tokenizers.base import Tokenizer, trim
from clipwright.pipeline.towers.base import TextTowerConfig

PREFETCH_BATCHES = 2  # batches decoded while another one is in use
SHARD_PREFETCH_BATCHES = 32  # batches whose shards a remote dataset fetches ahead
RETRY_DELAYS_SECONDS = (0.1, 1.0)  # before each new attempt to read a sample after an I/O error
LOCATE_POSITIONS = 1024  # positions located at once
CANDIDATE_POSITIONS = 256  # positions located at once when a replacement is searched for
MAX_KNOWN_BAD = 100_000  # bad samples remembered
SAMPLE_TIMEOUT_SECONDS = 25.0  # to read and decode one sample


class Loader:
    """The batches of one rank from any position, as a pure function of that position."""

    def __init__(
        self,
        config: DataConfig,
        rank_batch: RankBatch,
        *,
        tokenizer: Tokenizer,
        text: TextTowerConfig,
        image_size: int,
        seed: int,
        workers: int,
        cache: CacheConfig | None = None,
    ) -> None:
        self.config, self.rank_batch, self.tokenizer, self.text = config, rank_batch, tokenizer, text
        self.image_size, self.seed, self.workers = image_size, seed, workers
        self.data = Datasets(config, cache)
        self.data.check_batch(rank_batch.global_batch)
        self.order = self.data.order(seed)
        for dataset, order in zip(self.data.datasets, self.order.orders, strict=True):
            shards = order.shards_in_use(rank_batch.world_size)
            dataset.keep_rows(shards)
            dataset.open_cache(shards)
        self._known_bad: dict[DatasetRow, str] = {}  # bad sample → E_ code
        self._unreadable = UnreadableShards(self.data, rank_batch.rank)

    def batches(self, position: int, should_stop: Callable[[], bool] = lambda: False) -> Generator[Batch, None, None]:
        """Yields batches from global position `position` without end; PREFETCH_BATCHES more are decoded ahead.

        Ends if `should_stop` returns True while it waits for a batch.
        """
        workers = Workers(self.workers)
        locations = self._locations(position)
        pending: deque[PendingBatch] = deque()
        upcoming: deque[tuple[int, SampleLocation]] = deque(maxlen=SHARD_PREFETCH_BATCHES + PREFETCH_BATCHES + 1)
        try:
            while True:
                while len(pending) <= PREFETCH_BATCHES:
                    self._prefetch_shards(upcoming, position)
                    pending.append(self._start(workers, *next(locations)))
                    position += self.rank_batch.global_batch
                started = time.perf_counter()
                batch = self._wait(workers, pending.popleft(), should_stop)
                if batch is None:
                    return
                batch.wait_seconds = time.perf_counter() - started
                yield batch
        finally:
            for dataset in self.data.datasets:
                dataset.prefetch(())
            workers.close()

    def _rank_positions(self, position: int, batches: int = 1) -> np.ndarray:
        """Returns this rank's positions of the `batches` global batches from `position` on."""
        end = position + batches * self.rank_batch.global_batch
        return np.arange(position + self.rank_batch.rank, end, self.rank_batch.world_size)

    def _prefetch_shards(self, upcoming: deque[tuple[int, SampleLocation]], position: int) -> None:
        """Asks remote datasets for the shards of the batch at `position` and of those that follow.

        upcoming: end position and locations of each batch considered so far, including those still being decoded.
        """
        if not any(dataset.remote for dataset in self.data.datasets):
            return
        size = self.rank_batch.global_batch
        first = upcoming[-1][0] if upcoming else position
        for start in range(first, position + SHARD_PREFETCH_BATCHES * size, size):
            upcoming.append((start + size, self.order.locate(self._rank_positions(start))))
        for number, dataset in enumerate(self.data.datasets):
            shards = [location.shard[location.dataset == number] for _, location in upcoming]
            dataset.prefetch(np.concatenate(shards).tolist())

    def _locations(self, position: int) -> Iterator[tuple[np.ndarray, SampleLocation]]:
        """Yields this rank's positions of each global batch from `position` on, and the locations of their samples.

        Several batches are located at once, which takes hardly longer than one.
        """
        size = self.rank_batch.global_batch // self.rank_batch.world_size
        batches = max(LOCATE_POSITIONS // size, 1)
        for start in itertools.count(position, self.rank_batch.global_batch * batches):
            positions = self._rank_positions(start, batches)
            located = self.order.locate(positions)
            for first in range(0, len(positions), size):
                batch = slice(first, first + size)
                yield (
                    positions[batch],
                    SampleLocation(
                        located.epoch[batch], located.shard[batch], located.row[batch], located.dataset[batch]
                    ),
                )

    def _start(self, workers: Workers, positions: np.ndarray, location: SampleLocation) -> PendingBatch:
        """Submits the jobs of this rank's part of a global batch."""
        pending = PendingBatch(positions, location, self.image_size)
        for first in range(0, len(positions), SAMPLES_PER_JOB):
            indices = range(first, min(first + SAMPLES_PER_JOB, len(positions)))
            workers.submit(lambda indices=indices: self._run_job(workers, pending, indices))
        return pending

    def _wait(self, workers: Workers, pending: PendingBatch, should_stop: Callable[[], bool]) -> Batch | None:
        while not wait([pending.future], timeout=0.2).done:
            if should_stop():
                return None
            seconds, item = workers.slowest()
            if seconds > SAMPLE_TIMEOUT_SECONDS:
                assert isinstance(item, tuple)
                dataset, shard, row = item
                raise ClipwrightError(
                    "E_WORKER",
                    "a data worker is stuck on a sample",
                    where=f"{self.data.datasets[dataset].tar_path(shard)}, row {row}",
                    found=f"no result for {seconds:.0f} s",
                    allowed=f"limit {SAMPLE_TIMEOUT_SECONDS:.0f} s",
                    fix="check the disk it is stored on and run the same command again",
                )
        return pending.future.result()

    def _run_job(self, workers: Workers, pending: PendingBatch, indices: range) -> None:
        """Reads and decodes some samples of a batch; collates the batch if this was its last job."""
        index = indices.start
        try:
            # Read all samples, then decode all of them: the Python part of each loop runs faster back to back, and the
            # threads wait less for each other.
            views: list[View | None] = []
            for index in indices:
                views.append(self._try_read(workers, pending, index))
            for index, view in zip(indices, views, strict=True):
                if view is None or not self._try_decode(workers, pending, index, view):
                    self._read_or_replace(workers, pending, index)
            if pending.finish_job():
                pending.future.set_result(self._collate(pending))
        except BaseException as error:
            if not pending.future.done():
                explained = isinstance(error, (ClipwrightError, OSError))
                pending.future.set_exception(error if explained else self._unexpected(pending, index, error))

    def _unexpected(self, pending: PendingBatch, index: int, error: BaseException) -> ClipwrightError:
        """Returns the error for an unexpected exception, naming the sample it occurred at."""
        tar = self.data.datasets[pending.dataset[index]].tar_path(pending.shard[index])
        failure = ClipwrightError(
            "E_WORKER",
            "a data worker failed on a sample",
            where=f"{tar}, row {pending.row[index]}",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="run the same command again; --debug shows the traceback",
        )
        failure.__cause__ = error
        return failure

    def _try_read(self, workers: Workers, pending: PendingBatch, index: int) -> View | None:
        """Reads a position's own sample and returns its undecoded view, or None on any error."""
        sample = pending.dataset_row(index)
        dataset, shard, row = sample
        workers.stop_clock()
        with self.data.datasets[dataset].pinned(shard):
            workers.start_item(sample)
            if sample in self._known_bad or self._unreadable.code(dataset, shard):
                return None
            try:
                if not self.data.datasets[dataset].rows(shard).captions.count(row):
                    return None
                view = self._view(pending, index, self.data.datasets[dataset].image(shard, row))
            except (OSError, ClipwrightError, PixelError):
                return None
            self._unreadable.read(dataset, shard)
            return view

    def _try_decode(self, workers: Workers, pending: PendingBatch, index: int, view: View) -> bool:
        """Decodes a view into the batch and returns whether that succeeded."""
        workers.start_item(pending.dataset_row(index))
        try:
            view.write(pending.pixels[index])
        except PixelError:
            return False
        return True

    def _read_or_replace(self, workers: Workers, pending: PendingBatch, index: int) -> None:
        """Decodes the sample of a position or, if it is unreadable, that of the nearest position of its stream.

        Earlier positions come first, since training has already seen their samples. The choice depends only on the
        position and on what is readable.
        """
        failed: list[ReplacedSample] = []
        for by, (dataset, shard, row, epoch) in self._candidates(pending, index):
            pending.dataset[index], pending.shard[index] = dataset, shard
            pending.row[index], pending.epoch[index] = row, epoch
            sample = (dataset, shard, row)
            workers.stop_clock()
            with self.data.datasets[dataset].pinned(shard):
                workers.start_item(sample)
                reason = self._known_bad.get(sample) or self._unreadable.code(dataset, shard)
                reason = reason or self._read_and_decode(pending, index, retry=not failed)
            if reason is None:
                if failed:
                    pending.replaced.append(dataclasses.replace(failed[0], by=by))
                return
            name = self.data.shard_name(dataset, shard)
            failed.append(ReplacedSample(pending.positions[index], by, self._key(sample), name, reason))
        raise too_many_bad_samples(
            failed,
            f"{format_count(len(failed), 'consecutive sample')} of the stream of position {pending.positions[index]:,}",
        )

    def _candidates(self, pending: PendingBatch, index: int) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Yields position and (dataset, shard, row, epoch) of a sample and then of its possible replacements.

        For position p and P streams: p, p − P, p − 2P, …, and from the start of the run p + P, p + 2P, ….
        """
        position, streams = pending.positions[index], self.config.streams
        yield position, (pending.dataset[index], pending.shard[index], pending.row[index], pending.epoch[index])
        for first in range(1, RECENT_POSITIONS, CANDIDATE_POSITIONS):
            steps = np.arange(first, first + CANDIDATE_POSITIONS)
            earlier = position - steps * streams
            later = position + (steps - position // streams) * streams
            positions = np.where(steps * streams <= position, earlier, later)
            location = self.order.locate(positions)
            columns = (location.dataset, location.shard, location.row, location.epoch)
            locations = zip(*(column.tolist() for column in columns), strict=True)
            yield from zip(positions.tolist(), locations, strict=True)

    def _read_and_decode(self, pending: PendingBatch, index: int, *, retry: bool) -> str | None:
        """Reads a sample and writes its view and color jitter into the batch; returns an E_ code if that fails.

        retry: whether to wait and read again after an I/O error.
        """
        sample = pending.dataset_row(index)
        dataset, shard, row = sample
        try:
            captions = self.data.datasets[dataset].rows(shard).captions
        except (OSError, ClipwrightError) as error:
            if isinstance(error, ClipwrightError) and self.data.datasets[dataset].has_sidecar(shard):
                raise  # it is there, and wrong
            return self._failed(pending, dataset, shard, error)
        if not captions.count(row):
            return "E_CAP_EMPTY"
        try:
            data = _read(self.data.datasets[dataset], shard, row, RETRY_DELAYS_SECONDS if retry else ())
            self._unreadable.read(dataset, shard)
            self._view(pending, index, data).write(pending.pixels[index])
        except OSError as error:
            return self._failed(pending, dataset, shard, error)  # possibly temporary: the sample is not remembered
        except (ClipwrightError, PixelError) as error:
            code = str(error.args[0])
            if len(self._known_bad) < MAX_KNOWN_BAD:
                self._known_bad[sample] = code
            return code
        return None

    def _failed(self, pending: PendingBatch, dataset: int, shard: int, error: OSError | ClipwrightError) -> str:
        """Counts a failed read of a shard, which may be given up for it; returns the sample's E_ code."""
        reason = self._unreadable.failed(dataset, shard, error)
        if reason is not None:
            pending.unreadable[self.data.shard_name(dataset, shard)] = reason
        return error.code if isinstance(error, ClipwrightError) else "E_SYSTEM"

    def _key(self, sample: DatasetRow) -> str:
        """Returns the key of a sample; empty if the sidecar of its shard is unreadable."""
        dataset, shard, row = sample
        try:
            return self.data.datasets[dataset].rows(shard).key[row].decode()
        except (ClipwrightError, OSError):
            return ""

    def _view(self, pending: PendingBatch, index: int, data: bytes) -> View:
        """Returns a sample's view and writes its color jitter into the batch."""
        number, shard, row = pending.dataset_row(index)
        dataset, augment, epoch = self.data.datasets[number], self.config.augment, pending.epoch[index]
        key = dataset.rows(shard).key[row].decode()
        view_number = epoch if augment.views is None else epoch % augment.views
        if augment.changes_color:
            # The purpose "colour" is part of the random seed: another spelling would change every draw.
            rng = SampleRng(self.seed, dataset.fingerprint, view_number, key, "colour")
            pending.color_jitter[index] = draw_color_jitter(augment, rng)
        return View(data, augment, SampleRng(self.seed, dataset.fingerprint, view_number, key, "view"))

    def _collate(self, pending: PendingBatch) -> Batch:
        samples = list(zip(pending.dataset, pending.shard, pending.row, strict=True))
        rows = [self.data.datasets[dataset].rows(shard) for dataset, shard, _ in samples]
        sample_keys = [shard_rows.key[row].decode() for shard_rows, row in zip(rows, pending.row, strict=True)]
        image_keys = [key[:32] for key in sample_keys]  # without the suffix of a repeated image
        captions = self._captions(rows, pending, image_keys)
        negatives = self._negatives(rows, pending, image_keys)
        texts = list(dict.fromkeys([*captions, *filter(None, negatives)]))
        tokens = self.tokenizer.encode(texts, self.text.context)
        lengths = (tokens == self.tokenizer.eot_id).argmax(1) + 1
        # Shortest first, so that each micro-batch of texts is only as long as its own longest text.
        by_length = lengths.argsort(kind="stable")
        row_of = {texts[old]: new for new, old in enumerate(by_length.tolist())}
        id_of = {text: _text_id(text) for text in row_of}
        return Batch(
            views=pending.views,
            tokens=torch.from_numpy(trim(tokens, self.tokenizer.eot_id, self.text.pad)[by_length]).long(),
            text_row=torch.tensor([row_of[text] for text in captions]),
            image_id=torch.tensor([int(key[:16], 16) - 2**63 for key in image_keys]),
            caption_id=torch.tensor([id_of[text] for text in captions]).view(len(image_keys), -1),
            color_jitter=torch.from_numpy(pending.color_jitter) if self.config.augment.changes_color else None,
            negative_row=torch.tensor([-1 if text is None else row_of[text] for text in negatives], dtype=torch.int64),
            negative_id=torch.tensor([0 if text is None else id_of[text] for text in negatives], dtype=torch.int64),
            lengths=torch.from_numpy(lengths[by_length]) if self.text.pad == "longest" else None,
            batch_samples=BatchSamples(
                sample_keys,
                sorted(pending.replaced, key=lambda sample: sample.at),
                key_sum(sample_keys),
                pending.unreadable,
            ),
        )

    def _captions(self, rows: list[Rows], pending: PendingBatch, keys: list[str]) -> list[str]:
        """Returns the captions of the batch, those of an image next to each other."""
        counts = np.array([shard_rows.captions.count(row) for shard_rows, row in zip(rows, pending.row, strict=True)])
        epochs = np.array(pending.epoch) * self.config.captions
        picks = [
            caption_index(counts, seed=self.seed, epochs=epochs + number, keys=keys)
            for number in range(self.config.captions)
        ]
        samples = zip(rows, pending.row, np.stack(picks, axis=1).tolist(), strict=True)
        return [shard_rows.captions.text(row, pick) for shard_rows, row, chosen in samples for pick in chosen]

    def _negatives(self, rows: list[Rows], pending: PendingBatch, keys: list[str]) -> list[str | None]:
        """Returns the hard negatives of the batch, `negative_count` per image, None where an image has fewer."""
        columns = [shard_rows.negatives for shard_rows in rows if shard_rows.negatives is not None]
        if not columns:
            return []
        counts = np.array([column.count(row) for column, row in zip(columns, pending.row, strict=True)])
        epochs = np.array(pending.epoch)
        picks = negative_index(counts, self.config.negative_count, seed=self.seed, epochs=epochs, keys=keys)
        samples = zip(columns, pending.row, picks.tolist(), strict=True)
        return [None if pick < 0 else column.text(row, pick) for column, row, chosen in samples for pick in chosen]


def _read(dataset: Dataset, shard: int, row: int, delays: Sequence[float]) -> bytes:
    """Reads a stored image. A corrupt sample is read once more; an I/O error is retried after each delay (seconds)."""
    try:
        return dataset.image(shard, row)
    except ClipwrightError:
        return dataset.image(shard, row)
    except OSError:
        for seconds in delays:
            time.sleep(seconds)
            with suppress(OSError):
                return dataset.image(shard, row)
        raise


def _text_id(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
