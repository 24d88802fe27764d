"""Plain formulas of the losses, and ranks as threads of one process."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipwright.pipeline.distributed.exchange import Columns
from clipwright.pipeline.losses import tiles
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features


@dataclass
class Batch:
    """A global batch of embeddings before normalization, and the settings of the loss."""

    image: Tensor
    text: Tensor
    image_id: Tensor
    caption_id: Tensor
    negative: Tensor | None = None
    negative_id: Tensor | None = None
    present: Tensor | None = None
    name: str = "softmax"
    scale: float = 14.0
    bias: float = -10.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> list[float]:
        return [self.scale, self.bias] if self.name == "sigmoid" else [self.scale]

    def loss(self) -> ContrastiveLoss:
        loss = LOSSES.build(LOSSES.preset(self.name, **self.settings), embed_dim=self.image.shape[1])
        with torch.no_grad():
            loss.logit_scale.fill_(self.scale).log_()
            if self.name == "sigmoid":
                loss.bias.fill_(self.bias)
        return loss


@dataclass
class Result:
    """A loss and its gradients for images, texts, negatives, log-scale and bias, in float64."""

    loss: Tensor
    image: Tensor
    text: Tensor
    negative: Tensor | None
    parameters: list[Tensor]  # log-scale, bias


def random_batch(
    images: int, per_image: int, dim: int, *, seed: int = 0, repeats: bool = False, negatives: int = 0, **rest: Any
) -> Batch:
    """Random directions. repeats: some images and captions repeat; negatives: per image, some absent."""
    generator = torch.Generator().manual_seed(seed)
    image_id, caption_id = torch.arange(images), torch.arange(images * per_image).view(images, per_image) + 1000
    if repeats:
        image_id[torch.randperm(images, generator=generator)[: images // 4]] = image_id[0].item()
        some = torch.randperm(images * per_image, generator=generator)
        caption_id.view(-1)[some[: images // 3]] = caption_id.view(-1)[some[images // 3 : 2 * (images // 3)]]
    batch = Batch(
        torch.randn(images, dim, generator=generator),
        torch.randn(images * per_image, dim, generator=generator),
        image_id,
        caption_id,
        **rest,
    )
    if negatives:
        count = images * negatives
        batch.negative = torch.randn(count, dim, generator=generator)
        # Some equal a caption of the batch and are ignored for its image.
        batch.negative_id = torch.where(
            torch.rand(count, generator=generator) < 0.3, caption_id[0, 0], torch.arange(count) + 5000
        )
        batch.present = torch.rand(count, generator=generator) < 0.7
    return batch


def plain(batch: Batch) -> Result:
    """Computes the formulas over full matrices in float64; autograd gives the gradients of the raw embeddings."""
    raw = [None if side is None else side.double().requires_grad_() for side in sides(batch)]
    t = torch.tensor(batch.scale).log().double().requires_grad_()
    b = torch.tensor(batch.bias).double().requires_grad_()
    nested = batch.settings.get("matryoshka")
    dims = nested.dims if nested else (batch.image.shape[1],)
    loss = torch.zeros((), dtype=torch.float64)
    for dim, weight in zip(dims, nested.weights if nested and nested.weights else [1.0] * len(dims), strict=True):
        truncated = [None if side is None else side[:, :dim] / side[:, :dim].norm(dim=1, keepdim=True) for side in raw]
        loss = loss + weight * (sigmoid if batch.name == "sigmoid" else softmax)(batch, truncated, t, b)
    loss.backward()
    image, text, negative = (None if side is None else side.grad for side in raw)
    assert image is not None and text is not None
    parameters = [x.grad for x in (t, b)][: len(batch.parameters)]
    return Result(loss.detach(), image, text, negative, parameters)  # pyright: ignore[reportArgumentType]


def sides(batch: Batch) -> list[Tensor | None]:
    return [batch.image, batch.text, batch.negative]


def relations(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns whether each pair of an image and a text (hard negatives last) is positive, and is excluded."""
    images, per_image = batch.caption_id.shape
    image_id, captions = batch.image_id.tolist(), batch.caption_id.tolist()
    texts = [(owner, captions[owner][k]) for owner in range(images) for k in range(per_image)]
    equal = [[image_id[i] == image_id[owner] or text in captions[i] for owner, text in texts] for i in range(images)]
    positive, excluded = torch.tensor(equal), torch.zeros(images, len(texts), dtype=torch.bool)
    if batch.settings.get("repeats") == "mask":
        own = torch.tensor([[owner == i for owner, _ in texts] for i in range(images)])
        positive, excluded = own, positive & ~own
    if batch.negative is None:
        return positive, excluded
    assert batch.negative_id is not None and batch.present is not None
    own = torch.tensor([[caption in captions[i] for caption in batch.negative_id.tolist()] for i in range(images)])
    positive = torch.cat([positive, torch.zeros_like(own)], 1)
    return positive, torch.cat([excluded, own | ~batch.present], 1)


