"""What the ranks of test_checkpoint.py do: `python checkpoint_ranks.py OUT` forks the ranks of one world after another,
which go on with each other's checkpoints, and writes what rank 0 saw.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layouts import Case, config, model, share

from clipwright.pipeline import checkpoint
from clipwright.pipeline.distributed import World, process_group
from clipwright.pipeline.engine import Engine
from clipwright.pipeline.saver import Saver

ADAMW = Case(optim="adamw", clip=0.5, batch=48)
SGD = Case(batch=48)
MOMENTUM = 0.9
# The ZeRO stages of one run after another, each on as many ranks as `WORLDS` says.
WORLDS = (2, 4, 1, 3)
CHAINS = {"1230": (ADAMW, (1, 2, 3, 0)), "3012": (ADAMW, (3, 0, 1, 2)), "0123": (SGD, (0, 1, 2, 3))}
LEG = 3  # steps of each world


def trained(run: Path, case: Case, zero: int, world: World, end: int, **runtime: Any) -> dict[str, Any]:
    """Goes on with `run` to step `end`, as the trainer does; what was seen on the way."""
    run.mkdir(exist_ok=True)
    made = config(case, zero=zero, **runtime)
    if case.optim == "sgd":
        made = dataclasses.replace(made, optim=dataclasses.replace(made.optim, momentum=MOMENTUM))
    towers, loss = model(made)
    found = checkpoint.newest(run, world=world)
    start = 0 if found is None else found.step
    if found is not None:
        found.restore_weights(towers, loss)
    engine = Engine(towers, loss, made, world)
    if found is not None:
        found.restore_optimizers(engine)
    saver = Saver(run, world, made.runtime, {}, start)
    losses = {}
    for step in range(start, end):
        losses[step], _ = engine.backward(share(case, step, world.rank, world.size), step)
        engine.update(1.0)
        saver.settle(saver.pending, saver.failed) if world.size == 1 else None
        if saver.due(step + 1, late=False):
            saver.save(engine, step + 1)
    saver.save(engine, end, wait=True)
    return {"losses": losses, "start": start, "weights": engine.weights()}


def chained(out: Path) -> None:
    """Each chain's run, passed on from world to world; and the same by one process, in one go."""
    for leg, size in enumerate(WORLDS):

        def work(world: World, leg: int = leg) -> None:
            for name, (case, stages) in CHAINS.items():
                seen = trained(out / name, case, stages[leg], world, LEG * (leg + 1))
                if world.first:
                    torch.save(seen, out / f"{name}-{leg}.pt")

        ranks(size, work)

    def whole(world: World) -> None:
        for name, (case, _) in CHAINS.items():
            torch.save(trained(out / f"{name}-whole", case, 0, world, LEG * len(WORLDS)), out / f"{name}-whole.pt")

    ranks(1, whole)


def ranks(size: int, work: Callable[[World], None]) -> None:
    """Forks `size` processes, which do `work` as the ranks of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for number in range(size):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                os.environ.update(
                    {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number)},
                    LOCAL_WORLD_SIZE=str(size),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                torch.set_num_threads(1)
                with process_group() as world:
                    work(world)
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        sys.exit(f"world {size}: ranks ended with {codes}")


if __name__ == "__main__":
    chained(Path(sys.argv[1]))
