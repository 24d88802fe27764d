"""The cost of checkpoints: `python tests/bench/checkpoint.py [CASE …] [--quick]`; cases are models.

blocking: seconds that a save blocks training (the copy, and the commit once all files are written), against
`torch.save` and fsync of the same state in the training loop; `share` is its share of 1,000 steps, or of 15 minutes if
they are shorter, and `beside` the factor by which a step is slower while files are written.
written: bytes per second from the copy until the commit, if training waits for it.
size: bytes on disk.
restart: seconds from a built model to the end of its first step, verification and reading included, against torch.load
of the other file. One process, as many threads as cores, wall-clock seconds.
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
        tokenizer=None,  # pyright: ignore[reportArgumentType]  tokens are random
        embed_dim=256,
        data=DataConfig(train="none"),
        loss=LOSSES.preset("softmax"),
        optim=OPTIMIZERS.preset("adamw"),
        schedule=SCHEDULES.preset("cosine", global_batch=batch),
        precision="fp32",
    )


def random_batch(run_config: RunConfig) -> Batch:
    count, side = run_config.schedule.global_batch, run_config.image.image_size
    none = torch.empty(0, dtype=torch.int64)
    return Batch(
        views=torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8),
        tokens=torch.randint(1, VOCABULARY - 1, (count, 16)).index_fill(1, torch.tensor([15]), VOCABULARY - 1),
        text_row=torch.arange(count),
        image_id=torch.arange(count),
        caption_id=torch.arange(count)[:, None],
        negative_row=none,
        negative_id=none,
    )


def build(run_config: RunConfig) -> tuple[TwoTower, Any]:
    torch.manual_seed(0)
    towers = TwoTower(run_config, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1).train()
    return towers, LOSSES.build(run_config.loss, embed_dim=run_config.embed_dim)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain_save(engine: Engine, path: Path) -> None:
    """As other trainers do: the complete state by torch.save, in the training loop."""
    state = {"model": engine.towers.state_dict(), "loss": engine.loss.state_dict()}
    state["optimizer"] = engine.optimizer.state_dict()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def measure_save(engine: Engine, saver: Saver, batch: Batch, step: int) -> tuple[float, list[float]]:
    """Seconds that a save blocks the training loop, and seconds of each step that runs while files are written."""
    steps = list[float]()
    blocking = seconds(lambda: saver.save(engine, step))
    while saver.pending:
        steps.append(seconds(lambda: engine.step(batch, step, 1.0, measure=False)))
    blocking += seconds(lambda: saver.commit_if_written(False, saver.failed))
    assert saver.committed == step
    return blocking, steps


def restart(run_config: RunConfig, world: World, batch: Batch, run: Path, path: Path) -> tuple[float, float]:
    towers, loss = build(run_config)

    def ours() -> None:
        found = checkpoint.newest(run, world=world)
        assert found is not None
        found.restore_weights(towers, loss)
        engine = Engine(towers, loss, run_config, world)
        found.restore_optimizers(engine)
        engine.step(batch, found.step, 1.0, measure=False)

    def theirs() -> None:
        state = torch.load(path, weights_only=True)
        towers.load_state_dict(state["model"])
        engine = Engine(towers, loss, run_config, world)
        engine.optimizer.load_state_dict(state["optimizer"])
        engine.step(batch, 1, 1.0, measure=False)

    return seconds(ours), seconds(theirs)


def measure(case: str, runs: int, world: World, folder: Path) -> list[dict[str, Any]]:
    run_config = config(case)
    batch, path, run = random_batch(run_config), folder / f"{case}.pt", folder / case
    run.mkdir()
    engine = Engine(*build(run_config), run_config, world)
    saver = Saver(run, world, run_config.runtime, {"identity": {}, "accepted": []}, 0)
    steps = [seconds(lambda: engine.step(batch, 0, 1.0, measure=False)) for _ in range(runs + 1)][1:]
    step_seconds = statistics.median(steps)
    blocking, beside, plain, waited = list[float](), list[float](), list[float](), list[float]()
    for number in range(runs + 1):
        step = 2 * number
        blocking_seconds, beside_seconds = measure_save(engine, saver, batch, step + 1)
        plain_seconds = seconds(lambda: plain_save(engine, path))
        waited_seconds = seconds(lambda step=step: saver.save(engine, step + 2, wait=True))
        if number > 0:  # the first run warms up
            blocking.append(blocking_seconds)
            beside += beside_seconds
            plain.append(plain_seconds)
            waited.append(waited_seconds)
    committed = run / "checkpoints" / checkpoint.step_name(saver.committed)
    size = sum(file.stat().st_size for file in committed.iterdir())
    plain_size = path.stat().st_size
    restarts = [restart(run_config, world, batch, run, path) for _ in range(runs)]
    rates = ([size / value for value in waited], [plain_size / value for value in plain])
    reference = "torch.save and fsync of the same state in the loop"
    more = {
        "step_seconds": round(step_seconds, 4),
        "share": round(statistics.median(blocking) / min(STEPS * step_seconds, MINUTES * 60), 6),
        "beside": round(statistics.median(beside) / step_seconds, 3) if beside else None,
    }
    return [
        line(case, "blocking", "s", blocking, plain, reference, lower=True, **more),
        line(case, "written", "B/s", *rates, f"{reference}; ours is hashed and committed too", lower=False),
        line(case, "size", "B", [size], [plain_size], "the file of torch.save", lower=True),
        line(case, "restart", "s", *zip(*restarts, strict=True), "torch.load, not verified", lower=True),
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
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)}; all by default")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder, process_group() as world:
        for case in options.case or (["nano"] if options.quick else CASES):
            for result in measure(case, 1 if options.quick else 5, world, Path(folder)):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
