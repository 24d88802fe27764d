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

from clipwright.pipeline.core.config import Choice, Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.batch import RankBatch
from clipwright.pipeline.data.datasets import DataConfig, Datasets
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.distributed.group import World, broadcast_object, run_on_rank0
from clipwright.pipeline.folders.cache import CachedRuntime
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.losses.base import LOSSES, LossConfig, TotalLoss
from clipwright.pipeline.model.two_tower import ModelConfig, TwoTower, build_model
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig
from clipwright.pipeline.towers.base import TEXT_TOWERS
from clipwright.pipeline.towers.checkpointing import Blocks, checkpoint_activations
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.optimizers import base as optimizers
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from clipwright.pipeline.train.schedules import base as schedules
from clipwright.pipeline.train.schedules.base import SCHEDULES, ScheduleConfig
from clipwright.pipeline.train.techniques.base import TECHNIQUES, TechniqueConfig, Techniques, build_techniques

MAX_TOKENIZER_CAPTIONS = 1_000_000  # captions of a larger dataset that a tokenizer is trained on

PositiveInt = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Minutes = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@configclass
class ActivationCheckpointing:
    """Blocks of each tower that are recomputed in the backward pass, which saves memory."""

    image: Blocks = "none"
    """Blocks of the image tower: `none`, `all`, or a list of numbers from 0."""
    text: Blocks = "none"
    """Blocks of the text tower: `none`, `all`, or a list of numbers from 0."""


@configclass
class RuntimeConfig(CachedRuntime):
    """What may change between two starts of a run without changing its result beyond rounding."""

    workers: PositiveInt = 2
    """Processes per rank that decode images."""
    threads: NotNegativeInt = 0
    """CPU threads per rank. 0: the cores of the machine divided by its ranks."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "optimizer"] = "none"
    """Under ZeRO 1 to 3, `optimizer` keeps the optimizer's state and master weights in host memory."""
    micro_batch: NotNegativeInt = 0
    """Samples per rank and forward pass; smaller ones accumulate gradients with cached features. 0: all at once."""
    exchange: Literal["gather", "ring"] = "gather"
    """How a rank obtains the texts of the others for the loss: all at once, or one rank's at a time."""
    compile: bool = False
    """Compile the towers with torch.compile."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    """Blocks that are recomputed in the backward pass."""
    ledger: Literal["sums", "keys"] = "sums"
    """What ledger.jsonl has of each step's samples: the sum of their hashed keys, or their keys too."""
    log_every: PositiveInt = 20
    """Steps between two log lines."""
    save_every: PositiveInt = 1000
    """Steps between two checkpoints."""
    save_minutes: Minutes = 15.0
    """Minutes after which a checkpoint is saved even if `save_every` is not reached."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: NotNegativeInt = 0
    """Checkpoints at multiples of this many steps are kept for good. 0: none."""
    keep_best: str = ""
    """Name of a logged number; the checkpoint of its best step is kept: of the highest value, of a loss the lowest."""
    copy_to: str = ""
    """Bucket address, s3://… or gs://…, to which each checkpoint is copied."""
    timeout_minutes: Minutes = 10.0
    """Minutes without progress of a rank after which the run ends with an error."""
    validation: str | None = None
    """Held-out dataset folder that is scored during training; null: none."""
    validate_every: PositiveInt = 1000
    """Steps between two validations; the last step is always validated. Each of these steps is saved first."""
    stop_at: PositiveInt | None = None
    """Step at which to stop, as if the run were interrupted there."""

    def __post_init__(self) -> None:
        if self.offload != "none" and self.zero == 0:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "there is nothing to offload under ZeRO 0",
                where="runtime.offload",
                found=f"{self.offload!r} with runtime.zero=0",
                fix="set runtime.zero=1, 2 or 3, or runtime.offload=none",
            )


def acceptable(key: str) -> str:
    """Validates a key of `accept`."""
    if run_folder.ACCEPTABLE.fullmatch(key) is None:
        raise ValueError(
            "a run may change keys of optim, loss, data.augment and schedule, except optim.name, loss.name, "
            "schedule.samples and schedule.global_batch"
        )
    return key


