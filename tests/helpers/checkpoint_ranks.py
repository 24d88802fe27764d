"""The processes of test_checkpoint.py: `python checkpoint_ranks.py OUT KILLS`.

Chains: ranks of one world size after another, which resume from each other's checkpoints. Kills: a run that is killed
at KILLS places inside its saves, and resumed. Disk full: two ranks whose disk is full at one call after another. All
are forked from this process, so that torch and DeepSpeed are loaded once; the results are written to OUT.
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
WORLD_SIZES = (2, 4, 1, 3)
# By ZeRO stage at each world size, in order.
CHAINS = {"1230": (ADAMW, (1, 2, 3, 0)), "3012": (ADAMW, (3, 0, 1, 2)), "0123": (SGD, (0, 1, 2, 3))}
LEG_STEPS = 3  # at each world size
SAVE_EVERY, END = 2, 7  # steps, of the runs that are killed or whose disk is full


def train(run: Path, case: Case, zero: int, world: World, end: int, **runtime: Any) -> dict[str, Any]:
    """Trains or resumes `run` up to step `end`, as the trainer does; returns losses, first step and weights."""
    run.mkdir(exist_ok=True)
    run_config = config(case, zero=zero, **runtime)
    if case.optim == "sgd":
        run_config = dataclasses.replace(run_config, optim=dataclasses.replace(run_config.optim, momentum=MOMENTUM))
    towers, loss = model(run_config)
    found = checkpoint.newest(run, world=world)
    start = 0 if found is None else found.step
    if found is not None:
        found.restore_weights(towers, loss)
    engine = Engine(towers, loss, run_config, world)
    if found is not None:
        found.restore_optimizers(engine)
    run_saver = Saver(run, world, run_config.runtime, {"identity": {}, "accepted": []}, start)
    losses = {}
    for step in range(start, end):
        if world.size == 1:
            run_saver.commit_if_written(run_saver.pending, run_saver.failed)
        losses[step], _ = engine.backward(rank_batch(case, step, world.rank, world.size), step)
        engine.update(1.0)
        (run / "progress").write_text(str(step + 1))
        if run_saver.due(step + 1, late=False):
            run_saver.note({"step": step + 1, "score": losses[step]})
            run_saver.save(engine, step + 1)
    run_saver.save(engine, end, wait=True)
    return {"losses": losses, "start": start, "weights": engine.weights()}


def run_chains(out: Path) -> None:
    """Each chain's run, resumed at one world size after another; and the same by one process without a stop."""
    for leg, size in enumerate(WORLD_SIZES):

        def work(world: World, leg: int = leg) -> None:
            for name, (case, stages) in CHAINS.items():
                offload = "optimizer" if stages[leg] and name == "3012" else "none"
                result = train(out / name, case, stages[leg], world, LEG_STEPS * (leg + 1), offload=offload)
                if world.is_rank0:
                    torch.save(result, out / f"{name}-{leg}.pt")

        fork_ranks(size, work)

    def uninterrupted(world: World) -> None:
        for name, (case, _) in CHAINS.items():
            result = train(out / f"{name}-uninterrupted", case, 0, world, LEG_STEPS * len(WORLD_SIZES))
            torch.save(result, out / f"{name}-uninterrupted.pt")

    fork_ranks(1, uninterrupted)


