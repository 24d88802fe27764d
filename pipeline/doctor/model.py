"""The model against the machine: sizes, memory, disk, and one forward-backward step of a few samples."""

from __future__ import annotations

import dataclasses
import gc
import os
from contextlib import closing, suppress
from pathlib import Path

import torch

from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.doctor.base import Context, Found, check
from clipwright.pipeline.doctor.environment import disk_folder, free_disk, free_memory, usable_cores
from clipwright.pipeline.losses.base import Features
from clipwright.pipeline.model.two_tower import build_model
from clipwright.pipeline.towers.base import parameter_count
from clipwright.pipeline.train.config import assemble
from clipwright.pipeline.train.logging import peak_memory
from clipwright.pipeline.train.optim import OptimConfig
from clipwright.pipeline.train.trainer import thread_count

FEW = 16  # samples of the first step


@check("threads", "config")
def threads(context: Context) -> Found:
    """The threads of all ranks on this machine against its cores; sets this rank's, as a run does."""
    world, count = context.world, thread_count(context.config.runtime, context.world)
    torch.set_num_threads(count)
    cores = usable_cores()
    found = f"ranks here: {world.local_size}, each {count} threads and {context.config.runtime.workers} that decode"
    if count * world.local_size > cores:
        share = max(cores // world.local_size, 1)
        return Found("warn", found, f"at most {cores} threads for {cores} usable cores", f"set runtime.threads={share}")
    return Found("ok", f"{found}, {cores} usable of {os.cpu_count()} cores")


@check("towers", "tokenizer")
def towers(context: Context) -> Found:
    """Builds the towers without memory: whether the sizes go together, and how many parameters there are."""
    with torch.device("meta"):
        made = build_model(context.config, context.tokenizer)
    image, text, whole = (parameter_count(part) for part in (made.image, made.text, made))
    context.predicted["parameters"] = {"image": image, "text": text, "all": whole}
    return Found("ok", f"image {image:,}, text {text:,} parameters, embed {context.config.embed_dim}")


@check("weights", "towers")
def weights(context: Context) -> Found:
    """Memory of weights, gradients and moments on this machine, before any picture."""
    count, world = context.predicted["parameters"]["all"], context.world
    optim, zero, gpu = context.config.optim, context.config.runtime.zero, world.device.type == "cuda"
    moved = gpu and context.config.runtime.offload == "optimizer"  # on a CPU it is the same memory
    each = [count * state_bytes(optim, stage, world.size, offload=moved and stage > 0) for stage in range(4)]
    here = 1 if gpu else world.local_size
    context.predicted["state_bytes"] = each[zero]
    free = free_on(context)
    found = f"{free / 2**30:.1f} GiB available"
    if moved:
        host = count * state_bytes(optim, zero, world.size) - each[zero]
        found += f", {free_memory() / 2**30:.1f} GiB of host memory"
        if host * world.local_size > free_memory():
            need = f"{host / 2**30:.2f} GiB a rank of host memory for what is offloaded; ranks here: {world.local_size}"
            return Found("FAIL", found, need, "set runtime.offload=none, or take more machines")
    wanted = (
        f"{each[zero] / 2**30:.2f} GiB a rank for weights, gradients, moments under ZeRO {zero}; ranks here: {here}"
    )
    if each[zero] * here > free:
        enough = next((stage for stage in range(4) if each[stage] * here <= free), None)
        fix = "take a smaller tower, more ranks with runtime.zero=3, or more memory"
        fix += " (or runtime.offload=optimizer)" if gpu and not moved else ""
        return Found("FAIL", found, wanted, fix if enough is None else f"set runtime.zero={enough}")
    return Found("ok", found, wanted)


@check("checkpoints", "towers")
def checkpoints(context: Context) -> Found:
    """Disk for the checkpoints that a run keeps, and the one being written."""
    config = context.config
    size = context.predicted["parameters"]["all"] * checkpoint_bytes(config.optim)
    context.predicted["checkpoint_bytes"] = size
    runtime = config.runtime
    more = config.schedule.steps // runtime.keep_every if runtime.keep_every else 0
    kept = {"newest": runtime.keep, "kept for good": more, "best": int(bool(runtime.keep_best)), "being written": 1}
    need, free = sum(kept.values()) * size, free_disk(context)
    found = f"{free / 1e9:.1f} GB free at {disk_folder(context)}"
    named = " + ".join(f"{count} {name}" for name, count in kept.items() if count)
    wanted = f"{need / 1e9:.2f} GB: {named}, each {size / 1e9:.2f} GB"
    if need > free:
        less = "lower runtime.keep" if more <= runtime.keep else f"raise runtime.keep_every={runtime.keep_every}"
        return Found("FAIL", found, wanted, f"free space, name another folder with -o, or {less}")
    return Found("ok", found, wanted)


@check("step", "weights", "captions", "images", "samples", "threads")
def step(context: Context) -> Found:
    """One forward-backward step of a few samples: finite, and how much memory all that are in the towers will take."""
    config, world = context.config, context.world
    context.parts = assemble(config, world, context.tokenizer)
    with closing(context.parts.loader.batches(0)) as batches:
        context.batch = batch = next(batches)
    few = first(batch, FEW)
    forget_peak(world.device)
    before = peak_memory(world.device)
    loss, norm = forward_backward(context, few)
    grown = peak_memory(world.device) - before
    found = f"loss {loss:.3f}, gradient norm {norm:.3f}"
    if not torch.tensor([loss, norm]).isfinite().all():
        return Found("FAIL", found, "finite numbers", "set precision=fp32")
    at_once = min(config.runtime.micro_batch or len(batch.views), len(batch.views))
    need, free = grown * at_once / len(few.views) * world.local_size, free_on(context)
    wanted = f"{need / 2**30:.1f} GiB for {at_once} samples at once"
    if need > free:
        fix = "set a smaller runtime.micro_batch, or lower schedule.global_batch or image.image_size"
        return Found("FAIL", f"{found}; {free / 2**30:.1f} GiB available", wanted, fix)
    return Found("ok", f"{found}; {free / 2**30:.1f} GiB available", f"finite, {wanted}")


def first(batch: Batch, count: int) -> Batch:
    """The first `count` samples of a batch."""
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


def forward_backward(context: Context, batch: Batch) -> tuple[float, float]:
    """Loss and gradient norm of a batch on this rank alone, without DeepSpeed; leaves no gradients."""
    towers, loss, device = context.parts.towers.train(), context.parts.loss, context.world.device
    with autocast(context):
        image, text = towers(batch.images(device), batch.tokens.to(device))
    ids = (batch.image_id.to(device), batch.caption_id.to(device))
    value = loss(Features(image.float(), text[batch.text_row.to(device)].float(), *ids))
    value.backward()
    grads = [p.grad for p in towers.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))
    for module in (towers, loss):
        module.zero_grad(set_to_none=True)
    return float(value.detach()), norm


