"""Whether this machine, or cluster, trains on the exact gradient of the global batch."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.doctor.base import Context, Found, check
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.towers.checkpointing import Blocks
from clipwright.pipeline.train.config import ActivationCheckpointing, RunConfig, prepare_towers
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.optim import OptimConfig

STEPS = 3  # an error of accumulation may show from the second step on only
# Sums of float32 in another order come to 1e-5 of the largest gradient (a ResNet, on some processors); a factor, a rank
# or a micro-batch that is lost comes to far more than 1e-4.
LIMIT = 1e-4
FEW, VOCABULARY = 4, 64  # samples of a micro-batch, of which a rank has two; token ids


@check("gradients", "config")
def gradients(context: Context) -> Found:
    """Loss, gradients and parameters of a few steps under the config's layout against a plain loop on the first rank.

    The config's towers, cut to a block or two, its loss, ranks, ZeRO stage, exchange, micro-batches, activation
    checkpointing and clipping; made-up samples, one caption of them twice. Plain SGD in float32, for it hides no
    factor; without dropout, and batch norm by its running statistics, which a loop without micro-batches knows nothing
    of.
    """
    world, config = context.world, small(context.config, context.world)
    torch.manual_seed(config.seed)
    towers = TwoTower(config, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1).to(world.device)
    loss = LOSSES.build(config.loss, embed_dim=config.embed_dim).to(world.device)
    for tower in (towers.image, towers.text):
        tower.eval()
    plain = Plain(*copy.deepcopy((towers, loss)), config.optim) if world.is_rank0 else None
    prepare_towers(towers, config.runtime)
    engine = Engine(towers, loss, config, world)
    worst = {"loss": 0.0, "gradient": 0.0, "parameter": 0.0}
    # TensorFloat-32 is no error of the layout.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for step in range(STEPS):
            value, _ = engine.backward(batch(config, step, world.rank, world.size), step)
            grads = engine.gradients()
            engine.update(1.0)
            weights = engine.weights() | {f"loss.{name}": p.detach().cpu() for name, p in loss.named_parameters()}
            if plain is not None:
                for name, apart in plain.step(batch(config, step, 0, 1), value, grads, weights).items():
                    worst[name] = max(worst[name], apart)
    context.predicted["gradient_check"] = {"steps": STEPS, **worst}
    told = ", ".join(f"{name} {apart:.0e}" for name, apart in worst.items())
    found, need = f"off by {told} after {STEPS} steps", f"at most {LIMIT:.0e} from a plain loop"
    if not max(worst.values()) <= LIMIT:
        fix = "try runtime.zero=0, runtime.micro_batch=0 and exchange=gather one by one, and report which mends it"
        return Found("FAIL", found, need, fix)
    return Found("ok", found, need)


class Plain:
    """The same model in a plain loop of one process, without DeepSpeed, micro-batches or an exchange."""

    def __init__(self, towers: TwoTower, loss: ContrastiveLoss, optim: OptimConfig) -> None:
        self.towers, self.loss, self.optim = towers, loss, optim
        self.optimizer = torch.optim.SGD(towers.parameters(), lr=optim.lr)
        self.loss_optimizer = torch.optim.AdamW(
            loss.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0
        )

    def step(
        self, batch: Batch, value: float, grads: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> dict[str, float]:
        """One step; how far the loss, the gradients (of the largest) and the parameters behind it are from the given.

        The gradients of the loss's own parameters are compared as they are.
        """
        device = next(self.towers.parameters()).device
        image, text = self.towers(batch.views.to(device), batch.tokens.to(device))
        ids = batch.image_id.to(device), batch.caption_id.to(device)
        loss = self.loss(Features(image, text[batch.text_row.to(device)], *ids))
        for module in (self.towers, self.loss):
            module.zero_grad()
        loss.backward()
        own = {name: p.grad for name, p in self._named() if p.grad is not None}
        largest = max(float(grad.abs().max()) for name, grad in own.items() if not name.startswith("loss."))
        apart = {name: _apart(grads[name], grad) for name, grad in own.items()}
        gradient = max(far / (1 if name.startswith("loss.") else largest) for name, far in apart.items())
        nn.utils.clip_grad_norm_(self.towers.parameters(), self.optim.grad_clip_norm or math.inf)
        for optimizer in (self.optimizer, self.loss_optimizer):
            optimizer.step()
        self.loss.clamp()
        parameter = max(_apart(weights[name], p) for name, p in self._named())
        return {"loss": abs(float(loss.detach()) - value), "gradient": gradient, "parameter": parameter}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        own = ((f"loss.{name}", p) for name, p in self.loss.named_parameters())
        return [*self.towers.named_parameters(), *own]


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN, which is no small number, if there is one."""
    return float((one - other.detach().float().cpu()).abs().max())


def small(config: RunConfig, world: World) -> RunConfig:
    """`config` for a check of seconds: few blocks and samples, but as many ranks and ways between them."""
    runtime, chosen = config.runtime, config.runtime.activation_checkpointing
    everywhere: dict[str, Blocks] = {
        side: "none" if blocks in ("none", ()) else "all" for side, blocks in dataclasses.asdict(chosen).items()
    }
    return dataclasses.replace(
        config,
        image=shallow(config.image),
        text=shallow(config.text),
        optim=OptimConfig(name="sgd", lr=0.01, weight_decay=0.0, grad_clip_norm=config.optim.grad_clip_norm),
        schedule=dataclasses.replace(config.schedule, global_batch=2 * FEW * world.size),
        precision="fp32",
        runtime=dataclasses.replace(
            runtime,
            micro_batch=FEW if runtime.micro_batch else 0,
            activation_checkpointing=ActivationCheckpointing(**everywhere),
            compile=False,
        ),
    )


def shallow(tower: Any) -> Any:
    """A tower's config with at most two blocks, or one in each stage."""
    fields = {name: getattr(tower, name) for name in ("depth", "depths", "layers") if hasattr(tower, name)}
    cut = {name: min(v, 2) if isinstance(v, int) else tuple(min(d, 1) for d in v) for name, v in fields.items()}
    return dataclasses.replace(tower, **cut)


def batch(config: RunConfig, step: int, rank: int, world: int) -> Batch:
    """A rank's part of a made-up global batch; its last sample has the caption of its first."""
    draw, size = torch.Generator().manual_seed(step), config.schedule.global_batch
    side, context = config.image.image_size, config.text.context
    views = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(0, VOCABULARY - 1, (size - 1, context), generator=draw)
    tokens[:, -1] = VOCABULARY - 1
    mine = torch.arange(rank, size, world)
    caption_id, text_row = (mine % (size - 1)).unique(return_inverse=True)
    return Batch(views[mine], tokens[caption_id], text_row, mine, (mine % (size - 1))[:, None])
