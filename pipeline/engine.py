"""DeepSpeed, and the only importer of it: one step of a contrastive model on any number of ranks.

Works around what DeepSpeed 0.19 does on a CPU (each line has a test):
- the first init_distributed compiles `deepspeed_shm_comm`, which needs a compiler and prints to stdout: switched off;
- `gradient_clipping` left out means 1.0: always stated;
- ZeRO 0 in fp32 reports no gradient norm: computed here, before the step;
- a clamp of a parameter after the step is lost under ZeRO 1-3, and a 0-dimensional parameter crashes `initialize`:
  the loss stays outside, with a small optimiser of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipwright.pipeline.core.log import quiet_libraries
from clipwright.pipeline.data.loader import Batch
from clipwright.pipeline.distributed import Block, GatheredColumns, World, sum_ranks
from clipwright.pipeline.losses.base import ContrastiveLoss, Features
from clipwright.pipeline.model import TwoTower
from clipwright.pipeline.optim import OptimConfig, make_optimizer

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet_libraries()
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
quiet_libraries()


@dataclass
class StepResult:
    """Numbers of one step, over the global batch; the accuracies only where they were asked for."""

    loss: float
    grad_norm: float
    acc_image: float | None = None
    acc_text: float | None = None


def deepspeed_config(optim: OptimConfig, *, local_batch: int, world: int, zero: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's dictionary, a pure function of our config."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": local_batch * world,
        "gradient_clipping": optim.clip,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        # fp32 parameters and autocast; `bf16.enabled` would cast every parameter.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


class Engine:
    """A DeepSpeed engine for the towers and a replicated loss beside it."""

    def __init__(
        self, towers: TwoTower, loss: ContrastiveLoss, optim: OptimConfig, world: World, config: dict[str, Any]
    ) -> None:
        self.world, self.loss, self.optim, self.zero = world, loss, optim, config["zero_optimization"]["stage"]
        optimizer = make_optimizer(towers, optim, towers.no_weight_decay())
        made: Any = deepspeed.initialize(model=towers, optimizer=optimizer, config=config, dist_init_required=False)
        self.engine, self.optimizer = made[0], made[1]
        self.loss_optimizer = make_optimizer(loss, OptimConfig(lr=optim.lr, weight_decay=0.0))

    @property
    def towers(self) -> TwoTower:
        return self.engine.module

    def step(self, batch: Batch, lr_factor: float, *, measure: bool) -> StepResult:
        """Forward, exact global contrastive gradient, update. Non-finite values are returned, not raised.

        The loss is computed on leaves; its feature gradients, already exchanged between ranks, are fed back through
        Σ f·g. DeepSpeed averages gradients over ranks, hence the factor `world`.
        """
        device = self.world.device
        for group in (*self.optimizer.param_groups, *self.loss_optimizer.param_groups):
            group["lr"] = self.optim.lr * lr_factor
        image, text = self.engine(batch.views.to(device), batch.tokens.to(device))
        text = text[batch.text_row.to(device)]
        features = Features(
            image=image.detach().float().requires_grad_(),
            text=text.detach().float().requires_grad_(),
            image_id=batch.image_id.to(device),
            caption_id=batch.caption_id.to(device),
            exchange=GatheredColumns,
        )
        loss = self.loss(features)
        parameters = [p for p in self.loss.parameters() if p.requires_grad]
        image_grad, text_grad, *own = torch.autograd.grad(loss, [features.image, features.text, *parameters])
        surrogate = (image.float() * image_grad).sum() + (text.float() * text_grad).sum()
        self.engine.backward(surrogate * self.world.size)
        before = self._norm_before_step()
        self.engine.step()
        norm = before if before is not None else self.engine.get_global_grad_norm()
        assert norm is not None
        for parameter, grad in zip(parameters, own, strict=True):
            parameter.grad = sum_ranks(grad)
        self.loss_optimizer.step()
        self.loss.constrain()
        result = StepResult(float(sum_ranks(loss.detach().clone())), float(norm))
        if measure:
            correct = sum_ranks(torch.stack(_correct(features)))
            result.acc_image = float(correct[0]) / (len(features.image) * self.world.size)
            result.acc_text = float(correct[1]) / (len(features.text) * self.world.size)
        return result

    def _norm_before_step(self) -> float | None:
        """The global gradient norm where DeepSpeed reports none: ZeRO 0, whose gradients are whole on every rank."""
        if self.zero > 0:
            return None
        grads = [p.grad for p in self.towers.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))

    def weights(self) -> dict[str, Tensor]:
        """The towers' whole fp32 state on rank 0 (elsewhere empty under ZeRO 3); every rank must call."""
        self._average_running_statistics()
        if self.zero < 3:
            return {name: tensor.detach().cpu() for name, tensor in self.towers.state_dict().items()}
        whole: dict[str, Tensor] = {}
        for name, parameter in self.towers.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                if self.world.first:
                    whole[name] = parameter.detach().cpu().clone()
        if self.world.first:
            buffers = {name for name, _ in self.towers.named_buffers()}
            state = self.towers.state_dict()
            whole |= {name: state[name].detach().cpu() for name in state if name in buffers}
        return whole

    def _average_running_statistics(self) -> None:
        """Batch-norm statistics differ between ranks (nothing synchronises buffers): make them the average."""
        for name, buffer in self.towers.named_buffers():
            if self.world.size > 1 and name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= self.world.size

    def save(self, folder: Path) -> None:
        """DeepSpeed's own files, for this world size and stage, under `folder`/deepspeed; every rank must call."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. The caller has checked every file against the checkpoint's manifest."""
        found, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed")
        assert found is not None, folder  # DeepSpeed says so, and goes on, when it finds nothing


@torch.no_grad()
def _correct(features: Features) -> tuple[Tensor, Tensor]:
    """How many of this rank's images and texts rank one of their positives first among the global batch.

    Positives are the loss's: equal image bytes or equal captions, so that class-name captions count as they should.
    """
    image = features.image.float()
    best, best_positive = (torch.full_like(image[:, 0], -torch.inf) for _ in range(2))

    def compare(block: Block) -> tuple[Tensor, Tensor]:
        scores = image @ block["text"].float().T
        positive = scores.masked_fill(~features.positive(block), -torch.inf)
        best.copy_(torch.maximum(best, scores.amax(1)))
        best_positive.copy_(torch.maximum(best_positive, positive.amax(1)))
        return scores.amax(0), positive.amax(0)

    text_best, text_positive = features.columns().reduce(compare, ["max", "max"])
    return (best == best_positive).sum().float(), (text_best == text_positive).sum().float()
