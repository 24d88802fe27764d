"""Which dataset of a weighted mixture has which position: a pure function of (weights, P).

A rank-1 lattice: slot s = p mod P gives its k-th position to the dataset whose interval of cumulative weight holds
frac(kφ + (s·m mod P)/P). A row of P positions is spread evenly over the slots and a slot's positions evenly over the
rows, so that any P positions in a row hold each weight within a few samples. Phases are 64-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from clipwright.pipeline.data.order import Order, Place

_U64 = np.uint64
_TURN = 2**64  # one whole turn of a phase
_PHI = 0x9E3779B97F4A7C15  # the golden ratio's fraction of a turn
MAX_ROWS = 2**40  # rows of P positions; beyond them the quotients below would no longer be exact


@dataclass(frozen=True)
class WeightStep:
    """From position `at` on (a multiple of P), samples are drawn in proportion to `weights`, one a dataset."""

    at: int
    weights: Sequence[float]


class Mixture:
    """Several orders as one. With c earlier positions of slot s given to dataset d, position p ≡ s is cP + s of d's."""

    def __init__(self, orders: Sequence[Order], steps: Sequence[WeightStep]) -> None:
        self.orders, self.streams = list(orders), orders[0].streams
        assert all(order.streams == self.streams for order in orders)
        starts = [step.at for step in steps]
        assert starts[0] == 0 and starts == sorted(set(starts)) and not any(at % self.streams for at in starts)
        self._starts = np.array(starts)
        self._offsets = slot_offsets(self.streams)
        self._bounds = [_bounds(step.weights) for step in steps]
        self._base = self._counts_at_starts()

    def locate(self, positions: np.ndarray) -> Place:
        """The places of `positions` (any int64 array)."""
        positions = np.asarray(positions, np.int64)
        if len(self.orders) == 1:
            return self.orders[0].locate(positions)
        dataset, own = self.draw(positions)
        place = Place(*(np.empty_like(positions) for _ in range(3)), dataset=dataset)
        for number in np.unique(dataset):
            mine = dataset == number
            found = self.orders[number].locate(own[mine])
            place.epoch[mine], place.shard[mine], place.row[mine] = found.epoch, found.shard, found.row
        return place

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The dataset that each position is given to, and which position of that dataset's own order it is."""
        row, slot = np.divmod(positions, self.streams)
        assert row.max(initial=0) < MAX_ROWS
        offset = self._offsets[slot]
        with np.errstate(over="ignore"):
            phase = row.astype(_U64) * _U64(_PHI) + offset
        step = np.searchsorted(self._starts, positions, side="right") - 1
        dataset = np.empty_like(positions)
        low, high = np.empty_like(phase), np.empty_like(phase)
        for number in np.unique(step):
            here = step == number
            ids, bounds = self._bounds[number]
            interval = np.searchsorted(bounds[1:-1], phase[here], side="right")
            dataset[here], low[here], high[here] = ids[interval], bounds[interval], bounds[interval + 1]
        earlier = self._base[step, dataset, slot] + _hits(row, offset, low, high)
        return dataset, earlier * self.streams + slot

    def _counts_at_starts(self) -> np.ndarray:
        """int64 (steps, datasets, P): what `_hits` under a step's weights lacks of the true count in that step."""
        base = np.zeros((len(self._bounds), len(self.orders), self.streams), np.int64)
        for number, (ids, bounds) in enumerate(self._bounds):
            if number:
                row = self._starts[number : number + 1] // self.streams
                base[number] = base[number - 1]
                for sign, (owners, edges) in ((1, self._bounds[number - 1]), (-1, (ids, bounds))):
                    hits = _hits(row, self._offsets, edges[:-1, None], edges[1:, None])
                    base[number, owners] += sign * hits
        return base


def slot_offsets(streams: int) -> np.ndarray:
    """The phase of each slot at row 0: (s·m mod P)/P, m the first number from 0.618 P on that is coprime to P."""
    multiplier = max(1, -(-618 * streams // 1000))
    while math.gcd(multiplier, streams) > 1:
        multiplier += 1
    return np.array([(slot * multiplier % streams) * _TURN // streams for slot in range(streams)], _U64)


def _bounds(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The datasets that have a weight, and their intervals' edges as phases; the last edge, a whole turn, is 0."""
    assert all(math.isfinite(weight) and weight >= 0 for weight in weights)
    ids = [number for number, weight in enumerate(weights) if weight > 0]
    total, upto, edges = sum(map(Fraction, weights)), Fraction(0), [0]
    for number in ids[:-1]:
        upto += Fraction(weights[number])
        edges.append(min(round(upto / total * _TURN), _TURN - 1))
    return np.array(ids), np.array([*edges, 0], _U64)


def _hits(rows: np.ndarray, offset: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many j < rows have low ≤ (jφ + offset) mod 2⁶⁴ < high, elementwise; a `high` of 0 means 2⁶⁴."""
    rows, offset, low, high = np.broadcast_arrays(rows.astype(_U64), offset, low, high)
    with np.errstate(over="ignore"):
        # A phase x mod 2⁶⁴ lies below an edge where ⌊x/2⁶⁴⌋ − ⌊(x − edge)/2⁶⁴⌋ is 1; the first term is common to both.
        low_sum, high_sum = _floor_sum(np.stack([rows, rows]), np.stack([offset - low, offset - high]))
        wrapped = (low_sum - high_sum) + rows * (((offset < high) | (high == 0)).astype(_U64) - (offset < low))
    return wrapped.astype(np.int64)


def _floor_sum(count: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Σ over j < count of ⌊(jφ + start)/2⁶⁴⌋, modulo 2⁶⁴, elementwise on uint64; count < 2⁴⁰.

    Lattice points under a line, counted by Euclid's algorithm on (2⁶⁴, φ), the axes changing places at each step
    (Graham, Knuth and Patashnik, "Concrete Mathematics", section 3.5); about 1.44 log₂(count) steps.
    """
    high, low = _multiply(count, _PHI)
    rest = low + start
    count = high + (rest < low)
    total = np.zeros_like(count)
    modulus, factor = _PHI, _TURN
    while count.any():
        whole, factor = divmod(factor, modulus)
        pairs = np.where(
            count & _U64(1), count * ((count - _U64(1)) >> _U64(1)), (count >> _U64(1)) * (count - _U64(1))
        )
        over, rest = np.divmod(rest, _U64(modulus))
        total += pairs * _U64(whole) + count * over
        # The quotient of a number beyond 64 bits: a floating point guess never too high and at most 1 too low leaves
        # a remainder below 1.02 × modulus, which 64 bits hold whatever was carried out of them.
        guess = count * (factor / modulus) + rest / modulus - 1 / 64
        quotient = np.maximum(np.floor(guess), 0).astype(_U64)
        rest = count * _U64(factor) + rest - quotient * _U64(modulus)
        short = rest >= _U64(modulus)
        rest = rest - short * _U64(modulus)
        count, factor, modulus = quotient + short, modulus, factor
    return total


def _multiply(value: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper and lower 64 bits of a product."""
    half, mask = _U64(32), _U64(2**32 - 1)
    above, below = _U64(factor >> 32), _U64(factor % 2**32)
    low = (value & mask) * below
    middle = (value >> half) * below + (low >> half)
    crossed = (value & mask) * above + (middle & mask)
    return (value >> half) * above + (middle >> half) + (crossed >> half), value * _U64(factor)
