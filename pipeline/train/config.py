"""RunConfig and build(): the one place where the sections of a training config meet."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from clipwright.pipeline.core.config import Choice, Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.batch import RankBatch
from clipwright.pipeline.data.datasets import DataConfig, Datasets
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.distributed.group import World, broadcast_object, run_on_rank0
from clipwright.pipeline.folders.cache import CachedRuntime
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, LossConfig
from clipwright.pipeline.model.two_tower import ModelConfig, TwoTower, build_model
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig
from clipwright.pipeline.towers.base import TEXT_TOWERS
from clipwright.pipeline.towers.checkpointing import Blocks, checkpoint_activations
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.optim import OptimConfig, ScheduleConfig

CAPTIONS = 1_000_000  # of a larger dataset, as many captions teach a tokenizer


@configclass
class ActivationCheckpointing:
    """Which blocks of each tower are computed again in the backward pass, for less memory: by number, from 0."""

    image: Blocks = "none"
    text: Blocks = "none"


@configclass
class RuntimeConfig(CachedRuntime):
    """What may change between two starts of one run without changing its result beyond rounding."""

    workers: Annotated[int, Field(ge=1)] = 2
    threads: Annotated[int, Field(ge=0)] = 0  # 0: the cores of this machine divided by its local ranks
    zero: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer"] = "none"  # under ZeRO 1-3 its moments and master weights, to host memory
    micro_batch: Annotated[int, Field(ge=0)] = 0  # samples of a rank that are in the towers at once; 0: all of them
    exchange: Literal["gather", "ring"] = "gather"  # how texts of other ranks are met: all at once, or rank by rank
    compile: bool = False  # the towers, by torch.compile
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    ledger: Literal["sums", "keys"] = "sums"  # whether each line of ledger.jsonl lists its samples too
    log_every: Annotated[int, Field(ge=1)] = 20  # steps
    save_every: Annotated[int, Field(ge=1)] = 1000  # steps
    save_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 15.0
    keep: Annotated[int, Field(ge=1)] = 2  # newest checkpoints
    keep_every: Annotated[int, Field(ge=0)] = 0  # steps whose checkpoints are kept for good; 0: none
    keep_best: str = ""  # a figure of the log, of whose best step one is kept: the highest, of losses the lowest
    copy_to: str = ""  # a bucket's address, s3://… or gs://…, to which each checkpoint is copied
    timeout_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0  # a rank that does not get on ends all
    validation: str = ""  # held-out dataset that is scored while training goes on
    validate_every: Annotated[int, Field(ge=1)] = 1000  # steps; and at the end
    stop_at: Annotated[int, Field(ge=1)] | None = None  # step to stop at, as if the run were interrupted there

    def __post_init__(self) -> None:
        if self.offload != "none" and self.zero == 0:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a config value that is not allowed",
                where="runtime.offload",
                found=f"{self.offload!r} with runtime.zero=0, under which nothing is moved",
                fix="set runtime.zero=1, 2 or 3, or runtime.offload=none",
            )


def acceptable(key: str) -> str:
    """A key of `accept`."""
    if run_folder.ACCEPTABLE.fullmatch(key) is None:
        raise ValueError(
            "a run may change keys of optim, loss and data.augment, and schedule.warmup, decay and final_lr_ratio"
        )
    return key


@configclass
class RunConfig(ModelConfig):
    """A training run.

    accept: keys in which it may from now on differ from how it was begun; what changed is kept in log, manifests and
    model card. init_from: a run or model folder whose weights it begins with.
    """

    data: DataConfig
    loss: Annotated[LossConfig, Choice(LOSSES, "softmax")]
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0
    accept: tuple[Annotated[str, AfterValidator(acceptable)], ...] = ()
    init_from: str = ""
    runtime: RuntimeConfig = RuntimeConfig()


@dataclass
class Parts:
    """Everything a trainer needs, built from one config."""

    tokenizer: Tokenizer
    loader: Loader
    towers: TwoTower
    loss: ContrastiveLoss


def resolve_text(resolved: Resolved[RunConfig], run: Path, *, fresh: bool) -> Resolved[RunConfig]:
    """Writes down, by rank 0, what the text tower's folder decides, so that a run and its models say all."""
    text = resolved.value.text
    stored = (None if fresh else run_folder.stored_tree(run)) or {}
    fields: dict[str, Any] = {}
    run_on_rank0(lambda: fields.update(text.resolved_fields(stored.get("text", {}))))
    settled: Any = broadcast_object(fields)
    value = dataclasses.replace(resolved.value, text=dataclasses.replace(text, **settled))
    return dataclasses.replace(
        resolved, value=value, tree={**resolved.tree, "text": {**resolved.tree["text"], **settled}}
    )


def build(config: RunConfig, world: World, run: Path | None = None) -> Parts:
    """Builds data, towers and loss. All ranks build equal weights from the seed. `run`: a run folder to go on with."""
    return assemble(
        config, world, open_tokenizer(config.tokenizer, Datasets(config.data, config.runtime.cache), run, world)
    )


