"""The loader: batches are a pure function of position, for any number of ranks and workers."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data import loader as data_loader
from clipwright.pipeline.data.augment import AugmentConfig, adjust_colors, draw_color_jitter
from clipwright.pipeline.data.batch import Batch, RankBatch
from clipwright.pipeline.data.datasets import DataConfig, DatasetEntry, Datasets, WeightChange
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.data.order import SampleRng
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.towers.base import TEXT_TOWERS


def loader(folder: Path, rank_batch: RankBatch, workers: int = 2, **config: Any) -> Loader:
    return Loader(
        DataConfig(**{"train": str(folder), **config}),
        rank_batch,
        tokenizer=TOKENIZERS.build(TOKENIZERS.preset("clip_bpe")),
        text=TEXT_TOWERS.preset("text_nano"),
        image_size=32,
        seed=5,
        workers=workers,
    )


def take(source: Loader, position: int, count: int) -> list[Batch]:
    batches = source.batches(position)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def test_batches_do_not_depend_on_start_workers_or_ranks(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = take(loader(scenes, RankBatch(0, 1, 16)), 0, 14)  # two epochs of 96 and part of a third
    resumed = take(loader(scenes, RankBatch(0, 1, 16), workers=5), 16 * 9, 5)
    for first, second in zip(batches[9:], resumed, strict=True):
        assert torch.equal(first.views, second.views)
        assert torch.equal(first.tokens, second.tokens) and torch.equal(first.text_row, second.text_row)
    monkeypatch.setattr(data_loader, "LOCATE_POSITIONS", 50)  # six of these batches at once instead of all
    halves = [take(loader(scenes, RankBatch(r, 2, 16)), 0, 14) for r in range(2)]
    for step, batch in enumerate(batches):
        for r in range(2):
            assert torch.equal(halves[r][step].views, batch.views[r::2])
            assert torch.equal(halves[r][step].image_id, batch.image_id[r::2])
    epochs = torch.cat([batch.image_id for batch in batches]).tolist()
    assert sorted(epochs[:96]) == sorted(epochs[96:192])
    assert len(set(epochs[:96])) == 96


def test_views_differ_between_epochs_and_captions_follow_their_image(scenes: Path) -> None:
    data = Dataset(scenes)
    owner = {}
    for shard in range(len(data.sizes)):
        for row in range(data.sizes[shard]):
            record = data.record(shard, row)
            owner[int(record["key"][:16], 16) - 2**63] = set(record["captions"])
    source = loader(scenes, RankBatch(0, 1, 16), captions=2)
    first, second = take(source, 0, 6), take(source, 96, 6)
    tokenizer = source.tokenizer
    for batch in first:
        assert batch.text_row.shape == (32,) and batch.caption_id.shape == (16, 2)
        # Each distinct caption is tokenized once, and equal captions share its row.
        assert len(batch.tokens) == len(set(batch.caption_id.flatten().tolist())) == len(set(batch.text_row.tolist()))
        assert batch.tokens.shape[1] % 8 == 0 or batch.tokens.shape[1] == source.text.context
        for i, image in enumerate(batch.image_id.tolist()):
            texts = {tokenizer.decode(batch.tokens[batch.text_row[2 * i + k]].tolist()).strip() for k in range(2)}
            assert texts <= {c.lower() for c in owner[image]}
    by_key = {i: v for b in first for i, v in zip(b.image_id.tolist(), b.views, strict=True)}
    changed = [not torch.equal(by_key[i], v) for b in second for i, v in zip(b.image_id.tolist(), b.views, strict=True)]
    assert sum(changed) > 80


def test_an_image_has_the_configured_number_of_views(scenes: Path) -> None:
    augment = AugmentConfig(views=2, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.1)
    epochs = [
        {
            i: (v, c)
            for b in take(loader(scenes, RankBatch(0, 1, 16), augment=augment), 96 * e, 6)
            for i, v, c in rows_of(b)
        }
        for e in range(3)
    ]
    same = [[all(map(torch.equal, a[i], b[i])) for i in a] for a, b in itertools.combinations(epochs, 2)]
    assert not any(same[0]) and all(same[1]) and not any(same[2])
    batch = take(loader(scenes, RankBatch(0, 1, 16), augment=augment), 0, 1)[0]
    assert batch.color_jitter is not None
    assert torch.equal(batch.images(torch.device("cpu")), adjust_colors(batch.views, batch.color_jitter))
    assert not torch.equal(batch.images(torch.device("cpu")), batch.views)


def test_views_and_colors_are_drawn_independently(scenes: Path) -> None:
    """Each purpose has its own stream of random numbers of a sample."""
    augment = AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.1)
    source = loader(scenes, RankBatch(0, 1, 16), augment=augment)
    [batch] = take(source, 0, 1)
    [plain] = take(loader(scenes, RankBatch(0, 1, 16)), 0, 1)
    assert torch.equal(batch.views, plain.views) and batch.color_jitter is not None
    assert batch.batch_samples.keys == plain.batch_samples.keys
    fingerprint = source.data.datasets[0].fingerprint
    draws = {purpose: [] for purpose in ("colour", "view")}
    for key in batch.batch_samples.keys:
        for purpose, drawn in draws.items():
            rng = SampleRng(source.seed, fingerprint, 0, key, purpose)
            drawn.append(draw_color_jitter(augment, rng))
    assert torch.equal(batch.color_jitter, torch.tensor(draws["colour"]))
    assert not torch.equal(batch.color_jitter, torch.tensor(draws["view"]))


def rows_of(batch: Batch) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    assert batch.color_jitter is not None
    return list(zip(batch.image_id.tolist(), batch.views, batch.color_jitter, strict=True))


def image_numbers(batch: Batch) -> list[int]:
    """The numbers of a batch's images, which `make_dataset` encodes in their color."""
    middle = batch.views[:, 16, 16].int()
    return (middle[:, 0] + 256 * middle[:, 1]).tolist()


