"""Checks of the model against the machine: sizes, memory, disk, and one forward-backward pass of a few samples."""

from __future__ import annotations

import dataclasses
import os
from contextlib import closing

import torch

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check
from clipwright.pipeline.doctor.environment import disk_folder, free_disk, free_memory, usable_cores
from clipwright.pipeline.losses.base import Features
from clipwright.pipeline.measure import peak_memory, reset_peak_memory
from clipwright.pipeline.model.two_tower import build_model
from clipwright.pipeline.towers.base import parameter_count
from clipwright.pipeline.train.config import assemble
from clipwright.pipeline.train.optimizers.base import OptimizerConfig
from clipwright.pipeline.train.setup import thread_count

FEW_SAMPLES = 16  # samples of the first forward-backward pass


@check("threads", "config")
def threads(context: DoctorContext) -> CheckResult:
    """Threads of all ranks on this machine against its cores; sets this rank's threads as a run does."""
    world = context.world
    count = thread_count(context.config.runtime, world)
    torch.set_num_threads(count)
    cores = usable_cores()
    found = (
        f"{format_count(world.local_size, 'local rank')}, each with {format_count(count, 'thread')} and "
        f"{format_count(context.config.runtime.workers, 'loader worker')}"
    )
    if count * world.local_size > cores:
        fix = f"set runtime.threads={max(cores // world.local_size, 1)}"
        return CheckResult(
            "warn", found, f"at most {format_count(cores, 'thread')} for {format_count(cores, 'usable core')}", fix
        )
    return CheckResult("ok", f"{found}, {cores} usable of {format_count(os.cpu_count() or cores, 'core')}")


@check("towers", "tokenizer")
def towers(context: DoctorContext) -> CheckResult:
    """Builds the towers on the meta device: the sizes must fit together; counts the parameters."""
    with torch.device("meta"):
        model = build_model(context.config, context.tokenizer)
    image, text, total = (parameter_count(module) for module in (model.image, model.text, model))
    context.predicted["parameters"] = {"image": image, "text": text, "all": total}
    return CheckResult("ok", f"parameters: image {image:,}, text {text:,}; embed_dim {context.config.embed_dim}")


@check("weights", "towers")
def weights(context: DoctorContext) -> CheckResult:
    """Memory of weights, gradients and optimizer moments, before any activations."""
    parameters, world = context.predicted["parameters"]["all"], context.world
    optim, zero = context.config.optim, context.config.runtime.zero
    on_gpu = world.device.type == "cuda"
    offloaded = on_gpu and context.config.runtime.offload == "optimizer"  # on a CPU it is the same memory
    per_stage = [
        parameters * state_bytes(optim, stage, world.size, offload=offloaded and stage > 0) for stage in range(4)
    ]
    context.predicted["state_bytes"] = per_stage[zero]
    ranks_sharing = 1 if on_gpu else world.local_size
    free = free_device_memory(context)
    found = f"{free / 2**30:.1f} GiB available"
    if offloaded:
        host_bytes = parameters * state_bytes(optim, zero, world.size) - per_stage[zero]
        found += f", {free_memory() / 2**30:.1f} GiB of host memory"
        if host_bytes * world.local_size > free_memory():
            need = (
                f"{host_bytes / 2**30:.2f} GiB of host memory per rank for offloaded state; local ranks: "
                f"{world.local_size}"
            )
            return CheckResult("FAIL", found, need, "set runtime.offload=none, or use more machines")
    need = (
        f"{per_stage[zero] / 2**30:.2f} GiB per rank for weights, gradients and moments under ZeRO {zero}; "
        f"local ranks: {ranks_sharing}"
    )
    if per_stage[zero] * ranks_sharing <= free:
        return CheckResult("ok", found, need)
    for stage in range(4):
        if per_stage[stage] * ranks_sharing <= free:
            return CheckResult("FAIL", found, need, f"set runtime.zero={stage}")
    fix = "use a smaller tower, more ranks with runtime.zero=3, or more memory"
    if on_gpu and not offloaded:
        fix += " (or runtime.offload=optimizer)"
    return CheckResult("FAIL", found, need, fix)


