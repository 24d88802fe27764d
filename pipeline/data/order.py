"""Which sample stands at which position: a pure function of (dataset, seed, P, window).

Training counts samples. Position p belongs to epoch p div N and to stream p mod P. A stream of an epoch is one block
of that epoch's shuffled shards; inside it, consecutive windows are permuted. No rank, worker or machine count takes
part, so any of them may change between two runs of the same sequence.
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


def key64(*parts: object) -> int:
    """A 64-bit key from anything canonical JSON can hold."""
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts)).encode()).digest()[:8], "big")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Keyed permutation of range(size), elementwise: `index`, `size` and `key` broadcast; returns int64.

    A balanced Feistel network on the next power of four, walked until it lands inside (Black and Rogaway 2002).
    O(1) memory an element, and its inverse is never needed.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index).astype(_U64), np.asarray(size).astype(_U64), np.asarray(key).astype(_U64)
    )
    half = np.zeros(size.shape, _U64)
    while np.any(grow := (_U64(1) << (_U64(2) * half)) < size):
        half = half + grow.astype(_U64)
    mask = (_U64(1) << half) - _U64(1)
    out = index.copy()
    left_to_do = np.ones(out.shape, bool)
    with np.errstate(over="ignore"):
        while left_to_do.any():
            part = out[left_to_do]
            bits, low, seed = half[left_to_do], mask[left_to_do], key[left_to_do]
            left, right = part >> bits, part & low
            for turn in range(_ROUNDS):
                odd = (2 * turn + 1) * 0x9E3779B97F4A7C15 % 2**64
                left, right = right, left ^ (_mix(right + seed * _U64(odd) + _U64(turn)) & low)
            out[left_to_do] = (left << bits) | right
            left_to_do &= out >= size
    return out.astype(np.int64)


@dataclass(frozen=True)
class Place:
    """Where the samples of some positions lie: arrays of epoch, shard, row inside the shard, dataset's number."""

    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    dataset: np.ndarray


class Order:
    """The order of one dataset.

    sizes: samples per shard; fingerprint: the dataset's, so that two datasets of equal shape do not run in lockstep;
    streams: P; window: how many samples of a stream are mixed with each other. When N ≤ P·window the epoch is one
    permutation of all N.
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

    def locate(self, positions: np.ndarray) -> Place:
        """The places of `positions` (any int64 array)."""
        positions = np.asarray(positions, np.int64)
        epochs = positions // self.samples
        shard, row = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shard[here], row[here] = self._locate(int(epoch), positions[here])
        return Place(epochs, shard, row, np.zeros_like(positions))

    def reach(self, world: int) -> int:
        """About how many shards one of `world` ranks reads from at a time."""
        if self.samples <= self.streams * self.window:
            return len(self.sizes)
        streams = self.streams // math.gcd(self.streams, world)
        return min(len(self.sizes), streams * (-(-self.window * len(self.sizes) // self.samples) + 1))

    def _locate(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = epoch * self.samples
        if self.samples <= self.streams * self.window:
            index = permute(positions - first, self.samples, key64("epoch", self.seed, self.fingerprint, epoch))
            shard = np.searchsorted(self._starts, index, side="right") - 1
            return shard, index - self._starts[shard]
        order, starts = self._shards(epoch)
        stream = positions % self.streams
        lengths = self._count(np.arange(self.streams), first + self.samples) - self._count(
            np.arange(self.streams), first
        )
        block_starts = np.concatenate([[0], np.cumsum(lengths)])
        k = self._count(stream, positions) - self._count(stream, first)  # how many of this stream came before
        window = k // self.window
        inside = np.minimum(self.window, lengths[stream] - window * self.window)
        base = key64("window", self.seed, self.fingerprint, epoch)
        with np.errstate(over="ignore"):
            keys = _mix(_mix(_U64(base) + stream.astype(_U64)) + window.astype(_U64))
        index = block_starts[stream] + window * self.window + permute(k % self.window, inside, keys)
        turn = np.searchsorted(starts, index, side="right") - 1
        return order[turn], index - starts[turn]

    def _count(self, stream: np.ndarray, before: np.ndarray | int) -> np.ndarray:
        """How many positions p < before have p ≡ stream (mod P)."""
        return (np.asarray(before) - stream + self.streams - 1) // self.streams

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard order and the running starts of its shards."""
        count = len(self.sizes)
        order = permute(np.arange(count), count, key64("shards", self.seed, self.fingerprint, epoch))
        return order, np.concatenate([[0], np.cumsum(self.sizes[order])])


class Draw:
    """Counter-based random numbers of one sample in one epoch: a pure function of (seed, dataset, epoch, key)."""

    def __init__(self, seed: int, fingerprint: str, epoch: int, key: str, purpose: str) -> None:
        self._name = f"{seed}\0{fingerprint}\0{epoch}\0{key}\0{purpose}".encode()
        self._blocks = 0
        self._numbers: list[int] = []

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        if not self._numbers:
            counter = b"\0%d" % self._blocks if self._blocks else b""
            self._numbers.extend(_EIGHT.unpack(hashlib.blake2b(self._name + counter, digest_size=64).digest()))
            self._blocks += 1
        return (self._numbers.pop() >> 11) / 2**53


def caption_index(counts: np.ndarray, *, seed: int, epochs: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Which of its `counts` captions each sample takes: each caption once in every `counts` epochs."""
    turns, out = epochs % counts, np.zeros_like(counts)
    several = np.flatnonzero(counts > 1)
    if len(several):
        rounds = (epochs // counts)[several].tolist()
        seeds = [key64("caption", seed, keys[i], turn) for i, turn in zip(several.tolist(), rounds, strict=True)]
        out[several] = permute(turns[several], counts[several], np.array(seeds, _U64))
    return out


def negative_index(counts: np.ndarray, most: int, *, seed: int, epochs: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Which of its `counts` negatives each sample brings along, int64 (n, most): different ones, −1 where it has fewer.

    All of them come in turn, in an order of the sample's own.
    """
    turns = np.arange(most)
    seeds = np.array([key64("negative", seed, key) for key in keys], _U64)
    sizes = np.maximum(counts, 1)[:, None]
    picks = permute((epochs[:, None] * most + turns) % sizes, sizes, seeds[:, None])
    return np.where(turns < counts[:, None], picks, -1)