class TracedDisk:
    """Records every call by which this process changes its run's folder, in order, and calls `hook` before each.

    hook(number of the call from 1, its text, a half-written file or None).
    """

    def __init__(self, run: Path, hook: Callable[[int, str, Path | None], None]) -> None:
        self.run, self.hook, self.calls, self.lock = run, hook, list[str](), threading.Lock()
        for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "chmod"):
            setattr(os, name, self._traced(name, getattr(os, name)))
        io.open = self._traced("open", io.open)
        saver.save_file = self._traced("save_file", saver.save_file)

    def _traced(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            path = arguments[1] if name == "save_file" else arguments[0]
            is_handle = isinstance(path, int)
            in_run = is_handle or str(path).startswith(str(self.run)) or "dir_fd" in named
            mode = arguments[1] if len(arguments) > 1 else "r"
            reads_only = name == "open" and not mode.startswith("w")
            if in_run and not reads_only and "progress" not in str(path):
                self._record(name if is_handle else f"{name} {Path(path).name}", None)
                if name == "save_file":
                    real(*arguments, **named)
                    self._record(f"half of {Path(path).name}", Path(path))
                    return None
            return real(*arguments, **named)

        return call

    def _record(self, text: str, half_written: Path | None) -> None:
        with self.lock:
            self.calls.append(text)
            number = len(self.calls)
        self.hook(number, text, half_written)


def truncate(path: Path | None) -> None:
    if path is not None:
        os.truncate(path, path.stat().st_size // 2)


def run_kills(out: Path, count: int) -> None:
    """A run of one process that is killed once, at `count` places, and resumed.

    The places are the calls of its saves in order, then random moments; if there are more calls than `count`, calls at
    equal distances.
    """
    runtime: dict[str, Any] = {"save_every": SAVE_EVERY, "keep": 1, "keep_best": "score"}

    def uninterrupted(world: World) -> None:
        disk = TracedDisk(out / "kill-uninterrupted", lambda *_: None)
        started = time.monotonic()
        result = train(out / "kill-uninterrupted", ADAMW, 0, world, END, **runtime)
        result.update({"calls": disk.calls, "seconds": time.monotonic() - started})
        torch.save(result, out / "kill-uninterrupted.pt")

    fork_ranks(1, uninterrupted)
    expected = torch.load(out / "kill-uninterrupted.pt")
    calls = len(expected["calls"])
    draw = random.Random(0)
    for number in range(count):
        kill_at = number + 1 if count >= calls else 1 + number * calls // count
        run = out / f"kill-{number}"

        def killed(world: World, run: Path = run, kill_at: int = kill_at) -> None:
            def hook(call: int, text: str, half_written: Path | None) -> None:
                if call == kill_at:
                    truncate(half_written)
                    os.kill(os.getpid(), signal.SIGKILL)

            TracedDisk(run, hook)
            if kill_at > calls:
                seconds = draw.random() * expected["seconds"]
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            train(run, ADAMW, 0, world, END, **runtime)

        codes = fork_ranks(1, killed, strict=False)
        progress = run / "progress"
        state = {
            "codes": codes,
            "at": expected["calls"][kill_at - 1] if kill_at <= calls else "a random moment",
            "progress": int(progress.read_text() or 0) if progress.exists() else 0,
            "latest": (run / "latest").read_text().strip() if (run / "latest").exists() else None,
        }
        if run.exists():
            shutil.copytree(run, out / f"kill-{number}-left")

        def resumed(world: World, run: Path = run, state: dict[str, Any] = state, number: int = number) -> None:
            torch.save({**state, **train(run, ADAMW, 0, world, END, **runtime)}, out / f"kill-{number}.pt")

        fork_ranks(1, resumed)


def run_disk_full(out: Path) -> None:
    """Two ranks whose disk is full at each call of the second save by which either of them writes, and at none."""
    runtime: dict[str, Any] = {"save_every": SAVE_EVERY, "keep": 2}
    (out / "full").mkdir()

    def work(world: World, run: Path, rank: int, full_at: int) -> None:
        def hook(call: int, text: str, half_written: Path | None) -> None:
            if world.rank == rank and call == full_at:
                truncate(half_written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run))

        disk, started, message = TracedDisk(run, hook), time.monotonic(), None
        try:
            train(run, SGD, 2, world, 2 * SAVE_EVERY, **runtime)
        except ClipwrightError as error:
            message = str(error)
        result = {
            "message": message,
            "seconds": time.monotonic() - started,
            "calls": disk.calls,
            "full_at": disk.calls[full_at - 1] if rank == world.rank and full_at else None,
        }
        (run / f"result-{world.rank}.json").write_text(json.dumps(result))

    def keep_first_checkpoint(run: Path) -> None:
        shutil.rmtree(run / "checkpoints" / checkpoint.step_name(2 * SAVE_EVERY))
        (run / "latest").write_text(f"{checkpoint.step_name(SAVE_EVERY)}\n")

    first = out / "full" / "none"
    fork_ranks(2, lambda world: work(world, first, 0, 0))
    keep_first_checkpoint(first)
    fork_ranks(2, lambda world: work(world, first, 0, 0))  # the second save alone
    for rank in range(2):
        calls = json.loads((first / f"result-{rank}.json").read_text())["calls"]
        for full_at, text in enumerate(calls, 1):
            if text.split()[0] in ("unlink", "rmdir", "chmod"):
                continue
            run = out / "full" / f"{rank}-{full_at}"
            shutil.copytree(first, run)
            keep_first_checkpoint(run)
            fork_ranks(2, lambda world, run=run, rank=rank, full_at=full_at: work(world, run, rank, full_at))


def run_agreement(out: Path) -> None:
    """Three ranks, of which one finds its share of the newest checkpoint changed."""
    run = out / "agreement"
    shutil.copytree(out / "0123", run)
    newest = run / "checkpoints" / checkpoint.step_name(LEG_STEPS * len(WORLD_SIZES))
    with (newest / "optimizer-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")

    def work(world: World) -> None:
        found = checkpoint.newest(run, world=world)
        (run / f"found-{world.rank}").write_text(str(found and found.step))

    fork_ranks(3, work)


def fork_ranks(size: int, work: Callable[[World], None], *, strict: bool = True) -> list[int]:
    """Runs `work` on `size` forked ranks of one group; returns their exit codes, which must be 0 if `strict`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(
                    RANK=str(rank),
                    WORLD_SIZE=str(size),
                    LOCAL_RANK=str(rank),
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
        sys.exit(f"world size {size}: exit codes {codes}")
    return codes


def main(out: Path, kills: int) -> None:
    # Modules that torch and DeepSpeed import late, imported once for all processes.
    from deepspeed.runtime.zero.muon import original_muon  # noqa: F401

    gc.collect()
    gc.freeze()  # the forked processes need not scan what they share
    for work in (run_chains, run_agreement, lambda out: run_kills(out, kills), run_disk_full):
        started = time.monotonic()
        work(out)
        print(f"{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
