"""Which samples were taken, and how many of them stood in for one that could not be read."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from clipwright.pipeline.core.errors import ClipwrightError

# Of so many positions, so many may be replaced, and fewer than so many in a row.
WINDOW, MOST, IN_A_ROW = 10_000, 200, 100
SUM = 2**128


@dataclass(frozen=True)
class Replaced:
    """A position whose own sample, `key` in `shard`, could not be read: it took that of position `by`."""

    at: int
    by: int
    key: str
    shard: str
    reason: str


@dataclass
class BatchSamples:
    """One rank's part of a global batch, or all of one: keys by position, and which of them stand in for others."""

    keys: list[str] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)
    sum: int = 0  # of `key_number` over the keys, mod 2^128


def key_sum(keys: Iterable[str]) -> int:
    """Sum mod 2^128 of the first 16 bytes of each key's SHA-256: the same in any order, and on any number of ranks."""
    return sum(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big") for key in keys) % SUM


class BadSampleLimit:
    """The rule that ends a run on data that rots: more than MOST of WINDOW positions, or IN_A_ROW, replaced.

    A function of positions alone, so that all ranks, and a resumed run, come to the same end at the same step. A share
    of all positions so far would stop a run with few bad samples early on, by chance.
    """

    def __init__(self) -> None:
        self._recent: deque[Replaced] = deque()
        self._row = 0

    def add(self, replaced: Sequence[Replaced]) -> None:
        """The next replaced positions, in order; E_BAD_SAMPLES, naming the worst shards, where they are too many."""
        for one in replaced:
            self._row = self._row + 1 if self._recent and self._recent[-1].at == one.at - 1 else 1
            self._recent.append(one)
            while self._recent[0].at <= one.at - WINDOW:
                self._recent.popleft()
            if len(self._recent) > MOST:
                raise too_many(self._recent, f"{len(self._recent)} of the last {WINDOW:,} positions, {MOST} allowed")
            if self._row >= IN_A_ROW:
                raise too_many(self._recent, f"{self._row} in a row, {IN_A_ROW - 1} allowed")


def too_many(replaced: Iterable[Replaced], found: str) -> ClipwrightError:
    """The error of a run that meets too many samples that cannot be read."""
    replaced = list(replaced)
    worst = ", ".join(f"{shard} {count}" for shard, count in Counter(one.shard for one in replaced).most_common(3))
    why = ", ".join(f"{reason} {count}" for reason, count in Counter(one.reason for one in replaced).most_common())
    return ClipwrightError(
        "E_BAD_SAMPLES",
        "too many samples that cannot be read",
        where=worst,
        found=f"{found}: {why}",
        fix="restore these shards (clipwright data verify DATASET names every fault) and start again; the run resumes",
    )
