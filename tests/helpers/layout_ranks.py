"""What the ranks of test_layouts.py do: `python layout_ranks.py OUT WORLD...` forks the ranks of each world, trains all
of its layouts in them, with and without mutations, and writes what rank 0 saw.
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
from layouts import IMAGE, LAYOUTS, STEPS, Case, Layout, config, formula, model, named, share
from torch import Tensor

from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.data.order import key64
from clipwright.pipeline.distributed import exchange
from clipwright.pipeline.distributed.group import World, all_gather_object, process_group
from clipwright.pipeline.measure import peak_memory, reset_peak_memory
from clipwright.pipeline.towers.base import IMAGE_TOWERS
from clipwright.pipeline.train import engine as engine_module
from clipwright.pipeline.train.engine import Engine, micro_batches


def trained(layout: Layout, world: World, spoil: Callable[[Engine], Any] | None = None) -> dict[str, Any]:
    made = config(layout.case, micro_batch=layout.micro, zero=layout.zero, exchange=layout.exchange)
    towers, loss = model(made)
    engine = Engine(towers, loss, made, world)
    if spoil is not None:
        spoil(engine)
    seen: dict[str, Any] = {"loss": [], "gradients": [], "norm": []}
    for step in range(STEPS):
        batch = share(layout.case, step, world.rank, world.size)
        value, _ = engine.backward(batch, step)
        seen["loss"].append(value)
        seen["gradients"].append(engine.gradients())
        seen["norm"].append(engine.update(1.0))
    own = {f"loss.{name}": tensor.detach().clone() for name, tensor in engine.loss.state_dict().items()}
    seen["weights"] = {**{k: v.clone() for k, v in engine.weights().items()}, **own}
    if spoil is None:
        batch = share(layout.case, STEPS, world.rank, world.size)
        seen["negatives"] = engine.step(batch, STEPS, 1.0, measure=True).negatives
    return seen


def wide(engine: Engine) -> None:
    """The loss's own parameters get a gradient too large by the number of ranks."""
    real = engine_module.all_reduce_sum
    engine_module.all_reduce_sum = lambda tensor: real(tensor).mul_(engine.world.size if tensor.shape == (1,) else 1)


def alone(engine: Engine) -> None:
    """DeepSpeed's mean over ranks is not made up for."""
    engine.world = dataclasses.replace(engine.world, size=1)


def unsummed(engine: Engine) -> None:
    """Feature gradients stay on the rank that found them."""
    exchange.reduce_scatter_sum = lambda tensor: tensor.chunk(engine.world.size)[engine.world.rank].contiguous()


def unmerged(engine: Engine) -> None:
    """The texts' log-sum-exps are those of this rank's images alone."""
    real = exchange._merge_own

    def merge(part: Tensor, op: str) -> Tensor:
        if op == "sum":
            return real(part, op)
        return part.chunk(engine.world.size)[engine.world.rank].contiguous()

    exchange._merge_own = merge


def unmerged_ring(engine: Engine) -> None:
    """What the last rank found of a block takes the place of what the others did."""
    exchange._MERGE["logaddexp"] = lambda first, second, out: out.copy_(second)


def past_deepspeed(engine: Engine) -> None:
    """The replay goes to the towers and not through the engine."""
    through = engine._embed

    def embed(part: Batch, step: int, number: int) -> tuple[Tensor, Tensor]:
        return engine.towers(part.views, part.tokens) if torch.is_grad_enabled() else through(part, step, number)

    engine._embed = embed


def apart(engine: Engine) -> None:
    """Each tower is replayed by a call of its own."""
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


# What a mutation does to which layout; all of them must be seen.
MUTATIONS: dict[Callable[[Engine], None], Layout] = {
    wide: Layout(Case(), 2, 16),
    alone: Layout(Case(), 2, 16),
    unsummed: Layout(Case(), 2),
    unmerged: Layout(Case(), 2),
    unmerged_ring: Layout(Case(), 2, exchange="ring"),
    past_deepspeed: Layout(Case(), 2, 16, zero=3),
    apart: Layout(Case(), 2, zero=3),
}


def mutated(spoil: Callable[[Engine], None], layout: Layout, world: World) -> dict[str, Any]:
    kept = [(module, dict(vars(module))) for module in (exchange, engine_module)]
    merge = dict(exchange._MERGE)
    try:
        return trained(layout, world, spoil)
    finally:
        for module, before in kept:
            vars(module).update(before)
        exchange._MERGE.update(merge)


def dropped(world: World) -> dict[str, Any]:
    """Gradients of the first step under drop path, ours and those of the micro-batches in one graph."""
    case, size = Case(), 16
    made = config(case, micro_batch=size)
    made = dataclasses.replace(
        made,
        image=dataclasses.replace(made.image, drop_path=0.5),
        text=dataclasses.replace(made.text, drop_path=0.5),
    )
    towers, loss = model(made)
    plain_towers, plain_loss = copy.deepcopy((towers, loss))
    engine, batch = Engine(towers, loss, made, world), share(case, 0)
    engine.backward(batch, 0)
    pairs = []
    for number, part in enumerate(micro_batches(batch, size)):
        torch.manual_seed(key64("step", made.seed, 0, 0, number) >> 1)
        pairs.append(plain_towers(part.views, part.tokens))
    image, text = (torch.cat(side) for side in zip(*pairs, strict=True))
    formula(case.loss, plain_loss, image, text, batch).backward()
    return {"ours": engine.gradients(), "plain": named(plain_towers, plain_loss, lambda p: p.grad)}


