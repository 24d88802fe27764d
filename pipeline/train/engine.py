"""DeepSpeed, and the only importer of it: one step of a contrastive model on any number of ranks.

A step is the exact gradient of the global batch, whatever fits into memory at once: the loss sees the features of all
samples, the towers `runtime.micro_batch` at a time (Gao et al. 2021, "Scaling deep contrastive learning batch size
under memory limited setup").

Works around what DeepSpeed 0.19 does on a CPU (each line has a test):
- the first init_distributed compiles `deepspeed_shm_comm`, which needs a compiler and prints to stdout: switched off;
- `gradient_clipping` left out means 1.0: always stated;
- ZeRO 0 in fp32 reports no gradient norm and steps by one that is not finite, which ZeRO 1-3 skip: computed here,
  before the step;
- ZeRO 3 accumulates wrongly, from the second step on, when the towers are called apart: one call for both;
- a clamp of a parameter after the step is lost under ZeRO 1-3, and a 0-dimensional parameter crashes `initialize`:
  the loss stays outside, with a small optimiser of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipwright.pipeline.core.log import quiet_libraries
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.data.order import key64
from clipwright.pipeline.distributed.exchange import EXCHANGES
from clipwright.pipeline.distributed.group import World, all_reduce_sum
from clipwright.pipeline.losses.base import ContrastiveLoss, Features
from clipwright.pipeline.losses.tiles import batch_accuracy
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.tokenizers.base import LENGTH_STEP
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.optim import OptimConfig, make_optimizer
from clipwright.pipeline.train.optimizer_state import Held, layout, restore, slices
from clipwright.pipeline.train.supervision.progress import enter_phase

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet_libraries()
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
quiet_libraries()


@dataclass
class StepResult:
    """Numbers of one step, over the global batch; accuracies and negatives only where they were asked for.

    negatives: columns that an image was compared with, less one; wrong captions count.
    """

    loss: float
    grad_norm: float
    acc_image: float | None = None
    acc_text: float | None = None
    negatives: int | None = None

    @property
    def skipped(self) -> bool:
        """Whether no update was made, on all ranks alike, since the loss or a gradient is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, a pure function of our config.

    It knows nothing of micro-batches: the engine says which one is a step's last.
    """
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.schedule.global_batch // world,
        "gradient_accumulation_steps": 1,
        "train_batch_size": config.schedule.global_batch,
        "gradient_clipping": config.optim.grad_clip_norm,
        "zero_optimization": {"stage": config.runtime.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if config.runtime.offload == "optimizer":
        made["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        made["zero_force_ds_cpu_optimizer"] = False  # its own AdamW is C++, compiled when it is first used
    if config.precision == "bf16":
        # fp32 parameters and autocast; `bf16.enabled` would cast every parameter.
        made["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return made


class Engine:
    """A DeepSpeed engine for the towers and a replicated loss beside it."""

    def __init__(self, towers: TwoTower, loss: ContrastiveLoss, config: RunConfig, world: World) -> None:
        self.world, self.loss, self.config, self.zero = world, loss, config, config.runtime.zero
        optim = config.optim
        optimizer = make_optimizer(towers, optim, towers.no_weight_decay())
        settings = deepspeed_config(config, world.size)
        # Its clone of the first process group it saw, which this process may have left for another.
        deepspeed.utils.groups._WORLD_GROUP = None  # pyright: ignore[reportPrivateImportUsage]
        made: Any = deepspeed.initialize(model=towers, optimizer=optimizer, config=settings, dist_init_required=False)
        self.engine, self.optimizer = made[0], made[1]
        self.updates = 0  # of the towers so far
        self.loss_optimizer = make_optimizer(loss, OptimConfig(lr=optim.lr, weight_decay=0.0))

    @property
    def towers(self) -> TwoTower:
        return self.engine.module

    def step(self, batch: Batch, step: int, lr_factor: float, *, measure: bool) -> StepResult:
        """Step number `step`: exact global gradient, update. Where something is not finite nothing is updated."""
        loss, features = self.backward(batch, step)
        result = StepResult(loss, self.update(lr_factor))
        if measure:
            *correct, columns = batch_accuracy(features)
            wrong = all_reduce_sum((batch.negative_row >= 0).sum().to(self.world.device))
            result.negatives = columns - 1 + int(wrong)
            both = all_reduce_sum(torch.stack(correct))
            result.acc_image = float(both[0]) / (len(features.image) * self.world.size)
            result.acc_text = float(both[1]) / (len(features.text) * self.world.size)
        return result

    def backward(self, batch: Batch, step: int) -> tuple[float, Features]:
        """The loss of the global batch and this rank's features; the gradients are left to `update`.

        The loss is computed on leaves: of a whole batch's features, or of those embedded without a graph, micro-batch
        by micro-batch. Its feature gradients, already exchanged between ranks, are fed back through Σ f·g, where a
        micro-batch is embedded a second time with the same draws of dropout. DeepSpeed averages gradients over ranks,
        hence the factor `world`; the gradients of the loss's own parameters are summed here. Where the loss or one of
        those is not finite the towers' gradients are not either, so that their norm alone, which DeepSpeed computes
        over all ranks, decides whether a step is skipped.
        """
        parts = micro_batches(batch, self.config.runtime.micro_batch)
        replayed = len(parts) > 1
        self.statistics = statistics = _Statistics(self.towers)
        enter_phase("embed")
        with torch.no_grad() if replayed else nullcontext():
            pairs = [self._embed(part, step, number) for number, part in enumerate(parts)]
        image, text = (torch.cat(side).detach().float().requires_grad_() for side in zip(*pairs, strict=True))
        enter_phase("exchange")
        features = self._features(image, text, batch)
        loss = self.loss(features)
        parameters = [p for p in self.loss.parameters() if p.requires_grad]
        *grads, image_grad, text_grad = torch.autograd.grad(loss, [*parameters, image, text])
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = all_reduce_sum(grad)
        total = all_reduce_sum(loss.detach().clone())
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        factor = self.world.size + 0 * (total + sum(grad.sum() for grad in own))  # NaN without asking the device
        grad_parts = zip(
            image_grad.split([len(part.views) for part in parts]),
            text_grad.split([len(part.tokens) for part in parts]),
            strict=True,
        )
        enter_phase("backward")
        for number, (part, part_grads) in enumerate(zip(parts, grad_parts, strict=True)):
            if replayed:
                statistics.restore()
                pairs[number] = self._embed(part, step, number)
            surrogate = sum((f.float() * g).sum() for f, g in zip(pairs[number], part_grads, strict=True))
            self.engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            self.engine.backward(surrogate * factor, scale_wrt_gas=False)
            if replayed:
                statistics.add(len(part.views) / len(image))
        if replayed:
            statistics.settle()
        return float(total), features

    def _embed(self, part: Batch, step: int, number: int) -> tuple[Tensor, Tensor]:
        # Dropout is a function of what is embedded: a replay and a resumed run draw what was drawn before.
        torch.manual_seed(key64("step", self.config.seed, step, self.world.rank, number) >> 1)
        return self.engine(part.images(self.world.device), part.tokens.to(self.world.device))

    def _features(self, image: Tensor, text: Tensor, batch: Batch) -> Features:
        """What the loss is told; text (u, E): a row for each different caption."""
        device, wrong = self.world.device, batch.negative_row.to(self.world.device)
        return Features(
            image=image,
            text=text[batch.text_row.to(device)],
            image_id=batch.image_id.to(device),
            caption_id=batch.caption_id.to(device),
            exchange=EXCHANGES[self.config.runtime.exchange],
            negative=text[wrong.clamp_min(0)] if len(wrong) else None,
            negative_id=batch.negative_id.to(device) if len(wrong) else None,
            negative_present=wrong >= 0 if len(wrong) else None,
        )

    def update(self, lr_factor: float) -> float:
        """One update from what `backward` left, at `lr_factor` of the configured rate; the norm before clipping.

        Where that is not finite nothing changes: weights, both optimisers' states and running statistics stay.
        """
        enter_phase("update")
        for group in (*self.optimizer.param_groups, *self.loss_optimizer.param_groups):
            group["lr"] = self.config.optim.lr * lr_factor
        before = self._norm_before_step()
        if before is None or math.isfinite(before):
            self.engine.step()
        else:
            self.engine.zero_grad()
        norm = float(before if before is not None else self.engine.get_global_grad_norm())
        if math.isfinite(norm):
            self.updates += 1
            self.loss_optimizer.step()
            self.loss.clamp()
        else:
            self.loss_optimizer.zero_grad()
            self.statistics.restore()
        return norm

    def gradients(self) -> dict[str, Tensor]:
        """The whole gradients between `backward` and `update`, unclipped, towers' and loss's; every rank must call."""
        named = {name: deepspeed.utils.safe_get_full_grad(p) for name, p in self.towers.named_parameters()}
        named |= {f"loss.{name}": p.grad for name, p in self.loss.named_parameters()}
        return {name: grad.detach().float().cpu().clone() for name, grad in named.items() if grad is not None}

    def _norm_before_step(self) -> float | None:
        """The global gradient norm where DeepSpeed reports none: ZeRO 0, whose gradients are whole on every rank."""
        if self.zero > 0:
            return None
        grads = [p.grad for p in self.towers.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))

    def weights(self) -> dict[str, Tensor]:
        """Copies of the towers' whole fp32 state on rank 0, elsewhere nothing; every rank must call."""
        self._average_running_statistics()
        whole: dict[str, Tensor] = {}
        if self.zero == 3:
            for name, parameter in self.towers.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                    if self.world.is_rank0:
                        whole[name] = parameter.detach().to("cpu", copy=True)
        if not self.world.is_rank0:
            return {}
        state = self.towers.state_dict()
        return whole | {name: state[name].detach().to("cpu", copy=True) for name in state if name not in whole}

    def _average_running_statistics(self) -> None:
        """Batch-norm statistics differ between ranks (nothing synchronises buffers): make them the average."""
        for buffer in _Statistics(self.towers).buffers:
            if self.world.size > 1 and buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world.size

    def optimizer_state(self) -> dict[str, Tensor]:
        """Copies of the optimiser's state that this rank is to write; see `optimizer_state.py`."""
        return slices(self._torch_optimizer.state, self._held(), self.zero, self.world.rank, self.world.size)

    def restore_optimizer(self, files: Iterable[Path], updates: int) -> None:
        """Takes over the towers' optimiser state after `updates` updates from what any layout wrote."""
        restore(self._torch_optimizer, self._held(), files, updates)
        self.updates = updates

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The one that `make_optimizer` made, which DeepSpeed wraps from ZeRO 1 on."""
        return self.optimizer.optimizer if self.zero else self.optimizer

    def _held(self) -> list[Held]:
        names = {parameter: name for name, parameter in self.towers.named_parameters()}
        return layout(self.optimizer, self.zero, names, self.world.rank, self.world.size)


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """A batch's views, with their colours, and its tokens in equally large parts of at most `size` samples; 0: in one.

    The parts' other fields are the whole batch's. A part's tokens are trimmed to its own longest caption; the loader
    puts captions of like length side by side. Each part has a caption, so that each goes through both towers. Where
    there are fewer captions than parts, the last parts repeat one behind the batch's own: no row of features points at
    it and its gradient is zero.
    """
    count = -(-len(batch.views) // size) if size else 1
    colors = [None] * count if batch.color_jitter is None else batch.color_jitter.tensor_split(count)
    texts = [part if len(part) else batch.tokens[:1] for part in batch.tokens.tensor_split(count)]
    if batch.lengths is not None:
        lengths = [part if len(part) else batch.lengths[:1] for part in batch.lengths.tensor_split(count)]
        wide = (-(-int(part.max()) // LENGTH_STEP) * LENGTH_STEP for part in lengths)
        texts = [part[:, :most] for part, most in zip(texts, wide, strict=True)]
    cut = zip(batch.views.tensor_split(count), colors, texts, strict=True)
    return [dataclasses.replace(batch, views=views, color_jitter=colors, tokens=text) for views, colors, text in cut]


class _Statistics:
    """Batch norm's running statistics, which move once a step: by the mean of what each replay would do alone."""

    def __init__(self, towers: TwoTower) -> None:
        names = ("running_mean", "running_var", "num_batches_tracked")
        self.buffers = [buffer for name, buffer in towers.named_buffers() if name.endswith(names)]
        self.before = [buffer.clone() for buffer in self.buffers]
        self.mean = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in self.buffers]

    def restore(self) -> None:
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(before)

    def add(self, share: float) -> None:
        for buffer, mean in zip(self.buffers, self.mean, strict=True):
            mean += share * buffer

    def settle(self) -> None:
        for buffer, mean in zip(self.buffers, self.mean, strict=True):
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())
