"""A model and its batches, the plain loop that trains it, and the layouts that must come to the same."""

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
from clipwright.pipeline.train.optim import OptimConfig, ScheduleConfig

STEPS, VOCABULARY, CONTEXT, IMAGE = 5, 40, 8, 8
OPTIM = {
    "sgd": OptimConfig(name="sgd", lr=0.01, weight_decay=0.0, grad_clip_norm=0.0),
    "adamw": OptimConfig(name="adamw", lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, grad_clip_norm=0.0),
}


@dataclass(frozen=True)
class Case:
    """What decides the result."""

    batch: int = 64
    loss: str = "softmax"
    optim: str = "sgd"
    clip: float = 0.0
    captions: int = 0  # different ones in a batch, class names say; 0: each its own
    wrong: bool = False  # whether most images bring a wrong caption
    scale: float = 0.0  # of the logits at the start; 0: the loss's own


@dataclass(frozen=True)
class Layout:
    """What must not."""

    case: Case
    world: int
    micro: int = 0
    zero: int = 0
    exchange: str = "gather"

    def __str__(self) -> str:
        case = [
            f"{field.name}{value}" for field in dataclasses.fields(Case) if (value := getattr(self.case, field.name))
        ]
        return "-".join([f"{self.world}ranks", f"micro{self.micro}", f"zero{self.zero}", self.exchange, *case])


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
        yield Layout(Case(loss=loss, wrong=True), 2, 16, 3)
        yield Layout(Case(loss=loss, wrong=True, batch=96), 3, 0, 0, "ring")


LAYOUTS = list(layouts())


# The model and its data, the same for all


def config(case: Case, **runtime: Any) -> RunConfig:
    return RunConfig(
        image=IMAGE_TOWERS.preset("vit_nano", image_size=IMAGE, patch=4, dim=16, depth=1, heads=2),
        text=TEXT_TOWERS.preset("text_nano", width=16, depth=1, heads=2, context=CONTEXT),
        tokenizer=None,  # pyright: ignore[reportArgumentType]  tokens are made here
        embed_dim=16,
        data=DataConfig(train="none"),
        loss=LOSSES.preset(case.loss, **({"init_scale": case.scale} if case.scale else {})),
        optim=dataclasses.replace(OPTIM[case.optim], grad_clip_norm=case.clip),
        schedule=ScheduleConfig(global_batch=case.batch),
        precision="fp32",
        runtime=RuntimeConfig(**runtime),
    )


def model(made: RunConfig) -> tuple[TwoTower, ContrastiveLoss]:
    torch.manual_seed(3)
    towers = TwoTower(made, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1)
    return towers, LOSSES.build(made.loss, embed_dim=made.embed_dim)


def share(case: Case, step: int, rank: int = 0, world: int = 1) -> Batch:
    """A rank's part of batch `step`, each of its captions once, as the loader gives it."""
    draw = torch.Generator().manual_seed(step)
    views = torch.randint(0, 256, (case.batch, IMAGE, IMAGE, 3), dtype=torch.uint8, generator=draw)
    different = case.captions or case.batch
    captions = torch.randint(0, VOCABULARY - 1, (different + case.batch, CONTEXT), generator=draw)
    captions[:, -1] = VOCABULARY - 1
    mine = torch.arange(case.batch)[rank::world]
    right, wrong = mine % different, torch.empty(0, dtype=torch.int64)
    if case.wrong:  # of every eight images two have none, and one has its neighbour's caption
        wrong = torch.where(mine % 8 == 1, (mine + 1) % different, different + mine)
    present = mine % 4 > 0 if case.wrong else wrong >= 0
    used, rows = torch.cat([right, wrong[present]]).unique(return_inverse=True)
    negative_row = torch.full_like(wrong, -1).masked_scatter(present, rows[len(mine) :])
    return Batch(
        views=views[mine],
        tokens=captions[used],
        text_row=rows[: len(mine)],
        image_id=1000 + mine,
        caption_id=right[:, None],
        negative_row=negative_row,
        negative_id=wrong,
    )


# The plain loop