def texts(source: Loader, batch: Batch, rows: torch.Tensor) -> list[str | None]:
    """The texts of some rows, without the spaces that CLIP's tokenizer adds between digits."""
    decode = source.tokenizer.decode
    return [None if row < 0 else decode(batch.tokens[row].tolist()).replace(" ", "") for row in rows.tolist()]


def test_captions_and_negatives_follow_their_image_through_a_mixture(make_dataset: Any) -> None:
    hard = [[f"wrong{i}.{k}" for k in range(i % 4)] for i in range(60)]
    first = make_dataset("one", [20, 1, 39], wrong=hard)
    second = make_dataset("two", [300], lambda i: [f"other {i}", f"second {i}"], wrong=[None] * 300)
    entries = [DatasetEntry(path=str(first), weight=3), DatasetEntry(path=str(second))]
    config: dict[str, Any] = {"train": entries, "negatives": "wrong", "negative_count": 2, "captions": 2}
    source = loader(first, RankBatch(0, 1, 16), workers=3, **config)
    seen: list[int] = []
    for batch in take(source, 0, 20):
        captions, negatives = texts(source, batch, batch.text_row), texts(source, batch, batch.negative_row)
        assert len(captions) == len(negatives) == 32 and batch.negative_id.shape == (32,)
        assert (batch.negative_id == 0).tolist() == [text is None for text in negatives]
        for i, image in enumerate(image_numbers(batch)):
            pair, hard_negatives = captions[2 * i : 2 * i + 2], {text for text in negatives[2 * i : 2 * i + 2] if text}
            if pair[0] == f"picture{image}":
                seen.append(image)
                assert pair[1] == pair[0] and hard_negatives <= set(hard[image])
                assert len(hard_negatives) == min(2, len(hard[image]))
            else:
                assert set(pair) <= {f"other{image}", f"second{image}"} and not hard_negatives
    assert len(seen) == 240 and {seen.count(i) for i in range(60)} <= {3, 4, 5}  # 3 of 4 samples, in about four epochs
    halves = [take(loader(first, RankBatch(r, 2, 16), **config), 0, 3) for r in range(2)]
    for step, batch in enumerate(take(source, 0, 3)):
        for r in range(2):
            assert torch.equal(halves[r][step].views, batch.views[r::2])
            assert torch.equal(halves[r][step].caption_id, batch.caption_id[r::2])
            assert torch.equal(halves[r][step].negative_id.view(-1, 2), batch.negative_id.view(-1, 2)[r::2])


