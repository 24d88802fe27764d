"""Techniques: freezing, a plugin with state, and warm start at another image size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.techniques.base import TECHNIQUES, build_techniques
from clipwright.pipeline.train.techniques.freeze import frozen_parameters
from clipwright.pipeline.train.warm_start import read, resize

pytestmark = pytest.mark.xdist_group("ranks")

# The smallest preset of each family, with two blocks or more.
NANO_TOWERS = sorted(name for name in IMAGE_TOWERS.entries if name.endswith("_nano"))
STEPS = ["schedule.samples=96", "schedule.warmup=0", "optim.lr=0.01"]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def two_towers(small: Any, **image: Any) -> TwoTower:
    config = resolve(RunConfig, overrides=[*small.settings, "data.train=none"]).value
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, **image))
    torch.manual_seed(0)
    return TwoTower(config, vocab_size=64, eot_id=63)


# Freezing


@pytest.mark.parametrize("ranks_and_zero", [(0, 0), (2, 1), (2, 3)], ids=str)
def test_frozen_tower_does_not_train(ranks_and_zero: tuple[int, int], scenes: Path, tmp_path: Path, small: Any) -> None:
    ranks, zero = ranks_and_zero
    args = [f"data.train={scenes}", *STEPS, "techniques=[{name: freeze, image: all, text: 1}]", f"runtime.zero={zero}"]
    args += ["runtime.micro_batch=4", "runtime.save_every=1", "runtime.keep=9", "-o", "run"]
    printed = small(tmp_path, *args, "runtime.stop_at=2", ranks=ranks).stdout
    assert "(0 trainable)" in printed
    assert "resuming at step 2" in small(tmp_path, *args, ranks=ranks).stdout
    first, last = weights(tmp_path / "run", 1), weights(tmp_path / "run", 6)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    frozen = {name for name in first if name.startswith(("image.", "text.blocks.0.", "text.token_embed"))}
    assert frozen and not changed & frozen
    assert {"image_projection.weight", "text_projection.weight", "text.blocks.1.attn.qkv.weight"} <= changed
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert identity["techniques"] == [{"name": "freeze", "image": "all", "text": 1}]


@pytest.mark.parametrize("name", [*NANO_TOWERS, "text_nano"])
def test_first_blocks_are_frozen_with_the_stem(name: str) -> None:
    if name in TEXT_TOWERS.entries:
        tower = TEXT_TOWERS.build(TEXT_TOWERS.preset(name), vocab_size=64, eot_id=63)
    else:
        tower = IMAGE_TOWERS.build(IMAGE_TOWERS.preset(name))
    blocks = tower.block_list()
    names = {id(parameter): key for key, parameter in tower.named_parameters()}
    frozen = {names[id(parameter)] for parameter in frozen_parameters(tower, 1, "here")}
    first, last = ({names[id(parameter)] for parameter in blocks[i].parameters()} for i in (0, -1))
    stem = next(iter(names.values()))
    assert first <= frozen and stem in frozen
    if len(blocks) > 1:
        assert not last & frozen
    assert len(frozen_parameters(tower, "all", "here")) == len(names) and not frozen_parameters(tower, "none", "here")
    with pytest.raises(ClipwrightError) as caught:
        frozen_parameters(tower, len(blocks) + 1, "techniques: freeze.image")
    assert f"the tower has {len(blocks)}" in str(caught.value) and f"use 1 to {len(blocks)}" in str(caught.value)


@pytest.mark.parametrize(
    ("techniques", "code", "pieces"),
    [
        ("[{name: freeze, image: 3}]", "E_CONFIG_VALUE", ["freeze.image: 3", "the tower has 2", "use 1 to 2"]),
        ("[{name: freeze, image: 0}]", "E_CONFIG_VALUE", ["techniques.0.image"]),
        ("[{name: freeze, imag: all}]", "E_CONFIG_KEY", ["techniques.0.imag", "did you mean 'techniques.0.image'?"]),
        ("[{name: freez}]", "E_CONFIG_CHOICE", ["freez", "did you mean 'freeze'?"]),
        ("[{name: freeze}, {name: freeze}]", "E_CONFIG_VALUE", ["listed twice", "freeze"]),
        ("freeze", "E_CONFIG_VALUE", ["techniques"]),
    ],
)
def test_wrong_techniques_are_refused(
    techniques: str, code: str, pieces: list[str], scenes: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    args = [*small.settings, f"data.train={scenes}", f"techniques={techniques}", "-o", "run"]
    line = here(tmp_path, "train", *args, code=2).error
    assert line.startswith(f"error[{code}]: "), line
    assert [piece for piece in pieces if piece not in line] == [], line
    assert not (tmp_path / "run").exists()


def test_freezing_everything_is_refused(small: Any) -> None:
    config = resolve(RunConfig, overrides=[*small.settings, "data.train=none", "embed_dim=128"]).value
    config = dataclasses.replace(
        config,
        image=dataclasses.replace(config.image, projection="none"),
        text=dataclasses.replace(config.text, projection="none", width=128),
    )
    towers = TwoTower(config, vocab_size=64, eot_id=63)
    with pytest.raises(ClipwrightError) as caught:
        build_techniques([TECHNIQUES.preset("freeze", image="all", text="all")]).prepare(towers)
    assert "every parameter of the model is frozen" in str(caught.value)


# A technique with state, as a plugin

MOVING_AVERAGE = """
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.train.techniques.base import TECHNIQUES, Technique, TechniqueConfig

