"""The ranks of test_layouts.py: `python layout_ranks.py OUT WORLD_SIZE...` forks the ranks of each world size, trains
all of its layouts in them, with and without mutations, and writes what rank 0 saw.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layouts import IMAGE_SIZE, LAYOUTS, STEPS, Case, Layout, config, formula, model, named, rank_batch
from torch import Tensor

from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.data.order import key64
from clipwright.pipeline.distributed import exchange
from clipwright.pipeline.distributed.group import World, all_gather_object, process_group
from clipwright.pipeline.measure import peak_memory, reset_peak_memory
from clipwright.pipeline.towers.base import IMAGE_TOWERS
from clipwright.pipeline.train import engine as engine_module
from clipwright.pipeline.train.engine import Engine, micro_batches


def train(layout: Layout, world: World, mutate: Callable[[Engine], Any] | None = None) -> dict[str, Any]:
    run_config = config(layout.case, micro_batch=layout.micro, zero=layout.zero, exchange=layout.exchange)
    towers, loss = model(run_config)
    engine = Engine(towers, loss, run_config, world)
    if mutate is not None:
        mutate(engine)
    seen: dict[str, Any] = {"loss": [], "gradients": [], "norm": []}
    for step in range(STEPS):
        batch = rank_batch(layout.case, step, world.rank, world.size)
        value, _ = engine.backward(batch, step)
        seen["loss"].append(value)
        seen["gradients"].append(engine.gradients())
        seen["norm"].append(engine.update(1.0))
    weights = {name: tensor.clone() for name, tensor in engine.weights().items()}
    for name, tensor in engine.loss.state_dict().items():
        weights[f"loss.{name}"] = tensor.detach().clone()
    seen["weights"] = weights
    if mutate is None:
        batch = rank_batch(layout.case, STEPS, world.rank, world.size)
        seen["negatives"] = engine.step(batch, STEPS, 1.0, measure=True).negatives
    return seen


# Mutations, each of which the tests must notice


def loss_gradient_times_world(engine: Engine) -> None:
    """The gradient of the loss's own parameters is too large by the number of ranks."""
    real = engine_module.all_reduce_sum
    engine_module.all_reduce_sum = lambda tensor: real(tensor).mul_(engine.world.size if tensor.shape == (1,) else 1)


def mean_over_ranks(engine: Engine) -> None:
    """DeepSpeed's mean over ranks is not compensated."""
    engine.world = dataclasses.replace(engine.world, size=1)


def feature_gradients_not_summed(engine: Engine) -> None:
    """Feature gradients are not summed over ranks."""
    exchange.reduce_scatter_sum = lambda tensor: tensor.chunk(engine.world.size)[engine.world.rank].contiguous()


def log_sum_exps_not_merged(engine: Engine) -> None:
    """The log-sum-exps of the texts are those of this rank's images only."""
    real = exchange._reduce_scatter

    def merge(part: Tensor, op: str) -> Tensor:
        if op == "sum":
            return real(part, op)
        return part.chunk(engine.world.size)[engine.world.rank].contiguous()

    exchange._reduce_scatter = merge


def ring_results_not_merged(engine: Engine) -> None:
    """The last rank's results for a block replace those of the other ranks."""
    exchange._MERGE["logaddexp"] = lambda first, second, out: out.copy_(second)


def replay_without_deepspeed(engine: Engine) -> None:
    """The second pass calls the towers instead of the DeepSpeed engine."""
    embed_with_engine = engine._embed

    def embed(part: Batch, step: int, number: int) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return engine.towers(part.views, part.tokens)
        return embed_with_engine(part, step, number)

    engine._embed = embed


def towers_called_separately(engine: Engine) -> None:
    """The second pass calls the DeepSpeed engine once per tower."""
    towers, deepspeed_engine = engine.towers, engine.engine
    encoders = towers.encode_image, towers.encode_text
    towers.forward = lambda side, inputs: encoders[side](inputs)

    def backward(batch: Batch, step: int) -> tuple[float, Any]:
        with torch.no_grad():
            pair = [deepspeed_engine(side, inputs) for side, inputs in enumerate((batch.views, batch.tokens))]
        leaves = [features.requires_grad_() for features in pair]
        features = engine._features(*leaves, batch)
        loss = engine.loss(features)
        engine.loss.logit_scale.grad, *grads = torch.autograd.grad(loss, [engine.loss.logit_scale, *leaves])
        exchange.all_reduce_sum(engine.loss.logit_scale.grad)
        for side, inputs in enumerate((batch.views, batch.tokens)):
            deepspeed_engine.set_gradient_accumulation_boundary(side == 1)
            surrogate = (deepspeed_engine(side, inputs) * grads[side]).sum() * engine.world.size
            deepspeed_engine.backward(surrogate, scale_wrt_gas=False)
        return float(exchange.all_reduce_sum(loss.detach().clone())), features

    engine.backward = backward


