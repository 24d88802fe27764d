"""Ranks for the test of doctor's `ping` check: `python ping_ranks.py OUT` forks three; the last stops answering."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from clipwright.pipeline.distributed.group import barrier, process_group
from clipwright.pipeline.doctor import network

SECONDS = 1.0


def run_rank(rank: int, out: Path) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    with process_group() as world:
        assert network.find_silent_ranks(world) is None
        seen = {"trips": network.round_trips(world), "rate": network.all_reduce_rate(world)}
        barrier()
        if rank == 2:
            time.sleep(600)  # until it is killed
        started = time.monotonic()
        found = network.find_silent_ranks(dataclasses.replace(world, local_size=2), SECONDS)
        assert found is not None
        seen |= {"reported": dataclasses.asdict(found), "seconds": time.monotonic() - started}
        (out / f"{rank}.json").write_text(json.dumps(seen))


def main(out: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    children = []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            run_rank(rank, out)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children[:2]]
    os.kill(children[2], signal.SIGKILL)
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
