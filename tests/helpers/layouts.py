"""A model and its batches, a plain training loop, and the layouts that must compute the same."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.data.datasets import DataConfig
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS
from clipwright.pipeline.train.config import RunConfig, RuntimeConfig
from clipwright.pipeline.train.optimizers.base import OPTIMIZERS
from clipwright.pipeline.train.schedules.base import SCHEDULES

STEPS, VOCAB_SIZE, CONTEXT, IMAGE_SIZE = 5, 40, 8, 8
BETAS, EPS = (0.9, 0.98), 1e-6
OPTIM = {
    "sgd": OPTIMIZERS.preset("sgd", lr=0.01, weight_decay=0.0, grad_clip_norm=0.0),
    "adamw": OPTIMIZERS.preset("adamw", lr=5e-4, betas=BETAS, eps=EPS, weight_decay=0.1, grad_clip_norm=0.0),
}


@dataclass(frozen=True)
class Case:
    """What decides the result."""

    batch: int = 64
    loss: str = "softmax"
    optim: str = "sgd"
    clip: float = 0.0
    captions: int = 0  # distinct captions in a batch, as with class names; 0: one per sample
    hard_negatives: bool = False  # whether most images bring a hard negative
    scale: float = 0.0  # initial logit scale; 0: the loss's default


@dataclass(frozen=True)
class Layout:
    """What must not change the result."""

    case: Case
    world: int
    micro: int = 0
    zero: int = 0
    exchange: str = "gather"

    def __str__(self) -> str:
        parts = [f"{self.world}ranks", f"micro{self.micro}", f"zero{self.zero}", self.exchange]
        for field in dataclasses.fields(Case):
            if value := getattr(self.case, field.name):
                parts.append(f"{field.name}{value}")
        return "-".join(parts)


def layouts() -> Iterator[Layout]:
    for case in (Case(loss=loss, optim=optim) for loss in LOSSES.entries for optim in OPTIM):
        for world, micro in ((1, 0), (1, 16), (2, 16), (4, 0)):
            yield Layout(case, world, micro)
        yield Layout(dataclasses.replace(case, batch=96), 3, 8)
        for world, micro in ((3, 8), (4, 0)):
            yield Layout(dataclasses.replace(case, batch=96 if world == 3 else 64), world, micro, exchange="ring")
    clipped = Case(clip=0.05)
    for zero in range(4):
        for micro in (0, 16):
            yield Layout(clipped, 1, micro, zero)
            yield Layout(clipped, 2, micro, zero)
            yield Layout(dataclasses.replace(clipped, batch=96), 3, micro, zero, "ring")
        yield Layout(clipped, 4, 4, zero, "ring")
    for zero in (1, 3):
        yield Layout(Case(optim="adamw", clip=0.5), 2, 16, zero)
    # Micro-batches that do not divide the batch, fewer captions than micro-batches, a scale at its lower clamp.
    yield Layout(Case(), 2, 9, 3)
    yield Layout(Case(captions=3, clip=0.5), 1, 8, 2)
    yield Layout(Case(captions=3, clip=0.5), 2, 4, 3)
    yield Layout(Case(captions=3, clip=0.5), 4, 0, 0, "ring")
    yield Layout(Case(scale=1.0), 2, 16, 3)
    for loss in LOSSES.entries:
        yield Layout(Case(loss=loss, hard_negatives=True), 2, 16, 3)
        yield Layout(Case(loss=loss, hard_negatives=True, batch=96), 3, 0, 0, "ring")


LAYOUTS = list(layouts())


# The model and its data, the same for all layouts


def config(case: Case, **runtime: Any) -> RunConfig:
    return RunConfig(
        image=IMAGE_TOWERS.preset("vit_nano", image_size=IMAGE_SIZE, patch=4, dim=16, depth=1, heads=2),
        text=TEXT_TOWERS.preset("text_nano", width=16, depth=1, heads=2, context=CONTEXT),
        tokenizer=None,  # pyright: ignore[reportArgumentType]  tokens are generated here
        embed_dim=16,
        data=DataConfig(train="none"),
        loss=LOSSES.preset(case.loss, **({"init_scale": case.scale} if case.scale else {})),
        optim=dataclasses.replace(OPTIM[case.optim], grad_clip_norm=case.clip),
        schedule=SCHEDULES.preset("cosine", global_batch=case.batch),
        precision="fp32",
        runtime=RuntimeConfig(**runtime),
    )


def model(run_config: RunConfig) -> tuple[TwoTower, ContrastiveLoss]:
    torch.manual_seed(3)
    towers = TwoTower(run_config, vocab_size=VOCAB_SIZE, eot_id=VOCAB_SIZE - 1)
    return towers, LOSSES.build(run_config.loss, embed_dim=run_config.embed_dim)


def rank_batch(case: Case, step: int, rank: int = 0, world: int = 1) -> Batch:
    """Returns a rank's part of batch `step`, each of its captions once, as the loader does."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randint(0, 256, (case.batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
    distinct = case.captions or case.batch
    captions = torch.randint(0, VOCAB_SIZE - 1, (distinct + case.batch, CONTEXT), generator=generator)
    captions[:, -1] = VOCAB_SIZE - 1
    own = torch.arange(case.batch)[rank::world]
    caption, negative = own % distinct, torch.empty(0, dtype=torch.int64)
    if case.hard_negatives:  # of every eight images two have none, and one has its neighbor's caption
        negative = torch.where(own % 8 == 1, (own + 1) % distinct, distinct + own)
    present = own % 4 > 0 if case.hard_negatives else negative >= 0
    used, rows = torch.cat([caption, negative[present]]).unique(return_inverse=True)
    negative_row = torch.full_like(negative, -1).masked_scatter(present, rows[len(own) :])
    return Batch(
        views=views[own],
        tokens=captions[used],
        text_row=rows[: len(own)],
        image_id=1000 + own,
        caption_id=caption[:, None],
        negative_row=negative_row,
        negative_id=negative,
    )


