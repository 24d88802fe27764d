"""Which samples a batch contains, which of them replace an unreadable sample, and the limit on such replacements."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count

RECENT_POSITIONS = 10_000  # the span of positions over which replacements are counted
MAX_REPLACED = 200  # replacements allowed among RECENT_POSITIONS
MAX_CONSECUTIVE = 100  # this many in a row end the run
KEY_SUM_MODULUS = 2**128


@dataclass(frozen=True)
class ReplacedSample:
    """Position `at`, whose sample `key` in `shard` could not be read and was replaced by that of position `by`.

    The field names are those of the sample log.
    """

    at: int
    by: int
    key: str
    shard: str
    reason: str


@dataclass
class BatchSamples:
    """Keys by position and replaced samples, of one rank's part of a global batch or of the complete one."""

    keys: list[str] = field(default_factory=list)
    replaced: list[ReplacedSample] = field(default_factory=list)
    sum: int = 0
    """`key_sum` of the keys."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Shards that were given up while the batch was read, and why."""


def key_sum(keys: Iterable[str]) -> int:
    """Returns the sum mod 2^128 of the first 16 bytes of each key's SHA-256, independent of order and ranks."""
    hashes = (hashlib.sha256(key.encode()).digest() for key in keys)
    return sum(int.from_bytes(digest[:16], "big") for digest in hashes) % KEY_SUM_MODULUS


class BadSampleLimit:
    """Ends a run when too many samples are unreadable.

    More than MAX_REPLACED of RECENT_POSITIONS, or MAX_CONSECUTIVE in a row. The rule depends on positions alone, so all
    ranks and a resumed run stop at the same step. A fraction of all positions so far would stop a run with few bad
    samples early, by chance.
    """

    def __init__(self) -> None:
        self._recent: deque[ReplacedSample] = deque()
        self._consecutive = 0

    def add(self, replaced: Sequence[ReplacedSample]) -> None:
        """Adds the next replaced positions, in order. Raises E_BAD_SAMPLES, naming the worst shards, at the limit."""
        for sample in replaced:
            if self._recent and self._recent[-1].at == sample.at - 1:
                self._consecutive += 1
            else:
                self._consecutive = 1
            self._recent.append(sample)
            while self._recent[0].at <= sample.at - RECENT_POSITIONS:
                self._recent.popleft()
            count = len(self._recent)
            if count > MAX_REPLACED:
                found = f"{count} of the last {format_count(RECENT_POSITIONS, 'position')} ({MAX_REPLACED} allowed)"
                raise too_many_bad_samples(self._recent, found)
            if self._consecutive >= MAX_CONSECUTIVE:
                found = f"{format_count(self._consecutive, 'consecutive position')} ({MAX_CONSECUTIVE - 1} allowed)"
                raise too_many_bad_samples(self._recent, found)


def too_many_bad_samples(replaced: Iterable[ReplacedSample], found: str) -> ClipwrightError:
    """Returns the error of a run with too many unreadable samples; it names the worst shards and the reasons."""
    replaced = list(replaced)
    shards = Counter(sample.shard for sample in replaced).most_common(3)
    reasons = Counter(sample.reason for sample in replaced).most_common()
    return ClipwrightError(
        "E_BAD_SAMPLES",
        "too many samples cannot be read",
        where=", ".join(f"{shard} {count}" for shard, count in shards),
        found=f"{found}: " + ", ".join(f"{reason} {count}" for reason, count in reasons),
        fix="restore these shards (clipwright data verify DATASET lists every fault) and run the same command again "
        "to resume",
    )
