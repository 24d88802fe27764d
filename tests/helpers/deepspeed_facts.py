"""The ranks of test_deepspeed.py: `python deepspeed_facts.py OUT` forks two, which try each fact about DeepSpeed, and
writes what rank 0 measured as JSON.

Each function below is named after a fact and returns numbers or text for it; if the fact is an error, its message.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import clipwright.pipeline.train.engine  # noqa: F401  before DeepSpeed: switches off its C++ extension
from clipwright.pipeline.distributed.group import World, all_gather_object, process_group
from clipwright.pipeline.train.optimizer_state import read_state, state_layout, state_slices

import deepspeed  # isort: skip
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import ShareMemCommBuilder

FACTS: list[Callable[[World], Any]] = []
STAGES = (0, 1, 2, 3)


def fact(work: Callable[[World], Any]) -> Callable[[World], Any]:
    FACTS.append(work)
    return work


class Two(nn.Module):
    """Two towers in one module, like ours."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(4, 3), nn.Linear(5, 3)
        if extra is not None:
            self.extra = extra

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def inputs(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 5, generator=generator)


def cost(image: Tensor, text: Tensor) -> Tensor:
    return (image - text).square().mean()


def initialize(module: nn.Module, optimizer: Any = None, **settings: Any) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **settings,
    }
    config = {key: value for key, value in config.items() if value is not None}
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


def staged(zero: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": zero}}


def weights(engine: Any) -> dict[str, Tensor]:
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=None, enabled=engine.zero_optimization_stage() == 3
        ):
            gathered[name] = parameter.detach().clone()
    return gathered


def step(engine: Any, world: World, number: int = 0) -> None:
    engine.backward(cost(*engine(*inputs(world.rank, number))))
    engine.step()


def plain(world: World, steps: int = 1, clip: float = 0.0, lr: float = 0.5) -> tuple[dict[str, Tensor], list[float]]:
    """Trains with torch only: the gradient is the mean over ranks. Returns weights and gradient norms."""
    module = Two()
    optimizer, norms = torch.optim.SGD(module.parameters(), lr=lr), []
    for number in range(steps):
        optimizer.zero_grad()
        for rank in range(world.size):
            (cost(*module(*inputs(rank, number))) / world.size).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)))
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}, norms


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Starting


@fact
def no_cpp_is_compiled_with_the_op_switched_off(world: World) -> Any:
    from deepspeed.comm.torch import build_shm_op

    built: list[str] = []
    real, ShareMemCommBuilder.load = ShareMemCommBuilder.load, lambda self, *words: built.append(self.NAME)
    try:
        off = build_shm_op() is None and not built
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = True
        build_shm_op()
    finally:
        ShareMemCommBuilder.load = real
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {"off": off, "would be built": built}


@fact
def accelerator_is_the_cpu(world: World) -> Any:
    return get_accelerator().device_name()


@fact
def without_launcher_variables_it_requires_mpi(world: World) -> Any:
    """If it should create the group; with an existing group it still needs one variable."""
    kept = os.environ.pop("LOCAL_RANK")
    try:
        with_group = error_of(lambda: initialize(Two()))
        return [error_of(lambda: deepspeed.init_distributed("gloo", dist_init_required=True)), with_group]
    finally:
        os.environ["LOCAL_RANK"] = kept


# Parameters and config


@fact
def zero_dimensional_parameter_crashes(world: World) -> Any:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

    def work(zero: int) -> None:
        engine = initialize(Two(Scale()), **staged(zero))
        engine.backward(cost(*engine(*inputs(world.rank))) * engine.module.extra.scale)
        engine.step()

    return {zero: error_of(lambda zero=zero: work(zero)) != "" for zero in STAGES}


@fact
def clamp_after_the_step_is_lost_under_zero(world: World) -> Any:
    """A weight that is set to zero after each step continues from its master copy."""
    found = {}
    for zero in (0, 1, 2):
        engine, seen = initialize(Two(), **staged(zero)), []
        for number in range(3):
            step(engine, world, number)
            with torch.no_grad():
                seen.append(float(engine.module.image.weight.abs().max()))
                engine.module.image.weight.zero_()
        found[zero] = seen[-1]
    return found


@fact
def parameter_is_empty_outside_forward_under_stage_3(world: World) -> Any:
    engine = initialize(Two(), **staged(3))
    return [engine.module.image.weight.numel(), weights(engine)["image.weight"].numel()]


@fact
def missing_clipping_means_one_and_zero_means_none(world: World) -> Any:
    """Returns the norm of the update divided by the learning rate."""
    found = {}
    for name, value in (("left out", None), ("zero", 0.0)):
        for zero in (0, 2):
            engine = initialize(Two(), gradient_clipping=value, **staged(zero))
            engine.backward(100 * cost(*engine(*inputs(world.rank))))
            engine.step()
            whole = weights(engine)
            start = dict(Two().named_parameters())
            updates = torch.stack([(whole[key] - start[key].detach()).square().sum() for key in whole])
            found[f"{name}, {zero}"] = float(updates.sum().sqrt()) / 0.5
    return found


