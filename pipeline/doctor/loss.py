"""Checks of the loss: its parameters, and the predicted cost of a global batch, from a few measured tiles."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check
from clipwright.pipeline.doctor.model import free_device_memory
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features
from clipwright.pipeline.losses.tiles import tile_shape
from clipwright.pipeline.measure import seconds_of
from clipwright.pipeline.train.config import RunConfig

RUNS = 3  # timed runs per size, after one warmup
TRIAL_PAIRS = 4


@check("loss fit", "config")
def fit(context: DoctorContext) -> CheckResult:
    """The loss accepts embeddings of this size, and its parameters are such that the engine can step and save them.

    Runs it on a few random embeddings, since a loss may come from a plugin.
    """
    config = context.config
    loss = LOSSES.build(config.loss, embed_dim=config.embed_dim).to(context.world.device)
    parameters = dict(loss.named_parameters())
    found = f"{config.loss.name}, embed_dim {config.embed_dim}, parameters: {', '.join(parameters) or 'none'}"
    need = "a finite loss; parameters float32 of shape (1,), each with a gradient"
    problems: list[str] = []
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32 or parameter.shape != (1,):
            problems.append(f"{name} is {parameter.dtype} {tuple(parameter.shape)}")
    features, inputs = random_features(context, TRIAL_PAIRS)
    value = loss(features)
    grads = torch.autograd.grad(value, [*inputs, *parameters.values()], allow_unused=True)
    for name, grad in zip(parameters, grads[len(inputs) :], strict=True):
        if grad is None:
            problems.append(f"{name} is not used")
    finite = all(bool(torch.isfinite(x).all()) for x in (value, *grads) if x is not None)
    if value.shape != () or not finite:
        problems.append(f"the loss of {format_count(TRIAL_PAIRS, 'random pair')} is {value.tolist()}")
    if problems:
        return CheckResult("FAIL", f"{found}; {', '.join(problems)}", need, "choose another loss, or fix the plugin's")
    return CheckResult("ok", found, need)


@check("loss", "loss fit", "threads")
def loss(context: DoctorContext) -> CheckResult:
    """Seconds and memory of the loss per step on each rank: forward, backward, feature gradients."""
    config, world = context.config, context.world
    module = LOSSES.build(config.loss, embed_dim=config.embed_dim).to(world.device)
    images = config.schedule.global_batch // world.size
    seconds = predict_seconds(context, module, images, world.size)
    size = loss_bytes(config, images, world.size, tile_shape(world.device))
    context.predicted |= {"loss_seconds": seconds, "loss_bytes": size}
    free = free_device_memory(context)
    if world.device.type == "cpu":
        free //= world.local_size
    texts = sum(text_counts(config, images)) * world.size
    found = (
        f"{seconds:.3g} s and {size / 2**20:.0f} MiB per step and rank: {format_count(images, 'image')} "
        f"× {format_count(texts, 'text')}"
    )
    need = f"at most the {free / 2**20:,.0f} MiB available"
    if size > free:
        fix = "lower schedule.global_batch, set runtime.exchange=ring, or use more ranks"
        return CheckResult("FAIL", found, need, fix)
    return CheckResult("ok", found, need)


def text_counts(config: RunConfig, images: int) -> tuple[int, int]:
    """Returns the number of captions and of hard negatives that belong to `images` images."""
    data = config.data
    negatives = 0 if data.negatives is None else images * data.negative_count
    return images * data.captions, negatives


def predict_seconds(context: DoctorContext, module: ContrastiveLoss, images: int, world: int) -> float:
    """Predicts seconds of one rank's part from two measured sizes of complete tiles.

    The cost of all pairs grows with the square of the size; that of the pairs near the diagonal, where positives are
    marked, grows linearly.
    """
    rows = max(min(images // 2, max(tile_shape(context.world.device))), 1)
    single = measure_seconds(context, module, rows)
    double = measure_seconds(context, module, 2 * rows)
    quadratic = max(double / 2 - single, 0.0)
    linear = max(2 * single - double / 2, 0.0)
    return quadratic * (images / rows) ** 2 * world + linear * images / rows


def measure_seconds(context: DoctorContext, module: ContrastiveLoss, rows: int) -> float:
    """Returns the least seconds of forward and backward on `rows` images and their texts, after one warmup."""
    features, inputs = random_features(context, rows)

    def forward_backward() -> None:
        torch.autograd.grad(module(features), inputs)

    times = [seconds_of(forward_backward, context.world.device) for _ in range(RUNS + 1)]
    return min(times[1:])


def random_features(context: DoctorContext, rows: int) -> tuple[Features, list[torch.Tensor]]:
    """Returns random unit embeddings of `rows` images and their texts, all distinct, and the inputs with gradients."""
    device = context.world.device
    sizes = (rows, *text_counts(context.config, rows))
    generator = torch.Generator().manual_seed(0)
    image, text, negative = (
        F.normalize(torch.randn(size, context.config.embed_dim, generator=generator), dim=1).to(device).requires_grad_()
        for size in sizes
    )
    ids = torch.arange(sum(sizes), device=device)
    features = Features(image, text, ids[:rows], ids[: len(text)].view(rows, -1))
    if len(negative) == 0:
        return features, [image, text]
    features.negative = negative
    features.negative_id = ids[-len(negative) :]
    features.negative_present = torch.ones_like(features.negative_id, dtype=torch.bool)
    return features, [image, text, negative]


def loss_bytes(config: RunConfig, images: int, world: int, tile: tuple[int, int]) -> int:
    """Returns the bytes the loss takes besides the features of a rank: gradients, exchanged embeddings, one tile.

    With `exchange: gather`: the texts of all ranks, their gradients, and this rank's slice of these. With `ring`: two
    blocks of texts and three of gradients. Hard negatives come after the captions, whose slice is kept. Matryoshka
    dims have copies of their own, with gradients.
    """
    texts, negatives = text_counts(config, images)
    if world == 1:
        embeddings = images + texts + negatives
    elif config.runtime.exchange == "ring":
        embeddings = images + max(5 * texts, texts + 5 * negatives)
    else:
        gathered = world * (texts + negatives)
        embeddings = images + gathered + max((world + 1) * texts, texts + (world + 1) * negatives)
    truncated = sum(dim for dim in config.loss.matryoshka.dims if dim < config.embed_dim)
    numbers = embeddings * config.embed_dim + 2 * (images + texts + negatives) * truncated
    ids = 64 * (images + world * (texts + negatives))  # sorted copies of the ids, log-sum-exps, counts
    buffers = math.prod(tile) * (2 * 4 + 3)  # two float32 tiles and three masks
    return 4 * numbers + ids + buffers
