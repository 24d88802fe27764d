"""The sequence of samples of a run: the sample log is the same for any ranks, workers, kills and resumes.

ROUNDS is the number of seeds of the random cases (`make soak` sets CLIPWRIGHT_SOAK). Except for one test, ranks are
loaders in one process here; test_ranks.py and test_resume.py compare the logs of real ranks.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.batch import Batch, RankBatch
from clipwright.pipeline.data.datasets import DataConfig, DatasetEntry, Datasets
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.folders.records import write_manifest
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.towers.base import TEXT_TOWERS
from clipwright.pipeline.train.run_folder import StepFile
from clipwright.pipeline.train.sample_log import line, merge

ROUNDS = int(os.environ.get("CLIPWRIGHT_SOAK", "0"))
RAGGED = [13, 5, 1, 11, 30, 7]  # 67 samples
SMALL: dict[str, Any] = {"streams": 8, "window": 3}


@functools.cache
def tokenizer() -> Any:
    return TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))


def loader(train: Any, rank_batch: RankBatch, workers: int, **config: Any) -> Loader:
    return Loader(
        DataConfig(**{"train": train, **config}),
        rank_batch,
        tokenizer=tokenizer(),
        text=TEXT_TOWERS.preset("text_nano"),
        image_size=16,
        seed=5,
        workers=workers,
    )


@contextlib.contextmanager
def ranks(
    train: Any, world: int, workers: int, batch: int, step: int, **config: Any
) -> Iterator[Iterator[list[Batch]]]:
    """The steps after `step`, each as the list of the ranks' batches."""
    sources = [
        loader(train, RankBatch(rank, world, batch), workers, **config).batches(step * batch) for rank in range(world)
    ]
    try:
        yield ([next(source) for source in sources] for _ in itertools.count())
    finally:
        for source in sources:
            source.close()


def run(path: Path, train: Any, world: int, workers: int, batch: int, first: int, last: int, **config: Any) -> None:
    """Writes steps `first` + 1 … `last` to a sample log that is first truncated to `first`."""
    file = StepFile(path, first)
    with ranks(train, world, workers, batch, first, **config) as steps:
        for step, parts in zip(range(first + 1, last + 1), steps, strict=False):
            batch_samples = merge([part.batch_samples for part in parts])
            assert len({len(part.views) for part in parts}) == 1
            file.write(line(step, (step - 1) * batch, batch, batch_samples, keys=True))
    file.close()


def test_ranks_and_workers_may_change_within_an_epoch(make_dataset: Any, tmp_path: Path) -> None:
    folder = str(make_dataset("d", RAGGED))
    run(tmp_path / "clean", folder, 1, 2, 12, 0, 20, **SMALL)
    layouts = [(1, 1), (2, 2), (4, 3), (2, 1), (3, 3)]  # within the first epoch and beyond
    for number, (world, workers) in enumerate(layouts):
        run(tmp_path / "moved", folder, world, workers, 12, number, number + 1 if number < 4 else 20, **SMALL)
    assert (tmp_path / "moved").read_bytes() == (tmp_path / "clean").read_bytes()


@pytest.mark.xdist_group("ranks")
def test_run_resumes_with_other_ranks_and_workers_within_an_epoch(
    make_dataset: Any, tmp_path: Path, small: Any
) -> None:
    """The same through `clipwright train`: 1, 2 and 1 ranks, in `make soak` 1, 2, 4, 2 and 3."""
    folder = make_dataset("d", RAGGED)
    arguments = [
        f"data.train={folder}",
        "data.streams=8",
        "data.window=3",
        "seed=5",
        "runtime.ledger=keys",
        "-o",
        "run",
    ]
    arguments += ["schedule.global_batch=12", "schedule.samples=84"]
    legs = [(1, 1, 1), (2, 2, 2), (4, 3, 3), (2, 1, 4), (3, 3, 7)] if ROUNDS else [(1, 1, 2), (2, 3, 4), (1, 2, 7)]
    for world, workers, last in legs:
        many = {"ranks": world} if world > 1 else {}
        small(tmp_path, *arguments, f"runtime.workers={workers}", f"runtime.stop_at={last}", **many)
        assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == last
    run(tmp_path / "clean", str(folder), 1, 2, 12, 0, 7, **SMALL)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == (tmp_path / "clean").read_bytes()


@pytest.mark.parametrize("seed", range(ROUNDS or 3))
def test_runs_killed_at_random_steps_lose_and_repeat_no_sample(seed: int, make_dataset: Any, tmp_path: Path) -> None:
    """Three epochs with a checkpoint every few steps, kills at any step, and other ranks and workers after each."""
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 7, 20, 33]) for _ in range(draw.randint(2, 7))] + [13]
    batch = 12 if sum(sizes) >= 12 else sum(sizes)
    first, second = make_dataset("d", sizes), make_dataset("e", [40, 9], lambda i: [f"other {i}"])
    train: Any = str(first) if seed % 2 else [DatasetEntry(path=str(first), weight=2), DatasetEntry(path=str(second))]
    config = {"streams": draw.choice([1, 3, 8]), "window": draw.choice([1, 3, 4096])}
    last = -(-3 * Datasets(DataConfig(train=train)).samples // batch)
    run(tmp_path / "clean", train, 1, 2, batch, 0, last, **config)
    every, step = draw.randint(2, 5), 0
    for _ in range(6):
        killed = draw.randint(step, last)
        run(tmp_path / "killed", train, draw.choice([1, 2, 3, 4, 6]), draw.randint(1, 3), batch, step, killed, **config)
        with (tmp_path / "killed").open("a") as file:
            file.write(draw.choice(["", '{"step":', '{"step":1}']))
        step = killed // every * every
    run(tmp_path / "killed", train, draw.choice([1, 2, 3, 4]), 2, batch, step, last, **config)
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "clean").read_bytes()


