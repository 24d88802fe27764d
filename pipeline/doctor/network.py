"""Checks of the process group: which ranks answer, their latency, and the all-reduce rate."""

from __future__ import annotations

import re
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.distributed.group import World, broadcast_object
from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check
from clipwright.pipeline.measure import synchronize

ANSWER_SECONDS = 60.0  # timeout for the first answer of a rank
PINGS = 8  # timed round trips per rank
ALL_REDUCES = 4  # the first is not timed
ALL_REDUCE_NUMBERS = 2**22  # 16 MiB of float32
# A rank is slow if its round trip is this many times the median and this many seconds above it.
SLOW_RATIO = 10
SLOW_SECONDS = 5e-3


def find_silent_ranks(world: World, seconds: float = ANSWER_SECONDS) -> CheckResult | None:
    """Returns a FAIL result that names the ranks that joined but do not answer, or None.

    After a FAIL no rank may start another collective.
    """
    if world.size == 1:
        return None
    group: Any = None
    if dist.get_backend() != "gloo":  # NCCL cannot name the missing ranks
        group = dist.new_group(backend="gloo")
    try:
        dist.monitored_barrier(group, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        match = re.search(r"Ranks ([\d, ]+) failed", str(error))
        ranks = [int(number) for number in re.findall(r"\d+", match[1])] if match else [0]
        nodes = sorted({rank // world.local_size for rank in ranks})
        return CheckResult(
            "FAIL",
            f"no answer from {_names('rank', ranks)} of {world.size} (on {_names('node', nodes)}, counted from 0)",
            f"an answer within {seconds:g} s",
            "check that the process runs there, and that a firewall lets all ports between these machines through",
        )
    return None


def _names(kind: str, numbers: list[int]) -> str:
    plural = "s" if len(numbers) > 1 else ""
    return f"{kind}{plural} {', '.join(map(str, numbers))}"


@check("ping")
def ping(context: DoctorContext) -> CheckResult:
    """Round trips from rank 0 to every other rank, and the rate of an all-reduce."""
    world = context.world
    if world.size == 1:
        return CheckResult("ok", "one process")
    times = round_trips(world)
    rate = all_reduce_rate(world)
    context.predicted["ping"] = {"seconds": times, "all_reduce_bytes_per_s": rate}
    median = statistics.median(times)
    slowest = max(range(len(times)), key=lambda index: times[index])
    found = (
        f"round trip {median * 1e3:.2g} ms, at most {times[slowest] * 1e3:.2g} ms (rank {slowest + 1}); "
        f"all-reduce of {ALL_REDUCE_NUMBERS * 4 / 2**20:.0f} MiB over {format_count(world.size, 'rank')} at "
        f"{rate / 1e9:.2g} GB/s "
        f"by {dist.get_backend()}"
    )
    if times[slowest] > max(SLOW_RATIO * median, median + SLOW_SECONDS):
        return CheckResult(
            "warn",
            found,
            f"no round trip above {SLOW_RATIO} times the median",
            f"check the network of rank {slowest + 1}'s machine; the slowest rank sets the pace of all ranks",
        )
    return CheckResult("ok", found)


def round_trips(world: World) -> list[float]:
    """Returns seconds of a round trip from rank 0 to ranks 1, 2, …, each a median; the same on all ranks."""
    message = torch.zeros(1, device=world.device)
    medians: list[float] = []
    for other in range(1, world.size):
        seconds: list[float] = []
        for _ in range(PINGS + 1):  # the first round trip opens the connection
            started = time.perf_counter()
            if world.is_rank0:
                dist.send(message, other)
                dist.recv(message, other)
                synchronize(world.device)
            elif world.rank == other:
                dist.recv(message, 0)
                dist.send(message, 0)
            seconds.append(time.perf_counter() - started)
        medians.append(statistics.median(seconds[1:]))
    shared = broadcast_object(medians)
    assert isinstance(shared, list)
    return shared


def all_reduce_rate(world: World) -> float:
    """Returns bytes per second of an all-reduce, the best of a few; the same on all ranks."""
    numbers = torch.zeros(ALL_REDUCE_NUMBERS, device=world.device)
    seconds: list[float] = []
    for _ in range(ALL_REDUCES):
        started = time.perf_counter()
        dist.all_reduce(numbers)
        synchronize(world.device)
        seconds.append(time.perf_counter() - started)
    shared = broadcast_object(ALL_REDUCE_NUMBERS * 4 / min(seconds[1:]))
    assert isinstance(shared, float)
    return shared
