"""The ranks against each other: who answers, how soon, and how fast they sum."""

from __future__ import annotations

import re
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipwright.pipeline.distributed.group import World, broadcast_object
from clipwright.pipeline.doctor.base import Context, Found, check

ANSWER = 60.0  # seconds that a rank has to answer at all
ROUNDS, SUMS = 8, 4  # pings of each rank, and sums of all, of which the first is not timed
NUMBERS = 2**22  # summed over ranks at once, 16 MiB
SLOW, LATE = 10, 5e-3  # a ping is slow that takes so many times the others' median, and so many seconds more


def silent(world: World, seconds: float = ANSWER) -> Found | None:
    """What to say of ranks that joined and do not answer; nothing where all do. No rank may exchange anything then."""
    if world.size == 1:
        return None
    # NCCL cannot name who is missing.
    group: Any = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    try:
        dist.monitored_barrier(group, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        named = re.search(r"Ranks ([\d, ]+) failed", str(error))
        ranks = [int(number) for number in re.findall(r"\d+", named[1])] if named else [0]
        nodes = sorted({rank // world.local_size for rank in ranks})
        found = f"no answer from {_list('rank', ranks)} of {world.size} (on {_list('node', nodes)}, counted from 0)"
        fix = "see whether it runs there, and whether a firewall lets all ports between these machines through"
        return Found("FAIL", found, f"an answer within {seconds:g} s", fix)
    return None


def _list(kind: str, numbers: list[int]) -> str:
    return f"{kind}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


@check("ping")
def ping(context: Context) -> Found:
    """The way from rank 0 to each other rank and back, and a sum over all ranks."""
    world = context.world
    if world.size == 1:
        return Found("ok", "one process")
    times = round_trips(world)
    rate = sum_rate(world)
    context.predicted["ping"] = {"seconds": times, "sum_bytes_per_s": rate}
    backend = dist.get_backend()
    median, slowest = statistics.median(times), max(range(len(times)), key=times.__getitem__)
    found = (
        f"{median * 1e3:.2g} ms there and back, at most {times[slowest] * 1e3:.2g} ms (rank {slowest + 1}); "
        f"{NUMBERS * 4 / 2**20:.0f} MiB summed over {world.size} ranks at {rate / 1e9:.2g} GB/s by {backend}"
    )
    if times[slowest] > max(SLOW * median, median + LATE):
        fix = f"look at the network of rank {slowest + 1}'s machine; the slowest rank sets the pace of all"
        return Found("warn", found, f"no rank {SLOW} times as far away as the others", fix)
    return Found("ok", found)


def round_trips(world: World) -> list[float]:
    """Seconds from rank 0 to rank 1, 2, … and back, the median of a few; known to all ranks."""
    word, times = torch.zeros(1, device=world.device), []
    for other in range(1, world.size):
        took = []
        for _ in range(ROUNDS + 1):  # the first one opens the way
            started = time.perf_counter()
            if world.is_rank0:
                dist.send(word, other)
                dist.recv(word, other)
                _settled(word)
            elif world.rank == other:
                dist.recv(word, 0)
                dist.send(word, 0)
            took.append(time.perf_counter() - started)
        times.append(statistics.median(took[1:]))
    told = broadcast_object(times)
    assert isinstance(told, list)
    return told


def sum_rate(world: World) -> float:
    """Bytes a second of a tensor that is summed over all ranks, the best of a few; known to all ranks."""
    numbers, took = torch.zeros(NUMBERS, device=world.device), []
    for _ in range(SUMS):
        started = time.perf_counter()
        dist.all_reduce(numbers)
        _settled(numbers)
        took.append(time.perf_counter() - started)
    told = broadcast_object(NUMBERS * 4 / min(took[1:]))
    assert isinstance(told, float)
    return told


def _settled(tensor: torch.Tensor) -> None:
    """Waits for a GPU to have done what it was told."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
