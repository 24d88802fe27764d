"""What the loss of a whole batch will cost: time from a few of its tiles, memory from its sizes."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F

from clipwright.pipeline.doctor.base import Context, Found, check
from clipwright.pipeline.doctor.model import free_on
from clipwright.pipeline.doctor.speed import synchronize
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features
from clipwright.pipeline.losses.tiles import tile_shape
from clipwright.pipeline.train.config import RunConfig

RUNS = 3
TRIED = 4  # pairs


@check("loss fit", "config")
def fit(context: Context) -> Found:
    """The loss against the model: vectors of its length, and parameters of its own as the engine steps and saves them.

    Tried on a few random vectors, since a loss may come from a plugin.
    """
    config, need = context.config, "finite; own parameters float32 of shape (1,), each with a gradient"
    made = LOSSES.build(config.loss, embed_dim=config.embed_dim).to(context.world.device)
    own = dict(made.named_parameters())
    told = ", ".join(own) or "none"
    found = f"{config.loss.name} of vectors of {config.embed_dim} numbers, own parameters: {told}"
    odd = {name: p for name, p in own.items() if (p.dtype, p.shape) != (torch.float32, (1,))}
    wrong = [f"{name} is {p.dtype} {tuple(p.shape)}" for name, p in odd.items()]
    features, sides = random_features(context, TRIED)
    value = made(features)
    grads = torch.autograd.grad(value, [*sides, *own.values()], allow_unused=True)
    wrong += [f"{name} has no part in it" for name, grad in zip(own, grads[len(sides) :], strict=True) if grad is None]
    if value.shape != () or not all(torch.isfinite(x).all() for x in (value, *grads) if x is not None):
        wrong.append(f"it is {value.tolist()} for {TRIED} random pairs")
    if wrong:
        return Found("FAIL", f"{found}; {', '.join(wrong)}", need, "choose another loss, or mend the plugin's")
    return Found("ok", found, need)


@check("loss", "loss fit", "threads")
def loss(context: Context) -> Found:
    """Seconds and bytes that a step's loss takes on each rank: forward, backward, feature gradients."""
    config, world = context.config, context.world
    made = LOSSES.build(config.loss, embed_dim=config.embed_dim).to(world.device)
    images = config.schedule.global_batch // world.size
    seconds = predicted(context, made, images, world.size)
    size = loss_bytes(config, images, world.size, tile_shape(world.device))
    context.predicted |= {"loss_seconds": seconds, "loss_bytes": size}
    free = free_on(context) // (world.local_size if world.device.type == "cpu" else 1)
    texts = sum(columns(config, images)) * world.size
    found = f"{seconds:.3g} s and {size / 2**20:.0f} MiB a step: {images:,} images × {texts:,} texts a rank"
    need = f"at most the {free / 2**20:,.0f} MiB that are free"
    if size > free:
        return Found("FAIL", found, need, "lower schedule.global_batch, set runtime.exchange=ring, or use more ranks")
    return Found("ok", found, need)


def columns(config: RunConfig, images: int) -> tuple[int, int]:
    """How many captions, and wrong captions, as many images bring."""
    data = config.data
    return images * data.captions, 0 if data.negatives is None else images * data.negative_count


def predicted(context: Context, made: ContrastiveLoss, images: int, world: int) -> float:
    """Seconds of a rank's part, from two sizes of whole tiles.

    All pairs take a time, and those near the diagonal, where positives are marked, a time beside: the first grows with
    the square of the size, the second with the size.
    """
    rows = max(min(images // 2, max(tile_shape(context.world.device))), 1)
    once, twice = timed(context, made, rows), timed(context, made, 2 * rows)
    square, linear = max(twice / 2 - once, 0.0), max(2 * once - twice / 2, 0.0)
    return square * (images / rows) ** 2 * world + linear * images / rows


def timed(context: Context, made: ContrastiveLoss, rows: int) -> float:
    """Seconds of forward and backward on `rows` images and their texts, the least of RUNS behind a first."""
    features, sides = random_features(context, rows)
    times = []
    for _ in range(RUNS + 1):
        synchronize(context)
        started = time.perf_counter()
        torch.autograd.grad(made(features), sides)
        synchronize(context)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def random_features(context: Context, rows: int) -> tuple[Features, list[torch.Tensor]]:
    """Unit vectors of `rows` images and their texts, all different; and the tensors that have gradients."""
    device, sizes = context.world.device, (rows, *columns(context.config, rows))
    draw = torch.Generator().manual_seed(0)
    image, text, negative = (
        F.normalize(torch.randn(size, context.config.embed_dim, generator=draw), dim=1).to(device).requires_grad_()
        for size in sizes
    )
    ids = torch.arange(sum(sizes), device=device)
    features = Features(image, text, ids[:rows], ids[: len(text)].view(rows, -1))
    if len(negative):
        features.negative, features.negative_id = negative, ids[-len(negative) :]
        features.negative_present = torch.ones_like(features.negative_id, dtype=torch.bool)
    return features, [image, text, negative] if len(negative) else [image, text]


def loss_bytes(config: RunConfig, images: int, world: int, tile: tuple[int, int]) -> int:
    """Bytes beside the features of a rank's `images` and their texts: gradients, what is exchanged, a tile.

    Gathered, the texts of all ranks and their gradients are there, and this rank's share of these; in a ring two blocks
    of texts and three of gradients. Wrong captions come behind the others, of which the share is kept. Nested vectors
    have copies of their own, with their gradients.
    """
    texts, wrong = columns(config, images)
    if world == 1:
        vectors = images + texts + wrong
    elif config.runtime.exchange == "ring":
        vectors = images + max(5 * texts, texts + 5 * wrong)
    else:
        vectors = images + world * (texts + wrong) + max((world + 1) * texts, texts + (world + 1) * wrong)
    nested = sum(dim for dim in config.loss.matryoshka.dims if dim < config.embed_dim)
    ids = 64 * (images + world * (texts + wrong))  # their sorted copies, log-sum-exps, counts
    spare = math.prod(tile) * (2 * 4 + 3)  # two of floats, three masks
    return 4 * (vectors * config.embed_dim + 2 * (images + texts + wrong) * nested) + ids + spare
