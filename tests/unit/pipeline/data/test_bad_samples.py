"""Unreadable samples: their replacements are a function of position, are logged, and are limited."""

from __future__ import annotations

import errno
import functools
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data import batch_samples
from clipwright.pipeline.data import loader as data_loader
from clipwright.pipeline.data.batch import Batch, RankBatch
from clipwright.pipeline.data.batch_samples import BadSampleLimit, BatchSamples, ReplacedSample, key_sum
from clipwright.pipeline.data.datasets import DataConfig
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.data.order import caption_index
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.towers.base import TEXT_TOWERS
from clipwright.pipeline.train.sample_log import merge

SIZES, STREAMS, WINDOW = [70, 30, 1, 99], 8, 16


@pytest.fixture(autouse=True)
def no_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_loader, "RETRY_DELAYS_SECONDS", (0.0, 0.0))


@functools.cache
def tokenizer() -> Any:
    return TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))


def loader(folder: Path, rank: int = 0, world: int = 1, batch: int = 20, **config: Any) -> Loader:
    return Loader(
        DataConfig(**{"train": str(folder), "streams": STREAMS, "window": WINDOW, **config}),
        RankBatch(rank, world, batch),
        tokenizer=tokenizer(),
        text=TEXT_TOWERS.preset("text_nano"),
        image_size=16,
        seed=5,
        workers=2,
    )


