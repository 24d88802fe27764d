"""What the processes of test_checkpoint.py do: `python checkpoint_ranks.py OUT KILLS`.

Chains: the ranks of one world after another, which go on with each other's checkpoints. Kills: a run that is killed at
KILLS places inside its saves, and gone on with. Faults: two ranks whose disk is full at one place after another. All
are forked from this process, so that torch and DeepSpeed are loaded once; OUT gets what was seen.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layouts import Case, config, model, rank_batch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.distributed.group import World, process_group
from clipwright.pipeline.train.checkpoints import checkpoint, saver
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.engine import Engine

ADAMW = Case(optim="adamw", clip=0.5, batch=48)
SGD = Case(batch=48)
MOMENTUM = 0.9
# The ZeRO stages of one run after another, each on as many ranks as `WORLDS` says.
WORLDS = (2, 4, 1, 3)
CHAINS = {"1230": (ADAMW, (1, 2, 3, 0)), "3012": (ADAMW, (3, 0, 1, 2)), "0123": (SGD, (0, 1, 2, 3))}
LEG = 3  # steps of each world
INTERVAL, END = 2, 7  # steps between saves, and of the whole run, where one is killed or its disk is full


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
    saving = Saver(run, world, made.runtime, {"identity": {}, "accepted": []}, start)
    losses = {}
    for step in range(start, end):
        saving.settle(saving.pending, saving.failed) if world.size == 1 else None
        losses[step], _ = engine.backward(rank_batch(case, step, world.rank, world.size), step)
        engine.update(1.0)
        (run / "progress").write_text(str(step + 1))
        if saving.due(step + 1, late=False):
            saving.note({"score": losses[step]})
            saving.save(engine, step + 1)
    saving.save(engine, end, wait=True)
    return {"losses": losses, "start": start, "weights": engine.weights()}


def chains(out: Path) -> None:
    """Each chain's run, passed on from world to world; and the same by one process, in one go."""
    for leg, size in enumerate(WORLDS):

        def work(world: World, leg: int = leg) -> None:
            for name, (case, stages) in CHAINS.items():
                offload = "optimizer" if stages[leg] and name == "3012" else "none"
                seen = trained(out / name, case, stages[leg], world, LEG * (leg + 1), offload=offload)
                if world.is_rank0:
                    torch.save(seen, out / f"{name}-{leg}.pt")

        ranks(size, work)

    def whole(world: World) -> None:
        for name, (case, _) in CHAINS.items():
            torch.save(trained(out / f"{name}-whole", case, 0, world, LEG * len(WORLDS)), out / f"{name}-whole.pt")

    ranks(1, whole)


class Disk:
    """Every call by which a process changes its run's folder, in order; what happens at one of them."""

    def __init__(self, run: Path, happens: Callable[[int, str, Path | None], None]) -> None:
        self.run, self.happens, self.calls, self.lock = run, happens, list[str](), threading.Lock()
        for module, name in (
            *((os, name) for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "chmod")),
            (io, "open"),
            (saver, "save_file"),
        ):
            setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            path = words[1] if name == "save_file" else words[0]
            ours = isinstance(path, int) or str(path).startswith(str(self.run)) or "dir_fd" in named
            if ours and "progress" not in str(path) and not (name == "open" and (words[1:] or ("r",))[0][0] != "w"):
                self._at(f"{name} {'' if isinstance(path, int) else Path(path).name}".strip(), None)
                if name == "save_file":
                    real(*words, **named)
                    self._at(f"half of {Path(path).name}", Path(path))
                    return None
            return real(*words, **named)

        return call

    def _at(self, what: str, half: Path | None) -> None:
        with self.lock:
            self.calls.append(what)
            number = len(self.calls)
        self.happens(number, what, half)