@fact
def norm_is_from_before_clipping_and_missing_at_stage_0(world: World) -> Any:
    found, wanted = {}, plain(world)[1][0]
    for zero in STAGES:
        engine = initialize(Two(), gradient_clipping=0.01, **staged(zero))
        step(engine, world)
        norm = engine.get_global_grad_norm()
        found[zero] = None if norm is None else float(norm) / wanted
    return found


@fact
def gradients_are_averaged_over_ranks(world: World) -> Any:
    """Returns the largest distance of the gradient before the step from the mean over ranks."""
    found = {}
    module = Two()
    for rank in range(world.size):
        (cost(*module(*inputs(rank))) / world.size).backward()
    wanted = {name: p.grad for name, p in module.named_parameters()}
    for zero in STAGES:
        engine = initialize(Two(), **staged(zero))
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(cost(*engine(*inputs(world.rank))), scale_wrt_gas=False)
        grads = {name: deepspeed.utils.safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
        found[zero] = distance(grads, wanted)
        engine.step()
    return found


@fact
def without_managed_accumulation_stage_0_reduces_gradients_in_the_step_only(world: World) -> Any:
    """Distances from plain training: of the gradient before the step, and of the weights after it."""
    engine, module = initialize(Two(), managed_gradient_accumulation=False, **staged(0)), Two()
    engine.backward(cost(*engine(*inputs(world.rank))), scale_wrt_gas=False)
    for rank in range(world.size):
        (cost(*module(*inputs(rank))) / world.size).backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    before_step = distance({name: p.grad for name, p in engine.module.named_parameters()}, expected)
    engine.step()
    return [before_step, distance(weights(engine), plain(world)[0])]


@fact
def optimizer_state_cannot_be_set_before_the_first_step(world: World) -> Any:
    """Whether setting it fails on any rank."""
    found = {}
    for zero in (1, 2, 3):
        module = Two()
        engine = initialize(module, torch.optim.AdamW(module.parameters()), **staged(zero))
        parameter, value = engine.module.image.weight, torch.zeros(3, 4)
        error = error_of(lambda p=parameter, v=value: deepspeed.utils.safe_set_full_optimizer_state(p, v, "exp_avg"))
        found[zero] = any(all_gather_object(error != ""))
    return found


@fact
def learning_rate_set_in_the_wrapper_is_used(world: World) -> Any:
    found = {}
    for zero in STAGES:
        engine = initialize(Two(), **staged(zero))
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.125
        step(engine, world)
        found[zero] = distance(weights(engine), plain(world, lr=0.125)[0])
    return found


@fact
def sgd_must_be_allowed_explicitly(world: World) -> Any:
    message = error_of(lambda: initialize(Two(), zero_allow_untested_optimizer=False, **staged(2)))
    return {"refused": "untested" in message.lower() or "ZeRO" in message, "message": message}


@fact
def bf16_casts_every_parameter_and_autocast_none(world: World) -> Any:
    cast = initialize(Two(), bf16={"enabled": True}, **staged(1))
    kept = initialize(Two(), torch_autocast={"enabled": True, "dtype": "bfloat16"}, **staged(1))
    out = kept(*inputs(world.rank))[0]
    return [sorted({str(p.dtype) for p in engine.module.parameters()}) for engine in (cast, kept)] + [str(out.dtype)]


@fact
def running_statistics_differ_between_ranks(world: World) -> Any:
    engine = initialize(Two(nn.BatchNorm1d(4)), **staged(1))
    image, text = inputs(world.rank)
    pair = engine.module.extra(image), text
    engine.backward(cost(*engine(*pair)))
    engine.step()
    first, second = all_gather_object(engine.module.extra.running_mean.tolist())
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@fact
def samples_are_undercounted_if_the_boundary_is_set_by_hand(world: World) -> Any:
    engine = initialize(Two(), **staged(1))
    for number in range(4):
        for part in (False, True):
            engine.set_gradient_accumulation_boundary(part)
            engine.backward(cost(*engine(*inputs(world.rank, number))), scale_wrt_gas=False)
        engine.step()
    return [engine.global_samples, 4 * 2 * 6 * world.size]


# Cached accumulation


def accumulated(world: World, zero: int, replay: Callable[[Any, Tensor, Tensor], list[Tensor]], steps: int) -> float:
    """Trains with two micro-batches per step, each in one or several calls; returns the distance from plain weights."""
    engine = initialize(Two(), **staged(zero))
    for number in range(steps):
        image, text = inputs(world.rank, number)
        for part in range(2):
            rows = slice(3 * part, 3 * part + 3)
            losses = replay(engine, image[rows], text[rows])
            for place, loss in enumerate(losses):
                engine.set_gradient_accumulation_boundary(part == 1 and place == len(losses) - 1)
                engine.backward(loss / 2, scale_wrt_gas=False)
        engine.step()
    return distance(weights(engine), plain(world, steps)[0])


def one_call(engine: Any, image: Tensor, text: Tensor) -> list[Tensor]:
    return [cost(*engine(image, text))]


def bypass(engine: Any, image: Tensor, text: Tensor) -> list[Tensor]:
    return [cost(*engine.module(image, text))]


@fact
def one_call_for_both_towers_is_exact(world: World) -> Any:
    return {zero: accumulated(world, zero, one_call, 3) for zero in STAGES}


@fact
def bypassing_the_engine_is_wrong_under_stage_3_only(world: World) -> Any:
    return {zero: accumulated(world, zero, bypass, 3) for zero in STAGES}


class Separate(Two):
    """Called for one tower at a time."""

    def forward(self, image: Tensor | None, text: Tensor | None) -> Tensor:
        return self.image(image) if image is not None else self.text(text)


@fact
def separate_calls_are_wrong_under_stage_3_from_the_second_step(world: World) -> Any:
    """With a separate cost per tower, so that only the calls differ: distance after one step and after three."""
    found: dict[str, list[float]] = {}
    for zero in (0, 2, 3):
        found[str(zero)] = []
        for steps in (1, 3):
            engine, module = initialize(Separate(), **staged(zero)), Separate()
            optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
            for number in range(steps):
                image, text = inputs(world.rank, number)
                for place, side in enumerate(((image, None), (None, text))):
                    engine.set_gradient_accumulation_boundary(place == 1)
                    engine.backward(engine(*side).square().mean(), scale_wrt_gas=False)
                engine.step()
                optimizer.zero_grad()
                for rank in range(world.size):
                    image, text = inputs(rank, number)
                    loss = module(image, None).square().mean() + module(None, text).square().mean()
                    (loss / world.size).backward()
                optimizer.step()
            found[str(zero)].append(distance(weights(engine), {n: p.detach() for n, p in module.named_parameters()}))
    return found


# Offload


@fact
def offloaded_optimizer_is_exact_and_its_state_is_read_by_name(world: World) -> Any:
    """AdamW's moments and master weights in host memory: weights, gradients, norm, and a resume from its state."""
    found = {}
    module = Two()
    reference = torch.optim.AdamW(module.parameters(), lr=0.05, eps=1e-6)
    seen: list[dict[str, Tensor]] = []
    for number in range(4):
        reference.zero_grad()
        for rank in range(world.size):
            (cost(*module(*inputs(rank, number))) / world.size).backward()
        wanted = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        reference.step()
        seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
    for zero in (1, 2, 3):
        settings = staged(zero)
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        states: list[dict[str, Tensor]] = []
        with tempfile.TemporaryDirectory() as folder:
            for first in (0, 2):  # two engines, the second of which resumes where the first ended
                towers = Two()
                if first:
                    towers.load_state_dict(seen[1])
                adamw = torch.optim.AdamW(towers.parameters(), lr=0.05, eps=1e-6)
                engine = initialize(towers, adamw, zero_force_ds_cpu_optimizer=False, **settings)
                assert engine.zero_use_cpu_optimizer(), zero
                names = {parameter: name for name, parameter in engine.module.named_parameters()}
                held = state_layout(engine.optimizer, zero, names, world.rank, world.size)
                if first:
                    files = [Path(place) for place in all_gather_object(str(Path(folder) / "state.safetensors"))]
                    read_state(engine.optimizer.optimizer, held, files, 2)
                for number in range(first, first + 2):
                    for part in range(2):
                        image, text = inputs(world.rank, number)
                        rows = slice(3 * part, 3 * part + 3)
                        engine.set_gradient_accumulation_boundary(part == 1)
                        engine.backward(cost(*engine(image[rows], text[rows])) / 2, scale_wrt_gas=False)
                    grads = {n: deepspeed.utils.safe_get_full_grad(p) for n, p in engine.module.named_parameters()}
                    engine.step()
                states.append(weights(engine))
                state = state_slices(engine.optimizer.optimizer.state, held, zero, world.rank, world.size)
                save_file(state, Path(folder) / "state.safetensors")
                all_gather_object(None)  # all are written
            all_gather_object(None)  # all are read
        norm = float(torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt())
        found[zero] = [
            *(distance(states[0], seen[1]), distance(states[1], seen[3]), distance(grads, wanted)),
            float(engine.get_global_grad_norm()) / norm - 1,
        ]
    return found


# Compile


@fact
def module_compiled_in_place_trains_and_keeps_its_names(world: World) -> Any:
    found = {}
    for zero in (0, 2, 3):
        module = Two()
        module.image.compile(backend="eager")
        engine = initialize(module, **staged(zero))
        step(engine, world)
        found[zero] = [distance(weights(engine), plain(world)[0]), sorted(weights(engine)) == sorted(plain(world)[0])]
    return found


@fact
def module_wrapped_by_compile_has_other_names_and_fails(world: World) -> Any:
    module = Two()
    module.image = torch.compile(module.image, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    names = [name for name, _ in module.named_parameters()]

    def work() -> None:
        engine = initialize(module, **staged(3))
        step(engine, world)

    return {"names": names, "error": error_of(work)}


def main(out: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            with process_group() as world:
                torch.set_num_threads(1)
                seen = {work.__name__: work(world) for work in FACTS}
                if world.is_rank0:
                    out.write_text(json.dumps(seen))
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