def test_mixture_fingerprint_covers_datasets_weights_and_negatives(make_dataset: Any) -> None:
    first, second = (make_dataset(name, [30], wrong=["a"] * 30) for name in ("one", "two"))
    other = make_dataset("other", [30], wrong=["b"] * 30)

    def fingerprint(*datasets: tuple[Path, float], **config: Any) -> str:
        entries = [DatasetEntry(path=str(path), weight=weight) for path, weight in datasets]
        return Datasets(DataConfig(train=entries, **config)).fingerprint

    assert Datasets(DataConfig(train=str(first))).fingerprint == Dataset(first).fingerprint == fingerprint((first, 2))
    fingerprints = [
        fingerprint((first, 1), (second, 1)),
        fingerprint((first, 1), (second, 2)),
        fingerprint((first, 1)),
        fingerprint((first, 1), negatives="wrong"),
    ]
    assert len(set(fingerprints)) == 4
    # Equal images and captions, different hard negatives.
    assert fingerprint((other, 1)) == fingerprint((first, 1))
    assert fingerprint((other, 1), negatives="wrong") != fingerprints[3]


@pytest.mark.parametrize(
    ("config", "code", "pieces"),
    [
        ({"weights": [0, 0]}, "E_CONFIG_VALUE", ["data.train", "2 weights, 0 above 0"]),
        ({"reweight": [(64, [1])]}, "E_CONFIG_VALUE", ["data.reweight.0", "1 weight", "2 datasets"]),
        ({"reweight": [(100, [1, 2])]}, "E_CONFIG_VALUE", ["at=100", "use 128"]),
        ({"reweight": [(128, [1, 2]), (64, [1, 2])]}, "E_CONFIG_VALUE", ["data.reweight.1", "at=64", "ascending"]),
        ({"weights": [1, 10]}, "E_DATA_SMALL", ["two", "10 samples", "14.5455", "lower schedule.global_batch"]),
    ],
)
def test_invalid_mixtures_are_rejected(config: dict, code: str, pieces: list[str], make_dataset: Any) -> None:
    folders = [make_dataset("one", [40]), make_dataset("two", [10])]
    weights = config.get("weights", [1, 1])
    entries = [DatasetEntry(path=str(path), weight=weight) for path, weight in zip(folders, weights, strict=True)]
    steps = tuple(WeightChange(at=at, weights=row) for at, row in config.get("reweight", ()))
    with pytest.raises(ClipwrightError) as caught:
        loader(folders[0], RankBatch(0, 1, 16), train=entries, reweight=steps)
    assert caught.value.code == code and all(piece in str(caught.value) for piece in pieces)


def test_missing_negatives_column_is_an_error(scenes: Path, tmp_path: Path, small: Any) -> None:
    arguments = [*small.settings, f"data.train={scenes}", "data.negatives=captoins", "-o", "run"]
    line = small.cli(tmp_path).error("train", *arguments, code=3)
    assert line.startswith("error[E_COLUMN]") and ".parquet: captoins" in line and "did you mean 'captions'?" in line
    assert not (tmp_path / "run" / "latest").exists()


def test_stuck_worker_is_an_error_that_names_its_sample(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, release = make_dataset("d", [40]), threading.Event()
    monkeypatch.setattr("clipwright.pipeline.data.loader.SAMPLE_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr("clipwright.pipeline.data.workers.JOIN_TIMEOUT_SECONDS", 0.1)
    view = data_loader.View

    def stuck(data: bytes, *others: Any) -> Any:
        if data == bad:
            release.wait()
        return view(data, *others)

    bad = Dataset(folder).image(0, 7)
    monkeypatch.setattr(data_loader, "View", stuck)
    with pytest.raises(ClipwrightError) as caught:
        take(loader(folder, RankBatch(0, 1, 16)), 0, 4)
    assert caught.value.code == "E_WORKER" and f"{folder}/d-000000.tar, row 7" in str(caught.value)
    release.set()


def test_failed_worker_is_an_error_that_names_its_sample(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, view = make_dataset("d", [40]), data_loader.View
    bad, threads = Dataset(folder).image(0, 7), threading.active_count()

    def failing(data: bytes, *others: Any) -> Any:
        if data == bad:
            raise MemoryError("out of memory")
        return view(data, *others)

    monkeypatch.setattr(data_loader, "View", failing)
    with pytest.raises(ClipwrightError) as caught:
        take(loader(folder, RankBatch(0, 1, 16)), 0, 4)
    assert caught.value.code == "E_WORKER" and f"{folder}/d-000000.tar, row 7" in str(caught.value)
    assert "MemoryError: out of memory" in caught.value.found and isinstance(caught.value.__cause__, MemoryError)
    assert threading.active_count() <= threads


def test_closing_the_batches_ends_the_worker_threads(make_dataset: Any) -> None:
    folder = make_dataset("d", [40])
    before = threading.active_count()
    for _ in range(5):
        take(loader(folder, RankBatch(0, 1, 16), workers=3), 0, 2)
    assert threading.active_count() == before
