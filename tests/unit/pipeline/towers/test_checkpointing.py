"""Activation checkpointing: equal results with less memory, alone, compiled and under DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers import checkpointing
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS
from clipwright.pipeline.towers.checkpointing import Blocks, checkpoint_activations
from clipwright.pipeline.train.config import ActivationCheckpointing, RunConfig, RuntimeConfig, assemble, prepare_towers

IMAGES, TEXTS = ([n for n in registry.entries if n.endswith("_nano")] for registry in (IMAGE_TOWERS, TEXT_TOWERS))


def build(name: str, blocks: Blocks = "none") -> Any:
    """Builds a tower in training mode, with drop path where it has it."""
    torch.manual_seed(0)
    registry, context = (IMAGE_TOWERS, {}) if name in IMAGES else (TEXT_TOWERS, {"vocab_size": 100, "eot_id": 99})
    config = registry.preset(name)
    if hasattr(config, "drop_path"):
        config = registry.preset(name, drop_path=0.5)
    tower = registry.build(config, **context)
    checkpoint_activations(tower, blocks, "blocks")
    return tower.train()


def step(tower: Any) -> tuple[dict[str, Tensor], int]:
    """Returns outputs, buffers and gradients of a training pass, and the bytes it saved for the backward pass.

    Parameters and input do not count.
    """
    if hasattr(tower, "image_size"):
        x = torch.randn(4, 3, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(1))
    else:
        x = torch.randint(0, 100, (4, tower.context), generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = tower(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *tower.parameters())}
    (out.pooled.square().sum() + out.tokens.sin().sum()).backward()
    left = {"pooled": out.pooled, "tokens": out.tokens, **dict(tower.named_buffers())}
    left |= {f"{key}.grad": p.grad for key, p in tower.named_parameters()}
    return left, sum(size for place, size in kept.items() if place not in own)


def differing(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> list[str]:
    assert expected.keys() == actual.keys()
    return [key for key in expected if not torch.equal(expected[key], actual[key])]


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_recomputed_blocks_are_bit_identical_and_save_memory(name):
    plain, recomputed = build(name), build(name, "all")
    assert len(plain.block_list()) == len(set(plain.block_list())) > 1
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    (expected, all_bytes), (actual, saved_bytes) = step(plain), step(recomputed)
    assert differing(expected, actual) == []
    assert saved_bytes < all_bytes / 2, (saved_bytes, all_bytes)


def test_only_selected_blocks_recompute():
    sizes = [step(build("vit_nano", blocks))[1] for blocks in ("none", (2,), (2, 0), (0, 2, 2), (0, 1, 2, 3), "all")]
    none, one, two, repeated, four, every = sizes
    assert none > one > two > four and two == repeated and four == every


def test_recomputation_needs_saved_random_state_and_frozen_statistics(monkeypatch):
    """Without saved random state gradients differ; without frozen statistics they are updated twice."""
    expected, _ = step(build("coatnet_nano"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "checkpoint", partial(checkpoint, preserve_rng_state=False))
        assert "stages.3.0.mlp.fc1.weight.grad" in differing(expected, step(build("coatnet_nano", "all"))[0])
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "frozen_running_statistics", nullcontext)
        moved = differing(expected, step(build("coatnet_nano", "all"))[0])
        assert {key.rsplit(".", 1)[1] for key in moved} == {"running_mean", "running_var", "num_batches_tracked"}


def test_nonexistent_block_is_rejected():
    towers = nn.Module()
    towers.image, towers.text = build("swin_nano"), build("text_nano")
    for side, blocks, count in (("image", (3, 10), 10), ("text", (-1,), 4)):
        runtime = RuntimeConfig(activation_checkpointing=ActivationCheckpointing(**{side: blocks}))
        with pytest.raises(ClipwrightError) as caught:
            prepare_towers(towers, runtime)  # pyright: ignore[reportArgumentType]
        error = caught.value
        assert (error.code, error.where) == ("E_CONFIG_VALUE", f"runtime.activation_checkpointing.{side}: {blocks[-1]}")
        assert f"the tower has {count} blocks," in error.found and f"0 to {count - 1}" in error.fix


def test_compiled_tower_recomputes(unchecked):
    """Batch norm, drop path and attention in one tower; the backend traces the backward pass but generates no code."""
    expected, _ = step(build("coatnet_nano"))
    tower = build("coatnet_nano", "all")
    tower.compile(fullgraph=True, backend="aot_eager")
    assert differing(expected, step(tower)[0]) == []
    torch.compiler.reset()


def test_compile_without_a_compiler_is_rejected_at_startup(monkeypatch):
    monkeypatch.setenv("CXX", "absent-g++")
    config = resolve(RunConfig, overrides=["data.train=nowhere", "runtime.compile=true"]).value
    world: Any = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(ClipwrightError) as caught:
        assemble(config, world, tokenizer=Any)  # pyright: ignore[reportArgumentType]
    error = caught.value
    assert (error.code, error.where) == ("E_CONFIG_VALUE", "runtime.compile: True")
    assert "absent-g++" in error.found and "leave out runtime.compile" in error.fix


ENGINES = """
import json, torch, deepspeed
from torch import nn
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.distributed.group import process_group
from clipwright.pipeline.train.engine import deepspeed_config
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.train.config import RunConfig, prepare_towers

compile = nn.Module.compile
nn.Module.compile = lambda module: compile(module, backend="aot_eager")
words = ["image.name=convnext_nano", "image.image_size=32", "image.depths=[1,1,1,1]", "image.drop_path=0.5"]
words += ["text.depth=2", "embed_dim=32", "schedule.global_batch=4", "precision=fp32", "data.train=nowhere"]
with process_group():
    for zero, blocks, compiled in ((0, "none", False), (0, "all", False), (3, "all", False), (3, "all", True)):
        runtime = [f"runtime.zero={zero}", f"runtime.compile={compiled}"]
        runtime += [f"runtime.activation_checkpointing.{side}={blocks}" for side in ("image", "text")]
        config = resolve(RunConfig, overrides=[*words, *runtime]).value
        torch.manual_seed(0)
        towers = TwoTower(config, vocab_size=100, eot_id=99)
        prepare_towers(towers, config.runtime)
        settings = deepspeed_config(config, 1)
        if zero == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or none is ever partitioned
        optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
        start = {"model": towers, "optimizer": optimizer, "config": settings, "dist_init_required": False}
        engine = deepspeed.initialize(**start)[0]
        losses = []
        for turn in range(3):
            torch.manual_seed(turn)
            views = torch.randint(0, 255, (4, 32, 32, 3), dtype=torch.uint8)
            image, text = engine(views, torch.randint(0, 100, (4, 8 + 8 * turn)))
            loss = -(image @ text.T).log_softmax(1).diag().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        print("LOSSES", json.dumps([zero, blocks, compiled, losses]), flush=True)
"""


def test_deepspeed_training_is_unchanged_by_recomputation_and_compile():
    """ZeRO 0 and 3 in one process; a block's own parameters (ConvNeXt's scale) are partitioned during recomputation."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", ENGINES], env=env, capture_output=True, text=True, check=False)
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("LOSSES")]
    assert len(rows) == 4, done.stderr[-3000:]
    reference = rows[0][3]
    assert reference[2] < reference[0]
    for zero, blocks, compiled, losses in rows:
        assert losses == pytest.approx(reference, rel=1e-6), (zero, blocks, compiled)
