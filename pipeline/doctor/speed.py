"""A short real measurement with the run's own loader, engine and step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipwright.pipeline.core.messages import format_count, format_duration
from clipwright.pipeline.distributed.group import any_rank
from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check
from clipwright.pipeline.doctor.model import autocast, free_device_memory
from clipwright.pipeline.measure import peak_memory, reset_peak_memory, seconds_of
from clipwright.pipeline.train.engine import Engine, micro_batches

WARMUP_STEPS = 3
MIN_STEPS = 3
MAX_STEPS = 64
MAX_SECONDS = 8.0  # of measured steps
DATA_SHARE = 0.2  # of the step time that may be spent waiting for data


@dataclass
class StepTimes:
    """Measured steps: seconds per step, seconds of it spent waiting for data, and CPU seconds of all steps."""

    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


@check("speed", "step", "shards")
def speed(context: DoctorContext) -> CheckResult:
    """Predicts samples per second, duration and peak memory, and where a step spends its time."""
    config, world, batch = context.config, context.world, context.batch
    reset_peak_memory(world.device)
    towers, device = context.components.towers, world.device
    parts = micro_batches(batch, config.runtime.micro_batch)
    image = tower_seconds(context, lambda: towers.encode_image(parts[0].images(device)), len(parts))
    text = tower_seconds(context, lambda: towers.encode_text(parts[0].tokens.to(device)), len(parts))
    times = measure_steps(context)
    global_batch = config.schedule.global_batch
    step_seconds = statistics.median(times.steps)
    data_share = sum(times.waits) / sum(times.steps)
    shares = {"data": data_share, "image tower": image / step_seconds, "text tower": text / step_seconds}
    shares["loss and optimizer"] = max(1 - sum(shares.values()), 0.0)
    seconds = config.schedule.steps * step_seconds
    duration = format_duration(seconds)
    context.predicted |= {
        "samples_per_s": global_batch / step_seconds,
        "cpu_s_per_sample": times.cpu_seconds / len(times.steps) / (global_batch // world.size),
        "data_share": data_share,
        "seconds": seconds,
        "memory_gb": peak_memory(world.device) / 2**30,
        "measured_steps": len(times.steps),
        "shares": shares,
    }
    return CheckResult(
        "ok",
        f"{global_batch / step_seconds:.0f} samples/s, {format_count(config.schedule.samples, 'sample')} in "
        f"{duration}, "
        f"{format_count(len(times.steps), 'step')} measured",
    )


@check("bottleneck", "speed")
def bottleneck(context: DoctorContext) -> CheckResult:
    """What a step spends most of its time on."""
    shares: dict[str, float] = context.predicted["shares"]
    names = sorted(shares, key=lambda name: -shares[name])
    context.predicted["bottleneck"] = names[0]
    found = ", ".join(f"{name} {shares[name]:.0%}" for name in names)
    need = f"at most {DATA_SHARE:.0%} waiting for data"
    if shares["data"] > DATA_SHARE:
        fix = "raise runtime.workers, or prepare smaller images (images.resize, images.size)"
        return CheckResult("warn", found, need, fix)
    return CheckResult("ok", found, need)


@check("peak memory", "speed")
def memory(context: DoctorContext) -> CheckResult:
    """The measured peak of all local ranks against the memory of this machine."""
    peak = int(context.predicted["memory_gb"] * 2**30)
    local_ranks = context.world.local_size if context.world.device.type == "cpu" else 1
    total = free_device_memory(context) + peak
    found = f"{peak / 2**30:.1f} GiB per rank"
    need = f"at most 90% of {total / 2**30:.1f} GiB; local ranks: {local_ranks}"
    if peak * local_ranks > 0.9 * total:
        fix = "lower runtime.micro_batch or schedule.global_batch, or use fewer ranks on this machine"
        return CheckResult("warn", found, need, fix)
    return CheckResult("ok", found, need)


def tower_seconds(context: DoctorContext, encode: Callable[[], Tensor], parts: int) -> float:
    """Returns seconds of a tower's forward and backward passes over `parts` micro-batches, after one warmup.

    With several micro-batches the forward pass runs twice (GradCache).
    """

    def forward_backward() -> None:
        if parts > 1:
            with autocast(context), torch.no_grad():
                encode()
        with autocast(context):
            out = encode()
        if out.requires_grad:  # not if all its parameters are frozen
            out.sum().backward()

    device = context.world.device
    seconds_of(forward_backward, device)
    seconds = seconds_of(forward_backward, device)
    context.components.towers.zero_grad(set_to_none=True)
    return seconds * parts


def measure_steps(context: DoctorContext) -> StepTimes:
    """Runs real steps: a warmup, then up to MAX_SECONDS; all ranks take the same number.

    The copies that a save makes exist during the last warmup step, so that the peak memory is that of a run.
    """
    config, world, components = context.config, context.world, context.components
    global_batch = config.schedule.global_batch
    engine = Engine(components.towers, components.loss, config, world)
    components.towers.train()
    times = StepTimes()
    steps = WARMUP_STEPS + min(MAX_STEPS, max(MIN_STEPS, config.schedule.steps))
    with closing(components.loader.batches(0)) as batches:
        for step in range(steps):
            started, cpu_started = time.perf_counter(), time.process_time()
            batch = next(batches)
            copies = (engine.weights(), engine.optimizer_state()) if step == WARMUP_STEPS - 1 else ()
            engine.step(batch, step, config.schedule.factor(step * global_batch), measure=False)
            del copies
            if step >= WARMUP_STEPS:
                times.steps.append(time.perf_counter() - started)
                times.waits.append(batch.wait_seconds)
                times.cpu_seconds += time.process_time() - cpu_started
            enough = len(times.steps) >= MIN_STEPS and sum(times.steps) > MAX_SECONDS
            if any_rank(enough, world.device):
                break
    return times