@configclass
class RunConfig(ModelConfig):
    """A training run."""

    data: DataConfig
    """Training data, its order and augmentation."""
    loss: Annotated[LossConfig, Choice(LOSSES, "softmax")]
    """Contrastive loss."""
    optim: Annotated[OptimizerConfig, Choice(OPTIMIZERS, "adamw", shared=optimizers.SHARED_FIELDS)]
    """Optimizer of the towers."""
    schedule: Annotated[ScheduleConfig, Choice(SCHEDULES, "cosine", shared=schedules.SHARED_FIELDS)]
    """Length of training and learning-rate schedule."""
    techniques: tuple[Annotated[TechniqueConfig, Choice(TECHNIQUES)], ...] = ()
    """List of techniques that change training, such as `{name: freeze, image: all}`."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision. `auto`: bf16 where it is faster; a run keeps the choice of its first start."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, sample order, augmentation and dropout."""
    accept: tuple[Annotated[str, AfterValidator(acceptable)], ...] = ()
    """Config keys in which a resumed run may differ from its start; changes are recorded in log and manifests."""
    init_from: str = ""
    """Run or model folder whose weights a new run starts with; the image size may differ."""
    runtime: RuntimeConfig = RuntimeConfig()
    """What does not change the result: hardware use, logging and saving."""


@dataclass
class Components:
    """Everything a trainer needs, built from one config."""

    tokenizer: Tokenizer
    loader: Loader
    towers: TwoTower
    loss: TotalLoss
    techniques: Techniques


def resolve_text(resolved: Resolved[RunConfig], run: Path, *, fresh: bool) -> Resolved[RunConfig]:
    """Adds the fields that the text tower's folder decides, read by rank 0, so that the run's config is complete."""
    text = resolved.value.text
    stored = (None if fresh else run_folder.stored_identity(run)) or {}
    from_rank0: dict[str, Any] = {}
    run_on_rank0(lambda: from_rank0.update(text.resolved_fields(stored.get("text", {}))))
    fields: Any = broadcast_object(from_rank0)
    value = dataclasses.replace(resolved.value, text=dataclasses.replace(text, **fields))
    tree = {**resolved.tree, "text": {**resolved.tree["text"], **fields}}
    return dataclasses.replace(resolved, value=value, tree=tree)


def build(config: RunConfig, world: World, run: Path | None = None) -> Components:
    """Builds data, towers, loss and techniques; all ranks build equal weights from the seed.

    run: a run folder to resume.
    """
    datasets = Datasets(config.data, config.runtime.cache)
    return assemble(config, world, open_tokenizer(config.tokenizer, datasets, run, world))


def assemble(config: RunConfig, world: World, tokenizer: Tokenizer) -> Components:
    """Builds the same with an open tokenizer."""
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
    techniques = build_techniques(config.techniques)
    techniques.prepare(towers)
    prepare_towers(towers, config.runtime)
    contrastive = LOSSES.build(config.loss, embed_dim=config.embed_dim)
    loss = TotalLoss({"contrastive": contrastive, **techniques.loss_terms()})
    return Components(tokenizer, loader, towers.to(world.device), loss.to(world.device), techniques)


