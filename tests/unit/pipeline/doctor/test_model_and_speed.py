"""Doctor's checks of model, loss, ranks and speed, each made to fail or to warn; what it predicts."""

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
from clipwright.pipeline.doctor.base import Found
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS
from clipwright.pipeline.train import engine
from clipwright.pipeline.train.config import RunConfig

pytestmark = pytest.mark.xdist_group("ranks")


def test_threads_memory_and_disk(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, tmp_path: Path) -> None:
    made = context(world, f"data.train={scenes}", "precision=fp32", "image.depth=2", "runtime.threads=1", out=tmp_path)
    assert run(made, *DATA, "tokenizer", "threads").status == "ok"
    monkeypatch.setattr(model, "usable_cores", lambda: 0)
    found = model.threads(made)
    assert found.status == "warn" and found.fix == "set runtime.threads=1"
    run(made, "towers")
    assert model.weights(made).status == model.checkpoints(made).status == "ok"
    monkeypatch.setattr(model, "free_memory", lambda: 10_000_000)
    found = model.weights(made)
    assert found.status == "FAIL" and "GiB" in found.need and "runtime.zero=3" in found.fix
    monkeypatch.setattr(model, "free_disk", lambda made: 10_000_000)
    found = model.checkpoints(made)
    assert found.status == "FAIL" and "2 newest + 1 being written" in found.need and "-o" in found.fix
    assert "lower runtime.keep" in found.fix


def test_memory_of_a_rank_under_each_stage(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World) -> None:
    """What one stage has no room for another may have: it is named."""
    made = context(world, f"data.train={scenes}", "precision=fp32", "image.depth=2", "runtime.threads=1")
    run(made, *DATA, "tokenizer", "towers")
    count = made.predicted["parameters"]["all"]
    made.world = dataclasses.replace(world, size=4, local_size=2)
    # A parameter takes 16 bytes under ZeRO 0 (weight, gradient, two moments), of 4 ranks 11, 8 and 5 under 1, 2 and 3.
    for free, fix in ((32, ""), (31, "runtime.zero=1"), (21, "runtime.zero=2"), (15, "runtime.zero=3"), (9, "smaller")):
        monkeypatch.setattr(model, "free_on", lambda made, free=free: free * count)
        found = model.weights(made)
        assert found.status == ("FAIL" if fix else "ok") and fix in found.fix, (free, found)
        assert "under ZeRO 0; ranks here: 2" in found.need
    assert made.predicted["state_bytes"] == 16 * count
    # Offloaded from a GPU, the device keeps weight and gradient; both ranks' moments and master weights go to the host.
    words = ["runtime.zero=1", "runtime.offload=optimizer", "precision=fp32", "image.depth=2", "runtime.threads=1"]
    made = context(world, f"data.train={scenes}", *words)
    run(made, *DATA, "tokenizer", "towers")
    made.world = dataclasses.replace(world, size=4, local_size=2, device=torch.device("cuda"))
    for device_bytes, host_bytes, fix in ((8, 6, ""), (7, 6, "runtime.zero=2"), (8, 5, "runtime.offload=none")):
        monkeypatch.setattr(model, "free_on", lambda made, free=device_bytes: free * count)
        monkeypatch.setattr(model, "free_memory", lambda free=host_bytes: free * count)
        found = model.weights(made)
        assert found.status == ("FAIL" if fix else "ok") and fix in found.fix, (device_bytes, host_bytes, found)
    assert made.predicted["state_bytes"] == 8 * count


def test_disk_for_checkpoints_that_are_kept_for_good(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, tmp_path: Path
) -> None:
    words = ["runtime.keep=3", "runtime.keep_every=10", "runtime.keep_best=loss", "schedule.samples=1600"]
    made = context(world, f"data.train={scenes}", "precision=fp32", "schedule.global_batch=16", *words, out=tmp_path)
    run(made, *DATA, "tokenizer", "towers")
    found = model.checkpoints(made)
    size = made.predicted["checkpoint_bytes"]
    assert found.status == "ok" and "3 newest + 10 kept for good + 1 best + 1 being written" in found.need
    monkeypatch.setattr(model, "free_disk", lambda made: 15 * size)
    assert model.checkpoints(made).status == "ok"
    monkeypatch.setattr(model, "free_disk", lambda made: 15 * size - 1)
    found = model.checkpoints(made)
    assert found.status == "FAIL" and "raise runtime.keep_every=10" in found.fix


@pytest.mark.parametrize(
    ("words", "piece"), [(["image.image_size=33"], "33"), (["image.projection=none"], "embed_dim")]
)
def test_sizes_that_do_not_go_together(words: list[str], piece: str, scenes: Path, world: World) -> None:
    made = context(world, f"data.train={scenes}", "precision=fp32", "image.name=vit_nano", *words)
    found = run(made, *DATA, "tokenizer", "towers")
    assert found.status == "FAIL" and "E_CONFIG_VALUE" in found.found and piece in found.found


