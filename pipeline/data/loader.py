"""Batches at a position: threads decode ahead, the order decides what."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress

import numpy as np
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.augment import View, draw_colour
from clipwright.pipeline.data.batch import Batch, Share
from clipwright.pipeline.data.batch_samples import WINDOW, BatchSamples, Replaced, key_sum, too_many
from clipwright.pipeline.data.datasets import DataConfig, Datasets
from clipwright.pipeline.data.order import Draw, Place, caption_index, negative_index
from clipwright.pipeline.data.workers import Workers
from clipwright.pipeline.folders.cache import CacheConfig
from clipwright.pipeline.folders.dataset import Dataset, Rows
from clipwright.pipeline.pixels import PixelError
from clipwright.pipeline.tokenizers.base import Tokenizer, trim
from clipwright.pipeline.towers.base import TextTowerConfig

AHEAD = 2  # batches decoded while one is in use
EXPECTED = 32  # batches whose shards a remote dataset fetches ahead
PART = 8  # samples a thread takes at a time
PAUSES = (0.1, 1.0)  # seconds before each new try of a sample where the disk fails
PLANNED = 1024  # places looked up at once
LOOK, KNOWN = 256, 100_000  # places looked up at once for a sample that can be read; bad ones that are remembered
STUCK = 25.0  # seconds after which a sample that is not read and decoded is an error


class Pending:
    """A batch in the making: each part of it is a job, and whoever does the last one puts it together."""

    def __init__(self, position: np.ndarray, place: Place, size: int) -> None:
        count = len(position)
        self.position: list[int] = position.tolist()
        self.dataset, self.shard, self.row, self.epoch = (
            column.tolist() for column in (place.dataset, place.shard, place.row, place.epoch)
        )
        self.replaced: list[Replaced] = []
        # Page-locked memory goes to a GPU while it computes.
        self.views = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.pixels = self.views.numpy()
        self.colour = np.empty((count, 4), np.float32)
        self.future: Future[Batch] = Future()
        self._left, self._lock = -(-count // PART), threading.Lock()

    def where(self, number: int) -> tuple[int, int, int]:
        """Dataset, shard and row of a sample."""
        return self.dataset[number], self.shard[number], self.row[number]

    def last(self) -> bool:
        """Counts a part as done; whether it was the last."""
        with self._lock:
            self._left -= 1
            return self._left == 0


class Loader:
    """The batches of one rank from any position on; nothing in it depends on where another run stopped."""

    def __init__(
        self,
        config: DataConfig,
        share: Share,
        *,
        tokenizer: Tokenizer,
        text: TextTowerConfig,
        image_size: int,
        seed: int,
        workers: int,
        cache: CacheConfig | None = None,
    ) -> None:
        self.config, self.share, self.tokenizer, self.text = config, share, tokenizer, text
        self.image_size, self.seed, self.workers = image_size, seed, workers
        self.dataset = Datasets(config, cache)
        self.dataset.check_batch(share.global_batch)
        self.order = self.dataset.order(seed)
        for part, order in zip(self.dataset.parts, self.order.orders, strict=True):
            part.keep_rows(order.reach(share.world))
            part.open_cache(order.reach(share.world))
        self._bad: dict[tuple[int, int, int], str] = {}  # samples that are known to be bad, and why

    def batches(self, position: int, stop: Callable[[], bool] = lambda: False) -> Generator[Batch, None, None]:
        """Batches from global position `position` on, AHEAD of them decoded beyond the one in use.

        Endless, but that waiting for one ends, and with it the batches, when `stop` says so.
        """
        workers = Workers(self.workers)
        places = self._places(position)
        ahead: deque[Pending] = deque()
        coming: deque[tuple[int, Place]] = deque(maxlen=EXPECTED + AHEAD + 1)
        try:
            while True:
                while len(ahead) <= AHEAD:
                    self._expect(coming, position)
                    ahead.append(self._start(workers, *next(places)))
                    position += self.share.global_batch
                started = time.perf_counter()
                batch = self._wait(workers, ahead.popleft(), stop)
                if batch is None:
                    return
                batch.waited = time.perf_counter() - started
                yield batch
        finally:
            for part in self.dataset.parts:
                part.expect(())
            workers.close()

    def _mine(self, position: int, batches: int = 1) -> np.ndarray:
        """This rank's positions of the global batch at `position`, and of so many that follow."""
        end = position + batches * self.share.global_batch
        return np.arange(position + self.share.rank, end, self.share.world)

    def _expect(self, coming: deque[tuple[int, Place]], position: int) -> None:
        """Tells remote datasets which shards the batch at `position` and the next ones read.

        coming: the end and the places of each batch looked at so far, those that are still being made included.
        """
        if not any(part.remote for part in self.dataset.parts):
            return
        size = self.share.global_batch
        first = coming[-1][0] if coming else position
        for start in range(first, position + EXPECTED * size, size):
            coming.append((start + size, self.order.locate(self._mine(start))))
        for number, part in enumerate(self.dataset.parts):
            part.expect(np.concatenate([place.shard[place.dataset == number] for _, place in coming]).tolist())

    def _places(self, position: int) -> Iterator[tuple[np.ndarray, Place]]:
        """This rank's positions of each global batch from `position` on, and where their samples lie.

        Looked up for several batches at once, which takes hardly longer than for one.
        """
        size = self.share.global_batch // self.share.world
        for start in itertools.count(position, self.share.global_batch * max(PLANNED // size, 1)):
            mine = self._mine(start, max(PLANNED // size, 1))
            place = self.order.locate(mine)
            for first in range(0, len(mine), size):
                part = slice(first, first + size)
                columns = place.epoch, place.shard, place.row, place.dataset
                yield mine[part], Place(*(column[part] for column in columns))

    def _start(self, workers: Workers, mine: np.ndarray, place: Place) -> Pending:
        """Sets the workers to this rank's part of a global batch."""
        pending = Pending(mine, place, self.image_size)
        for first in range(0, len(mine), PART):
            part = range(first, min(first + PART, len(mine)))
            workers.submit(lambda part=part: self._work(workers, pending, part))
        return pending

    def _wait(self, workers: Workers, pending: Pending, stop: Callable[[], bool]) -> Batch | None:
        while not wait([pending.future], timeout=0.2).done:
            if stop():
                return None
            seconds, place = workers.longest()
            if seconds > STUCK:
                assert isinstance(place, tuple)
                part, shard, row = place
                raise ClipwrightError(
                    "E_WORKER",
                    "a thread that does not come back from a sample",
                    where=f"{self.dataset.parts[part].tar_path(shard)}, row {row}",
                    found=f"{seconds:.0f} s, {STUCK:.0f} allowed",
                    fix="check the disk it lies on and start again; the run resumes",
                )
        return pending.future.result()

    def _work(self, workers: Workers, pending: Pending, part: range) -> None:
        number = part.start
        try:
            # Read all, then decode all: Python's share of a sample is done faster several times in a row, and the
            # threads wait less for each other.
            views: list[View | None] = []
            for number in part:
                views.append(self._sound(workers, pending, number))
            for number, view in zip(part, views, strict=True):
                if view is None or not self._written(workers, pending, number, view):
                    self._take(workers, pending, number)
            if pending.last():
                pending.future.set_result(self._collate(pending))
        except BaseException as error:
            if not pending.future.done():
                told = isinstance(error, (ClipwrightError, OSError))
                pending.future.set_exception(error if told else self._failed(pending, number, error))

    def _failed(self, pending: Pending, number: int, error: BaseException) -> ClipwrightError:
        """What nobody foresaw, by the name of the sample it met."""
        tar = self.dataset.parts[pending.dataset[number]].tar_path(pending.shard[number])
        made = ClipwrightError(
            "E_WORKER",
            "a thread that failed",
            where=f"{tar}, row {pending.row[number]}",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="start again, the run resumes; --debug shows where it happened",
        )
        made.__cause__ = error
        return made

    def _sound(self, workers: Workers, pending: Pending, number: int) -> View | None:
        """The view of a position's own sample, not decoded yet; none where anything is wrong with it."""
        where = pending.where(number)
        part = self.dataset.parts[where[0]]
        workers.rests()
        with part.held(where[1]):
            workers.begins(where)
            try:
                return None if where in self._bad else self._view(pending, number, part.image(*where[1:]))
            except (OSError, ClipwrightError, PixelError):
                return None

    def _written(self, workers: Workers, pending: Pending, number: int, view: View) -> bool:
        """Decodes a view into its place; whether that could be done."""
        workers.begins(pending.where(number))
        try:
            view.write(pending.pixels[number])
        except PixelError:
            return False
        return True

    def _take(self, workers: Workers, pending: Pending, number: int) -> None:
        """Decodes the sample of a position or, where it cannot be read, that of the nearest position of its stream.

        Those before it come first: what they hold is known to have been trained on. Which it is depends on nothing
        but the position and the disk.
        """
        failed: list[Replaced] = []
        for by, place in self._candidates(pending, number):
            pending.dataset[number], pending.shard[number], pending.row[number], pending.epoch[number] = place
            workers.rests()
            with self.dataset.parts[place[0]].held(place[1]):
                workers.begins(place[:3])
                reason = self._bad.get(place[:3]) or self._decode(pending, number, patient=not failed)
            if reason is None:
                if failed:
                    pending.replaced.append(dataclasses.replace(failed[0], by=by))
                return
            key = self.dataset.parts[place[0]].rows(place[1]).key[place[2]].decode()
            shard = self.dataset.shard_name(*place[:2])
            failed.append(Replaced(pending.position[number], by, key, shard, reason))
        raise too_many(failed, f"{len(failed):,} samples in a row beside position {pending.position[number]:,}")

    def _candidates(self, pending: Pending, number: int) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """The position and place of a sample, and of those that may stand in for it: each a stream's step further."""
        at, streams = pending.position[number], self.config.streams
        yield at, (pending.dataset[number], pending.shard[number], pending.row[number], pending.epoch[number])
        for first in range(1, WINDOW, LOOK):
            steps = np.arange(first, first + LOOK)
            positions = np.where(steps * streams <= at, at - steps * streams, at + (steps - at // streams) * streams)
            place = self.order.locate(positions)
            columns = (place.dataset, place.shard, place.row, place.epoch)
            yield from zip(positions.tolist(), zip(*(c.tolist() for c in columns), strict=True), strict=True)

    def _decode(self, pending: Pending, number: int, *, patient: bool) -> str | None:
        """Reads a sample's picture and writes its view and colours to their places; a code where that cannot be.

        patient: whether to wait for a disk that fails.
        """
        where = pending.where(number)
        try:
            data = _read(self.dataset.parts[where[0]], *where[1:], PAUSES if patient else ())
            self._view(pending, number, data).write(pending.pixels[number])
        except OSError:
            return "E_SYSTEM"  # not for ever, perhaps
        except (ClipwrightError, PixelError) as error:
            reason = str(error.args[0])
            if len(self._bad) < KNOWN:
                self._bad[where] = reason
            return reason
        return None

    def _view(self, pending: Pending, number: int, data: bytes) -> View:
        """A sample's view, and its colours in their place."""
        dataset, shard, row = pending.where(number)
        part, augment, epoch = self.dataset.parts[dataset], self.config.augment, pending.epoch[number]
        key = part.rows(shard).key[row].decode()
        turn = epoch if augment.views is None else epoch % augment.views
        if augment.colours:
            pending.colour[number] = draw_colour(augment, Draw(self.seed, part.fingerprint, turn, key, "colour"))
        return View(data, augment, Draw(self.seed, part.fingerprint, turn, key, "view"))

    def _collate(self, pending: Pending) -> Batch:
        where = list(zip(pending.dataset, pending.shard, pending.row, strict=True))
        rows = [self.dataset.parts[part].rows(shard) for part, shard, _ in where]
        names = [one.key[row].decode() for one, row in zip(rows, pending.row, strict=True)]
        keys = [name[:32] for name in names]
        captions = self._captions(rows, pending, keys)
        negatives = self._negatives(rows, pending, keys)
        texts = list(dict.fromkeys([*captions, *filter(None, negatives)]))
        tokens = self.tokenizer.encode(texts, self.text.context)
        lengths = (tokens == self.tokenizer.eot_id).argmax(1) + 1
        # Shortest first: where a batch is cut into micro-batches, each is as long as its own longest.
        short_first = lengths.argsort(kind="stable")
        known = {texts[old]: new for new, old in enumerate(short_first.tolist())}
        ids = {text: _text_id(text) for text in known}
        return Batch(
            views=pending.views,
            tokens=torch.from_numpy(trim(tokens, self.tokenizer.eot_id, self.text.pad)[short_first]).long(),
            text_row=torch.tensor([known[text] for text in captions]),
            image_id=torch.tensor([int(key[:16], 16) - 2**63 for key in keys]),
            caption_id=torch.tensor([ids[text] for text in captions]).view(len(keys), -1),
            colour=torch.from_numpy(pending.colour) if self.config.augment.colours else None,
            negative_row=torch.tensor([-1 if text is None else known[text] for text in negatives], dtype=torch.int64),
            negative_id=torch.tensor([0 if text is None else ids[text] for text in negatives], dtype=torch.int64),
            lengths=torch.from_numpy(lengths[short_first]) if self.text.pad == "longest" else None,
            batch_samples=BatchSamples(names, sorted(pending.replaced, key=lambda one: one.at), key_sum(names)),
        )

    def _captions(self, rows: list[Rows], pending: Pending, keys: list[str]) -> list[str]:
        """The captions of the batch, those of an image side by side."""
        counts = np.array([one.captions.count(row) for one, row in zip(rows, pending.row, strict=True)])
        epochs = np.array(pending.epoch) * self.config.captions
        picks = [
            caption_index(counts, seed=self.seed, epochs=epochs + turn, keys=keys)
            for turn in range(self.config.captions)
        ]
        chosen = zip(rows, pending.row, np.stack(picks, axis=1).tolist(), strict=True)
        return [one.captions.text(row, pick) for one, row, mine in chosen for pick in mine]

    def _negatives(self, rows: list[Rows], pending: Pending, keys: list[str]) -> list[str | None]:
        """The wrong captions of the batch, `negative_count` an image; none where it has fewer."""
        columns = [one.negatives for one in rows]
        texts = [column for column in columns if column is not None]
        if not texts:
            return []
        counts = np.array([column.count(row) for column, row in zip(texts, pending.row, strict=True)])
        picks = negative_index(
            counts, self.config.negative_count, seed=self.seed, epochs=np.array(pending.epoch), keys=keys
        ).tolist()
        chosen = zip(texts, pending.row, picks, strict=True)
        return [None if pick < 0 else column.text(row, pick) for column, row, mine in chosen for pick in mine]


def _read(part: Dataset, shard: int, row: int, pauses: Sequence[float]) -> bytes:
    """A stored image. What cannot be read is read again: once, or as often as there are pauses where the disk fails."""
    try:
        return part.image(shard, row)
    except ClipwrightError:
        return part.image(shard, row)
    except OSError:
        for seconds in pauses:
            time.sleep(seconds)
            with suppress(OSError):
                return part.image(shard, row)
        raise


def _text_id(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
