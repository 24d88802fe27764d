"""The order against a slow reference implementation of its definition."""

from __future__ import annotations

import numpy as np
import pytest

from clipwright.pipeline.data.order import Order, SampleRng, caption_index, key64, negative_index, permute

MASK = 2**64 - 1


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_permute(index: int, size: int, key: int) -> int:
    half = 0
    while 4**half < size:
        half += 1
    while True:
        left, right = index >> half, index & (2**half - 1)
        for number in range(4):
            multiplier = (2 * number + 1) * 0x9E3779B97F4A7C15 & MASK
            mixed = slow_mix((right + key * multiplier + number) & MASK)
            left, right = right, left ^ (mixed & (2**half - 1))
        index = (left << half) | right
        if index < size:
            return index


def slow_epoch(sizes: list[int], streams: int, window: int, seed: int, fingerprint: str, epoch: int) -> list[tuple]:
    """(shard, row) of every position of an epoch, by building the list of each stream."""
    total = sum(sizes)
    first = epoch * total
    if total <= streams * window:
        flat = [(s, r) for s, n in enumerate(sizes) for r in range(n)]
        key = key64("epoch", seed, fingerprint, epoch)
        return [flat[slow_permute(i, total, key)] for i in range(total)]
    count = len(sizes)
    shards = [slow_permute(i, count, key64("shards", seed, fingerprint, epoch)) for i in range(count)]
    flat = [(s, r) for s in shards for r in range(sizes[s])]
    base = key64("window", seed, fingerprint, epoch)
    out: dict[int, tuple] = {}
    start = 0
    for stream in range(streams):
        positions = [p for p in range(first, first + total) if p % streams == stream]
        block = flat[start : start + len(positions)]
        start += len(positions)
        for w in range(0, len(positions), window):
            part = block[w : w + window]
            key = slow_mix((slow_mix((base + stream) & MASK) + w // window) & MASK)
            for i in range(len(part)):
                out[positions[w + i]] = part[slow_permute(i, len(part), key)]
    return [out[p] for p in range(first, first + total)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permute_is_a_bijection_and_matches_python_integers(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        got = permute(np.arange(size), size, key)
        assert sorted(got) == list(range(size))
        assert got.tolist() == [slow_permute(i, size, key) for i in range(size)]
    if size >= 64:
        assert (permute(np.arange(size), size, 1) != permute(np.arange(size), size, 2)).mean() > 0.8


@pytest.mark.parametrize(
    ("sizes", "streams", "window"),
    [
        ([5, 7, 3], 4, 2),
        ([100] * 7 + [13], 8, 16),
        ([3], 64, 4096),
        ([40, 1, 9, 30], 5, 4),
        ([17] * 11, 16, 8),
        ([50, 50], 64, 1),
    ],
)
def test_locations_match_the_slow_reference(sizes: list[int], streams: int, window: int) -> None:
    order = Order(sizes, fingerprint="f", seed=3, streams=streams, window=window)
    for epoch in range(3):
        positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
        location = order.locate(positions)
        got = list(zip(location.shard.tolist(), location.row.tolist(), strict=True))
        assert got == slow_epoch(sizes, streams, window, 3, "f", epoch)
        assert len(set(got)) == order.samples
        assert set(location.epoch) == {epoch}


def test_positions_may_cross_epochs_and_be_located_in_any_order() -> None:
    order = Order([30, 20], fingerprint="f", seed=0, streams=4, window=3)
    ordered = order.locate(np.arange(150))
    shuffled = np.random.default_rng(0).permutation(150)
    part = order.locate(shuffled)
    assert (part.shard == ordered.shard[shuffled]).all()
    assert (part.row == ordered.row[shuffled]).all()
    assert (part.epoch == shuffled // 50).all()


def test_seed_dataset_and_epoch_all_change_the_order() -> None:
    def first(seed: int, fingerprint: str, epoch: int) -> list[int]:
        order = Order([200], fingerprint=fingerprint, seed=seed)
        return order.locate(np.arange(200) + 200 * epoch).row.tolist()

    orders = [first(0, "a", 0), first(1, "a", 0), first(0, "b", 0), first(0, "a", 1)]
    for i, first_order in enumerate(orders):
        for second_order in orders[i + 1 :]:
            assert np.mean(np.array(first_order) == np.array(second_order)) < 0.1


def captions(count: int, epochs: list[int], key: str) -> list[int]:
    counts = np.full(len(epochs), count)
    return caption_index(counts, seed=1, epochs=np.array(epochs), keys=[key] * len(epochs)).tolist()


def test_each_caption_is_chosen_once_in_as_many_epochs_as_there_are_captions() -> None:
    picks = captions(5, list(range(15)), "ab")
    assert [sorted(picks[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert len({tuple(picks[i : i + 5]) for i in (0, 5, 10)}) > 1
    assert picks != captions(5, list(range(15)), "cd")
    assert captions(1, [0, 9], "ab") == [0, 0]
    mixed = caption_index(np.array([1, 5, 3]), seed=1, epochs=np.array([4, 7, 2]), keys=["x", "ab", "y"])
    assert mixed.tolist() == [0, picks[7], captions(3, [2], "y")[0]]


def test_negatives_of_a_sample_are_distinct_and_cycle() -> None:
    counts, keys = np.array([0, 1, 2, 5]), ["a", "b", "c", "d"]
    picks = np.stack(
        [negative_index(counts, 2, seed=1, epochs=np.full(4, epoch), keys=keys) for epoch in range(10)]
    )  # (epoch, sample, 2)
    assert (picks[:, 0] == -1).all() and (picks[:, 1] == [0, -1]).all()
    assert all(sorted(pair) == [0, 1] for pair in picks[:, 2].tolist())
    assert all(len(set(pair)) == 2 for pair in picks[:, 3].tolist())
    assert sorted(picks[:5, 3].flatten().tolist()) == sorted([*range(5)] * 2)  # 10 draws of 5 negatives
    assert len({tuple(pair) for pair in picks[:, 3].tolist()}) == 5


def test_sample_rng_is_uniform_and_pure() -> None:
    numbers = [SampleRng(0, "f", 0, f"{i:032x}", "view").uniform() for i in range(4000)]
    assert numbers[:10] == [SampleRng(0, "f", 0, f"{i:032x}", "view").uniform() for i in range(10)]
    assert abs(np.mean(numbers) - 0.5) < 0.02
    assert abs(np.std(numbers) - 12**-0.5) < 0.02
    first, again = SampleRng(0, "f", 0, "0", "view"), SampleRng(0, "f", 0, "0", "view")
    many = [first.uniform() for _ in range(4000)]
    assert many == [again.uniform() for _ in range(4000)] and len(set(many)) == 4000
    assert np.abs(np.histogram(many, 10, (0, 1))[0] - 400).max() < 90
    assert SampleRng(0, "f", 1, "0", "view").uniform() != SampleRng(0, "f", 0, "0", "view").uniform()
