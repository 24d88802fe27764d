"""The DeepSpeed engine, and the only importer of DeepSpeed: one step of a two-tower model on any number of ranks.

A step computes the exact gradient of the global batch, whatever fits into memory at once: gradients are accumulated
with cached features (GradCache). The loss sees the features of all samples, the towers `runtime.micro_batch` samples at
a time (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").

Workarounds for DeepSpeed 0.19 on a CPU, each with a test in test_deepspeed.py:
- The first init_distributed compiles `deepspeed_shm_comm`, which needs a compiler and prints to stdout: switched off.
- If `gradient_clipping` is left out, gradients are clipped to 1.0: always stated.
- ZeRO 0 in fp32 reports no gradient norm and applies a non-finite update, which ZeRO 1-3 skip: the norm is computed
  here, before the step. This needs gradients that are reduced by then, so the accumulation boundary is set by hand;
  with `managed_gradient_accumulation: false` ZeRO 0 and 1 reduce them inside `step()` only.
- ZeRO 3 accumulates wrong gradients, from the second step on, if the towers are called separately: one call for both.
- Under ZeRO 1-3 a clamp of a parameter after the step is lost, and a 0-dimensional parameter crashes `initialize`: the
  loss stays outside, with a small optimizer of its own.
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

from clipwright.pipeline.core.log import silence_libraries
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.data.order import key64
from clipwright.pipeline.distributed.exchange import EXCHANGES
from clipwright.pipeline.distributed.group import World, all_reduce_sum
from clipwright.pipeline.losses.base import Features, LossTerm
from clipwright.pipeline.losses.tiles import batch_accuracy
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.tokenizers.base import LENGTH_STEP
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.optimizer_state import StateTensor, read_state, state_layout, state_slices
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS, build_optimizer
from clipwright.pipeline.train.supervision.progress import enter_phase

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
silence_libraries()
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
silence_libraries()


@dataclass
class StepResult:
    """Numbers of one step over the global batch; accuracies and negatives only if they were measured.

    negatives: texts that an image was compared with, other than its own; hard negatives included.
    """

    loss: float
    grad_norm: float
    acc_image: float | None = None
    acc_text: float | None = None
    negatives: int | None = None

    @property
    def skipped(self) -> bool:
        """Whether no update was made, on all ranks alike, because the loss or a gradient is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's config, a pure function of ours.

    It states no micro-batches: the engine sets the gradient accumulation boundary itself.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.schedule.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": config.schedule.global_batch,
        "gradient_clipping": config.optim.grad_clip_norm,
        "zero_optimization": {"stage": config.runtime.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if config.runtime.offload == "optimizer":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False  # its own AdamW is C++ that is compiled at first use
    if config.precision == "bf16":
        # fp32 parameters and autocast; `bf16.enabled` would cast every parameter.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings


class Engine:
    """A DeepSpeed engine for the towers, and the replicated loss beside it."""

    def __init__(self, towers: TwoTower, loss: LossTerm, config: RunConfig, world: World) -> None:
        self.world, self.loss, self.config, self.zero = world, loss, config, config.runtime.zero
        optimizer = build_optimizer(towers, config.optim, towers.no_weight_decay())
        # DeepSpeed caches a clone of the first process group it saw, which this process may have left since.
        deepspeed.utils.groups._WORLD_GROUP = None  # pyright: ignore[reportPrivateImportUsage]
        initialized: Any = deepspeed.initialize(
            model=towers, optimizer=optimizer, config=deepspeed_config(config, world.size), dist_init_required=False
        )
        self.engine, self.optimizer = initialized[0], initialized[1]
        self.updates = 0  # of the towers so far
        self.loss_optimizer = build_optimizer(loss, OPTIMIZERS.preset("adamw", lr=config.optim.lr, weight_decay=0.0))

    @property
    def towers(self) -> TwoTower:
        return self.engine.module

    def step(self, batch: Batch, step: int, lr_factor: float, *, measure: bool) -> StepResult:
        """Runs step number `step`: the exact global gradient and one update, which is skipped if it is not finite.

        measure: whether to compute accuracies and negatives.
        """
        loss, features = self.backward(batch, step)
        result = StepResult(loss, self.update(lr_factor))
        if measure:
            correct_images, correct_texts, columns = batch_accuracy(features)
            hard_negatives = all_reduce_sum((batch.negative_row >= 0).sum().to(self.world.device))
            result.negatives = columns - 1 + int(hard_negatives)
            correct = all_reduce_sum(torch.stack([correct_images, correct_texts]))
            result.acc_image = float(correct[0]) / (len(features.image) * self.world.size)
            result.acc_text = float(correct[1]) / (len(features.text) * self.world.size)
        return result

    def backward(self, batch: Batch, step: int) -> tuple[float, Features]:
        """Returns the loss of the global batch and this rank's features; leaves the gradients to `update`.

        The loss is computed on leaves: the features of the whole batch or, with micro-batches, features embedded
        without a graph, one micro-batch at a time. Its feature gradients, already exchanged between ranks, are
        backpropagated through the surrogate Σ f·g, for which each micro-batch is embedded a second time with the same
        draws of dropout. DeepSpeed averages gradients over ranks, hence the factor `world.size`; gradients of the
        loss's own parameters are summed here. If the loss or one of those gradients is not finite, the towers'
        gradients become NaN too, so that their global norm alone decides whether the step is skipped.
        """
        parts = micro_batches(batch, self.config.runtime.micro_batch)
        use_cached_features = len(parts) > 1
        self.statistics = statistics = RunningStatistics(self.towers)
        enter_phase("embed")
        with torch.no_grad() if use_cached_features else nullcontext():
            pairs = [self._embed(part, step, number) for number, part in enumerate(parts)]
        image, text = (torch.cat(side).detach().float().requires_grad_() for side in zip(*pairs, strict=True))
        enter_phase("exchange")
        features = self._features(image, text, batch)
        loss = self.loss(features)
        parameters = [p for p in self.loss.parameters() if p.requires_grad]
        *parameter_grads, image_grad, text_grad = torch.autograd.grad(loss, [*parameters, image, text])
        for parameter, grad in zip(parameters, parameter_grads, strict=True):
            parameter.grad = all_reduce_sum(grad)
        total = all_reduce_sum(loss.detach().clone())
        summed_grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # NaN if one of them is not finite, without a synchronization with the device.
        factor = self.world.size + 0 * (total + sum(grad.sum() for grad in summed_grads))
        grad_parts = zip(
            image_grad.split([len(part.views) for part in parts]),
            text_grad.split([len(part.tokens) for part in parts]),
            strict=True,
        )
        enter_phase("backward")
        for number, (part, part_grads) in enumerate(zip(parts, grad_parts, strict=True)):
            if use_cached_features:
                statistics.restore()
                pairs[number] = self._embed(part, step, number)
            surrogate = sum((f.float() * g).sum() for f, g in zip(pairs[number], part_grads, strict=True))
            self.engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            self.engine.backward(surrogate * factor, scale_wrt_gas=False)
            if use_cached_features:
                statistics.accumulate(len(part.views) / len(image))
        if use_cached_features:
            statistics.apply_mean()
        return float(total), features

    def _embed(self, part: Batch, step: int, number: int) -> tuple[Tensor, Tensor]:
        # The seed is a function of what is embedded, so that the second pass and a resumed run repeat the draws.
        torch.manual_seed(key64("step", self.config.seed, step, self.world.rank, number) >> 1)
        return self.engine(part.images(self.world.device), part.tokens.to(self.world.device))

    def _features(self, image: Tensor, text: Tensor, batch: Batch) -> Features:
        """Returns the loss's input; text (u, E): one row per distinct caption."""
        device = self.world.device
        features = Features(
            image=image,
            text=text[batch.text_row.to(device)],
            image_id=batch.image_id.to(device),
            caption_id=batch.caption_id.to(device),
            exchange=EXCHANGES[self.config.runtime.exchange],
        )
        if len(batch.negative_row):
            negative_row = batch.negative_row.to(device)
            features.negative = text[negative_row.clamp_min(0)]
            features.negative_id = batch.negative_id.to(device)
            features.negative_present = negative_row >= 0
        return features

    def update(self, lr_factor: float) -> float:
        """Applies one update with the gradients of `backward`; returns the global norm before clipping.

        lr_factor: the learning rate as a share of its peak. If the norm is not finite, nothing changes: weights, the
        states of both optimizers and running statistics stay as they are.
        """
        enter_phase("update")
        for group in (*self.optimizer.param_groups, *self.loss_optimizer.param_groups):
            group["lr"] = self.config.optim.lr * lr_factor
        norm_before_step = self._norm_before_step()
        if norm_before_step is None or math.isfinite(norm_before_step):
            self.engine.step()
        else:
            self.engine.zero_grad()
        norm = float(self.engine.get_global_grad_norm() if norm_before_step is None else norm_before_step)
        if math.isfinite(norm):
            self.updates += 1
            self.loss_optimizer.step()
            self.loss.clamp()
        else:
            self.loss_optimizer.zero_grad()
            self.statistics.restore()
        return norm

    def gradients(self) -> dict[str, Tensor]:
        """Returns complete unclipped gradients, between `backward` and `update`; every rank must call it.

        Those of the loss are named `loss.NAME`.
        """
        named = {name: deepspeed.utils.safe_get_full_grad(p) for name, p in self.towers.named_parameters()}
        for name, parameter in self.loss.named_parameters():
            named[f"loss.{name}"] = parameter.grad
        return {name: grad.detach().float().cpu().clone() for name, grad in named.items() if grad is not None}

    def _norm_before_step(self) -> float | None:
        """Returns the global gradient norm if DeepSpeed reports none: under ZeRO 0, where ranks have all gradients."""
        if self.zero > 0:
            return None
        grads = [p.grad for p in self.towers.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))

    def weights(self) -> dict[str, Tensor]:
        """Returns copies of the towers' complete fp32 state on rank 0, elsewhere nothing; every rank must call it."""
        self._average_running_statistics()
        gathered: dict[str, Tensor] = {}
        if self.zero == 3:
            for name, parameter in self.towers.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                    if self.world.is_rank0:
                        gathered[name] = parameter.detach().to("cpu", copy=True)
        if not self.world.is_rank0:
            return {}
        for name, tensor in self.towers.state_dict().items():
            if name not in gathered:
                gathered[name] = tensor.detach().to("cpu", copy=True)
        return gathered

    def nonfinite_weight(self) -> str | None:
        """Returns the name of a parameter that is not finite in what this rank holds of the towers and the loss."""
        for name, parameter in (*self.towers.named_parameters(), *self.loss.named_parameters(prefix="loss")):
            held: Tensor = getattr(parameter, "ds_tensor", parameter)  # under ZeRO 3, this rank's partition
            if not bool(torch.isfinite(held).all()):
                return name
        return None

    def _average_running_statistics(self) -> None:
        """Averages batch-norm statistics over ranks; DeepSpeed synchronizes no buffers."""
        for buffer in RunningStatistics(self.towers).buffers:
            if self.world.size > 1 and buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world.size

    def optimizer_state(self) -> dict[str, Tensor]:
        """Returns copies of the optimizer state that this rank writes; see `optimizer_state.py`."""
        return state_slices(
            self._torch_optimizer.state, self._state_layout(), self.zero, self.world.rank, self.world.size
        )

    def restore_optimizer(self, files: Iterable[Path], updates: int) -> None:
        """Restores the towers' optimizer state after `updates` updates from files of any layout."""
        count = updates if self.config.optim.counts_updates else None
        read_state(self._torch_optimizer, self._state_layout(), files, count)
        self.updates = updates

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of `build_optimizer`, which DeepSpeed wraps from ZeRO 1 on."""
        return self.optimizer.optimizer if self.zero else self.optimizer

    def _state_layout(self) -> list[StateTensor]:
        names = {parameter: name for name, parameter in self.towers.named_parameters()}
        return state_layout(self.optimizer, self.zero, names, self.world.rank, self.world.size)


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Splits a batch's views and tokens into equal parts of at most `size` samples; 0: one part.

    The other fields of each part are those of the whole batch. The tokens of a part are trimmed to its own longest
    caption; the loader puts captions of similar length side by side. Each part has a caption, so that each goes through
    both towers: with fewer captions than parts, the last parts repeat the first caption, after the batch's own, where
    no row of features refers to it and its gradient is zero.
    """
    count = -(-len(batch.views) // size) if size else 1
    views = batch.views.tensor_split(count)
    jitters = [None] * count if batch.color_jitter is None else batch.color_jitter.tensor_split(count)
    tokens = [part if len(part) else batch.tokens[:1] for part in batch.tokens.tensor_split(count)]
    if batch.lengths is not None:
        for number, part in enumerate(batch.lengths.tensor_split(count)):
            longest = int(part.max() if len(part) else batch.lengths[0])
            tokens[number] = tokens[number][:, : -(-longest // LENGTH_STEP) * LENGTH_STEP]
    return [
        dataclasses.replace(batch, views=part_views, color_jitter=part_jitters, tokens=part_tokens)
        for part_views, part_jitters, part_tokens in zip(views, jitters, tokens, strict=True)
    ]


class RunningStatistics:
    """Batch norm's running statistics, which move once per step: to the mean over micro-batches."""

    def __init__(self, towers: TwoTower) -> None:
        names = ("running_mean", "running_var", "num_batches_tracked")
        self.buffers = [buffer for name, buffer in towers.named_buffers() if name.endswith(names)]
        self.before = [buffer.clone() for buffer in self.buffers]
        self.mean = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in self.buffers]

    def restore(self) -> None:
        """Restores the statistics of before the step."""
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(before)

    def accumulate(self, weight: float) -> None:
        """Adds the current statistics to the mean; weight: the micro-batch's share of the batch."""
        for buffer, mean in zip(self.buffers, self.mean, strict=True):
            mean += weight * buffer

    def apply_mean(self) -> None:
        for buffer, mean in zip(self.buffers, self.mean, strict=True):
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())
