"""What checkpoints cost: `python tests/bench/checkpoint.py [CASE …] [--quick]`; cases are models.

blocking: seconds a save holds up the training (the copy, and the seal once all is written), against `torch.save` and
fsync of the same state in the loop; `share` is what that is of 1,000 steps, or of 15 minutes if they come earlier, and
`beside` by how much a step is slower while files are written. written: bytes a second from the copy until the seal,
where training waits for it.
size: bytes on disk. restart: seconds from a built model to the end of its first step, verifying and reading included,
against torch.load of the other. One process, as many threads as cores, wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.data.datasets import DataConfig
from clipwright.pipeline.distributed.group import World, process_group
from clipwright.pipeline.losses.base import LOSSES
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS
from clipwright.pipeline.train.schedules.base import SCHEDULES

CASES = {"nano": ("vit_nano", "text_nano", 64), "small": ("deit_small_patch16", "text_nano", 16)}
VOCABULARY, STEPS, MINUTES = 49_408, 1000, 15


def config(case: str) -> RunConfig:
    image, text, batch = CASES[case]
    return RunConfig(
        image=IMAGE_TOWERS.preset(image),
        text=TEXT_TOWERS.preset(text),
        tokenizer=None,  # pyright: ignore[reportArgumentType]  tokens are made here
        embed_dim=256,
        data=DataConfig(train="none"),
        loss=LOSSES.preset("softmax"),
        optim=OPTIMIZERS.preset("adamw"),
        schedule=SCHEDULES.preset("cosine", global_batch=batch),
        precision="fp32",
    )


def made_batch(made: RunConfig) -> Batch:
    count, side, none = made.schedule.global_batch, made.image.image_size, torch.empty(0, dtype=torch.int64)
    return Batch(
        views=torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8),
        tokens=torch.randint(1, VOCABULARY - 1, (count, 16)).index_fill(1, torch.tensor([15]), VOCABULARY - 1),
        text_row=torch.arange(count),
        image_id=torch.arange(count),
        caption_id=torch.arange(count)[:, None],
        negative_row=none,
        negative_id=none,
    )


def built(made: RunConfig) -> tuple[TwoTower, Any]:
    torch.manual_seed(0)
    towers = TwoTower(made, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1).train()
    return towers, LOSSES.build(made.loss, embed_dim=made.embed_dim)


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def plain_save(engine: Engine, path: Path) -> None:
    """The incumbents' way: everything by torch.save, in the loop."""
    state = {"model": engine.towers.state_dict(), "loss": engine.loss.state_dict()}
    state["optimizer"] = engine.optimizer.state_dict()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def saved(engine: Engine, saver: Saver, batch: Batch, step: int) -> tuple[float, list[float]]:
    """Seconds that a save holds up the loop, and those of the steps beside it."""
    beside = list[float]()
    held = seconds(lambda: saver.save(engine, step))
    while saver.pending:
        beside.append(seconds(lambda: engine.step(batch, step, 1.0, measure=False)))
    held += seconds(lambda: saver.settle(False, saver.failed))
    assert saver.sealed == step
    return held, beside


def restart(made: RunConfig, world: World, batch: Batch, run: Path, path: Path) -> tuple[float, float]:
    towers, loss = built(made)

    def ours() -> None:
        found = checkpoint.newest(run, world=world)
        assert found is not None
        found.restore_weights(towers, loss)
        engine = Engine(towers, loss, made, world)
        found.restore_optimizers(engine)
        engine.step(batch, found.step, 1.0, measure=False)

    def theirs() -> None:
        state = torch.load(path, weights_only=True)
        towers.load_state_dict(state["model"])
        engine = Engine(towers, loss, made, world)
        engine.optimizer.load_state_dict(state["optimizer"])
        engine.step(batch, 1, 1.0, measure=False)

    return seconds(ours), seconds(theirs)


def measure(case: str, runs: int, world: World, folder: Path) -> list[dict[str, Any]]:
    made = config(case)
    batch, path, run = made_batch(made), folder / f"{case}.pt", folder / case
    run.mkdir()
    engine = Engine(*built(made), made, world)
    saver = Saver(run, world, made.runtime, {"identity": {}, "accepted": []}, 0)
    steps = [seconds(lambda: engine.step(batch, 0, 1.0, measure=False)) for _ in range(runs + 1)][1:]
    step_seconds, turns = statistics.median(steps), []
    for step in range(0, 2 * runs + 2, 2):
        held, beside = saved(engine, saver, batch, step + 1)
        plain = seconds(lambda: plain_save(engine, path))
        waited = seconds(lambda step=step: saver.save(engine, step + 2, wait=True))
        turns.append((held, beside, plain, waited))
    turns = turns[1:]  # the first warms up
    size = sum(file.stat().st_size for file in (run / "checkpoints" / checkpoint.step_name(saver.sealed)).iterdir())
    starts = [restart(made, world, batch, run, path) for _ in range(runs)]
    held, plain, bytes = [turn[0] for turn in turns], [turn[2] for turn in turns], path.stat().st_size
    beside = [one for turn in turns for one in turn[1]]
    rates = ([size / turn[3] for turn in turns], [bytes / one for one in plain])
    reference = "torch.save and fsync of the same state in the loop"
    more = {
        "step_seconds": round(step_seconds, 4),
        "share": round(statistics.median(held) / min(STEPS * step_seconds, MINUTES * 60), 6),
        "beside": round(statistics.median(beside) / step_seconds, 3) if beside else None,
    }
    return [
        line(case, "blocking", "s", held, plain, reference, lower=True, **more),
        line(case, "written", "B/s", *rates, f"{reference}; ours is hashed and sealed too", lower=False),
        line(case, "size", "B", [size], [bytes], "the file of torch.save", lower=True),
        line(case, "restart", "s", *zip(*starts, strict=True), "torch.load, not verified", lower=True),
    ]


def line(
    case: str, metric: str, unit: str, ours: Any, theirs: Any, reference_is: str, *, lower: bool, **more: Any
) -> dict[str, Any]:
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "case": case,
        "metric": metric,
        "unit": unit,
        "ours": round(statistics.median(ours), 4),
        "reference": round(statistics.median(theirs), 4),
        "ratio": round(statistics.median(b / a if lower else a / b for a, b in pairs), 3),
        "reference_is": reference_is,
        "runs": len(pairs),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, process_group() as world:
        for case in options.case or (["nano"] if options.quick else CASES):
            for found in measure(case, 1 if options.quick else 5, world, Path(folder)):
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