def layouts() -> Iterator[tuple[list[int], int, int]]:
    """(shard sizes, ranks, workers): a shard of 1 sample, a shard of 90 % of them, fewer samples than a batch."""
    draw = random.Random(0)
    for count in range(1, 14):
        sizes = [draw.randint(1, 30) for _ in range(count)]
        sizes[draw.randrange(count)] = 1
        yield sizes, draw.randint(1, 4), draw.randint(1, 5)
        sizes = [1] * (count - 1) + [max(9 * (count - 1), 24)]
        yield sizes, draw.randint(1, 4), draw.randint(1, 5)
    yield from (([1], 1, 1), ([23], 4, 2), ([1, 1], 2, 3), ([12, 11], 3, 1))


def test_no_layout_hangs(make_dataset: Any) -> None:
    """All ranks have equally many steps and see every sample once per epoch, or fail before the first step."""
    refused, threads = 0, threading.active_count()
    for number, (sizes, world, workers) in enumerate(layouts()):
        folder, total = str(make_dataset(f"d{number}", sizes)), sum(sizes)
        steps = -(-2 * total // 24)
        try:
            with ranks(folder, world, workers, 24, 0, streams=4, window=5) as batches:
                seen = [merge([part.batch_samples for part in parts]) for parts in itertools.islice(batches, steps)]
        except ClipwrightError as error:
            assert error.code == "E_DATA_SMALL" and total < 24
            refused += 1
            continue
        assert total >= 24
        keys = [key for batch_samples in seen for key in batch_samples.keys]
        assert len(set(keys[:total])) == len(set(keys[total : 2 * total])) == total
    assert number == 29 and 4 <= refused <= 12 and threading.active_count() == threads
    with pytest.raises(ClipwrightError) as caught:
        RankBatch(0, 5, 24)
    assert caught.value.code == "E_BATCH" and "multiple of 5" in caught.value.fix


def test_captions_stay_with_their_image(make_dataset: Any) -> None:
    """The color of each image and its caption encode the same number, up to the model's input."""
    folder = str(make_dataset("d", [300, 1, 499], lambda i: [f"number {i}", f"again {i}"]))
    want, pairs = 100_000 if ROUNDS else 2_000, 0
    decode = tokenizer().decode

    @functools.cache
    def number(tokens: tuple[int, ...]) -> int:
        return int(decode(list(tokens)).replace(" ", "").removeprefix("number").removeprefix("again"))

    with ranks(folder, 2, 2, 100, 0, streams=8, window=40, captions=2) as steps:
        for parts in steps:
            for batch in parts:
                middle = batch.views[:, 8, 8].int()
                captioned = [number(tuple(row)) for row in batch.tokens[batch.text_row].tolist()]
                shown = (middle[:, 0] + 256 * middle[:, 1]).repeat_interleave(2).tolist()
                assert captioned == shown
                pairs += len(captioned)
            if pairs >= want:
                return


def test_memory_does_not_grow(make_dataset: Any) -> None:
    """Over twenty epochs the resident set grows by less than 0.5 % per epoch."""
    folder = str(make_dataset("d", [500, 300, 200] if ROUNDS else [50, 49, 1]))
    total, process, resident = 1000 if ROUNDS else 100, psutil.Process(), []
    with ranks(folder, 1, 2, 50, 0, streams=4, window=30) as steps:
        for _ in range(25):
            for _ in itertools.islice(steps, total // 50):
                pass
            gc.collect()
            resident.append(process.memory_info().rss)
    slope = np.polyfit(np.arange(20), resident[5:], 1)[0]
    assert slope < 0.005 * resident[-1], resident


def test_a_hundred_thousand_shards_are_checked_in_seconds(tmp_path: Path) -> None:
    """A tar or sidecar that is missing, listed twice or of another size is an error that names it, in under 10 s."""
    count = 100_000 if ROUNDS else 3_000
    (tmp_path / "t").write_bytes(b"x" * 512)
    names = [f"d-{number:06d}.tar" for number in range(count)]
    sidecars = [name.replace(".tar", ".parquet") for name in names]
    for name in (*names, *sidecars):
        os.link(tmp_path / "t", tmp_path / name) if count < 30_000 else (tmp_path / name).write_bytes(b"x" * 512)
    entry = {"tar_bytes": 512, "tar_sha256": "", "sidecar_bytes": 512, "sidecar_sha256": "", "samples": 100}
    shards = [{**entry, "tar": name, "sidecar": side} for name, side in zip(names, sidecars, strict=True)]
    late = count * 9 // 10
    for change, message in (
        ({}, ""),
        ({"tar": names[3]}, f"{names[3]} — the manifest lists it twice"),
        ({"tar": "gone.tar"}, "gone.tar — the file is missing"),
        ({"tar_bytes": 513}, f"{names[late]} — 512 bytes, the manifest states 513"),
        ({"sidecar": "gone.parquet"}, "gone.parquet — the file is missing"),
        ({"sidecar_bytes": 9}, f"{sidecars[late]} — 512 bytes, the manifest states 9"),
    ):
        changed = [*shards[:late], {**shards[late], **change}, *shards[late + 1 :]]
        write_manifest(tmp_path, "dataset", "0" * 64, {"shards": changed})
        started = time.process_time()  # CPU time, since the machine may be busy
        try:
            source = loader(str(tmp_path), RankBatch(0, 1, 64), 1)
            source.order.locate(np.arange(64))
            assert not message
        except ClipwrightError as error:
            assert error.code == "E_DATA_HASH" and message and message in str(error), error
        assert time.process_time() - started < 10
