"""Which rank failed, as far as the heartbeats of all ranks show."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.train.supervision.progress import location

RESUME = "run the same command again: it resumes from the newest checkpoint if there is one"
MAX_LISTED_RANKS = 4  # ranks that a message names


@dataclass
class Peer:
    """What this process knows of a rank, itself included; times are on this process's monotonic clock, in seconds."""

    rank: int
    host: str = "an unknown host"
    last_heard: float = field(default_factory=time.monotonic)
    last_progress: float = field(default_factory=time.monotonic)
    state: Literal["connected", "disconnected", "finished"] = "connected"
    report: dict[str, Any] = field(default_factory=dict)  # of its newest heartbeat, see RankProgress.report

    def update(self, report: dict[str, Any]) -> None:
        """Takes over a heartbeat's report; `last_progress` becomes now if the rank has made progress since the last."""
        before = (self.step_and_phase, self.report.get("heartbeats"))
        self.report = {**report, "step_and_phase": tuple(report["step_and_phase"])}
        if (self.step_and_phase, report["heartbeats"]) != before:
            self.last_progress = time.monotonic()

    def discount_pause(self, seconds: float) -> None:
        """Shifts the times by a pause of this process, during which it received no heartbeats."""
        now = time.monotonic()
        self.last_heard = min(self.last_heard + seconds, now)
        self.last_progress = min(self.last_progress + seconds, now)

    @property
    def step_and_phase(self) -> tuple[int, int]:
        return self.report.get("step_and_phase", (-1, 0))

    @property
    def location(self) -> str:
        return location(self.step_and_phase[0], self.report.get("phase", ""))


def find_failure(peers: Sequence[Peer], now: float, timeout_seconds: float) -> ClipwrightError | None:
    """Returns E_RANK for ranks that exited or are silent, E_HANG for ranks without progress, both for too long."""
    connected = [peer for peer in peers if peer.state == "connected"]
    disconnected = [peer for peer in peers if peer.state == "disconnected"]
    if disconnected:
        return _exited(disconnected)
    silent = [peer for peer in connected if now - peer.last_heard > timeout_seconds]
    if silent:
        return _silent(silent, now, timeout_seconds)
    if not connected:
        return None
    slowest = min(peer.step_and_phase for peer in connected)
    if slowest[0] < 0:
        # Before its first step a rank may work for long while the others wait: it trains a tokenizer, for example.
        return None
    lagging = [peer for peer in connected if peer.step_and_phase == slowest]
    if any(now - peer.last_progress <= timeout_seconds for peer in lagging):
        return None
    # Of ranks that are equally far, those in a collective wait for those that are not.
    hanging = [peer for peer in lagging if not peer.report["in_collective"]] or lagging
    return _hanging(hanging, len(connected), now, timeout_seconds)


def find_rank0_failure(rank0: Peer, now: float, timeout_seconds: float) -> ClipwrightError | None:
    """Returns E_RANK if rank 0 exited or is silent: it supervises all ranks, the other ranks supervise it."""
    if rank0.state == "disconnected":
        return _exited([rank0])
    if rank0.state == "connected" and now - rank0.last_heard > timeout_seconds:
        return _silent([rank0], now, timeout_seconds)
    return None


def _list_ranks(peers: Sequence[Peer]) -> str:
    """Returns `rank 2 on node1, rank 3 on node1`."""
    listed = ", ".join(f"rank {peer.rank} on {peer.host}" for peer in peers[:MAX_LISTED_RANKS])
    unlisted = len(peers) - MAX_LISTED_RANKS
    return f"{listed} and {unlisted} more" if unlisted > 0 else listed


def _exited(peers: Sequence[Peer]) -> ClipwrightError:
    return ClipwrightError(
        "E_RANK",
        f"{_list_ranks(peers)} exited without an error message",
        where=f"last known: {peers[0].location}",
        fix=f"check that host's system log (out of memory, killed by a signal), then {RESUME}",
    )


def _silent(peers: Sequence[Peer], now: float, timeout_seconds: float) -> ClipwrightError:
    seconds = now - peers[0].last_heard
    return ClipwrightError(
        "E_RANK",
        f"{_list_ranks(peers)} sent no heartbeat for {seconds:.0f} s (limit {timeout_seconds:.0f} s)",
        where=f"last known: {peers[0].location}",
        fix=f"check that its host is up and reachable and that its process is not stopped, then {RESUME}",
    )


def _hanging(peers: Sequence[Peer], connected: int, now: float, timeout_seconds: float) -> ClipwrightError:
    first = peers[0]
    seconds = now - first.last_progress
    return ClipwrightError(
        "E_HANG",
        f"{_list_ranks(peers)} made no progress for {seconds:.0f} s (limit {timeout_seconds:.0f} s)",
        where=f"{first.location}, at {first.report['code_line']}",
        found="no other rank is ahead" if len(peers) == connected > 1 else "",
        fix=f"check that rank's log, or raise runtime.timeout_minutes, then {RESUME}",
    )
