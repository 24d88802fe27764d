"""Which rank is ill, by what each said of itself: a pure function of signs of life."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clipwright.pipeline.core.errors import ClipwrightError

AGAIN = "run the same command again: it goes on from the newest checkpoint"
SHOWN = 4  # ranks that a line names


@dataclass
class Peer:
    """What is known of a rank; times are this process's own. moved: when it last got on."""

    rank: int
    host: str = "a host that never answered"
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    state: Literal["here", "gone", "left"] = "here"
    beat: dict[str, Any] = field(default_factory=dict)

    def beats(self, beat: dict[str, Any]) -> None:
        before, self.beat = (self.mark, self.beat.get("signs")), {**beat, "mark": tuple(beat["mark"])}
        if (self.mark, beat["signs"]) != before:
            self.moved = time.monotonic()

    def discount_pause(self, seconds: float) -> None:
        """Nobody listened for so long."""
        now = time.monotonic()
        self.heard, self.moved = min(self.heard + seconds, now), min(self.moved + seconds, now)

    @property
    def mark(self) -> tuple[int, int]:
        return self.beat.get("mark", (-1, 0))

    @property
    def doing(self) -> str:
        if self.mark[0] < 0:
            return "it was starting"
        return f"it was in step {self.mark[0] + 1}, {self.beat['phase']}"


def judge(peers: Sequence[Peer], now: float, timeout_seconds: float) -> ClipwrightError | None:
    """E_RANK for ranks that died or are silent, E_HANG for ranks without progress for `timeout_seconds`."""
    here = [peer for peer in peers if peer.state == "here"]
    if gone := [peer for peer in peers if peer.state == "gone"]:
        return _died(gone)
    if silent := [peer for peer in here if now - peer.heard > timeout_seconds]:
        return _silent(silent, now, timeout_seconds)
    # Before its first step a rank may do for long what the others wait for: a tokenizer is learned, say.
    if not here or min(peer.mark for peer in here)[0] < 0:
        return None
    behind = [peer for peer in here if peer.mark == min(peer.mark for peer in here)]
    if any(now - peer.moved <= timeout_seconds for peer in behind):
        return None
    # Of ranks that are equally far, those hang that do not wait for others.
    hanging = [peer for peer in behind if not peer.beat["waits"]] or behind
    return _hangs(hanging, len(here), now, timeout_seconds)


def rank0_failure(first: Peer, now: float, timeout_seconds: float) -> ClipwrightError | None:
    """The same of rank 0, whom the others see alone."""
    if first.state == "gone":
        return _died([first])
    return (
        _silent([first], now, timeout_seconds)
        if now - first.heard > timeout_seconds and first.state == "here"
        else None
    )


def _named(peers: Sequence[Peer]) -> str:
    """`rank 2 on node1, rank 3 on node1`"""
    more = f" and {len(peers) - SHOWN} more" if len(peers) > SHOWN else ""
    return ", ".join(f"rank {peer.rank} on {peer.host}" for peer in peers[:SHOWN]) + more


def _died(gone: Sequence[Peer]) -> ClipwrightError:
    return ClipwrightError(
        "E_RANK",
        "a rank died",
        where=_named(gone),
        found=f"its process ended without a word; {gone[0].doing}",
        fix=f"see what that host says of it (out of memory, killed), and {AGAIN}",
    )


def _silent(silent: Sequence[Peer], now: float, timeout_seconds: float) -> ClipwrightError:
    return ClipwrightError(
        "E_RANK",
        "a rank that gives no sign of life",
        where=_named(silent),
        found=f"silent for {now - silent[0].heard:.0f} s, {timeout_seconds:.0f} allowed; {silent[0].doing}",
        fix=f"see whether its host is up and reached and its process not stopped, and {AGAIN}",
    )


def _hangs(hanging: Sequence[Peer], size: int, now: float, timeout_seconds: float) -> ClipwrightError:
    one = hanging[0]
    others = "; no rank is behind the others" if len(hanging) == size > 1 else ""
    return ClipwrightError(
        "E_HANG",
        "a rank that does not get on",
        where=_named(hanging),
        found=f"{one.doing} for {now - one.moved:.0f} s, {timeout_seconds:.0f} allowed, at {one.beat['at']}{others}",
        fix=f"see what it waits for there, or raise runtime.timeout_minutes, and {AGAIN}",
    )