def formula(name: str, loss: ContrastiveLoss, image: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """Both losses over the full matrix, as section 5 of the design has them; texts: a row for each caption."""
    present = batch.negative_row >= 0
    text, wrong = texts[batch.text_row], texts[batch.negative_row[present]]
    positive = batch.caption_id == batch.caption_id.T
    excluded = batch.caption_id == batch.negative_id[present]
    scores, wrong_scores = (loss.logit_scale.exp() * image @ side.T for side in (text, wrong))
    if name == "sigmoid":
        sign = positive.float() * 2 - 1
        terms = F.logsigmoid(sign * (scores + loss.bias)).sum()
        wrong_terms = F.logsigmoid(-(wrong_scores + loss.bias)).masked_fill(excluded, 0).sum()
        return -(terms + wrong_terms) / len(image)
    target = positive / positive.sum(1)
    rows = torch.cat([scores, wrong_scores.masked_fill(excluded, -1e9)], 1)
    row_target = torch.cat([target, torch.zeros_like(wrong_scores)], 1)
    return (F.cross_entropy(rows, row_target) + F.cross_entropy(scores.T, target)) / 2


@functools.cache
def plain(case: Case) -> dict[str, Any]:
    """One process, one batch at a time, torch's own optimisers and clipping."""
    towers, loss = model(made := config(case))
    free = towers.no_weight_decay()
    groups = [
        {"params": [p for name, p in towers.named_parameters() if (name in free) is is_free], "weight_decay": decay}
        for is_free, decay in ((True, 0.0), (False, made.optim.weight_decay))
    ]
    sgd = torch.optim.SGD(groups, lr=made.optim.lr)
    adamw = torch.optim.AdamW(groups, lr=made.optim.lr, betas=(0.9, 0.98), eps=1e-6)
    optimizers = [
        {"sgd": sgd, "adamw": adamw}[case.optim],
        torch.optim.AdamW(loss.parameters(), lr=made.optim.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0),
    ]
    seen: dict[str, Any] = {"loss": [], "gradients": [], "norm": []}
    for step in range(STEPS):
        batch = share(case, step)
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
    pairs = [*towers.named_parameters(), *((f"loss.{name}", p) for name, p in loss.named_parameters())]
    return {name: found.detach().clone() for name, p in pairs if (found := what(p)) is not None}


def deviations(ours: dict[str, Any], plain: dict[str, Any], *, adamw: bool) -> dict[str, float]:
    """Largest difference of each kind.

    Gradients of the towers are of the largest in the model, the loss and its own gradients of themselves where they are
    above 1; weights are absolute. Under AdamW biases of keys are left out: attention does not depend on them, and what
    float32 leaves of their gradient, about 1e-7, moves them by up to 7e-5 in five steps beside eps = 1e-6. A plain loop
    in float32 is as far from one in float64.
    """
    losses = zip(ours["loss"], plain["loss"], strict=True)
    worst = {"loss": max(abs(a - b) / max(1.0, abs(b)) for a, b in losses), "gradient": 0.0, "loss gradient": 0.0}
    for mine, theirs in zip(ours["gradients"], plain["gradients"], strict=True):
        assert mine.keys() == theirs.keys()
        sizes = {name: float(grad.abs().max()) for name, grad in theirs.items()}
        largest = max(size for name, size in sizes.items() if not name.startswith("loss."))
        for name, grad in theirs.items():
            own = name.startswith("loss.")
            kind, unit = ("loss gradient", max(1.0, sizes[name])) if own else ("gradient", largest)
            worst[kind] = max(worst[kind], float((mine[name] - grad).abs().max()) / unit)
    apart = {name: (ours["weights"][name] - w).abs() for name, w in plain["weights"].items()}
    if adamw:
        apart = {name: _without_keys(far) if name.endswith("qkv.bias") else far for name, far in apart.items()}
    worst["weight"] = max(float(far.max()) for far in apart.values())
    worst["norm"] = max(abs(a / b - 1) for a, b in zip(ours["norm"], plain["norm"], strict=True))
    return worst


def _without_keys(bias: Tensor) -> Tensor:
    """Of a bias of queries, keys and values."""
    query, _, value = bias.chunk(3)
    return torch.cat([query, value])