def normed(world: World) -> dict[str, Any]:
    """A tower with batch norm: statistics after a step, and gradients where it stands still."""
    case, size = Case(), 16
    made = config(case, micro_batch=size)
    image = IMAGE_TOWERS.preset("convmixer_nano", image_size=IMAGE, patch=2, dim=16, depth=1, kernel=3)
    made = dataclasses.replace(made, image=image)
    towers, loss = model(made)
    before, plain_loss = copy.deepcopy((towers, loss))
    engine, mine = Engine(towers, loss, made, world), share(case, 0, world.rank, world.size)
    engine.backward(mine, 0)
    engine.update(1.0)
    each = []
    for number in range(world.size):
        for part in micro_batches(share(case, 0, number, world.size), size):
            each.append(copy.deepcopy(before))
            each[-1].encode_image(part.views)
    names = [name for name, _ in before.named_buffers() if name.endswith(("running_mean", "running_var", "tracked"))]
    mean = {name: sum(tower.get_buffer(name) for tower in each) / len(each) for name in names}
    found = {
        "ours": {name: tensor.clone() for name, tensor in engine.weights().items() if name in names},
        "plain": mean,
    }

    still = copy.deepcopy(before)
    still.image.eval()
    engine = Engine(copy.deepcopy(still), copy.deepcopy(plain_loss), made, world)
    engine.backward(mine, 0)
    batch = share(case, 0)
    vectors = still(batch.views, batch.tokens)
    formula(case.loss, plain_loss, *vectors, batch).backward()
    found |= {"ours_still": engine.gradients(), "plain_still": named(still, plain_loss, lambda p: p.grad)}
    return found


def in_features(engine: Engine) -> None:
    through = engine._embed
    engine._embed = lambda *words: tuple(side * torch.nan for side in through(*words))


def in_a_gradient(engine: Engine) -> None:
    through = engine.engine.backward
    engine.engine.backward = lambda loss, **words: through(loss * torch.nan, **words)


def in_the_scale(engine: Engine) -> None:
    engine.loss.logit_scale.register_hook(lambda grad: grad + torch.inf)


ILL = (in_features, in_a_gradient, in_the_scale)


def skipped(world: World, zero: int, make_ill: Callable[[Engine], None] | None, micro: int) -> dict[str, Any]:
    """Three steps, the second ill on one rank or left out: weights behind each, and which ranks skipped it."""
    case = Case(optim="adamw", clip=0.5)
    made = config(case, zero=zero, micro_batch=micro)
    image = IMAGE_TOWERS.preset("convmixer_nano", image_size=IMAGE, patch=2, dim=16, depth=1, kernel=3)
    towers, loss = model(dataclasses.replace(made, image=image))
    engine = Engine(towers, loss, made, world)
    found: dict[str, Any] = {"weights": [], "told": []}
    for step in (0, 1, 2):
        if step == 1 and world.rank == 1 and make_ill is not None:
            make_ill(engine)
        if step != 1 or make_ill is not None:
            result = engine.step(share(case, step, world.rank, world.size), step, 1.0, measure=False)
            found["told"].append(all_gather_object(result.skipped))
        vars(engine).pop("_embed", None)
        vars(engine.engine).pop("backward", None)
        engine.loss.logit_scale._backward_hooks = None
        own = {f"loss.{name}": tensor for name, tensor in engine.loss.state_dict().items()}
        found["weights"].append({k: v.clone() for k, v in {**_held(engine), **own}.items()})
    return found


def _held(engine: Engine) -> dict[str, Tensor]:
    """What this rank holds: parameters, or its parts of them, and buffers as they are."""
    parts = {name: getattr(p, "ds_tensor", p).detach() for name, p in engine.towers.named_parameters()}
    return {**parts, **dict(engine.towers.named_buffers())}


def exchanged(world: World) -> dict[str, int]:
    """Bytes by which a rank grows while gradients of its columns, 16 MiB, go through each exchange."""
    found = {}
    for name, kind in exchange.EXCHANGES.items():
        own = torch.zeros(8192, 512)
        reset_peak_memory(world.device)
        before = peak_memory(world.device)
        kind({"text": own}).reduce(lambda block: [block["text"] + 1], ["sum"])
        found[name] = peak_memory(world.device) - before
    return found


def rank(number: int, size: int, port: int, out: Path) -> None:
    os.environ.update(
        {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(size)},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with process_group() as world:
        seen = {str(layout): trained(layout, world) for layout in LAYOUTS if layout.world == size}
        if size == 1:
            seen |= {"dropped": dropped(world), "normed1": normed(world)}
        if size == 2:
            seen["normed2"] = normed(world)
            for zero, micro in ((0, 0), (1, 16), (2, 0), (3, 16)):
                for ill in (None, *ILL):
                    seen[f"{ill and ill.__name__} {zero}"] = skipped(world, zero, ill, micro)
            seen |= {spoil.__name__: mutated(spoil, layout, world) for spoil, layout in MUTATIONS.items()}
        if size == 4:
            seen["exchanged"] = exchanged(world)
        if world.is_rank0:
            torch.save(seen, out / f"{size}.pt")


def main(out: Path, sizes: list[int]) -> None:
    for size in sizes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        for number in range(size):
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    rank(number, size, port, out)
                    code = 0
                finally:
                    if code:
                        sys.excepthook(*sys.exc_info())
                    os._exit(code)
            ranks.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        if any(codes):
            sys.exit(f"world {size}: ranks ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