def autocast(context: Context) -> torch.autocast:
    return torch.autocast(context.world.device.type, torch.bfloat16, enabled=context.config.precision == "bf16")


def moments(optim: OptimConfig) -> int:
    """Numbers an optimiser keeps for each parameter."""
    return 2 if optim.name == "adamw" else int(optim.momentum > 0)


def state_bytes(optim: OptimConfig, zero: int, world: int, *, offload: bool = False) -> float:
    """Bytes a parameter takes on one rank: fp32 weight, gradient, moments, and from ZeRO 1 on a master weight.

    ZeRO 1 shares moments and master weights among ranks, 2 gradients as well, 3 weights as well. With `offload` what
    is left on the device: weights and gradients.
    """
    kept = 0 if offload else 4 * moments(optim) + (4 if zero else 0)
    return 4 / (world if zero == 3 else 1) + 4 / (world if zero >= 2 else 1) + kept / (world if zero else 1)


def checkpoint_bytes(optim: OptimConfig) -> int:
    """Bytes a parameter takes in a checkpoint, on any number of ranks and under any ZeRO stage: weight and moments."""
    return 4 + 4 * moments(optim)


def free_on(context: Context) -> int:
    """Bytes that may still be taken where the model will be."""
    device = context.world.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def forget_peak(device: torch.device) -> None:
    """Lets the peak of memory begin anew, so that what doctor did before does not count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # where it is not allowed, what was done before counts
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
