"""Doctor's checks of model, loss, ranks and speed, each state to fail or warn, and its predictions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ping_ranks
import pytest
import torch
from doctor_checks import DATA, MODEL, context, run

from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.doctor import gradients, loss, model, network, speed
from clipwright.pipeline.doctor.base import CheckResult
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS
from clipwright.pipeline.train import engine
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS

pytestmark = pytest.mark.xdist_group("ranks")


def test_threads_memory_and_disk(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, tmp_path: Path) -> None:
    state = context(world, f"data.train={scenes}", "precision=fp32", "image.depth=2", "runtime.threads=1", out=tmp_path)
    assert run(state, *DATA, "tokenizer", "threads").status == "ok"
    monkeypatch.setattr(model, "usable_cores", lambda: 0)
    found = model.threads(state)
    assert found.status == "warn" and found.fix == "set runtime.threads=1"
    run(state, "towers")
    assert model.weights(state).status == model.checkpoints(state).status == "ok"
    monkeypatch.setattr(model, "free_memory", lambda: 10_000_000)
    found = model.weights(state)
    assert found.status == "FAIL" and "GiB" in found.need and "runtime.zero=3" in found.fix
    monkeypatch.setattr(model, "free_disk", lambda state: 10_000_000)
    found = model.checkpoints(state)
    assert found.status == "FAIL" and "2 newest + 1 being written" in found.need and "-o" in found.fix
    assert "lower runtime.keep" in found.fix


def test_memory_per_rank_under_each_zero_stage(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World) -> None:
    """The fix names the first ZeRO stage whose state fits."""
    state = context(world, f"data.train={scenes}", "precision=fp32", "image.depth=2", "runtime.threads=1")
    run(state, *DATA, "tokenizer", "towers")
    count = state.predicted["parameters"]["all"]
    state.world = dataclasses.replace(world, size=4, local_size=2)
    # Bytes per parameter: 16 under ZeRO 0 (weight, gradient, two moments); with 4 ranks 11, 8, 5 under ZeRO 1, 2, 3.
    for free, fix in ((32, ""), (31, "runtime.zero=1"), (21, "runtime.zero=2"), (15, "runtime.zero=3"), (9, "smaller")):
        monkeypatch.setattr(model, "free_device_memory", lambda state, free=free: free * count)
        found = model.weights(state)
        assert found.status == ("FAIL" if fix else "ok") and fix in found.fix, (free, found)
        assert "under ZeRO 0; local ranks: 2" in found.need
    assert state.predicted["state_bytes"] == 16 * count
    # With offload a GPU keeps weight and gradient; the moments and master weights of both ranks go to host memory.
    overrides = ["runtime.zero=1", "runtime.offload=optimizer", "precision=fp32", "image.depth=2", "runtime.threads=1"]
    state = context(world, f"data.train={scenes}", *overrides)
    run(state, *DATA, "tokenizer", "towers")
    state.world = dataclasses.replace(world, size=4, local_size=2, device=torch.device("cuda"))
    for device_bytes, host_bytes, fix in ((8, 6, ""), (7, 6, "runtime.zero=2"), (8, 5, "runtime.offload=none")):
        monkeypatch.setattr(model, "free_device_memory", lambda state, free=device_bytes: free * count)
        monkeypatch.setattr(model, "free_memory", lambda free=host_bytes: free * count)
        found = model.weights(state)
        assert found.status == ("FAIL" if fix else "ok") and fix in found.fix, (device_bytes, host_bytes, found)
    assert state.predicted["state_bytes"] == 8 * count


def test_disk_for_permanent_checkpoints(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, tmp_path: Path
) -> None:
    overrides = ["runtime.keep=3", "runtime.keep_every=10", "runtime.keep_best=loss", "schedule.samples=1600"]
    state = context(
        world, f"data.train={scenes}", "precision=fp32", "schedule.global_batch=16", *overrides, out=tmp_path
    )
    run(state, *DATA, "tokenizer", "towers")
    found = model.checkpoints(state)
    size = state.predicted["checkpoint_bytes"]
    assert found.status == "ok" and "3 newest + 10 permanent + 1 best + 1 being written" in found.need
    monkeypatch.setattr(model, "free_disk", lambda state: 15 * size)
    assert model.checkpoints(state).status == "ok"
    monkeypatch.setattr(model, "free_disk", lambda state: 15 * size - 1)
    found = model.checkpoints(state)
    assert found.status == "FAIL" and "raise runtime.keep_every=10" in found.fix


@pytest.mark.parametrize(
    ("overrides", "piece"), [(["image.image_size=33"], "33"), (["image.projection=none"], "embed_dim")]
)
def test_incompatible_sizes_fail(overrides: list[str], piece: str, scenes: Path, world: World) -> None:
    state = context(world, f"data.train={scenes}", "precision=fp32", "image.name=vit_nano", *overrides)
    found = run(state, *DATA, "tokenizer", "towers")
    assert found.status == "FAIL" and "E_CONFIG_VALUE" in found.found and piece in found.found


def test_step_fails_without_memory_or_finite_numbers(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any
) -> None:
    state = context(world, f"data.train={scenes}", *small.settings)
    assert run(state, *MODEL, "step").status == "ok"
    assert all(p.grad is None for p in state.components.towers.parameters())
    monkeypatch.setattr(model, "forward_backward", lambda state, few: (math.nan, 1.0))
    found = model.step(state)
    assert found.status == "FAIL" and "nan" in found.found and "precision=fp32" in found.fix
    monkeypatch.undo()
    monkeypatch.setattr(model, "free_device_memory", lambda state: -1)
    found = model.step(state)
    assert found.status == "FAIL" and "global_batch" in found.fix


def test_prediction_from_measured_steps(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any
) -> None:
    """Uses given times: steps of four seconds, of which each waits one second for data."""
    state = context(world, f"data.train={scenes}", *small.settings, "schedule.samples=1600")
    assert run(state, *MODEL, "step").status == "ok"
    towers = iter([1.0, 0.5])
    monkeypatch.setattr(speed, "tower_seconds", lambda state, encode, parts: next(towers) * parts)
    times = speed.StepTimes(steps=[4.0, 5.0, 3.0], waits=[1.0, 1.0, 1.0], cpu_seconds=24.0)
    monkeypatch.setattr(speed, "measure_steps", lambda state: times)
    found = speed.speed(state)
    assert found.status == "ok" and "4 samples/s, 1,600 samples in 6m40s, 3 steps measured" in found.found, found
    shares = {"data": 0.25, "image tower": 0.25, "text tower": 0.125, "loss and optimizer": 0.375}
    expected = {"samples_per_s": 4, "cpu_s_per_sample": 0.5, "data_share": 0.25, "seconds": 400, "measured_steps": 3}
    assert state.predicted["shares"] == shares and state.predicted.items() >= expected.items()


def test_loss_time_is_predicted_from_two_sizes(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """The quadratic and the linear part of the cost are separated."""
    monkeypatch.setattr(loss, "measure_seconds", lambda state, built, rows: 3e-7 * rows**2 + 5e-5 * rows)
    state = context(world)
    built = loss.LOSSES.build(loss.LOSSES.preset("softmax"), embed_dim=8)
    for images, ranks in ((64, 1), (512, 1), (8192, 1), (65_536, 8)):
        want = 3e-7 * images**2 * ranks + 5e-5 * images
        assert loss.predict_seconds(state, built, images, ranks) == pytest.approx(want)


def test_warns_of_waiting_for_data_and_little_memory(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    state = context(world)
    state.predicted = {"shares": {"data": 0.4, "image tower": 0.5, "text tower": 0.1}, "memory_gb": 1.0}
    found = speed.bottleneck(state)
    assert found.status == "warn" and "runtime.workers" in found.fix and found.found.startswith("image tower 50%")
    assert state.predicted["bottleneck"] == "image tower"
    state.predicted["shares"]["data"] = 0.1
    assert speed.bottleneck(state).status == "ok"
    monkeypatch.setattr(speed, "free_device_memory", lambda state: 2**20)
    found = speed.memory(state)
    assert found.status == "warn" and "global_batch" in found.fix
    monkeypatch.setattr(speed, "free_device_memory", lambda state: 2**32)
    assert speed.memory(state).status == "ok"


def test_gradient_check_passes_and_detects_a_factor(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    overrides = ["runtime.micro_batch=8", "image.name=clip_rn_nano", "optim.grad_clip_norm=0.1", "precision=fp32"]
    state = context(world, *overrides, "runtime.activation_checkpointing.image=all")
    state.without_data = True
    found = run(state, "config", "gradients")
    assert found.status == "ok", found
    assert 0 < state.predicted["gradient_check"]["gradient"] <= gradients.LIMIT
    # A factor on the gradient of the logit scale, which AdamW hides in the parameter.
    monkeypatch.setattr(engine, "all_reduce_sum", lambda tensor: tensor.mul_(2 if tensor.shape == (1,) else 1))
    found = run(state, "gradients")
    assert found.status == "FAIL" and "gradient" in found.found and "runtime.zero=0" in found.fix


def test_every_tower_builds_when_shallow() -> None:
    for registry in (IMAGE_TOWERS, TEXT_TOWERS):
        for name in registry.entries:
            if name == "huggingface":
                continue
            sizes = {"vocab_size": 64, "eot_id": 63} if registry is TEXT_TOWERS else {}
            with torch.device("meta"):
                registry.build(gradients.shallow(registry.preset(name)), **sizes)


def test_a_nan_difference_fails() -> None:
    assert math.isnan(gradients._max(0.0, math.nan)) and math.isnan(gradients._max(math.nan, 1.0))
    assert gradients._max(1.0, 2.0) == 2.0


def test_cost_of_the_loss(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    state = context(world, "schedule.global_batch=256", "embed_dim=32", "precision=fp32")
    state.without_data = True
    found = run(state, "config", "threads", "loss fit", "loss")
    assert found.status == "ok" and "256 images × 256 texts" in found.found
    # With several ranks the texts of the other ranks are held too.
    assert 0 < state.predicted["loss_seconds"] < 1
    vectors = 4 * 4096 * state.config.embed_dim
    sizes = [loss.loss_bytes(state.config, 4096, ranks, (1, 1)) / vectors for ranks in (1, 4)]
    assert 2 < sizes[0] < 3.1 + 1 < sizes[1]
    wrong = context(world, "schedule.global_batch=256", "embed_dim=32", "data.negatives=wrong", "data.negative_count=2")
    wrong.without_data = True
    assert "256 images × 768 texts" in run(wrong, "config", "threads", "loss fit", "loss").found
    more = loss.loss_bytes(wrong.config, 4096, 1, (1, 1)) / vectors
    assert more > sizes[0] + 2
    monkeypatch.setattr(loss, "free_device_memory", lambda state: 2**20)
    found = loss.loss(state)
    assert found.status == "FAIL" and "runtime.exchange=ring" in found.fix


def test_loss_with_unsupported_parameters_fails(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    overrides = ["embed_dim=32", "precision=fp32", "schedule.global_batch=16"]

    def fitted(*more: str) -> CheckResult:
        state = context(world, *overrides, *more)
        state.without_data = True
        return run(state, "config", "loss fit")

    found = fitted("loss.name=sigmoid")
    assert found.status == "ok" and "embed_dim 32, parameters: logit_scale, bias" in found.found
    found = fitted("loss.matryoshka.dims=[16, 64]")
    assert found.status == "FAIL" and "E_CONFIG_VALUE" in found.found and "use dims up to 32" in found.fix
    real = loss.LOSSES.build

    def spoiled(change: Any) -> Any:
        def build(*given: Any, **more: Any) -> Any:
            module = real(*given, **more)
            change(module)
            return module

        return build

    for change, piece in (
        (
            lambda module: setattr(module, "odd", torch.nn.Parameter(torch.tensor(1.0))),
            "odd is torch.float32 ()",
        ),
        (lambda module: module.half(), "logit_scale is torch.float16 (1,)"),
        (
            lambda module: setattr(module, "spare", torch.nn.Parameter(torch.ones(1))),
            "spare is not used",
        ),
        (lambda module: module.logit_scale.data.fill_(math.nan), "the loss of 4 random pairs is nan"),
    ):
        monkeypatch.setattr(loss.LOSSES, "build", spoiled(change))
        found = fitted()
        assert found.status == "FAIL" and piece in found.found and "plugin" in found.fix, found


def test_silent_rank_is_named(tmp_path: Path, script: Any) -> None:
    script(ping_ranks, tmp_path, timeout=1200)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["trips"] == seen[1]["trips"] and len(seen[0]["trips"]) == 2 and seen[0]["rate"] > 1e6
    assert all(0 < seconds < 1 for seconds in seen[0]["trips"])
    reported = seen[0]["reported"]
    assert (
        reported["status"] == "FAIL" and reported["found"] == "no answer from rank 2 of 3 (on node 1, counted from 0)"
    )
    assert max(one["seconds"] for one in seen) < 600 and "firewall" in reported["fix"]


def test_no_collective_after_a_silent_rank(tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table and error are printed without another collective."""
    from clipwright.pipeline.doctor import run as examined

    monkeypatch.setattr(
        examined, "find_silent_ranks", lambda world: CheckResult("FAIL", "no answer from rank 3 of 4", "", "look there")
    )
    monkeypatch.setattr(examined, "all_gather_object", lambda outcome: pytest.fail("a collective"))
    done = here(tmp_path, "doctor", code=1)
    assert done.error.startswith("error[E_DOCTOR]") and "ping: no answer from rank 3 of 4 — look there" in done.error
    assert "no answer" in done.out