# Mutation → the layout in which it must be noticed
MUTATIONS: dict[Callable[[Engine], None], Layout] = {
    loss_gradient_times_world: Layout(Case(), 2, 16),
    mean_over_ranks: Layout(Case(), 2, 16),
    feature_gradients_not_summed: Layout(Case(), 2),
    log_sum_exps_not_merged: Layout(Case(), 2),
    ring_results_not_merged: Layout(Case(), 2, exchange="ring"),
    replay_without_deepspeed: Layout(Case(), 2, 16, zero=3),
    towers_called_separately: Layout(Case(), 2, zero=3),
}


def train_mutated(mutate: Callable[[Engine], None], layout: Layout, world: World) -> dict[str, Any]:
    """Trains with a mutation, which is undone afterwards."""
    modules = [(module, dict(vars(module))) for module in (exchange, engine_module)]
    merge = dict(exchange._MERGE)
    try:
        return train(layout, world, mutate)
    finally:
        for module, before in modules:
            vars(module).update(before)
        exchange._MERGE.update(merge)


# Further comparisons


def with_drop_path(world: World) -> dict[str, Any]:
    """Returns gradients of the first step with drop path, ours and those of the micro-batches in one graph."""
    case, size = Case(), 16
    run_config = config(case, micro_batch=size)
    run_config = dataclasses.replace(
        run_config,
        image=dataclasses.replace(run_config.image, drop_path=0.5),
        text=dataclasses.replace(run_config.text, drop_path=0.5),
    )
    towers, loss = model(run_config)
    plain_towers, plain_loss = copy.deepcopy((towers, loss))
    engine, batch = Engine(towers, loss, run_config, world), rank_batch(case, 0)
    engine.backward(batch, 0)
    pairs = []
    for number, part in enumerate(micro_batches(batch, size)):
        torch.manual_seed(key64("step", run_config.seed, 0, 0, number) >> 1)
        pairs.append(plain_towers(part.views, part.tokens))
    image, text = (torch.cat(side) for side in zip(*pairs, strict=True))
    formula(case.loss, plain_loss, image, text, batch).backward()
    return {"ours": engine.gradients(), "plain": named(plain_towers, plain_loss, lambda p: p.grad)}


def batch_norm_config(case: Case, **runtime: Any) -> Any:
    """The config of a model whose image tower has batch norm."""
    image = IMAGE_TOWERS.preset("convmixer_nano", image_size=IMAGE_SIZE, patch=2, dim=16, depth=1, kernel=3)
    return dataclasses.replace(config(case, **runtime), image=image)


def with_batch_norm(world: World) -> dict[str, Any]:
    """Returns running statistics after a step, and gradients with the statistics in evaluation mode."""
    case, size = Case(), 16
    run_config = batch_norm_config(case, micro_batch=size)
    towers, loss = model(run_config)
    before, plain_loss = copy.deepcopy((towers, loss))
    engine, own_batch = Engine(towers, loss, run_config, world), rank_batch(case, 0, world.rank, world.size)
    engine.backward(own_batch, 0)
    engine.update(1.0)
    after_part = []
    for rank in range(world.size):
        for part in micro_batches(rank_batch(case, 0, rank, world.size), size):
            after_part.append(copy.deepcopy(before))
            after_part[-1].encode_image(part.views)
    statistics = ("running_mean", "running_var", "tracked")
    names = [name for name, _ in before.named_buffers() if name.endswith(statistics)]
    mean = {name: sum(towers.get_buffer(name) for towers in after_part) / len(after_part) for name in names}
    ours = {name: tensor.clone() for name, tensor in engine.weights().items() if name in names}

    evaluating = copy.deepcopy(before)
    evaluating.image.eval()
    engine = Engine(copy.deepcopy(evaluating), copy.deepcopy(plain_loss), run_config, world)
    engine.backward(own_batch, 0)
    batch = rank_batch(case, 0)
    formula(case.loss, plain_loss, *evaluating(batch.views, batch.tokens), batch).backward()
    return {
        "ours": ours,
        "plain": mean,
        "ours_evaluating": engine.gradients(),
        "plain_evaluating": named(evaluating, plain_loss, lambda p: p.grad),
    }