def test_a_step_without_memory_or_finite_numbers(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any
) -> None:
    made = context(world, f"data.train={scenes}", *small.settings)
    assert run(made, *MODEL, "step").status == "ok"
    assert all(p.grad is None for p in made.parts.towers.parameters())
    monkeypatch.setattr(model, "forward_backward", lambda made, few: (math.nan, 1.0))
    found = model.step(made)
    assert found.status == "FAIL" and "nan" in found.found and "precision=fp32" in found.fix
    monkeypatch.undo()
    monkeypatch.setattr(model, "free_on", lambda made: -1)
    found = model.step(made)
    assert found.status == "FAIL" and "global_batch" in found.fix


def test_what_was_timed_becomes_a_prediction(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any
) -> None:
    """On a clock of our own: four seconds of work in steps of which each waits one second for data."""
    made = context(world, f"data.train={scenes}", *small.settings, "schedule.samples=1600")
    assert run(made, *MODEL, "step").status == "ok"
    towers = iter([1.0, 0.5])
    monkeypatch.setattr(speed, "tower_seconds", lambda made, encode, parts: next(towers) * parts)
    times = speed.Times(steps=[4.0, 5.0, 3.0], waits=[1.0, 1.0, 1.0], processor=24.0)
    monkeypatch.setattr(speed, "measure", lambda made: times)
    found = speed.speed(made)
    assert found.status == "ok" and "4 samples/s, 1,600 in 6m40s, 3 steps timed" in found.found, found
    shares = {"data": 0.25, "image tower": 0.25, "text tower": 0.125, "loss and optimiser": 0.375}
    told = {"samples_per_s": 4, "processor_s_per_sample": 0.5, "data_share": 0.25, "seconds": 400, "measured_steps": 3}
    assert made.predicted["shares"] == shares and made.predicted.items() >= told.items()


