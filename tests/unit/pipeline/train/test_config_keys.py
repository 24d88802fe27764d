"""Every config key of `train` changes what it names. A new key needs an entry here, or a test that is named here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from config_keys import config_keys

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.distributed.group import World, process_group
from clipwright.pipeline.towers.checkpointing import RecomputedForward
from clipwright.pipeline.train import config as config_module
from clipwright.pipeline.train import engine as engine_module
from clipwright.pipeline.train.config import RunConfig, build
from clipwright.pipeline.train.engine import Engine, deepspeed_config

TESTS = Path(__file__).resolve().parents[3]
WORLD = World(0, 1, 0, 1, torch.device("cpu"))
TINY = [
    "image.name=vit_nano",
    "image.image_size=32",
    "image.depth=2",
    "text.depth=2",
    "text.width=32",
    "text.heads=2",
    "embed_dim=16",
    "data.train={data}",
    "data.streams=1",
    "schedule.global_batch=16",
    "schedule.samples=48",
    "schedule.warmup=0",
    "runtime.threads=1",
    "runtime.workers=1",
    "runtime.log_every=1",
    "precision=fp32",
]

# Key → (overrides under which it has an effect, overrides that change it): the first batches differ.
BATCHES: dict[str, tuple[list[str], list[str]]] = {
    "seed": ([], ["seed=1"]),
    "image.image_size": ([], ["image.image_size=64"]),
    "text.context": ([], ["text.context=8"]),
    "text.pad": ([], ["text.pad=fixed"]),
    "tokenizer.clean (clip_bpe)": ([], ["tokenizer.clean=transformers"]),
    "data.captions": ([], ["data.captions=2"]),
    "data.negatives": ([], ["data.negatives=others"]),
    "data.negative_count": (["data.negatives=others"], ["data.negative_count=2"]),
    "data.streams": (["data.window=3"], ["data.streams=2"]),
    "data.window": ([], ["data.window=3"]),
    "data.train": ([], ["data.train={other}"]),
    "data.train[].path": (["data.train=[{path: {data}}]"], ["data.train=[{path: {other}}]"]),
    "data.train[].weight": (["data.train={mixture}"], ["data.train=[{path: {data}, weight: 9}, {path: {other}}]"]),
    "data.reweight": (["data.train={mixture}"], ["data.reweight=[{at: 1, weights: [0, 1]}]"]),
    "data.reweight[].at": (
        ["data.train={mixture}", "data.reweight=[{at: 1, weights: [0, 1]}]"],
        ["data.reweight=[{at: 20, weights: [0, 1]}]"],
    ),
    "data.reweight[].weights": (
        ["data.train={mixture}", "data.reweight=[{at: 1, weights: [0, 1]}]"],
        ["data.reweight=[{at: 1, weights: [1, 0]}]"],
    ),
    "data.augment.scale": ([], ["data.augment.scale=[0.1,0.2]"]),
    "data.augment.ratio": ([], ["data.augment.ratio=[0.4,0.5]"]),
    "data.augment.flip": ([], ["data.augment.flip=1"]),
    "data.augment.jitter": ([], ["data.augment.jitter=[0.5,0.5,0.5,0.2]"]),
    "data.augment.jitter_probability": (
        ["data.augment.jitter=[0.5,0.5,0.5,0.2]"],
        ["data.augment.jitter_probability=0.2"],
    ),
    "data.augment.grayscale": ([], ["data.augment.grayscale=1"]),
    "data.augment.views": ([], ["data.augment.views=1"]),
    "schedule.global_batch": ([], ["schedule.global_batch=8"]),
}
# The same, and the numbers of three steps differ.
STEPS: dict[str, tuple[list[str], list[str]]] = {
    "embed_dim": ([], ["embed_dim=32"]),
    "precision": ([], ["precision=bf16"]),
    "techniques[].name": ([], ["techniques=[{name: freeze, image: all}]"]),
    "techniques[].image (freeze)": (
        ["techniques=[{name: freeze, text: all}]"],
        ["techniques=[{name: freeze, image: all}]"],
    ),
    "techniques[].text (freeze)": (
        ["techniques=[{name: freeze, image: all}]"],
        ["techniques=[{name: freeze, image: all, text: all}]"],
    ),
    "preprocessing.mean": ([], ["preprocessing.mean=[0.1,0.2,0.3]"]),
    "preprocessing.std": ([], ["preprocessing.std=[0.1,0.2,0.3]"]),
    "loss.name": ([], ["loss.name=sigmoid"]),
    "loss.init_scale": ([], ["loss.init_scale=20"]),
    "loss.repeats": (["data.augment.flip=0"], ["loss.repeats=mask"]),
    "loss.init_bias (sigmoid)": (["loss.name=sigmoid"], ["loss.init_bias=-3"]),
    "loss.label_smoothing (softmax)": ([], ["loss.label_smoothing=0.2"]),
    "optim.name": ([], ["optim.name=sgd"]),
    "optim.lr": ([], ["optim.lr=0.01"]),
    "optim.weight_decay": ([], ["optim.weight_decay=5"]),
    "optim.grad_clip_norm": (["optim.name=sgd", "optim.lr=1"], ["optim.grad_clip_norm=0.01"]),
    "optim.betas (adamw)": ([], ["optim.betas=[0.1,0.2]"]),
    "optim.eps (adamw)": ([], ["optim.eps=0.1"]),
    "optim.momentum (sgd)": (["optim.name=sgd", "optim.lr=1"], ["optim.momentum=0.9"]),
    "image.name": ([], ["image.name=deit_nano"]),
    "image.projection": (["embed_dim=128"], ["image.projection=none"]),
    "text.name": ([], ["text.name=bidirectional_text_nano"]),
    "text.projection": (["embed_dim=32"], ["text.projection=none"]),
}

# The same, and the logged learning rates differ.
SCHEDULES: dict[str, tuple[list[str], list[str]]] = {
    "schedule.name": ([], ["schedule.name=constant"]),
    "schedule.samples": ([], ["schedule.samples=32"]),
    "schedule.warmup": ([], ["schedule.warmup=32"]),
    "schedule.final_lr_ratio (cosine)": ([], ["schedule.final_lr_ratio=0.9"]),
}
# Keys whose tests are elsewhere, in files of tests/ that give the key a value: a key of one family by its bare name.
ELSEWHERE: dict[str, str] = {
    "accept": "unit/pipeline/train/test_accept_and_warm_start.py",
    "init_from": "unit/pipeline/train/test_accept_and_warm_start.py",
    "preprocessing.interpolation": "unit/pipeline/test_pixels.py",
    "preprocessing.fit": "unit/pipeline/test_pixels.py",
    "preprocessing.crop_rounding": "unit/pipeline/test_pixels.py",
    "runtime.cache_dir": "unit/pipeline/folders/test_remote.py",
    "runtime.cache_gb": "unit/pipeline/folders/test_remote.py",
    "runtime.copy_to": "unit/pipeline/train/test_copies.py",
    "runtime.timeout_minutes": "unit/pipeline/train/test_supervision.py",
    "runtime.keep_best": "unit/pipeline/train/test_checkpoint.py",
    "runtime.save_minutes": "unit/pipeline/train/test_save_first.py",
    "techniques": "unit/pipeline/train/test_techniques.py",
    "text.folder (huggingface_text)": "unit/pipeline/towers/test_huggingface_text.py",
    "text.pretrained (huggingface_text)": "unit/pipeline/towers/test_huggingface_text.py",
    "text.pool (huggingface_text)": "unit/pipeline/towers/test_huggingface_text.py",
    "text.architecture (huggingface_text)": "unit/pipeline/towers/test_huggingface_text.py",
    "text.weights (huggingface_text)": "unit/pipeline/towers/test_huggingface_text.py",
    "tokenizer.name": "unit/pipeline/tokenizers/test_sentencepiece.py",
    "tokenizer.vocab_size (sentencepiece)": "unit/pipeline/tokenizers/test_sentencepiece.py",
    "tokenizer.normalization (sentencepiece)": "unit/pipeline/tokenizers/test_sentencepiece.py",
    "tokenizer.folder (huggingface)": "unit/pipeline/tokenizers/test_huggingface.py",
    "tokenizer.folder (siglip)": "unit/pipeline/tokenizers/test_siglip.py",
    "tokenizer.lower_case (siglip)": "unit/pipeline/tokenizers/test_siglip.py",
    "tokenizer.end (siglip)": "unit/pipeline/tokenizers/test_siglip.py",
    "tokenizer.unknown (siglip)": "unit/pipeline/tokenizers/test_siglip.py",
    "tokenizer.pad (siglip)": "unit/pipeline/tokenizers/test_siglip.py",
}
# Key → (overrides under which it has an effect, overrides that change it): what the engine does differs.
ENGINE: dict[str, tuple[list[str], list[str]]] = {
    "runtime.workers": ([], ["runtime.workers=2"]),
    "runtime.zero": ([], ["runtime.zero=1"]),
    "runtime.offload": (["runtime.zero=1"], ["runtime.offload=optimizer"]),
    "runtime.micro_batch": ([], ["runtime.micro_batch=8"]),
    "runtime.exchange": ([], ["runtime.exchange=ring"]),
    "runtime.compile": ([], ["runtime.compile=true"]),
    "runtime.activation_checkpointing.image": ([], ["runtime.activation_checkpointing.image=[0]"]),
    "runtime.activation_checkpointing.text": ([], ["runtime.activation_checkpointing.text=[0]"]),
}
# Keys of logging and saving, which one run tests together.
FILES = {
    "runtime.log_every",
    "runtime.save_every",
    "runtime.keep",
    "runtime.keep_every",
    "runtime.ledger",
    "runtime.validation",
    "runtime.validate_every",
    "runtime.stop_at",
    "runtime.threads",
}


def test_every_key_has_a_test() -> None:
    """Fields of the towers themselves are tested in towers/test_config_fields.py."""
    of_towers = {key for key in config_keys("train") if key.startswith(("image.", "text.")) and key.endswith(")")}
    tested = {*BATCHES, *STEPS, *SCHEDULES, *ENGINE, *FILES, *ELSEWHERE}
    external = {key for key in of_towers if key.endswith("(huggingface_text)")}
    assert config_keys("train") - of_towers | external == tested
    for key, file in ELSEWHERE.items():
        name = key.partition(" ")[0].rpartition(".")[2]
        assert name in (TESTS / file).read_text(encoding="utf-8"), f"{file} does not mention {name}"


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_are_read_once() -> Iterator[None]:
    """Reading CLIP's vocabulary takes longer than anything else in these small runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(config_module, "stored_tokenizer", lru_cache(config_module.stored_tokenizer))
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, small: Any) -> dict[str, str]:
    """Two datasets of 48 textured images with three captions and two hard negatives each; some images repeat texts."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("keys")
    cli = small.cli(folder)
    noise = np.random.default_rng(0)
    for name in ("data", "other"):
        rows = []
        for number in range(48):
            path = folder / f"{name}{number}.png"
            Image.fromarray(noise.integers(0, 256, (28, 40, 3), dtype=np.uint8)).save(path)
            same = number // 2
            captions = [
                f"a caf\u00c3\u00a9 and {same} other things",
                f"{same} &amp; more",
                f"number {same} of a long list of all",
            ]
            rows.append({"image": path.name, "caption": captions, "others": [f"not {number}", f"nor {number}"]})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        cli(
            "prep",
            "table",
            f"source.path={name}.parquet",
            "shards.samples=16",
            "-o",
            f"{name}_set",
            "runtime.workers=1",
        )
    data, other = (str(folder / f"{name}_set") for name in ("data", "other"))
    return {"data": data, "other": other, "mixture": f"[{{path: {data}}}, {{path: {other}}}]"}


def filled(overrides: list[str], datasets: dict[str, str]) -> list[str]:
    for name, value in datasets.items():
        overrides = [override.replace(f"{{{name}}}", value) for override in overrides]
    return overrides


def config_of(overrides: list[str], datasets: dict[str, str]) -> RunConfig:
    return resolve(RunConfig, verb="train", overrides=filled([*TINY, *overrides], datasets)).value


def first_batches(overrides: list[str], datasets: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the arrays of the first six batches: two epochs of the small datasets."""
    loader = build(config_of(overrides, datasets), WORLD).loader
    with closing(loader.batches(0)) as batches:
        return [
            {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
            for batch in itertools.islice(batches, 6)
        ]


def is_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def known_batches() -> dict[str, list[dict[str, Any]]]:
    """Batches that several keys compare with."""
    return {}


@pytest.mark.parametrize("key", BATCHES)
def test_key_changes_the_batches(
    key: str, datasets: dict[str, str], known_batches: dict[str, list[dict[str, Any]]]
) -> None:
    base, changed = BATCHES[key]
    name = " ".join(base)
    if name not in known_batches:
        known_batches[name] = first_batches(base, datasets)
    assert not is_same(known_batches[name], first_batches([*base, *changed], datasets)), f"{key} is ignored"


def test_equal_keys_give_equal_batches(datasets: dict[str, str]) -> None:
    assert is_same(first_batches([], datasets), first_batches([], datasets))


@pytest.fixture(scope="module")
def known_steps() -> dict[str, list[Any]]:
    """Numbers that several keys compare with."""
    return {}


def numbers_of_steps(overrides: list[str], datasets: dict[str, str]) -> list[Any]:
    """Returns what the engine reports of three steps."""
    config = config_of(overrides, datasets)
    with process_group() as world:
        components = build(config, world)
        engine = Engine(components.towers, components.loss, config, world)
        with closing(components.loader.batches(0)) as batches:
            return [engine.step(next(batches), number, 1.0, measure=True) for number in range(3)]


@pytest.mark.parametrize("key", STEPS)
def test_key_changes_the_steps(key: str, datasets: dict[str, str], known_steps: dict[str, list[Any]]) -> None:
    base, changed = STEPS[key]
    name = " ".join(base)
    if name not in known_steps:
        known_steps[name] = numbers_of_steps(base, datasets)
    assert numbers_of_steps([*base, *changed], datasets) != known_steps[name], f"{key} is ignored"


def logged_rates(overrides: list[str], datasets: dict[str, str], folder: Path, here: Any) -> list[float]:
    """Returns the learning rates that a run logs."""
    run = folder / f"run-{len(list(folder.iterdir()))}"
    here(folder, "train", *filled([*TINY, *overrides], datasets), "-o", run, "--quiet")
    return [json.loads(line)["lr"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_keys_of_the_schedule_change_the_rates(datasets: dict[str, str], tmp_path: Path, here: Any) -> None:
    rates = {key: logged_rates(changed, datasets, tmp_path, here) for key, (_, changed) in SCHEDULES.items()}
    expected = logged_rates([], datasets, tmp_path, here)
    assert [key for key, changed in rates.items() if changed == expected] == []


def engine_behavior(overrides: list[str], datasets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns what one step does: DeepSpeed's config, forward passes of blocks, the exchange, and more."""
    config = config_of(overrides, datasets)
    used: list[str] = []
    calls = {"image": 0, "text": 0}

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    exchanges = {
        name: type(name, (kind,), {"__init_subclass__": None, "label": name})
        for name, kind in engine_module.EXCHANGES.items()
    }
    monkeypatch.setattr(engine_module, "EXCHANGES", exchanges)
    with process_group() as world:
        components = build(config, world)
        towers = components.towers
        compiled = [tower._compiled_call_impl is not None for tower in (towers.image, towers.text)]
        behavior: dict[str, Any] = {
            "deepspeed": deepspeed_config(config, 1),
            "workers": components.loader.workers,
            "compiled": compiled,
        }
        if any(compiled):
            return behavior
        for name, tower in (("image", towers.image), ("text", towers.text)):
            tower.register_forward_pre_hook(count(name))
            behavior[f"{name} recomputed"] = isinstance(tower.block_list()[0].forward, RecomputedForward)
        engine = Engine(towers, components.loss, config, world)
        real = engine._features

        def features(*arguments: Any) -> Any:
            result = real(*arguments)
            used.append(result.exchange.label)
            return result

        monkeypatch.setattr(engine, "_features", features)
        with closing(components.loader.batches(0)) as batches:
            engine.step(next(batches), 0, 1.0, measure=False)
        stage = engine.engine.zero_optimization_stage()
    return {**behavior, "calls": calls, "exchange": used, "stage": stage}


@pytest.mark.parametrize("key", ENGINE)
def test_key_changes_what_the_engine_does(key: str, datasets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    base, changed = ENGINE[key]
    with monkeypatch.context() as patched:
        expected = engine_behavior(base, datasets, patched)
    with monkeypatch.context() as patched:
        assert engine_behavior([*base, *changed], datasets, patched) != expected, f"{key} is ignored"


def test_keys_of_logging_and_saving(datasets: dict[str, str], tmp_path: Path, here: Any) -> None:
    data = datasets["data"]
    runtime = ["log_every=9", "save_every=3", "keep=1", "keep_every=6", "ledger=keys", "threads=2", "stop_at=11"]
    runtime += [f"validation={data}", "validate_every=5"]
    overrides = [*TINY, "schedule.samples=192", *(f"runtime.{override}" for override in runtime)]
    printed = here(tmp_path, "train", *filled(overrides, datasets), "-o", "run").out
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 5, 6, 9, 10, 11]  # the first, the last, what is due or saved
    assert [line["step"] for line in lines if "val_i2t_r1" in line] == [5, 10, 11]
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["step-00000006", "step-00000011"]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == 11 and all(len(line["keys"]) == 16 for line in ledger)
    assert "2 threads" in printed