@configclass
class AverageConfig(TechniqueConfig):
    decay: float = 0.5

class Average(Technique):
    def __init__(self, config):
        self.decay, self.average = config.decay, {}

    def initialize(self, towers, loss):
        self.average = {name: t.clone() for name, t in towers.state_dict().items() if t.is_floating_point()}

    def after_update(self, model, step):
        for name, tensor in model.weights().items():
            if tensor.is_floating_point():
                self.average[name] = tensor.lerp(self.average.get(name, tensor), self.decay)

    def state(self):
        return self.average

    def load_state(self, state):
        self.average = {name: state[name] for name in (state or ["image.norm.weight"])}

    def export(self, weights):
        return {name: self.average.get(name, tensor) for name, tensor in weights.items()}

TECHNIQUES.add(AverageConfig, Average, {"average": {}})
"""


def test_plugin_technique_is_checkpointed_restored_and_exported(
    scenes: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    (tmp_path / "average.py").write_text(MOVING_AVERAGE)
    args = [f"data.train={scenes}", *STEPS, "plugins=average.py", "techniques=[{name: average}]"]
    small(tmp_path, *args, "-o", "straight")
    small(tmp_path, *args, "runtime.stop_at=4", "-o", "run")
    small(tmp_path, *args, "-o", "run")
    file = Path("checkpoints") / "step-00000006" / "techniques.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    state = load_file(tmp_path / "run" / file)
    trained = weights(tmp_path / "run", 6)
    assert state.keys() == {f"average/{name}" for name, tensor in trained.items() if tensor.is_floating_point()}
    here(tmp_path, "export", "run", "-o", "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    name = "image.blocks.0.attn.qkv.weight"
    assert torch.equal(exported[name], state[f"average/{name}"]) and not torch.equal(exported[name], trained[name])
    # The average of a warm start begins with the weights of its source.
    small(tmp_path, *args, "init_from=run", "optim.lr=1e-9", "runtime.stop_at=1", "-o", "next")
    average = load_file(tmp_path / "next" / "checkpoints" / "step-00000001" / "techniques.safetensors")
    assert torch.allclose(average[f"average/{name}"], trained[name], atol=1e-6)
    # A checkpoint without the state that the technique needs.
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    manifest = {**found.manifest, "files": {}}
    techniques = build_techniques([TECHNIQUES.preset("average")])
    with pytest.raises(ClipwrightError) as caught:
        checkpoint.Checkpoint(found.folder, manifest).restore_techniques(techniques)
    assert caught.value.code == "E_CKPT_HASH" and "no tensor 'image.norm.weight'" in str(caught.value)


# Warm start


@pytest.mark.parametrize("name", ["vit_nano", "vit_rel_nano", "coatnet_nano"])
def test_init_from_another_image_size_resizes_positions(
    name: str, scenes: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    settings = [word for word in small.settings if not word.startswith("image.")]
    sizes = {"vit_nano": (32, 48), "vit_rel_nano": (32, 48), "coatnet_nano": (32, 64)}[name]
    args = [*settings, f"image.name={name}", f"data.train={scenes}", *STEPS, "runtime.stop_at=1"]
    train = small.cli(tmp_path)
    train("train", *args, f"image.image_size={sizes[0]}", "-o", "run")
    train("export", "run", "-o", "model")
    for source in ("run", "model"):
        train(
            "train", *args, f"image.image_size={sizes[1]}", "optim.lr=1e-9", f"init_from={source}", "-o", f"{source}2"
        )
        init, result = read(tmp_path / source), weights(tmp_path / f"{source}2", 1)
        assert init.image_size == sizes[0] and init.weights.keys() == result.keys()
        resized = {key for key, tensor in result.items() if tensor.shape != init.weights[key].shape}
        assert resized and all(key.endswith(("pos_embed", "relative_table")) for key in resized)
        kept = [
            key for key in result if key not in resized and not key.endswith(("running_mean", "running_var", "tracked"))
        ]
        assert all(torch.allclose(result[key], init.weights[key], atol=1e-6) for key in kept)


def test_resize_keeps_weights_of_the_same_size_and_of_another_architecture(small: Any) -> None:
    towers = two_towers(small)
    state = dict(towers.state_dict())
    assert resize(state, 32, towers) is state
    deeper = dict(two_towers(small, depth=3).state_dict())
    assert resize(deeper, 64, towers) is deeper
    larger = two_towers(small, image_size=64)
    resized = resize(state, 32, larger)
    larger.load_state_dict(resized)
    # Bicubic resizing keeps the mean of the positions.
    assert torch.allclose(larger.image.pos_embed.mean(0), state["image.pos_embed"].mean(0), atol=5e-3)
