"""A short real measurement: the run's own loader, engine and step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipwright.pipeline.core.log import format_duration
from clipwright.pipeline.distributed.group import any_rank
from clipwright.pipeline.doctor.base import Context, Found, check
from clipwright.pipeline.doctor.model import autocast, forget_peak, free_on
from clipwright.pipeline.train.engine import Engine, micro_batches
from clipwright.pipeline.train.logging import peak_memory

WARM, LEAST, MOST, SECONDS = 3, 3, 64, 8.0  # steps before, and steps or seconds of the measurement
SHARE = 0.2  # of its time that a step may wait for data


@dataclass
class Times:
    """Seconds of each measured step, of which it waited for data; processor seconds of all of them together."""

    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    processor: float = 0.0


@check("speed", "step", "shards")
def speed(context: Context) -> Found:
    """Predicted samples a second, time and peak memory, and what a step spends its time on."""
    config, world, batch = context.config, context.world, context.batch
    forget_peak(world.device)
    towers, device = context.parts.towers, world.device
    parts = micro_batches(batch, config.runtime.micro_batch)
    image = tower_seconds(context, lambda: towers.encode_image(parts[0].images(device)), len(parts))
    text = tower_seconds(context, lambda: towers.encode_text(parts[0].tokens.to(device)), len(parts))
    times = measure(context)
    size = config.schedule.global_batch
    each, waited = statistics.median(times.steps), sum(times.waits) / sum(times.steps)
    shares = {"data": waited, "image tower": image / each, "text tower": text / each}
    shares["loss and optimiser"] = max(1 - sum(shares.values()), 0.0)
    context.predicted |= {
        "samples_per_s": size / each,
        "processor_s_per_sample": times.processor / len(times.steps) / (size // world.size),
        "data_share": waited,
        "seconds": config.schedule.steps * each,
        "memory_gb": peak_memory(world.device) / 2**30,
        "measured_steps": len(times.steps),
        "shares": shares,
    }
    took = format_duration(context.predicted["seconds"])
    return Found(
        "ok", f"{size / each:.0f} samples/s, {config.schedule.samples:,} in {took}, {len(times.steps)} steps timed"
    )


@check("bottleneck", "speed")
def bottleneck(context: Context) -> Found:
    """What a step spends most of its time on."""
    shares: dict[str, float] = context.predicted["shares"]
    order = sorted(shares, key=lambda name: -shares[name])
    context.predicted["bottleneck"] = order[0]
    found = ", ".join(f"{name} {shares[name]:.0%}" for name in order)
    if shares["data"] > SHARE:
        fix = "raise runtime.workers, or prepare smaller pictures (images.resize, images.size)"
        return Found("warn", found, f"at most {SHARE:.0%} waiting for data", fix)
    return Found("ok", found, f"at most {SHARE:.0%} waiting for data")


@check("peak memory", "speed")
def memory(context: Context) -> Found:
    """The measured peak of all ranks here against what this machine has."""
    peak = int(context.predicted["memory_gb"] * 2**30)
    local = context.world.local_size if context.world.device.type == "cpu" else 1
    free, found = free_on(context) + peak, f"{peak / 2**30:.1f} GiB a rank"
    need = f"at most 90% of the {free / 2**30:.1f} GiB there are; ranks here: {local}"
    if peak * local > 0.9 * free:
        return Found("warn", found, need, "lower runtime.micro_batch or schedule.global_batch, or use fewer ranks here")
    return Found("ok", found, need)


def tower_seconds(context: Context, encode: Callable[[], Tensor], parts: int) -> float:
    """Seconds of a tower's forward and backward, the second of two; of several micro-batches the forward is twofold."""
    seconds = 0.0
    for _ in range(2):
        synchronize(context)
        started = time.perf_counter()
        with autocast(context), torch.no_grad():
            if parts > 1:
                encode()
        with autocast(context):
            out = encode()
        out.sum().backward()
        synchronize(context)
        seconds = time.perf_counter() - started
    context.parts.towers.zero_grad(set_to_none=True)
    return seconds * parts


def synchronize(context: Context) -> None:
    if context.world.device.type == "cuda":
        torch.cuda.synchronize(context.world.device)


def measure(context: Context) -> Times:
    """Real steps, some to warm up and then for SECONDS; all ranks take equally many.

    Beside the last that warms up lies what a save copies, so that the peak of memory is a run's.
    """
    config, world, parts = context.config, context.world, context.parts
    size = config.schedule.global_batch
    engine = Engine(parts.towers, parts.loss, config, world)
    parts.towers.train()
    times = Times()
    with closing(parts.loader.batches(0)) as batches:
        for turn in range(WARM + min(MOST, max(LEAST, config.schedule.steps))):
            started, processor = time.perf_counter(), time.process_time()
            batch = next(batches)
            copied = (engine.weights(), engine.optimizer_state()) if turn == WARM - 1 else ()
            engine.step(batch, turn, config.schedule.factor(turn * size), measure=False)
            del copied
            if turn >= WARM:
                times.steps.append(time.perf_counter() - started)
                times.waits.append(batch.wait_seconds)
                times.processor += time.process_time() - processor
            late = len(times.steps) >= LEAST and sum(times.steps) > SECONDS
            if any_rank(late, world.device):
                break
    return times
