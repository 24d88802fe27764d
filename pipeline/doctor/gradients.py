"""Checks that this machine, or cluster, trains on the exact gradient of the global batch."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.towers.checkpointing import Blocks
from clipwright.pipeline.train.config import ActivationCheckpointing, RunConfig, prepare_towers
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS, OptimizerConfig

STEPS = 3  # an accumulation error may appear from the second step on only
# Float32 sums in another order differ by up to 1e-5 of the largest gradient (a ResNet, on some processors). A lost
# factor, rank or micro-batch differs by far more than 1e-4.
LIMIT = 1e-4
MICRO_BATCH = 4  # each rank has two micro-batches of this size
VOCABULARY = 64


@check("gradients", "config")
def gradients(context: DoctorContext) -> CheckResult:
    """Loss, gradients and parameters of a few steps under the config's layout against a plain loop on rank 0.

    Uses the config's towers cut to a block or two, its loss, world size, ZeRO stage, exchange, micro-batches,
    activation checkpointing and clipping, on random samples, two of which share a caption. Plain SGD in float32,
    because it hides no factor. Dropout is off and batch norm uses its running statistics, which a loop without
    micro-batches cannot reproduce.
    """
    world, config = context.world, small_config(context.config, context.world)
    torch.manual_seed(config.seed)
    towers = TwoTower(config, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1).to(world.device)
    loss = LOSSES.build(config.loss, embed_dim=config.embed_dim).to(world.device)
    towers.image.eval()
    towers.text.eval()
    reference: ReferenceLoop | None = None
    if world.is_rank0:
        reference_towers, reference_loss = copy.deepcopy((towers, loss))
        reference = ReferenceLoop(reference_towers, reference_loss, config.optim)
    prepare_towers(towers, config.runtime)
    engine = Engine(towers, loss, config, world)
    worst = {"loss": 0.0, "gradient": 0.0, "parameter": 0.0}
    # TensorFloat-32 would differ more than the layout does.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for step in range(STEPS):
            value, _ = engine.backward(random_batch(config, step, world.rank, world.size), step)
            grads = engine.gradients()
            engine.update(1.0)
            weights = engine.weights()
            for name, parameter in loss.named_parameters():
                weights[f"loss.{name}"] = parameter.detach().cpu()
            if reference is not None:
                differences = reference.step(random_batch(config, step, 0, 1), value, grads, weights)
                for name, difference in differences.items():
                    worst[name] = _max(worst[name], difference)
    context.predicted["gradient_check"] = {"steps": STEPS, **worst}
    listed = ", ".join(f"{name} {difference:.0e}" for name, difference in worst.items())
    found, need = f"differences after {format_count(STEPS, 'step')}: {listed}", f"at most {LIMIT:.0e} from a plain loop"
    if all(difference <= LIMIT for difference in worst.values()):
        return CheckResult("ok", found, need)
    fix = "try runtime.zero=0, runtime.micro_batch=0 and runtime.exchange=gather one by one, and report which fixes it"
    return CheckResult("FAIL", found, need, fix)


class ReferenceLoop:
    """The same model in a plain loop in one process, without DeepSpeed, micro-batches or collectives."""

    def __init__(self, towers: TwoTower, loss: ContrastiveLoss, optim: OptimizerConfig) -> None:
        self.towers, self.loss, self.optim = towers, loss, optim
        self.optimizer = torch.optim.SGD(towers.parameters(), lr=optim.lr)
        self.loss_optimizer = torch.optim.AdamW(
            loss.parameters(), lr=optim.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0
        )

    def step(
        self, batch: Batch, value: float, grads: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> dict[str, float]:
        """Takes one step; returns the differences from the given loss, gradients and updated parameters.

        Gradients are compared relative to the largest one, those of the loss's parameters absolutely.
        """
        device = next(self.towers.parameters()).device
        image, text = self.towers(batch.views.to(device), batch.tokens.to(device))
        features = Features(
            image, text[batch.text_row.to(device)], batch.image_id.to(device), batch.caption_id.to(device)
        )
        loss = self.loss(features)
        self.towers.zero_grad()
        self.loss.zero_grad()
        loss.backward()
        reference = {name: p.grad for name, p in self._named_parameters() if p.grad is not None}
        largest = max(float(grad.abs().max()) for name, grad in reference.items() if not name.startswith("loss."))
        gradient = 0.0
        for name, grad in reference.items():
            difference = _max_difference(grads[name], grad)
            if not name.startswith("loss."):
                difference /= largest
            gradient = _max(gradient, difference)
        nn.utils.clip_grad_norm_(self.towers.parameters(), self.optim.grad_clip_norm or math.inf)
        self.optimizer.step()
        self.loss_optimizer.step()
        self.loss.clamp()
        parameter = 0.0
        for name, p in self._named_parameters():
            parameter = _max(parameter, _max_difference(weights[name], p))
        return {"loss": abs(float(loss.detach()) - value), "gradient": gradient, "parameter": parameter}

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        of_loss = [(f"loss.{name}", p) for name, p in self.loss.named_parameters()]
        return [*self.towers.named_parameters(), *of_loss]


def _max_difference(left: Tensor, right: Tensor) -> float:
    """Returns the largest absolute difference; NaN if there is a NaN."""
    return float((left - right.detach().float().cpu()).abs().max())


def _max(left: float, right: float) -> float:
    """Returns the larger number; NaN if either is NaN, so that the check fails."""
    return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)


def small_config(config: RunConfig, world: World) -> RunConfig:
    """Returns `config` with few blocks and samples, so that the check takes seconds; the layout is unchanged."""
    runtime = config.runtime
    checkpointing: dict[str, Blocks] = {}
    for side, blocks in dataclasses.asdict(runtime.activation_checkpointing).items():
        checkpointing[side] = "none" if blocks in ("none", ()) else "all"
    return dataclasses.replace(
        config,
        image=shallow(config.image),
        text=shallow(config.text),
        optim=OPTIMIZERS.preset("sgd", lr=0.01, weight_decay=0.0, grad_clip_norm=config.optim.grad_clip_norm),
        schedule=dataclasses.replace(config.schedule, global_batch=2 * MICRO_BATCH * world.size),
        precision="fp32",
        runtime=dataclasses.replace(
            runtime,
            micro_batch=MICRO_BATCH if runtime.micro_batch else 0,
            activation_checkpointing=ActivationCheckpointing(**checkpointing),
            compile=False,
        ),
    )


def shallow(tower: Any) -> Any:
    """Returns a tower's config with at most two blocks, or one per stage."""
    changes: dict[str, Any] = {}
    for name in ("depth", "depths", "layers"):
        if not hasattr(tower, name):
            continue
        value = getattr(tower, name)
        changes[name] = min(value, 2) if isinstance(value, int) else tuple(min(depth, 1) for depth in value)
    return dataclasses.replace(tower, **changes)


def random_batch(config: RunConfig, step: int, rank: int, world: int) -> Batch:
    """Returns a rank's part of a random global batch, whose last sample has the caption of its first."""
    generator, size = torch.Generator().manual_seed(step), config.schedule.global_batch
    side, context = config.image.image_size, config.text.context
    views = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, VOCABULARY - 1, (size - 1, context), generator=generator)
    tokens[:, -1] = VOCABULARY - 1
    rows = torch.arange(rank, size, world)
    captions = rows % (size - 1)
    caption_rows, text_row = captions.unique(return_inverse=True)
    return Batch(views[rows], tokens[caption_rows], text_row, rows, captions[:, None])
