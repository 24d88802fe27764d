"""Which sample is at which position: a pure function of (dataset, seed, streams P, window).

Training counts samples. Position p belongs to epoch p div N and to stream p mod P. A stream of an epoch is one block
of that epoch's shuffled shards; inside it, consecutive windows are permuted. Rank, worker and node counts play no part,
so they may change between two runs of the same sequence.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clipwright.pipeline.core.files import canonical_json

_U64 = np.uint64
_EIGHT = struct.Struct(">8Q")
_ROUNDS = 4  # Luby and Rackoff 1988: four rounds make a strong pseudo-random permutation
_GOLDEN_RATIO = 0x9E3779B97F4A7C15


def key64(*parts: object) -> int:
    """Returns a 64-bit key of any values that canonical JSON can represent."""
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts)).encode()).digest()[:8], "big")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Applies a keyed permutation of range(size) elementwise; `index`, `size` and `key` broadcast. Returns int64.

    A balanced Feistel network on the next power of four, repeated until the result is below `size` (cycle walking,
    Black and Rogaway 2002). It needs O(1) memory per element.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index).astype(_U64), np.asarray(size).astype(_U64), np.asarray(key).astype(_U64)
    )
    half_bits = np.zeros(size.shape, _U64)
    while True:
        too_small = (_U64(1) << (_U64(2) * half_bits)) < size
        if not np.any(too_small):
            break
        half_bits = half_bits + too_small.astype(_U64)
    mask = (_U64(1) << half_bits) - _U64(1)
    out = index.copy()
    pending = np.ones(out.shape, bool)
    with np.errstate(over="ignore"):
        while pending.any():
            values = out[pending]
            bits, low_mask, seed = half_bits[pending], mask[pending], key[pending]
            left, right = values >> bits, values & low_mask
            for number in range(_ROUNDS):
                multiplier = (2 * number + 1) * _GOLDEN_RATIO % 2**64
                left, right = right, left ^ (_mix(right + seed * _U64(multiplier) + _U64(number)) & low_mask)
            out[pending] = (left << bits) | right
            pending &= out >= size
    return out.astype(np.int64)


@dataclass(frozen=True)
class SampleLocation:
    """Where the samples of some positions are stored: one array element per position."""

    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    """Row inside the shard."""
    dataset: np.ndarray
    """Number of the dataset in the mixture."""


class Order:
    """The order of one dataset.

    sizes: samples per shard. fingerprint: the dataset's, without which two datasets of equal shape would run in
    lockstep. streams: P. window: how many samples of a stream are shuffled together. If N ≤ P * window, the epoch is
    one permutation of all N samples.
    """

    def __init__(
        self, sizes: Sequence[int], *, fingerprint: str, seed: int, streams: int = 64, window: int = 4096
    ) -> None:
        assert streams > 0 and window > 0
        self.sizes = np.asarray(sizes, np.int64)
        self.samples = int(self.sizes.sum())
        assert self.samples > 0
        self.fingerprint, self.seed, self.streams, self.window = fingerprint, seed, streams, window
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._shards = lru_cache(maxsize=2)(self._shuffle_shards)

    def locate(self, positions: np.ndarray) -> SampleLocation:
        """Returns the locations of `positions` (any int64 array)."""
        positions = np.asarray(positions, np.int64)
        epochs = positions // self.samples
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            shard[selected], row[selected] = self._locate(int(epoch), positions[selected])
        return SampleLocation(epochs, shard, row, np.zeros_like(positions))

    def shards_in_use(self, world_size: int) -> int:
        """Returns about how many shards one of `world_size` ranks reads from at the same time."""
        if self.samples <= self.streams * self.window:
            return len(self.sizes)
        streams = self.streams // math.gcd(self.streams, world_size)
        return min(len(self.sizes), streams * (-(-self.window * len(self.sizes) // self.samples) + 1))

    def _locate(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = epoch * self.samples
        if self.samples <= self.streams * self.window:
            index = permute(positions - first, self.samples, key64("epoch", self.seed, self.fingerprint, epoch))
            shard = np.searchsorted(self._starts, index, side="right") - 1
            return shard, index - self._starts[shard]
        order, starts = self._shards(epoch)
        stream = positions % self.streams
        all_streams = np.arange(self.streams)
        lengths = self._count(all_streams, first + self.samples) - self._count(all_streams, first)
        block_starts = np.concatenate([[0], np.cumsum(lengths)])
        in_stream = self._count(stream, positions) - self._count(stream, first)  # earlier positions of the stream
        window = in_stream // self.window
        window_size = np.minimum(self.window, lengths[stream] - window * self.window)
        base = key64("window", self.seed, self.fingerprint, epoch)
        with np.errstate(over="ignore"):
            keys = _mix(_mix(_U64(base) + stream.astype(_U64)) + window.astype(_U64))
        in_window = permute(in_stream % self.window, window_size, keys)
        index = block_starts[stream] + window * self.window + in_window
        shuffled = np.searchsorted(starts, index, side="right") - 1
        return order[shuffled], index - starts[shuffled]

    def _count(self, stream: np.ndarray, before: np.ndarray | int) -> np.ndarray:
        """Returns how many positions p < before have p ≡ stream (mod P)."""
        return (np.asarray(before) - stream + self.streams - 1) // self.streams

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the epoch's shard order and the cumulative starts of the shards in that order."""
        count = len(self.sizes)
        order = permute(np.arange(count), count, key64("shards", self.seed, self.fingerprint, epoch))
        return order, np.concatenate([[0], np.cumsum(self.sizes[order])])


class SampleRng:
    """Counter-based random numbers of one sample in one epoch: a pure function of the constructor's arguments."""

    def __init__(self, seed: int, fingerprint: str, epoch: int, key: str, purpose: str) -> None:
        self._name = f"{seed}\0{fingerprint}\0{epoch}\0{key}\0{purpose}".encode()
        self._blocks = 0
        self._numbers: list[int] = []

    def uniform(self) -> float:
        """Returns the next number in [0, 1)."""
        if not self._numbers:
            counter = b"\0%d" % self._blocks if self._blocks else b""
            self._numbers.extend(_EIGHT.unpack(hashlib.blake2b(self._name + counter, digest_size=64).digest()))
            self._blocks += 1
        return (self._numbers.pop() >> 11) / 2**53


def caption_index(counts: np.ndarray, *, seed: int, epochs: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Chooses one of the `counts` captions of each sample; in every `counts` epochs each caption comes once."""
    index, out = epochs % counts, np.zeros_like(counts)
    several = np.flatnonzero(counts > 1)
    if len(several):
        rounds = (epochs // counts)[several].tolist()
        seeds = [key64("caption", seed, keys[i], number) for i, number in zip(several.tolist(), rounds, strict=True)]
        out[several] = permute(index[several], counts[several], np.array(seeds, _U64))
    return out


def negative_index(counts: np.ndarray, limit: int, *, seed: int, epochs: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Chooses up to `limit` different ones of the `counts` hard negatives of each sample.

    Returns int64 (n, limit), -1 where a sample has fewer. Each sample cycles through all of its negatives in an order
    of its own.
    """
    columns = np.arange(limit)
    seeds = np.array([key64("negative", seed, key) for key in keys], _U64)
    sizes = np.maximum(counts, 1)[:, None]
    picks = permute((epochs[:, None] * limit + columns) % sizes, sizes, seeds[:, None])
    return np.where(columns < counts[:, None], picks, -1)