def check_compiler() -> None:
    """Raises E_CONFIG_VALUE where torch.compile would fail at the first step: on a CPU it generates C++."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "torch.compile needs a C++ compiler on a CPU",
            where="runtime.compile: True",
            found=f"there is no {name!r} on PATH",
            fix="install g++, set CXX to your C++ compiler, or leave out runtime.compile",
        )


def prepare_towers(towers: TwoTower, runtime: RuntimeConfig) -> None:
    """Applies activation checkpointing and compilation in place, before DeepSpeed; parameter names stay the same."""
    for side, tower in (("image", towers.image), ("text", towers.text)):
        blocks: Blocks = getattr(runtime.activation_checkpointing, side)
        checkpoint_activations(tower, blocks, f"runtime.activation_checkpointing.{side}")
        if runtime.compile:
            tower.compile()


def open_tokenizer(config: TokenizerConfig, dataset: Dataset | Datasets, run: Path | None, world: World) -> Tokenizer:
    """Returns the tokenizer of run `run`, or one for a new run on `dataset`; writes nothing to the run folder.

    A tokenizer that needs training is trained by rank 0 while the other ranks wait.
    """
    stored = None if run is None else run_folder.stored_identity(run)
    if config.trained_file is None or (stored is not None and stored.get("tokenizer", {}).get("name") == config.name):
        return stored_tokenizer(config, run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_on_rank0(lambda: config.train(sample_captions(dataset, MAX_TOKENIZER_CAPTIONS), folder))
        files = broadcast_object({path.name: path.read_bytes() for path in folder.iterdir()})
        assert isinstance(files, dict)
        for file, data in files.items():  # the other ranks may be on other machines
            (folder / file).write_bytes(data)
        return TOKENIZERS.build(config, folder=folder)


def stored_tokenizer(config: TokenizerConfig, run: Path | None) -> Tokenizer:
    """Returns the tokenizer that run `run` trains with; E_INPUT or E_CKPT_HASH if its file is missing or differs."""
    if config.trained_file is None:
        return TOKENIZERS.build(config)
    assert run is not None
    tokenizer = TOKENIZERS.build(config, folder=run / run_folder.TOKENIZER)
    known = (run_folder.stored_identity(run) or {}).get("tokenizer", {}).get("fingerprint")
    if tokenizer.fingerprint != known:
        raise ClipwrightError(
            "E_CKPT_HASH",
            "the tokenizer is not the one that this run started with",
            where=run / run_folder.TOKENIZER / config.trained_file,
            found=f"fingerprint {tokenizer.fingerprint[:16]}…, the run has {str(known)[:16]}…",
            fix="restore the file, or start over with --fresh",
        )
    return tokenizer


def sample_captions(dataset: Dataset | Datasets, count: int) -> Iterator[str]:
    """Yields all captions in the order of the sidecars, or `count` evenly spaced ones; loads one shard at a time."""
    shards = range(len(dataset.sizes))
    total = sum(len(dataset.captions(shard)) for shard in shards)
    wanted = np.arange(min(count, total)) * total // min(count, total)
    start = 0
    for shard in shards:
        column = dataset.captions(shard)
        first, last = np.searchsorted(wanted, [start, start + len(column)])
        yield from column.take(wanted[first:last] - start).to_pylist()
        start += len(column)


def identity(
    resolved: Resolved[RunConfig], dataset: str, tokenizer: str, init_source: dict[str, str] | None = None
) -> dict[str, Any]:
    """Returns what decides a run's result.

    dataset, tokenizer: fingerprints, which stand for them wherever they are stored. init_source: name and fingerprint
    of what `init_from` names.
    """
    tree = _without_external_fields(resolved.identity())
    for key in ("accept", "init_from"):
        tree.pop(key, None)
    if init_source:
        tree["init_from"] = init_source
    tree["data"] = {**tree["data"], "train": dataset}
    tree["tokenizer"] = {**tree["tokenizer"], "fingerprint": tokenizer}
    return tree


def model_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a run's config tree that a model folder keeps."""
    complete = _without_external_fields(tree)
    return {key: complete[key] for key in ("image", "text", "tokenizer", "embed_dim", "preprocessing", "loss")}


def _without_external_fields(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns `tree` without the fields of text tower and tokenizer that point outside the run."""
    entries = {
        "text": TEXT_TOWERS.entry(tree["text"]["name"]),
        "tokenizer": TOKENIZERS.entry(tree["tokenizer"]["name"]),
    }
    tree = dict(tree)
    for section, entry in entries.items():
        external = entry.config.external_fields
        tree[section] = {name: value for name, value in tree[section].items() if name not in external}
    return tree
