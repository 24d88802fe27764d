"""Which dataset of a weighted mixture each position is drawn from: a pure function of (weights, streams P).

A rank-1 lattice: slot s = p mod P gives its k-th position to the dataset whose interval of cumulative weight contains
frac(kφ + (s·m mod P)/P). This spreads each dataset evenly over the slots and over the rows of P positions, so any P
consecutive positions match each weight within a few samples. Phases are 64-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from clipwright.pipeline.data.order import Order, SampleLocation

_U64 = np.uint64
_TURN = 2**64  # a full turn of a phase
_PHI = 0x9E3779B97F4A7C15  # the golden ratio as a fraction of a turn
MAX_ROWS = 2**40  # rows of P positions; beyond that the quotients in `_floor_sum` would not be exact


@dataclass(frozen=True)
class WeightStep:
    """From position `at` (a multiple of P), samples are drawn in proportion to `weights`, one weight per dataset."""

    at: int
    weights: Sequence[float]


class Mixture:
    """Interleaves the orders of several datasets.

    If dataset d was given c earlier positions of slot s, its next position in that slot is cP + s of its own order.
    """

    def __init__(self, orders: Sequence[Order], steps: Sequence[WeightStep]) -> None:
        self.orders, self.streams = list(orders), orders[0].streams
        assert all(order.streams == self.streams for order in orders)
        starts = [step.at for step in steps]
        assert starts[0] == 0 and starts == sorted(set(starts)) and not any(at % self.streams for at in starts)
        self._starts = np.array(starts)
        self._offsets = slot_offsets(self.streams)
        self._bounds = [_bounds(step.weights) for step in steps]
        self._base = self._counts_at_starts()

    def locate(self, positions: np.ndarray) -> SampleLocation:
        """Returns the locations of `positions` (any int64 array)."""
        positions = np.asarray(positions, np.int64)
        if len(self.orders) == 1:
            return self.orders[0].locate(positions)
        dataset, own = self.draw(positions)
        epoch, shard, row = np.empty_like(positions), np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(dataset):
            selected = dataset == number
            location = self.orders[number].locate(own[selected])
            epoch[selected], shard[selected], row[selected] = location.epoch, location.shard, location.row
        return SampleLocation(epoch, shard, row, dataset)

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the dataset of each position, and the position in that dataset's own order."""
        row, slot = np.divmod(positions, self.streams)
        assert row.max(initial=0) < MAX_ROWS
        offset = self._offsets[slot]
        with np.errstate(over="ignore"):
            phase = row.astype(_U64) * _U64(_PHI) + offset
        step = np.searchsorted(self._starts, positions, side="right") - 1
        dataset = np.empty_like(positions)
        low, high = np.empty_like(phase), np.empty_like(phase)
        for number in np.unique(step):
            selected = step == number
            ids, bounds = self._bounds[number]
            interval = np.searchsorted(bounds[1:-1], phase[selected], side="right")
            dataset[selected] = ids[interval]
            low[selected], high[selected] = bounds[interval], bounds[interval + 1]
        earlier = self._base[step, dataset, slot] + _hits(row, offset, low, high)
        return dataset, earlier * self.streams + slot

    def _counts_at_starts(self) -> np.ndarray:
        """Returns int64 (steps, datasets, P): what `_hits` of a step's weights lacks to the true count in that step."""
        base = np.zeros((len(self._bounds), len(self.orders), self.streams), np.int64)
        for number in range(1, len(self._bounds)):
            row = self._starts[number : number + 1] // self.streams
            base[number] = base[number - 1]
            for sign, (ids, bounds) in ((1, self._bounds[number - 1]), (-1, self._bounds[number])):
                hits = _hits(row, self._offsets, bounds[:-1, None], bounds[1:, None])
                base[number, ids] += sign * hits
        return base


def slot_offsets(streams: int) -> np.ndarray:
    """Returns the phase of each slot at row 0: (s·m mod P)/P, with m the first number ≥ 0.618 P coprime to P."""
    multiplier = max(1, -(-618 * streams // 1000))
    while math.gcd(multiplier, streams) > 1:
        multiplier += 1
    return np.array([(slot * multiplier % streams) * _TURN // streams for slot in range(streams)], _U64)


def _bounds(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the datasets with a weight above 0, and the edges of their intervals as phases.

    The last edge, a full turn, is 0.
    """
    assert all(math.isfinite(weight) and weight >= 0 for weight in weights)
    ids = [number for number, weight in enumerate(weights) if weight > 0]
    total = sum(map(Fraction, weights))
    cumulative = Fraction(0)
    edges = [0]
    for number in ids[:-1]:
        cumulative += Fraction(weights[number])
        edges.append(min(round(cumulative / total * _TURN), _TURN - 1))
    return np.array(ids), np.array([*edges, 0], _U64)


def _hits(rows: np.ndarray, offset: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Counts the j < rows with low ≤ (jφ + offset) mod 2⁶⁴ < high, elementwise; a `high` of 0 means 2⁶⁴."""
    rows, offset, low, high = np.broadcast_arrays(rows.astype(_U64), offset, low, high)
    with np.errstate(over="ignore"):
        # A phase x mod 2⁶⁴ is below an edge where ⌊x/2⁶⁴⌋ − ⌊(x − edge)/2⁶⁴⌋ is 1; the first term is common to both.
        low_sum, high_sum = _floor_sum(np.stack([rows, rows]), np.stack([offset - low, offset - high]))
        wrapped = (low_sum - high_sum) + rows * (((offset < high) | (high == 0)).astype(_U64) - (offset < low))
    return wrapped.astype(np.int64)


def _floor_sum(count: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns Σ over j < count of ⌊(jφ + start)/2⁶⁴⌋, modulo 2⁶⁴, elementwise on uint64; count < 2⁴⁰.

    Counts lattice points under a line by Euclid's algorithm on (2⁶⁴, φ), swapping the axes at each step (Graham, Knuth
    and Patashnik, "Concrete Mathematics", section 3.5); about 1.44 log₂(count) steps.
    """
    high, low = _multiply(count, _PHI)
    rest = low + start
    count = high + (rest < low)
    total = np.zeros_like(count)
    modulus, factor = _PHI, _TURN
    while count.any():
        multiple, factor = divmod(factor, modulus)
        pairs = np.where(
            count & _U64(1), count * ((count - _U64(1)) >> _U64(1)), (count >> _U64(1)) * (count - _U64(1))
        )
        carry, rest = np.divmod(rest, _U64(modulus))
        total += pairs * _U64(multiple) + count * carry
        # The dividend exceeds 64 bits. A floating-point guess that is never too high and at most 1 too low leaves a
        # remainder below 1.02 × modulus, so 64-bit arithmetic that wraps around gives it exactly.
        guess = count * (factor / modulus) + rest / modulus - 1 / 64
        quotient = np.maximum(np.floor(guess), 0).astype(_U64)
        rest = count * _U64(factor) + rest - quotient * _U64(modulus)
        too_low = rest >= _U64(modulus)
        rest = rest - too_low * _U64(modulus)
        count, factor, modulus = quotient + too_low, modulus, factor
    return total


def _multiply(value: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the upper and lower 64 bits of a product."""
    half, mask = _U64(32), _U64(2**32 - 1)
    above, below = _U64(factor >> 32), _U64(factor % 2**32)
    low = (value & mask) * below
    middle = (value >> half) * below + (low >> half)
    crossed = (value & mask) * above + (middle & mask)
    return (value >> half) * above + (middle >> half) + (crossed >> half), value * _U64(factor)