def test_warns_of_a_slow_rank(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    state = context(world)
    assert network.ping(state).found == "one process"
    state.world = dataclasses.replace(world, size=4)
    monkeypatch.setattr(network, "all_reduce_rate", lambda world: 2.5e9)
    monkeypatch.setattr(network, "round_trips", lambda world: [1e-4, 2e-2, 1e-4])
    found = network.ping(state)
    assert found.status == "warn" and "round trip 0.1 ms, at most 20 ms (rank 2)" in found.found
    assert "2.5 GB/s" in found.found and "rank 2's machine" in found.fix
    monkeypatch.setattr(network, "round_trips", lambda world: [1e-4, 2e-4, 1e-4])
    assert network.ping(state).status == "ok" and state.predicted["ping"]["seconds"] == [
        1e-4,
        2e-4,
        1e-4,
    ]


def test_failing_steps_become_a_result(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any) -> None:
    state = context(world, f"data.train={scenes}", *small.settings)

    def broken(*overrides: object) -> None:
        raise RuntimeError("out of memory")

    run(state, *MODEL, "shards", "step")
    monkeypatch.setattr(speed, "measure_steps", broken)
    found = run(state, "speed")
    assert found.status == "FAIL" and "out of memory" in found.found
    assert run(state, "bottleneck").status == "skip"


def test_speed_of_a_frozen_tower_without_projection(scenes: Path, world: World, small: Any) -> None:
    frozen = ["embed_dim=128", "image.projection=none", "techniques=[{name: freeze, image: all}]"]
    state = context(world, f"data.train={scenes}", *small.settings, *frozen)
    found = run(state, *MODEL, "shards", "step", "speed")
    assert found.status == "ok", found


@pytest.mark.parametrize(
    ("name", "zero", "each"), [("adamw", 0, 12), ("adamw", 2, 12), ("adamw", 3, 12), ("sgd", 0, 4)]
)
def test_bytes_per_parameter(name: Any, zero: int, each: int) -> None:
    optim = OPTIMIZERS.preset(name)
    assert model.checkpoint_bytes(optim) == each
    assert model.state_bytes(optim, zero, 1) == (16 if name == "adamw" and zero == 0 else 20 if zero else 8)
