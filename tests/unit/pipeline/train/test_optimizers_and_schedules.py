"""Every optimizer and schedule of the registries, and how configs choose them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS, build_optimizer
from clipwright.pipeline.train.schedules.base import SCHEDULES

BASE = {"data": {"train": "none"}}


def settings_of(name: str) -> list[dict[str, Any]]:
    return [{}, {"momentum": 0.9}] if name == "sgd" else [{}]


@pytest.mark.parametrize("name", OPTIMIZERS.entries)
def test_optimizer_updates_trainable_parameters_and_states_its_size(name: str) -> None:
    for settings in settings_of(name):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        module[1].weight.requires_grad_(False)
        config = OPTIMIZERS.preset(name, lr=0.1, weight_decay=0.5, **settings)
        optimizer = build_optimizer(module, config, {"0.bias", "1.bias"})
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay == {id(module[0].weight): 0.5, id(module[0].bias): 0.0, id(module[1].bias): 0.0}
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        module(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        changed = {key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])}
        assert changed == {"0.weight", "0.bias", "1.bias"}
        state = optimizer.state.get(module[0].weight, {})
        per_parameter = [value for key, value in state.items() if key != "step" and value is not None]
        assert sum(value.numel() for value in per_parameter) == config.state_size * module[0].weight.numel()
        assert not state or ("step" in state) == config.counts_updates


@pytest.mark.parametrize("name", SCHEDULES.entries)
def test_schedule_warms_up_linearly_and_stays_within_the_peak(name: str) -> None:
    schedule = SCHEDULES.preset(name, samples=1000, global_batch=10, warmup=100)
    factors = [schedule.factor(samples) for samples in range(0, 1000, 10)]
    assert schedule.steps == len(factors) == 100
    assert factors[:10] == [pytest.approx((10 * i + 10) / 110) for i in range(10)] and factors[10] == 1.0
    assert all(0 <= later <= earlier for earlier, later in itertools.pairwise(factors[10:]))
    without_warmup = SCHEDULES.preset(name, samples=1000, global_batch=10, warmup=0)
    assert without_warmup.factor(0) == 1.0


def test_factors_of_the_learning_rate() -> None:
    """At the start, within and at the end of warmup, in the middle of the decay and at its end."""
    cosine = SCHEDULES.preset("cosine", samples=1100, global_batch=20, warmup=100, final_lr_ratio=0.2)
    at = {samples: cosine.factor(samples) for samples in (0, 60, 80, 100, 350, 600, 1080, 1100, 1300)}
    assert at == {
        0: pytest.approx(20 / 120),
        60: pytest.approx(80 / 120),
        80: pytest.approx(100 / 120),
        100: 1.0,
        350: pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2),  # a quarter of the 1000 samples after warmup
        600: pytest.approx(0.6),
        1080: pytest.approx(0.2 + 0.8 * 0.00098664, rel=1e-5),
        1100: pytest.approx(0.2),
        1300: pytest.approx(0.2),
    }
    constant = SCHEDULES.preset("constant", samples=1100, global_batch=20, warmup=100)
    assert [constant.factor(samples) for samples in (0, 80, 100, 1100)] == [
        pytest.approx(1 / 6),
        pytest.approx(5 / 6),
        1,
        1,
    ]
    # The default warmup: a twentieth, at most 5,000 samples.
    default = SCHEDULES.preset("constant", samples=2000, global_batch=20)
    assert [default.factor(samples) for samples in (0, 80, 100)] == [pytest.approx(1 / 6), pytest.approx(5 / 6), 1]
    long = SCHEDULES.preset("constant", samples=10**6, global_batch=20)
    assert long.factor(4980) == pytest.approx(5000 / 5020) and long.factor(5000) == 1


def test_steps_are_complete_batches() -> None:
    steps = {
        samples: SCHEDULES.preset("cosine", samples=samples, global_batch=10).steps for samples in (10, 19, 20, 1009)
    }
    assert steps == {10: 1, 19: 1, 20: 2, 1009: 100}


def test_cosine_ends_at_its_final_ratio_and_constant_at_the_peak() -> None:
    cosine = SCHEDULES.preset("cosine", samples=1000, global_batch=10, warmup=0, final_lr_ratio=0.1)
    assert cosine.factor(500) == pytest.approx(0.55) and cosine.factor(1000) == cosine.factor(2000) == 0.1
    assert SCHEDULES.preset("constant", samples=1000, warmup=0).factor(1000) == 1.0


def test_shared_fields_survive_a_change_of_name_and_own_fields_do_not(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "data: {train: none}\n"
        "optim: {lr: 0.002, weight_decay: 0.05, betas: [0.5, 0.6]}\n"
        "schedule: {samples: 640, global_batch: 64, final_lr_ratio: 0.5}\n"
    )
    config = resolve(RunConfig, config=str(path), overrides=["optim.name=sgd", "schedule.name=constant"]).value
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("sgd", 0.002, 0.05)
    assert (config.schedule.name, config.schedule.steps) == ("constant", 10)
    config = resolve(RunConfig, config=str(path), overrides=["optim.name=adamw"]).value
    assert config.optim.betas == (0.5, 0.6)
    for override, key in (("optim.betas=[0.1,0.2]", "optim.betas"), ("optim.eps=1", "optim.eps")):
        with pytest.raises(ClipwrightError) as caught:
            resolve(RunConfig, config=str(path), overrides=["optim.name=sgd", override])
        assert caught.value.code == "E_CONFIG_KEY" and key in caught.value.where


def test_techniques_are_expanded_to_all_their_fields() -> None:
    overrides = ["techniques=[{name: freeze, image: all}]"]
    resolved = resolve(RunConfig, base=BASE, overrides=overrides)
    assert resolved.tree["techniques"] == [{"name": "freeze", "image": "all", "text": "none"}]
    assert "techniques: [{image: all, name: freeze, text: none}] # command line" in " ".join(resolved.show().split())
    assert resolve(RunConfig, base=BASE).tree["techniques"] == ()