def test_a_loss_is_predicted_from_two_sizes(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """What grows with the square of the batch and what grows with the batch are told apart."""
    monkeypatch.setattr(loss, "timed", lambda made, built, rows: 3e-7 * rows**2 + 5e-5 * rows)
    made = context(world)
    built = loss.LOSSES.build(loss.LOSSES.preset("softmax"), embed_dim=8)
    for images, ranks in ((64, 1), (512, 1), (8192, 1), (65_536, 8)):
        want = 3e-7 * images**2 * ranks + 5e-5 * images
        assert loss.predicted(made, built, images, ranks) == pytest.approx(want)


def test_waiting_for_data_and_a_tight_machine_are_warned_of(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    made = context(world)
    made.predicted = {"shares": {"data": 0.4, "image tower": 0.5, "text tower": 0.1}, "memory_gb": 1.0}
    found = speed.bottleneck(made)
    assert found.status == "warn" and "runtime.workers" in found.fix and found.found.startswith("image tower 50%")
    assert made.predicted["bottleneck"] == "image tower"
    made.predicted["shares"]["data"] = 0.1
    assert speed.bottleneck(made).status == "ok"
    monkeypatch.setattr(speed, "free_on", lambda made: 2**20)
    found = speed.memory(made)
    assert found.status == "warn" and "global_batch" in found.fix
    monkeypatch.setattr(speed, "free_on", lambda made: 2**32)
    assert speed.memory(made).status == "ok"


def test_gradients_equal_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    words = ["runtime.micro_batch=8", "image.name=clip_rn_nano", "optim.grad_clip_norm=0.1", "precision=fp32"]
    made = context(world, *words, "runtime.activation_checkpointing.image=all")
    made.without_data = True
    found = run(made, "config", "gradients")
    assert found.status == "ok", found
    assert 0 < made.predicted["gradient_check"]["gradient"] <= gradients.LIMIT
    # A factor on the scale's gradient, which AdamW makes invisible in the parameter.
    monkeypatch.setattr(engine, "all_reduce_sum", lambda tensor: tensor.mul_(2 if tensor.shape == (1,) else 1))
    found = run(made, "gradients")
    assert found.status == "FAIL" and "gradient" in found.found and "runtime.zero=0" in found.fix


def test_every_tower_has_a_shallow_form() -> None:
    for registry in (IMAGE_TOWERS, TEXT_TOWERS):
        for name in registry.entries:
            if name == "huggingface":
                continue
            sizes = {"vocab_size": 64, "eot_id": 63} if registry is TEXT_TOWERS else {}
            with torch.device("meta"):
                registry.build(gradients.shallow(registry.preset(name)), **sizes)


def test_what_the_loss_will_cost(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    made = context(world, "schedule.global_batch=256", "embed_dim=32", "precision=fp32")
    made.without_data = True
    found = run(made, "config", "threads", "loss fit", "loss")
    assert found.status == "ok" and "256 images × 256 texts" in found.found
    # Four times the work, and from the second rank on the texts of the others.
    assert 0 < made.predicted["loss_seconds"] < 1
    vectors = 4 * 4096 * made.config.embed_dim
    sizes = [loss.loss_bytes(made.config, 4096, ranks, (1, 1)) / vectors for ranks in (1, 4)]
    assert 2 < sizes[0] < 3.1 + 1 < sizes[1]
    wrong = context(world, "schedule.global_batch=256", "embed_dim=32", "data.negatives=wrong", "data.negative_count=2")
    wrong.without_data = True
    assert "256 images × 768 texts" in run(wrong, "config", "threads", "loss fit", "loss").found
    more = loss.loss_bytes(wrong.config, 4096, 1, (1, 1)) / vectors
    assert more > sizes[0] + 2
    monkeypatch.setattr(loss, "free_on", lambda made: 2**20)
    found = loss.loss(made)
    assert found.status == "FAIL" and "runtime.exchange=ring" in found.fix


def test_a_loss_that_does_not_fit_the_model(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    words = ["embed_dim=32", "precision=fp32", "schedule.global_batch=16"]

    def fitted(*more: str) -> Found:
        made = context(world, *words, *more)
        made.without_data = True
        return run(made, "config", "loss fit")

    found = fitted("loss.name=sigmoid")
    assert found.status == "ok" and "vectors of 32 numbers, own parameters: logit_scale, bias" in found.found
    found = fitted("loss.matryoshka.dims=[16, 64]")
    assert found.status == "FAIL" and "E_CONFIG_VALUE" in found.found and "take dims up to 32" in found.fix
    real = loss.LOSSES.build

    def spoiled(change: Any) -> Any:
        def build(*given: Any, **more: Any) -> Any:
            made = real(*given, **more)
            change(made)
            return made

        return build

    for change, words_of_it in (
        (lambda made: setattr(made, "odd", torch.nn.Parameter(torch.tensor(1.0))), "odd is torch.float32 ()"),
        (lambda made: made.half(), "logit_scale is torch.float16 (1,)"),
        (lambda made: setattr(made, "spare", torch.nn.Parameter(torch.ones(1))), "spare has no part in it"),
        (lambda made: made.logit_scale.data.fill_(math.nan), "it is nan for 4 random pairs"),
    ):
        monkeypatch.setattr(loss.LOSSES, "build", spoiled(change))
        found = fitted()
        assert found.status == "FAIL" and words_of_it in found.found and "plugin" in found.fix, found


def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, script: Any) -> None:
    script(ping_ranks, tmp_path, timeout=120)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["trips"] == seen[1]["trips"] and len(seen[0]["trips"]) == 2 and seen[0]["rate"] > 1e6
    assert all(0 < seconds < 1 for seconds in seen[0]["trips"])
    said = seen[0]["said"]
    assert said["status"] == "FAIL" and said["found"] == "no answer from rank 2 of 3 (on node 1, counted from 0)"
    assert max(one["seconds"] for one in seen) < 20 * ping_ranks.SECONDS and "firewall" in said["fix"]


def test_nobody_is_waited_for_once_a_rank_is_silent(tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, and the error, though no rank can be asked for its outcome any more."""
    from clipwright.pipeline.doctor import run as examined

    monkeypatch.setattr(examined, "silent", lambda world: Found("FAIL", "no answer from rank 3 of 4", "", "look there"))
    monkeypatch.setattr(examined, "all_gather_object", lambda outcome: pytest.fail("an exchange"))
    done = here(tmp_path, "doctor", code=1)
    assert done.error.startswith("error[E_DOCTOR]") and "ping: no answer from rank 3 of 4 — look there" in done.error
    assert "no answer" in done.out


def test_a_rank_far_away_is_warned_of(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    made = context(world)
    assert network.ping(made).found == "one process"
    made.world = dataclasses.replace(world, size=4)
    monkeypatch.setattr(network, "sum_rate", lambda world: 2.5e9)
    monkeypatch.setattr(network, "round_trips", lambda world: [1e-4, 2e-2, 1e-4])
    found = network.ping(made)
    assert found.status == "warn" and "0.1 ms there and back, at most 20 ms (rank 2)" in found.found
    assert "2.5 GB/s" in found.found and "rank 2's machine" in found.fix
    monkeypatch.setattr(network, "round_trips", lambda world: [1e-4, 2e-4, 1e-4])
    assert network.ping(made).status == "ok" and made.predicted["ping"]["seconds"] == [1e-4, 2e-4, 1e-4]


def test_steps_that_fail_are_a_row(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any) -> None:
    made = context(world, f"data.train={scenes}", *small.settings)

    def broken(*words: object) -> None:
        raise RuntimeError("out of memory")

    run(made, *MODEL, "shards", "step")
    monkeypatch.setattr(speed, "measure", broken)
    found = run(made, "speed")
    assert found.status == "FAIL" and "out of memory" in found.found
    assert run(made, "bottleneck").status == "skip"


@pytest.mark.parametrize(
    ("name", "zero", "each"), [("adamw", 0, 12), ("adamw", 2, 12), ("adamw", 3, 12), ("sgd", 0, 4)]
)
def test_bytes_a_parameter(name: Any, zero: int, each: int) -> None:
    optim = dataclasses.replace(RunConfig.__dataclass_fields__["optim"].default, name=name)
    assert model.checkpoint_bytes(optim) == each
    assert model.state_bytes(optim, zero, 1) == (16 if name == "adamw" and zero == 0 else 20 if zero else 8)