def scores(unit: list[Tensor | None]) -> Tensor:
    image, *others = (side for side in unit if side is not None)
    return image @ torch.cat(others).T


def softmax(batch: Batch, unit: list[Tensor | None], t: Tensor, b: Tensor) -> Tensor:
    """½ (mean over images + mean over texts) of the cross-entropy against the smoothed uniform target."""
    positive, excluded = relations(batch)
    logits = (t.exp() * scores(unit)).masked_fill(excluded, -torch.inf)
    texts, smoothing = len(batch.text), batch.settings.get("label_smoothing", 0.0)

    def entropy(logits: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
        log_probability = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(excluded, 0.0)
        target = (1 - smoothing) * positive / positive.sum(1, keepdim=True)
        target = target + smoothing * ~excluded / (~excluded).sum(1, keepdim=True)
        return -(target * log_probability).sum(1).mean()

    backward = entropy(logits[:, :texts].T, positive[:, :texts].T, excluded[:, :texts].T)
    return (entropy(logits, positive, excluded) + backward) / 2


def sigmoid(batch: Batch, unit: list[Tensor | None], t: Tensor, b: Tensor) -> Tensor:
    """-log σ(±logit) of every pair, summed, over the number of images."""
    positive, excluded = relations(batch)
    signed = (t.exp() * scores(unit) + b) * torch.where(positive, 1.0, -1.0)
    return -(F.logsigmoid(signed).masked_fill(excluded, 0.0)).sum() / len(batch.image)


class Hub:
    """All-gather among ranks that are threads of one process."""

    def __init__(self, ranks: int) -> None:
        self.slots: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=600)

    def share(self, rank: int, value: Any) -> list[Any]:
        self.barrier.wait()
        self.slots[rank] = value
        self.barrier.wait()
        return list(self.slots)


MERGE: dict[str, Callable[..., Tensor]] = {
    "sum": lambda parts: torch.stack(parts).sum(0),
    "max": lambda parts: torch.stack(parts).amax(0),
    "logaddexp": lambda parts: torch.stack(parts).logsumexp(0),
}


def rank_columns(hub: Hub, index: int, merge: dict[str, Callable[..., Tensor]], block_by_block: bool) -> type[Columns]:
    """Returns the `Columns` of one of several ranks. block_by_block: one block per rank, else one for all."""

    class RankColumns(Columns):
        ranks, rank = len(hub.slots), index

        def reduce(self, work: Any, ops: Any, extra: Any = None) -> Any:
            blocks = hub.share(index, self.own | (extra or {}))
            if not block_by_block:
                blocks = [{name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}]
            results = [list(part) for part in zip(*(work(block) for block in blocks), strict=True)]
            all_results = hub.share(index, [torch.cat(parts) for parts in results])
            merged = [merge[op]([parts[number] for parts in all_results]) for number, op in enumerate(ops)]
            return [values.chunk(len(hub.slots))[index].clone() for values in merged]

    return RankColumns


