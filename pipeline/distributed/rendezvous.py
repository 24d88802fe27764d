"""Where the ranks meet before they form a process group: all of them join, or all of them stop."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from clipwright.pipeline.core.command import Preempted
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.signals import DeferredSignal
from clipwright.pipeline.distributed.launcher_env import LauncherEnv

MAX_LISTED_RANKS = 8  # missing ranks that an error lists by number
POLL_SECONDS = 0.2
LEAVE_SECONDS = 20.0  # for a rank that stops to tell the others
RESULT, COUNT, LEFT = "result", "joined ranks", "ranks that left"
JOINED, STOPPED = "joined", "stopped"

_finished = False  # this process has met the other ranks


def meet(launcher: LauncherEnv, deferred: DeferredSignal, limit_seconds: float) -> Store:
    """Returns the store of the ranks once every rank has joined.

    Raises Preempted, on all ranks, if one of them is stopped before. Raises E_RANK after `limit_seconds`; it names the
    ranks that are missing.
    """
    global _finished
    keys = [f"rank {rank}" for rank in range(launcher.world_size)]
    problem = "rank 0 did not join"
    deadline = time.monotonic() + limit_seconds
    try:
        store = _connect(launcher, deferred, limit_seconds)
        problem = "rank 0 exited before all ranks had joined"
        store.set(keys[launcher.rank], JOINED)
        if store.add(COUNT, 1) == launcher.world_size:
            store.compare_set(RESULT, "", JOINED)
        while not store.check([RESULT]):
            time.sleep(POLL_SECONDS)
            if deferred.number is not None:
                store.compare_set(RESULT, "", STOPPED)
            elif time.monotonic() > deadline:
                missing = [key for key in keys if not store.check([key])]
                unlisted = len(missing) - MAX_LISTED_RANKS
                more = f" and {unlisted} more" if unlisted > 0 else ""
                problem = f"{', '.join(missing[:MAX_LISTED_RANKS])}{more} did not join"
                raise dist.DistStoreError("timed out waiting for all ranks")
        if store.get(RESULT).decode() != JOINED:
            raise Preempted(signal.SIGTERM)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0].partition(", keys: ")[0]
        raise ClipwrightError(
            "E_RANK",
            f"the rendezvous failed: {problem}",
            where=f"rank {launcher.rank} of {launcher.world_size} (from {launcher.source}) at "
            f"{launcher.master_addr}:{launcher.master_port}",
            found=f"{reason} (limit {limit_seconds:g} s)",
            fix="start all ranks with the same MASTER_ADDR and MASTER_PORT, reachable from every node, and check "
            "whether one of them exited early",
        ) from None
    _finished = True
    return store


def leave(launcher: LauncherEnv) -> None:
    """Tells the ranks that come to the rendezvous that this one was stopped: they stop too.

    The rank that hosts the store waits until all have come, at most LEAVE_SECONDS. Does nothing after the rendezvous.
    """
    if _finished:
        return
    deadline = time.monotonic() + LEAVE_SECONDS
    with suppress(dist.DistError):  # no rank can be reached
        store = _connect(launcher, DeferredSignal(), LEAVE_SECONDS)
        store.compare_set(RESULT, "", STOPPED)
        left = store.add(LEFT, 1)
        while _hosts_store(launcher) and left < launcher.world_size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = store.add(LEFT, 0)


def _connect(launcher: LauncherEnv, deferred: DeferredSignal, limit_seconds: float) -> Store:
    """Connects to the store, or starts it on the rank that hosts it. Raises Preempted LEAVE_SECONDS after a signal."""
    hosts_store = _hosts_store(launcher)
    deadline, stopped_at = time.monotonic() + limit_seconds, None
    # TCPStore would not look for signals while it waits for rank 0 to start the store.
    while not hosts_store and not _answers(launcher) and time.monotonic() < deadline:
        if deferred.number is not None:
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() > stopped_at + LEAVE_SECONDS:
                raise Preempted(deferred.number)
        time.sleep(POLL_SECONDS)
    store = TCPStore(
        launcher.master_addr,
        launcher.master_port,
        launcher.world_size,
        hosts_store,
        timeout=timedelta(seconds=max(deadline - time.monotonic(), 1.0)),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"clipwright/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _answers(launcher: LauncherEnv) -> bool:
    """Whether something listens at the store's address."""
    try:
        socket.create_connection((launcher.master_addr, launcher.master_port), timeout=5.0).close()
    except OSError:
        return False
    return True


def _hosts_store(launcher: LauncherEnv) -> bool:
    """Whether this process hosts the store: under torchrun its agent does, under other launchers rank 0."""
    return launcher.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