def nan_features(engine: Engine) -> None:
    embed = engine._embed
    engine._embed = lambda *args: tuple(side * torch.nan for side in embed(*args))


def nan_gradient(engine: Engine) -> None:
    backward = engine.engine.backward
    engine.engine.backward = lambda loss, **kwargs: backward(loss * torch.nan, **kwargs)


def infinite_scale_gradient(engine: Engine) -> None:
    engine.loss.logit_scale.register_hook(lambda grad: grad + torch.inf)


FAULTS = (nan_features, nan_gradient, infinite_scale_gradient)


def skip_a_step(world: World, zero: int, fault: Callable[[Engine], None] | None, micro: int) -> dict[str, Any]:
    """Runs three steps, the second with a fault on rank 1, or without a fault left out.

    Returns the weights after each, and what each rank reported as skipped.
    """
    case = Case(optim="adamw", clip=0.5)
    towers, loss = model(batch_norm_config(case))
    engine = Engine(towers, loss, config(case, zero=zero, micro_batch=micro), world)
    seen: dict[str, Any] = {"weights": [], "skipped": []}
    for step in (0, 1, 2):
        if step == 1 and world.rank == 1 and fault is not None:
            fault(engine)
        if step != 1 or fault is not None:
            result = engine.step(rank_batch(case, step, world.rank, world.size), step, 1.0, measure=False)
            seen["skipped"].append(all_gather_object(result.skipped))
        vars(engine).pop("_embed", None)
        vars(engine.engine).pop("backward", None)
        engine.loss.logit_scale._backward_hooks = None
        tensors = _local_tensors(engine)
        tensors.update({f"loss.{name}": tensor for name, tensor in engine.loss.state_dict().items()})
        seen["weights"].append({name: tensor.clone() for name, tensor in tensors.items()})
    return seen


def _local_tensors(engine: Engine) -> dict[str, Tensor]:
    """Returns what this rank holds: parameters or its partitions of them, and buffers."""
    partitions = {name: getattr(p, "ds_tensor", p).detach() for name, p in engine.towers.named_parameters()}
    return {**partitions, **dict(engine.towers.named_buffers())}


def exchange_memory(world: World) -> dict[str, int]:
    """Returns the bytes by which a rank grows while each exchange reduces gradients of its columns, 16 MiB."""
    growth = {}
    for name, kind in exchange.EXCHANGES.items():
        own = torch.zeros(8192, 512)
        reset_peak_memory(world.device)
        before = peak_memory(world.device)
        kind({"text": own}).reduce(lambda block: [block["text"] + 1], ["sum"])
        growth[name] = peak_memory(world.device) - before
    return growth


def run_rank(rank: int, world_size: int, port: int, out: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with process_group() as world:
        seen = {str(layout): train(layout, world) for layout in LAYOUTS if layout.world == world_size}
        if world_size == 1:
            seen["drop path"] = with_drop_path(world)
            seen["batch norm 1"] = with_batch_norm(world)
        if world_size == 2:
            seen["batch norm 2"] = with_batch_norm(world)
            for zero, micro in ((0, 0), (1, 16), (2, 0), (3, 16)):
                seen[f"left out {zero}"] = skip_a_step(world, zero, None, micro)
                for fault in FAULTS:
                    seen[f"{fault.__name__} {zero}"] = skip_a_step(world, zero, fault, micro)
            for mutate, layout in MUTATIONS.items():
                seen[mutate.__name__] = train_mutated(mutate, layout, world)
        if world_size == 4:
            seen["exchange memory"] = exchange_memory(world)
        if world.is_rank0:
            torch.save(seen, out / f"{world_size}.pt")


def main(out: Path, world_sizes: list[int]) -> None:
    for world_size in world_sizes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(world_size):
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    run_rank(rank, world_size, port, out)
                    code = 0
                finally:
                    if code:
                        sys.excepthook(*sys.exc_info())
                    os._exit(code)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            sys.exit(f"world size {world_size}: ranks ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