def assemble(config: RunConfig, world: World, tokenizer: Tokenizer) -> Parts:
    """The same, around a tokenizer that is open already."""
    if config.runtime.compile and world.device.type == "cpu":
        check_compiler()
    loader = Loader(
        config.data,
        RankBatch(world.rank, world.size, config.schedule.global_batch),
        tokenizer=tokenizer,
        text=config.text,
        image_size=config.image.image_size,
        seed=config.seed,
        workers=config.runtime.workers,
        cache=config.runtime.cache,
    )
    torch.manual_seed(config.seed)
    towers = build_model(config, tokenizer)
    prepare_towers(towers, config.runtime)
    loss = LOSSES.build(config.loss, embed_dim=config.embed_dim)
    return Parts(tokenizer, loader, towers.to(world.device), loss.to(world.device))


def check_compiler() -> None:
    """E_CONFIG_VALUE where torch.compile would fail at the first step: on a CPU it makes C++."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "compilation without a compiler",
            where="runtime.compile: True",
            found=f"there is no {name!r} on PATH, which torch.compile needs on a CPU",
            fix="install g++, name your C++ compiler in CXX, or leave out runtime.compile",
        )


def prepare_towers(towers: TwoTower, runtime: RuntimeConfig) -> None:
    """Activation checkpointing and compilation, in place: names of parameters stay, and DeepSpeed comes after."""
    for side, tower in (("image", towers.image), ("text", towers.text)):
        blocks: Blocks = getattr(runtime.activation_checkpointing, side)
        checkpoint_activations(tower, blocks, f"runtime.activation_checkpointing.{side}")
        if runtime.compile:
            tower.compile()


def open_tokenizer(config: TokenizerConfig, dataset: Dataset | Datasets, run: Path | None, world: World) -> Tokenizer:
    """The tokenizer of the run that was begun in `run`, or one for a new run on `dataset`; writes nothing there.

    One that has to be learned is learned by rank 0 while the others wait.
    """
    begun = None if run is None else run_folder.stored_identity(run)
    if config.trained_file is None or (begun is not None and begun.get("tokenizer", {}).get("name") == config.name):
        return stored_tokenizer(config, run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_on_rank0(lambda: config.train(sample_captions(dataset, CAPTIONS), folder))
        files = broadcast_object({path.name: path.read_bytes() for path in folder.iterdir()})
        assert isinstance(files, dict)
        for file, data in files.items():  # the other ranks may be on other machines
            (folder / file).write_bytes(data)
        return TOKENIZERS.build(config, folder=folder)


def stored_tokenizer(config: TokenizerConfig, run: Path | None) -> Tokenizer:
    """The tokenizer that run `run` trains with; E_INPUT, E_CKPT_HASH when its file is missing or another."""
    if config.trained_file is None:
        return TOKENIZERS.build(config)
    assert run is not None
    tokenizer = TOKENIZERS.build(config, folder=run / run_folder.TOKENIZER)
    known = (run_folder.stored_identity(run) or {}).get("tokenizer", {}).get("fingerprint")
    if tokenizer.fingerprint != known:
        raise ClipwrightError(
            "E_CKPT_HASH",
            "a tokenizer that is not the one this run was begun with",
            where=run / run_folder.TOKENIZER / config.trained_file,
            found=f"fingerprint {tokenizer.fingerprint[:16]}…, the run has {str(known)[:16]}…",
            fix="restore the file, or start over with --fresh",
        )
    return tokenizer


def sample_captions(dataset: Dataset | Datasets, most: int) -> Iterator[str]:
    """All captions in the sidecars' order, or `most` of them, evenly spaced; holds one shard's at a time."""
    shards = range(len(dataset.sizes))
    total = sum(len(dataset.captions(shard)) for shard in shards)
    wanted = np.arange(min(most, total)) * total // min(most, total)
    start = 0
    for shard in shards:
        column = dataset.captions(shard)
        first, last = np.searchsorted(wanted, [start, start + len(column)])
        yield from column.take(wanted[first:last] - start).to_pylist()
        start += len(column)


def identity(
    resolved: Resolved[RunConfig], dataset: str, tokenizer: str, init_source: dict[str, str] | None = None
) -> dict[str, Any]:
    """What decides a run's result; dataset and tokenizer enter by fingerprint, never by where they lie.

    init_source: what `init_from` names.
    """
    tree = {key: value for key, value in _inside(resolved.identity()).items() if key not in ("accept", "init_from")}
    return {
        **tree,
        **({"init_from": init_source} if init_source else {}),
        "data": {**tree["data"], "train": dataset},
        "tokenizer": {**tree["tokenizer"], "fingerprint": tokenizer},
    }


def model_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's tree that a model folder keeps: architecture, tokenizer, preprocessing, loss."""
    inside = _inside(tree)
    return {key: inside[key] for key in ("image", "text", "tokenizer", "embed_dim", "preprocessing", "loss")}


def _inside(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` without the fields of text tower and tokenizer that point outside the run."""
    kinds = {"text": TEXT_TOWERS.entry(tree["text"]["name"]), "tokenizer": TOKENIZERS.entry(tree["tokenizer"]["name"])}
    cut = {
        key: {name: value for name, value in tree[key].items() if name not in entry.config.external_fields}
        for key, entry in kinds.items()
    }
    return {**tree, **cut}


def loss_tensors(loss: ContrastiveLoss) -> dict[str, Tensor]:
    """The loss's parameters under the names a model folder gives them."""
    return {f"loss.{name}": tensor.detach().cpu() for name, tensor in loss.state_dict().items()}