def cut(path: Path | None) -> None:
    if path is not None:
        os.truncate(path, path.stat().st_size // 2)


def killed(out: Path, count: int) -> None:
    """A run of one process, killed once at each of `count` places, and gone on with: as the boundaries of its saves
    come, then at random moments; at few of them, evenly, if there are more boundaries.
    """
    words: dict[str, Any] = {"save_every": INTERVAL, "keep": 1, "keep_best": "score"}

    def traced(world: World) -> None:
        disk = Disk(out / "kill-whole", lambda *_: None)
        begun = time.monotonic()
        seen = trained(out / "kill-whole", ADAMW, 0, world, END, **words)
        torch.save({**seen, "calls": disk.calls, "seconds": time.monotonic() - begun}, out / "kill-whole.pt")

    ranks(1, traced)
    whole = torch.load(out / "kill-whole.pt")
    boundaries = len(whole["calls"])
    draw = random.Random(0)
    for number in range(count):
        at = number + 1 if count >= boundaries else 1 + number * boundaries // count
        run = out / f"kill-{number}"

        def interrupted(world: World, run: Path = run, at: int = at) -> None:
            def happens(call: int, what: str, half: Path | None) -> None:
                if call == at:
                    cut(half)
                    os.kill(os.getpid(), signal.SIGKILL)

            Disk(run, happens)
            if at > boundaries:
                threading.Timer(draw.random() * whole["seconds"], os.kill, (os.getpid(), signal.SIGKILL)).start()
            trained(run, ADAMW, 0, world, END, **words)

        codes = ranks(1, interrupted, strict=False)
        progress = run / "progress"
        seen = {
            "codes": codes,
            "at": whole["calls"][at - 1] if at <= boundaries else "a random moment",
            "progress": int(progress.read_text() or 0) if progress.exists() else 0,
            "latest": (run / "latest").read_text().strip() if (run / "latest").exists() else None,
        }
        shutil.copytree(run, out / f"kill-{number}-left") if run.exists() else None

        def resumed(world: World, run: Path = run, seen: dict[str, Any] = seen, number: int = number) -> None:
            torch.save({**seen, **trained(run, ADAMW, 0, world, END, **words)}, out / f"kill-{number}.pt")

        ranks(1, resumed)


def full(out: Path) -> None:
    """Two ranks whose disk is full at each place in the second save where either of them writes, and at none."""
    words: dict[str, Any] = {"save_every": INTERVAL, "keep": 2}
    (out / "full").mkdir()

    def work(world: World, run: Path, rank: int, at: int) -> None:
        def happens(call: int, what: str, half: Path | None) -> None:
            if world.rank == rank and call == at:
                cut(half)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run))

        disk, begun, said = Disk(run, happens), time.monotonic(), None
        try:
            trained(run, SGD, 2, world, 2 * INTERVAL, **words)
        except ClipwrightError as error:
            said = str(error)
        place = disk.calls[at - 1] if rank == world.rank and at else None
        seen = {"said": said, "seconds": time.monotonic() - begun, "calls": disk.calls, "place": place}
        (run / f"seen-{world.rank}.json").write_text(json.dumps(seen))

    first = out / "full" / "none"
    ranks(2, lambda world: work(world, first, 0, 0))
    shutil.rmtree(first / "checkpoints" / checkpoint.step_name(2 * INTERVAL))
    (first / "latest").write_text(f"{checkpoint.step_name(INTERVAL)}\n")
    ranks(2, lambda world: work(world, first, 0, 0))  # the second save alone
    for rank in range(2):
        calls = json.loads((first / f"seen-{rank}.json").read_text())["calls"]
        for at, what in enumerate(calls, 1):
            if what.split()[0] in ("unlink", "rmdir", "chmod"):
                continue
            run = out / "full" / f"{rank}-{at}"
            shutil.copytree(first, run)
            shutil.rmtree(run / "checkpoints" / checkpoint.step_name(2 * INTERVAL))
            (run / "latest").write_text(f"{checkpoint.step_name(INTERVAL)}\n")
            ranks(2, lambda world, run=run, rank=rank, at=at: work(world, run, rank, at))


def agreed(out: Path) -> None:
    """Three ranks, of which one finds its share of the newest checkpoint changed."""
    run = out / "agreed"
    shutil.copytree(out / "0123", run)
    with (run / "checkpoints" / checkpoint.step_name(LEG * len(WORLDS)) / "optimizer-00002.safetensors").open(
        "r+b"
    ) as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\xff")

    def work(world: World) -> None:
        found = checkpoint.newest(run, world=world)
        (run / f"found-{world.rank}").write_text(str(found and found.step))

    ranks(3, work)


def ranks(size: int, work: Callable[[World], None], *, strict: bool = True) -> list[int]:
    """Forks `size` processes, which do `work` as the ranks of one group; how they ended, all well if `strict`."""
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
    if strict and any(codes):
        sys.exit(f"world {size}: ranks ended with {codes}")
    return codes


def main(out: Path, kills: int) -> None:
    # What torch and DeepSpeed load late, loaded once for all.
    from deepspeed.runtime.zero.muon import original_muon  # noqa: F401

    gc.collect()
    gc.freeze()  # what all have in common is looked through once
    for part in (chains, agreed, lambda out: killed(out, kills), full):
        begun = time.monotonic()
        part(out)
        print(f"{time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