def run(
    batch: Batch,
    ranks: int = 1,
    *,
    block_by_block: bool = False,
    merge: dict[str, Callable[..., Tensor]] = MERGE,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Runs our loss on `ranks` ranks: sums of the loss and of the parameters' gradients, gradients of embeddings."""
    hub = Hub(ranks)

    def on_rank(rank: int) -> list[Tensor | None]:
        loss = batch.loss()
        raw = [None if s is None else s.chunk(ranks)[rank].clone().to(dtype).requires_grad_() for s in sides(batch)]
        unit = [None if s is None else F.normalize(s.float(), dim=1).to(dtype) for s in raw]
        image_id, caption_id = batch.image_id.chunk(ranks)[rank], batch.caption_id.chunk(ranks)[rank]
        features = Features(unit[0], unit[1], image_id, caption_id)  # pyright: ignore[reportArgumentType]
        if ranks > 1:
            features.exchange = rank_columns(hub, rank, merge, block_by_block)
        if batch.negative is not None:
            assert batch.negative_id is not None and batch.present is not None
            features = dataclasses.replace(
                features,
                negative=unit[2],
                negative_id=batch.negative_id.chunk(ranks)[rank],
                negative_present=batch.present.chunk(ranks)[rank],
            )
        share = loss(features)
        share.backward()
        grads = [parameter.grad for parameter in loss.parameters()]
        return [share.detach(), *(None if side is None else side.grad for side in raw), *grads]

    with ThreadPoolExecutor(ranks) as pool:
        rows = list(pool.map(on_rank, range(ranks)))
    share, image, text, negative, *parameters = (
        None if part[0] is None else [tensor.double() for tensor in part] for part in zip(*rows, strict=True)
    )
    assert share and image and text and all(parameters)
    return Result(
        torch.stack(share).sum(),
        torch.cat(image),
        torch.cat(text),
        None if negative is None else torch.cat(negative),
        [torch.stack(part).sum(0)[0] for part in parameters if part],
    )


def error(ours: Tensor, reference: Tensor, floor: float) -> float:
    """Returns the largest absolute difference, relative to the largest absolute reference or to `floor` if larger."""
    return float((ours - reference).abs().max() / max(float(reference.abs().max()), floor))


def errors(batch: Batch, ours: Result, reference: Result) -> dict[str, float]:
    """Returns the error of the loss and of each gradient, with a floor for gradients that vanish."""
    shortest = min(float(side.double().norm(dim=1).min()) for side in sides(batch) if side is not None)
    floor = batch.scale / (shortest if batch.name == "sigmoid" else shortest * len(batch.image))
    result = {
        "loss": error(ours.loss, reference.loss, 1.0),
        "image": error(ours.image, reference.image, floor),
        "text": error(ours.text, reference.text, floor),
        "scale": error(ours.parameters[0], reference.parameters[0], batch.scale),
    }
    if batch.name == "sigmoid":
        result["bias"] = error(ours.parameters[1], reference.parameters[1], 1.0)
    if reference.negative is not None:
        assert ours.negative is not None
        result["negative"] = error(ours.negative, reference.negative, floor)
    return result


def check(batch: Batch, ranks: int = 1, *, limit: float = 1e-5, **options: Any) -> None:
    """Asserts that our loss equals the formula."""
    reference = plain(batch)
    differences = errors(batch, run(batch, ranks, **options), reference)
    assert max(differences.values()) <= limit, differences  # NaN fails too


@dataclass
class Plain:
    """The helpers above, for tests, which cannot import them."""

    batch: Any = random_batch
    formula: Any = plain
    run: Any = run
    errors: Any = errors
    check: Any = check
    merge: Any = field(default_factory=lambda: dict(MERGE))


@pytest.fixture
def plainly() -> Plain:
    return Plain()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets tile sizes that divide no batch of these tests."""
    monkeypatch.setattr(tiles, "CPU_TILE", (5, 7))