def take(source: Loader, position: int, count: int) -> list[Batch]:
    batches = source.batches(position)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def corrupt(folder: Path, samples: Sequence[tuple[int, int]]) -> None:
    """Changes one byte of each of these samples (shard, row)."""
    data = Dataset(folder)
    for shard, row in samples:
        record = data.record(shard, row)
        with data.tar_path(shard).open("r+b") as file:
            file.seek(record["offset"] + record["size"] // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))


def replacement(order: Any, bad: set[tuple[int, int]], position: int) -> int:
    """The rule written out: p − P, p − 2P, …, and from the start of the run p + P, p + 2P, …"""
    before = list(range(position - STREAMS, -1, -STREAMS))
    for by in itertools.chain([position], before, itertools.count(position + STREAMS, STREAMS)):
        location = order.locate(np.array([by]))
        if (int(location.shard[0]), int(location.row[0])) not in bad:
            return by
    raise AssertionError


def test_sample_without_caption_is_replaced(make_dataset: Any) -> None:
    """prep writes captions for all samples or for none; another tool may write some without."""
    folder = make_dataset("d", SIZES, lambda i: [] if i in (3, 4) else [f"picture {i}"])
    source = loader(folder)
    replaced = [sample for batch in take(source, 0, 10) for sample in batch.batch_samples.replaced]
    assert [sample.reason for sample in replaced] == ["E_CAP_EMPTY"] * 2
    keys = {source.data.datasets[0].record(0, row)["key"] for row in (3, 4)}
    assert {sample.key for sample in replaced} == keys


@pytest.mark.parametrize("bad_shard", [False, True])
def test_bad_sample_is_replaced_by_the_nearest_of_its_stream(bad_shard: bool, make_dataset: Any) -> None:
    """One rank and four, from the start and from a later position: same samples, same log."""
    folder = make_dataset("d", SIZES, lambda i: [f"first {i}", f"second {i}"])
    every = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
    bad = set(random.Random(1).sample(every, 40)) | ({(1, row) for row in range(30)} if bad_shard else set())
    corrupt(folder, sorted(bad))
    source = loader(folder)
    batches = take(source, 0, 30)
    ranks = [take(loader(folder, rank, 4), 0, 30) for rank in range(4)]
    later = take(loader(folder), 17 * 20, 5)
    owner = {}
    for shard, row in every:
        record = source.data.datasets[0].record(shard, row)
        owner[record["key"]] = (shard, row, record["captions"])
    replaced = 0
    for step, batch in enumerate(batches):
        samples = batch.batch_samples
        merged = merge([rank_batches[step].batch_samples for rank_batches in ranks])
        assert (merged.keys, merged.replaced) == (samples.keys, samples.replaced)
        assert merged.sum == samples.sum == key_sum(samples.keys)
        logged = {sample.at: sample for sample in samples.replaced}
        for i, position in enumerate(range(step * 20, step * 20 + 20)):
            by = replacement(source.order, bad, position)
            location = source.order.locate(np.array([position, by]))
            own, taken = ((int(s), int(r)) for s, r in zip(location.shard, location.row, strict=True))
            assert owner[samples.keys[i]][:2] == taken
            caption = source.tokenizer.decode(batch.tokens[batch.text_row[i]].tolist()).replace(" ", "")
            # A replacement has the caption it has at its own position.
            chosen = caption_index(np.array([2]), seed=5, epochs=location.epoch[1:], keys=[samples.keys[i]])
            assert caption == owner[samples.keys[i]][2][chosen[0]].replace(" ", "")
            assert (position in logged) == (own in bad)
            if own in bad:
                replaced += 1
                assert owner[logged[position].key][:2] == own and logged[position].by == by
                assert (logged[position].shard, logged[position].reason) == (f"d/d-{own[0]:06d}.tar", "E_DATA_HASH")
    assert replaced == 3 * len(bad)
    assert [batch.batch_samples for batch in later] == [batch.batch_samples for batch in batches[17:22]]


def test_undecodable_and_unreadable_samples_are_replaced_and_their_reason_logged(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset("d", [40])
    data, image, attempts = Dataset(folder), Dataset.image, []
    keys = [data.record(0, row)["key"] for row in range(40)]

    def faulty(self: Dataset, shard: int, row: int) -> bytes:
        if row == 7:
            return image(self, shard, row)[:-20]
        if row == 8:
            raise OSError(5, "Input/output error")
        if row == 9:
            attempts.append(row)
            if len(attempts) < 3:
                raise OSError(116, "Stale file handle")
        return image(self, shard, row)

    monkeypatch.setattr(Dataset, "image", faulty)
    replaced = [sample for batch in take(loader(folder), 0, 2) for sample in batch.batch_samples.replaced]
    assert {(sample.key, sample.reason) for sample in replaced} == {(keys[7], "E_IMG_TRUNCATED"), (keys[8], "E_SYSTEM")}
    assert len(attempts) >= 3  # the third attempt succeeded


def test_vanished_shard_is_given_up_once_and_named_once(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar and another shard's sidecar vanish before they are read: a few retries in all, not some per sample."""
    folder = make_dataset("d", SIZES)
    source, waits = loader(folder), []
    monkeypatch.setattr(data_loader.time, "sleep", waits.append)
    (folder / "d-000001.tar").unlink()
    (folder / "d-000003.parquet").unlink()
    samples = [batch.batch_samples for batch in take(source, 0, 20)]
    assert len(waits) <= 2 * len(data_loader.RETRY_DELAYS_SECONDS)  # by each of two workers
    reasons = {name: reason for sample in samples for name, reason in sample.unreadable.items()}
    assert sum(len(sample.unreadable) for sample in samples) == 2
    assert reasons.keys() == {"d/d-000001.tar", "d/d-000003.tar"}
    assert reasons["d/d-000001.tar"].startswith("ENOENT (No such file or directory) on rank 0, host ")
    assert reasons["d/d-000003.tar"].startswith("E_DATA_HASH (the file is missing")
    replaced = [sample for batch in samples for sample in batch.replaced]
    assert {(sample.shard, sample.reason) for sample in replaced} == {
        ("d/d-000001.tar", "E_SYSTEM"),
        ("d/d-000003.tar", "E_DATA_HASH"),
    }
    assert len(replaced) == 2 * (SIZES[1] + SIZES[3])  # of two epochs
    assert merge([samples[0], BatchSamples(samples[0].keys, unreadable={"x": "y"})]).unreadable == {
        **samples[0].unreadable,
        "x": "y",
    }


def test_failed_mount_is_an_error_of_this_rank(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dataset("d", SIZES)
    source = loader(folder, rank=1, world=2)
    image, failing = Dataset.image, [False]

    def read(self: Dataset, shard: int, row: int) -> bytes:
        if failing[0]:
            raise OSError(errno.EIO, "Input/output error")
        return image(self, shard, row)

    monkeypatch.setattr(Dataset, "image", read)
    batches = source.batches(0)
    next(batches)
    failing[0] = True
    with pytest.raises(ClipwrightError) as caught:
        list(itertools.islice(batches, 5))
    assert caught.value.code == "E_SYSTEM" and caught.value.what == f"the dataset {folder} cannot be read on one rank"
    assert caught.value.found.startswith("EIO (Input/output error) on rank 1, host ") and "d-0000" in caught.value.where
    assert "check the disk or mount" in caught.value.fix
    failing[0] = False
    source = loader(folder)
    batches = source.batches(0)
    (folder / "manifest.json").unlink()  # as if unmounted: the files are gone, and the folder's manifest too
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(ClipwrightError) as caught:
        next(batches)
    assert caught.value.code == "E_SYSTEM" and "ENOENT" in caught.value.found and "manifest.json" in caught.value.where


def test_no_readable_sample_is_an_error_that_names_the_shard(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset("d", [40])
    monkeypatch.setattr(data_loader, "RECENT_POSITIONS", 300)
    corrupt(folder, [(0, row) for row in range(40)])
    with pytest.raises(ClipwrightError) as caught:
        take(loader(folder), 0, 1)
    assert caught.value.code == "E_BAD_SAMPLES" and "d/d-000000.tar" in str(caught.value)


@pytest.mark.parametrize(
    ("positions", "stops"),
    [
        (range(0, 100), 99),  # 100 in a row
        ([*range(0, 99), *range(100, 200)], 199),  # 99, a gap, then 100
        (range(0, 10_000, 50), None),  # 200 in any 10,000
        (range(0, 20_050, 50), None),
        ([*range(0, 10_000, 50), 9_999], 9_999),
        ([*range(0, 10_000, 50), 10_000, 10_001], 10_001),  # position 0 no longer counts
        (range(3, 100_000, 49), 9_803),
    ],
)
def test_bad_sample_limit(positions: Sequence[int], stops: int | None) -> None:
    replaced = [ReplacedSample(at, at - 8, "k", f"d/{at % 7}.tar", "E_DATA_HASH") for at in positions]
    for batch in (1, 7, 64, 30_000):  # the same position exceeds the limit at any batch size
        limit, stopped = BadSampleLimit(), None
        for first in range(0, positions[-1] + 1, batch):
            in_batch = [sample for sample in replaced if first <= sample.at < first + batch]
            try:
                limit.add(in_batch)
            except ClipwrightError as error:
                stopped = first
                assert error.code == "E_BAD_SAMPLES" and "E_DATA_HASH" in error.found
                break
        assert stopped == (None if stops is None else stops // batch * batch)


def test_bad_sample_limit_names_the_three_worst_shards() -> None:
    shards = [*["a"] * 30, *["b"] * 9, *["c"] * 40, *["d"] * 21]
    with pytest.raises(ClipwrightError) as caught:
        BadSampleLimit().add([ReplacedSample(at, 0, "k", shard, "E_IMG_TRUNCATED") for at, shard in enumerate(shards)])
    assert caught.value.where == "c 40, a 30, d 21" and caught.value.found.endswith("E_IMG_TRUNCATED 100")
    assert batch_samples.MAX_CONSECUTIVE == 100


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.05])
def test_run_with_a_fraction_of_corrupt_samples(fraction: float, make_dataset: Any) -> None:
    """The first two finish with exact counts; the third stops within one global batch of exceeding the limit."""
    sizes = [400, 398, 2, *[400] * 8]
    folder = make_dataset("d", sizes)
    every = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    bad = random.Random(3).sample(every, round(fraction * 4000))
    corrupt(folder, bad)
    source, limit, done = loader(folder, batch=50, streams=16, window=64), BadSampleLimit(), 0
    replaced: list[ReplacedSample] = []
    order = source.order.locate(np.arange(8000))
    hit = [p for p, at in enumerate(zip(order.shard.tolist(), order.row.tolist(), strict=True)) if at in set(bad)]
    batches = source.batches(0)
    try:
        for batch in itertools.islice(batches, 160):
            replaced += batch.batch_samples.replaced
            done += 1
            limit.add(batch.batch_samples.replaced)
    except ClipwrightError as error:
        assert fraction == 0.05 and error.code == "E_BAD_SAMPLES"
        assert done == hit[200] // 50 + 1
    else:
        assert fraction < 0.05 and len(replaced) == 2 * len(bad) and done == 160
        assert [sample.at for sample in replaced] == hit
    finally:
        batches.close()
