"""Mixtures against a slow reference implementation, and their guarantees about weights and shuffling."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from clipwright.pipeline.data.datasets import DataConfig, DatasetEntry, Datasets
from clipwright.pipeline.data.mixture import Mixture, WeightStep, slot_offsets
from clipwright.pipeline.data.order import Order

TURN = 2**64
PHI = 0x9E3779B97F4A7C15


def slow_draws(weights: dict[int, list[float]], streams: int, count: int) -> list[tuple[int, int]]:
    """(dataset, position in its own order) of positions 0 … count − 1, by counting one by one."""
    multiplier = next(m for m in range(max(1, math.ceil(0.618 * streams)), 10**9) if math.gcd(m, streams) == 1)
    given: Counter[tuple[int, int]] = Counter()
    out = []
    for p in range(count):
        k, s = divmod(p, streams)
        current = weights[max(at for at in weights if at <= p)]
        phase = (k * PHI + (s * multiplier % streams) * TURN // streams) % TURN
        for d in range(len(current)):
            edge = round(sum(map(Fraction, current[: d + 1])) / sum(map(Fraction, current)) * TURN)
            if phase < edge:
                break
        out.append((d, given[s, d] * streams + s))
        given[s, d] += 1
    return out


def mixture(weights: dict[int, list[float]], streams: int, size: int = 50) -> Mixture:
    datasets = range(len(weights[0]))
    orders = [Order([size], fingerprint=str(d), seed=0, streams=streams, window=4) for d in datasets]
    return Mixture(orders, [WeightStep(at, values) for at, values in weights.items()])


def layouts() -> list[tuple[dict[int, list[float]], int]]:
    """60 mixtures of 1 to 5 datasets, half with a schedule of weights, some of which are zero."""
    rng = random.Random(0)
    cases = []
    for number in range(60):
        streams, datasets = rng.choice([1, 2, 3, 5, 8, 13, 64]), rng.randint(1, 5)
        steps = {0} | {streams * rng.randint(1, 900 // streams) for _ in range(rng.randint(1, 3) * (number % 2))}
        weights = {}
        for at in sorted(steps):
            row = [rng.choice([0.0, 1.0, 3.0, rng.random(), 1e-3]) for _ in range(datasets)]
            weights[at] = row if any(row) else [1.0] * datasets
        cases.append((weights, streams))
    return cases


def test_draws_match_the_slow_reference() -> None:
    for weights, streams in layouts():
        dataset, own = mixture(weights, streams).draw(np.arange(1500))
        assert list(zip(dataset.tolist(), own.tolist(), strict=True)) == slow_draws(weights, streams, 1500), weights
        some = np.random.default_rng(0).permutation(1500)[:200]
        again = mixture(weights, streams).draw(some)
        assert (again[0] == dataset[some]).all() and (again[1] == own[some]).all()


def test_large_positions_match_exact_python_integers() -> None:
    def floor_sum(n: int, b: int) -> int:
        total, m, a = 0, TURN, PHI
        while n:
            total += n * (n - 1) // 2 * (a // m) + n * (b // m)
            n, b = divmod(a % m * n + b % m, m)
            m, a = a % m, m
        return total

    mixed = mixture({0: [0.3, 0.5, 0.2]}, 64)
    offsets = [int(o) for o in slot_offsets(64)]
    edges = [
        round(sum(map(Fraction, [0.3, 0.5, 0.2][:d])) / sum(map(Fraction, [0.3, 0.5, 0.2])) * TURN) for d in range(4)
    ]
    rng = random.Random(1)
    positions = [0, 63, 64, *(rng.randrange(2**bits) for bits in (20, 31, 33, 40, 45) for _ in range(40)), 2**46 - 1]
    for p, d, own in zip(positions, *(a.tolist() for a in mixed.draw(np.array(positions))), strict=True):
        k, o = p // 64, offsets[p % 64]
        assert edges[d] <= (k * PHI + o) % TURN < edges[d + 1]
        count = floor_sum(k, o - edges[d]) - floor_sum(k, o - edges[d + 1])
        assert own == count * 64 + p % 64


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [5.0, 1.0, 1.0, 0.01], [0.999, 0.001]])
@pytest.mark.parametrize("start", [0, 10**12 + 17])
def test_weights_hold_over_any_range_of_positions(weights: list[float], start: int) -> None:
    dataset, own = mixture({0: weights}, 64).draw(np.arange(start, start + 100_000))
    for d, weight in enumerate(weights):
        fraction = weight / sum(weights)
        drawn = dataset == d
        assert abs(drawn.mean() - fraction) < 0.001
        rows = drawn[(-start) % 64 :]
        rows = rows[: len(rows) // 64 * 64].reshape(-1, 64).sum(1)
        assert (np.abs(rows - fraction * 64) <= 1).all()
        cumulative = np.concatenate([[0], np.cumsum(drawn)])
        assert np.abs(cumulative[64:] - cumulative[:-64] - fraction * 64).max() <= 4
        # No position of a dataset's own order comes twice; only the ends of the slots are not reached yet.
        positions = np.sort(own[drawn])
        assert (np.diff(positions) > 0).all()
        if start == 0 and len(positions):
            assert positions[-1] - len(positions) < 64 * 4


def test_each_dataset_has_its_own_epochs() -> None:
    orders = [
        Order([9, 11], fingerprint="a", seed=0, streams=4, window=2),
        Order([7], fingerprint="b", seed=0, streams=4),
    ]
    location = Mixture(orders, [WeightStep(0, [3, 1]), WeightStep(120, [1, 3])]).locate(np.arange(400))
    for number, order in enumerate(orders):
        for epoch in range(3):
            selected = (location.dataset == number) & (location.epoch == epoch)
            samples = list(zip(location.shard[selected].tolist(), location.row[selected].tolist(), strict=True))
            assert len(samples) == len(set(samples)) == order.samples


def test_mixture_of_one_dataset_is_its_own_order() -> None:
    order = Order([40, 30], fingerprint="a", seed=0, streams=4, window=3)
    mixed, single = Mixture([order], [WeightStep(0, [2.0])]).locate(np.arange(300)), order.locate(np.arange(300))
    assert (mixed.row == single.row).all() and (mixed.shard == single.shard).all()
    assert (mixed.epoch == single.epoch).all() and not mixed.dataset.any()


def meetings(rows: np.ndarray, batch: int, reach: int = 8) -> float:
    """Fraction of the pairs at most `reach` rows apart that are in the same batch."""
    batch_of = np.empty(len(rows), np.int64)
    batch_of[rows] = np.arange(len(rows)) // batch
    met = [np.mean(batch_of[gap:] == batch_of[:-gap]) for gap in range(1, reach + 1)]
    return float(np.mean(met))


def test_nearby_rows_share_a_batch_as_often_as_in_a_uniform_shuffle() -> None:
    order = Order([2000], fingerprint="a", seed=0)
    epochs = order.locate(np.arange(30 * 2000)).row.reshape(30, 2000)
    got = np.mean([meetings(rows, 64) for rows in epochs])
    rng = np.random.default_rng(0)
    uniform = np.mean([meetings(rng.permutation(2000), 64) for _ in range(30)])
    assert abs(got - uniform) < 0.03 and uniform < 0.05
    assert meetings(np.arange(2000), 64) > 0.9  # the measure detects an unshuffled dataset


def repeats(fingerprints: tuple[str, str], size: int) -> float:
    """Fraction of samples whose image is already in their batch, for two datasets of the same images."""
    orders = [Order([2000], fingerprint=name, seed=0) for name in fingerprints]
    location = Mixture(orders, [WeightStep(0, [1, 1])]).locate(np.arange(30 * 4000))
    batches = location.row[: 30 * 4000 // size * size].reshape(-1, size)
    return float(np.mean([1 - len(set(batch)) / size for batch in batches.tolist()]))


def test_recaptioned_copy_does_not_run_in_lockstep() -> None:
    assert repeats(("a", "b"), 64) <= 0.01
    assert repeats(("a", "a"), 256) > 5 * repeats(("a", "b"), 256)  # what the fingerprint prevents


def test_two_datasets_of_the_same_images_mix_like_a_uniform_shuffle(make_dataset: Any) -> None:
    """Nearby rows of a dataset share a batch no more often than by chance, and equal images hardly ever do."""
    folders = [make_dataset("one", [2000]), make_dataset("two", [2000], lambda i: [f"recaptioned {i}"])]
    data = Datasets(DataConfig(train=[DatasetEntry(path=str(folder)) for folder in folders]))
    location = data.order(0).locate(np.arange(30 * 4000))
    rng, got, uniform = np.random.default_rng(0), [], []
    for number, epoch in itertools.product(range(2), range(29)):
        selected = np.flatnonzero((location.dataset == number) & (location.epoch == epoch))
        assert sorted(location.row[selected]) == list(range(2000))
        for rows, met in ((location.row[selected], got), (rng.permutation(2000), uniform)):
            batch_of = np.empty(2000, np.int64)
            batch_of[rows] = selected // 64
            met.append(np.mean([np.mean(batch_of[gap:] == batch_of[:-gap]) for gap in range(1, 9)]))
    assert abs(np.mean(got) - np.mean(uniform)) < 0.03 and np.mean(uniform) < 0.03
    batches = location.row.reshape(-1, 64).tolist()
    assert np.mean([1 - len(set(batch)) / 64 for batch in batches]) <= 0.01


def test_locating_large_positions_needs_no_more_memory() -> None:
    """The steps of the floor sum grow with the logarithm of the row; position 10¹² needs no more memory."""
    sizes = np.full(100_000, 10_000)
    orders = [Order(sizes, fingerprint=name, seed=0, streams=64) for name in "ab"]
    location = Mixture(orders, [WeightStep(0, [0.8, 0.2])]).locate(np.arange(10**12, 10**12 + 4096))
    columns = (location.dataset.tolist(), location.shard.tolist(), location.row.tolist())
    assert len(set(zip(*columns, strict=True))) == 4096
    assert (location.row < 10_000).all() and (location.shard < 100_000).all()
