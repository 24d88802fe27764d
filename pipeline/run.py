"""RunConfig and build(): the one place where the sections of a training config meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from clipwright.pipeline.core.config import Choice, Resolved
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.loader import DataConfig, Loader, Share
from clipwright.pipeline.distributed import World
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, LossConfig
from clipwright.pipeline.model import ModelConfig, TwoTower, build_model
from clipwright.pipeline.optim import OptimConfig, ScheduleConfig
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer


@configclass
class RuntimeConfig:
    """What may change between two starts of one run without changing its result beyond rounding."""

    workers: Annotated[int, Field(ge=1)] = 2
    threads: Annotated[int, Field(ge=0)] = 0  # 0: the cores of this machine divided by its local ranks
    zero: Literal[0, 1, 2, 3] = 0
    log_every: Annotated[int, Field(ge=1)] = 20  # steps
    save_every: Annotated[int, Field(ge=1)] = 1000  # steps
    save_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 15.0
    keep: Annotated[int, Field(ge=1)] = 2  # newest checkpoints
    stop_at: Annotated[int, Field(ge=1)] | None = None  # step to stop at, as if the run were interrupted there


@configclass
class RunConfig(ModelConfig):
    """A training run."""

    data: DataConfig
    loss: Annotated[LossConfig, Choice(LOSSES, "softmax")]
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0
    runtime: RuntimeConfig = RuntimeConfig()


@dataclass
class Parts:
    """Everything a trainer needs, built from one config."""

    tokenizer: Tokenizer
    loader: Loader
    towers: TwoTower
    loss: ContrastiveLoss


def build(config: RunConfig, world: World) -> Parts:
    """Builds data, towers and loss. All ranks build equal weights from the seed."""
    tokenizer = TOKENIZERS.build(config.tokenizer)
    loader = Loader(
        config.data,
        Share(world.rank, world.size, config.schedule.global_batch),
        tokenizer=tokenizer,
        text=config.text,
        image_size=config.image.image_size,
        seed=config.seed,
        workers=config.runtime.workers,
    )
    torch.manual_seed(config.seed)
    towers = build_model(config, tokenizer)
    loss = LOSSES.build(config.loss)
    return Parts(tokenizer, loader, towers.to(world.device), loss.to(world.device))


def identity(resolved: Resolved[RunConfig], fingerprint: str) -> dict[str, Any]:
    """What decides a run's result; the dataset enters by fingerprint, never by where it lies."""
    tree = resolved.identity()
    return {**tree, "data": {**tree["data"], "train": fingerprint}}


def model_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's tree that a model folder keeps: architecture, tokenizer, preprocessing, loss."""
    return {key: tree[key] for key in ("image", "text", "tokenizer", "embed_dim", "preprocessing", "loss")}


def loss_tensors(loss: ContrastiveLoss) -> dict[str, Tensor]:
    """The loss's parameters under the names a model folder gives them."""
    return {f"loss.{name}": tensor.detach().cpu() for name, tensor in loss.state_dict().items()}