# The plain loop


def formula(name: str, loss: ContrastiveLoss, image: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """Both losses over the full matrix, as section 5 of the design defines them; texts: one row per caption."""
    present = batch.negative_row >= 0
    text, negative = texts[batch.text_row], texts[batch.negative_row[present]]
    positive = batch.caption_id == batch.caption_id.T
    excluded = batch.caption_id == batch.negative_id[present]
    scores, negative_scores = (loss.logit_scale.exp() * image @ side.T for side in (text, negative))
    if name == "sigmoid":
        sign = positive.float() * 2 - 1
        terms = F.logsigmoid(sign * (scores + loss.bias)).sum()
        negative_terms = F.logsigmoid(-(negative_scores + loss.bias)).masked_fill(excluded, 0).sum()
        return -(terms + negative_terms) / len(image)
    target = positive / positive.sum(1)
    rows = torch.cat([scores, negative_scores.masked_fill(excluded, -1e9)], 1)
    row_target = torch.cat([target, torch.zeros_like(negative_scores)], 1)
    return (F.cross_entropy(rows, row_target) + F.cross_entropy(scores.T, target)) / 2


@functools.cache
def plain(case: Case) -> dict[str, Any]:
    """Trains in one process, one batch at a time, with torch's own optimizers and clipping."""
    run_config = config(case)
    towers, loss = model(run_config)
    no_decay = towers.no_weight_decay()
    groups = [
        {"params": [p for name, p in towers.named_parameters() if (name in no_decay) is exempt], "weight_decay": decay}
        for exempt, decay in ((True, 0.0), (False, run_config.optim.weight_decay))
    ]
    lr = run_config.optim.lr
    sgd = torch.optim.SGD(groups, lr=lr)
    adamw = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS)
    optimizers = [
        {"sgd": sgd, "adamw": adamw}[case.optim],
        torch.optim.AdamW(loss.parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0),
    ]
    seen: dict[str, Any] = {"loss": [], "gradients": [], "norm": []}
    for step in range(STEPS):
        batch = rank_batch(case, step)
        image, text = towers.encode_image(batch.views), towers.encode_text(batch.tokens)
        value = formula(case.loss, loss, image, text, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        value.backward()
        seen["loss"].append(value.item())
        seen["gradients"].append(named(towers, loss, lambda p: p.grad))
        norm = nn.utils.clip_grad_norm_(towers.parameters(), case.clip or math.inf)
        seen["norm"].append(norm.item())
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            loss.logit_scale.clamp_(0.0, math.log(100.0))  # pyright: ignore[reportCallIssue]
    return {**seen, "weights": named(towers, loss, lambda p: p)}


def named(towers: nn.Module, loss: nn.Module, what: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Returns `what` of each parameter by name; the loss's are named `loss.NAME`."""
    pairs = [*towers.named_parameters(), *((f"loss.{name}", p) for name, p in loss.named_parameters())]
    return {name: value.detach().clone() for name, p in pairs if (value := what(p)) is not None}


def deviations(ours: dict[str, Any], plain: dict[str, Any], *, adamw: bool) -> dict[str, float]:
    """Returns the largest difference of each kind.

    Gradients of the towers are relative to the largest in the model, the loss and its own gradients to themselves where
    they are above 1; weights are absolute. Under AdamW the biases of keys are left out: attention does not depend on
    them, and what float32 leaves of their gradient, about 1e-7, moves them by up to 7e-5 in five steps with eps = 1e-6.
    A plain loop in float32 differs as much from one in float64.
    """
    losses = zip(ours["loss"], plain["loss"], strict=True)
    worst = {"loss": max(abs(a - b) / max(1.0, abs(b)) for a, b in losses), "gradient": 0.0, "loss gradient": 0.0}
    for our_gradients, plain_gradients in zip(ours["gradients"], plain["gradients"], strict=True):
        assert our_gradients.keys() == plain_gradients.keys()
        sizes = {name: float(grad.abs().max()) for name, grad in plain_gradients.items()}
        largest = max(size for name, size in sizes.items() if not name.startswith("loss."))
        for name, grad in plain_gradients.items():
            of_loss = name.startswith("loss.")
            kind, unit = ("loss gradient", max(1.0, sizes[name])) if of_loss else ("gradient", largest)
            worst[kind] = max(worst[kind], float((our_gradients[name] - grad).abs().max()) / unit)
    differences = {name: (ours["weights"][name] - w).abs() for name, w in plain["weights"].items()}
    if adamw:
        for name in differences:
            if name.endswith("qkv.bias"):
                differences[name] = _without_keys(differences[name])
    worst["weight"] = max(float(difference.max()) for difference in differences.values())
    worst["norm"] = max(abs(a / b - 1) for a, b in zip(ours["norm"], plain["norm"], strict=True))
    return worst


def _without_keys(bias: Tensor) -> Tensor:
    """Removes the keys' part of a bias of queries, keys and values."""
    query, _, value = bias.chunk(3)
    return torch.cat([query, value])