@check("checkpoints", "towers")
def checkpoints(context: DoctorContext) -> CheckResult:
    """Disk space for the checkpoints that a run keeps and the one being written."""
    config = context.config
    size = context.predicted["parameters"]["all"] * checkpoint_bytes(config.optim)
    context.predicted["checkpoint_bytes"] = size
    runtime = config.runtime
    permanent = config.schedule.steps // runtime.keep_every if runtime.keep_every else 0
    counts = {
        "newest": runtime.keep,
        "permanent": permanent,
        "best": int(bool(runtime.keep_best)),
        "being written": 1,
    }
    total, free = sum(counts.values()) * size, free_disk(context)
    found = f"{free / 1e9:.1f} GB free at {disk_folder(context)}"
    listed = " + ".join(f"{count} {name}" for name, count in counts.items() if count)
    need = f"{total / 1e9:.2f} GB: {listed}, {size / 1e9:.2f} GB each"
    if total > free:
        advice = "lower runtime.keep"
        if permanent > runtime.keep:
            advice = f"raise runtime.keep_every={runtime.keep_every}"
        return CheckResult("FAIL", found, need, f"free space, choose another folder with -o, or {advice}")
    return CheckResult("ok", found, need)


@check("step", "weights", "captions", "images", "samples", "threads")
def step(context: DoctorContext) -> CheckResult:
    """One forward-backward pass of a few samples: finite, and the memory a full micro-batch will take."""
    config, world = context.config, context.world
    context.components = assemble(config, world, context.tokenizer)
    with closing(context.components.loader.batches(0)) as batches:
        context.batch = batch = next(batches)
    few = first_samples(batch, FEW_SAMPLES)
    reset_peak_memory(world.device)
    before = peak_memory(world.device)
    loss, norm = forward_backward(context, few)
    growth = peak_memory(world.device) - before
    found = f"loss {loss:.3f}, gradient norm {norm:.3f}"
    if not torch.tensor([loss, norm]).isfinite().all():
        return CheckResult("FAIL", found, "finite numbers", "set precision=fp32")
    at_once = min(config.runtime.micro_batch or len(batch.views), len(batch.views))
    memory, free = growth * at_once / len(few.views) * world.local_size, free_device_memory(context)
    found += f"; {free / 2**30:.1f} GiB available"
    need = f"{memory / 2**30:.1f} GiB for {format_count(at_once, 'sample')} at once"
    if memory > free:
        fix = "set a smaller runtime.micro_batch, or lower schedule.global_batch or image.image_size"
        return CheckResult("FAIL", found, need, fix)
    return CheckResult("ok", found, f"finite, {need}")


def first_samples(batch: Batch, count: int) -> Batch:
    """Returns the first `count` samples of a batch."""
    captions = batch.caption_id.shape[1]
    rows, order = batch.text_row[: count * captions].unique(return_inverse=True)
    return dataclasses.replace(
        batch,
        views=batch.views[:count],
        color_jitter=None if batch.color_jitter is None else batch.color_jitter[:count],
        tokens=batch.tokens[rows],
        lengths=None if batch.lengths is None else batch.lengths[rows],
        text_row=order,
        image_id=batch.image_id[:count],
        caption_id=batch.caption_id[:count],
    )


def forward_backward(context: DoctorContext, batch: Batch) -> tuple[float, float]:
    """Returns loss and gradient norm of a batch on this rank alone, without DeepSpeed; leaves no gradients."""
    towers, loss, device = context.components.towers.train(), context.components.loss, context.world.device
    with autocast(context):
        image, text = towers(batch.images(device), batch.tokens.to(device))
    features = Features(
        image.float(),
        text[batch.text_row.to(device)].float(),
        batch.image_id.to(device),
        batch.caption_id.to(device),
    )
    value = loss(features)
    value.backward()
    norms = [torch.linalg.vector_norm(p.grad) for p in towers.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    towers.zero_grad(set_to_none=True)
    loss.zero_grad(set_to_none=True)
    return float(value.detach()), norm


def autocast(context: DoctorContext) -> torch.autocast:
    return torch.autocast(context.world.device.type, torch.bfloat16, enabled=context.config.precision == "bf16")


def state_bytes(optim: OptimizerConfig, zero: int, world: int, *, offload: bool = False) -> float:
    """Returns bytes per parameter on one rank: fp32 weight, gradient, moments, and from ZeRO 1 on a master weight.

    ZeRO 1 partitions moments and master weights over the ranks, 2 gradients as well, 3 weights as well. With
    `offload`: what stays on the device, weights and gradients.
    """
    weight = 4 / (world if zero == 3 else 1)
    gradient = 4 / (world if zero >= 2 else 1)
    if offload:
        return weight + gradient
    master_weight = 4 if zero else 0
    return weight + gradient + (4 * optim.state_size + master_weight) / (world if zero else 1)


def checkpoint_bytes(optim: OptimizerConfig) -> int:
    """Returns bytes per parameter in a checkpoint, for any world size and ZeRO stage: weight and moments."""
    return 4 + 4 * optim.state_size


def free_device_memory(context: DoctorContext) -> int:
    """Returns the bytes available on the device of the model."""
    device = context.world.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
