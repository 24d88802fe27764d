"""Logits of images and texts one tile at a time: memory O(b·E + n·E + one tile), never O(b·n).

What softmax and sigmoid losses share: which pairs are positives, the logits of a tile, and how a tile's gradient gets
back to the features. Everything is float32, whatever the features are. No memory of the size of a tile is allocated per
tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipwright.pipeline.distributed.exchange import Block, Op
from clipwright.pipeline.losses.base import Features, Repeats

# Rows and columns. 512 × 2,048 was the fastest of five shapes of at most 4 MB on a Zen 4 with 1 MB of second-level
# cache; twice that gave 1 % more. On other devices a tile should take longer than its launch: not measured.
CPU_TILE, OTHER_TILE = (512, 2048), (2048, 8192)


def tile_shape(device: torch.device) -> tuple[int, int]:
    return CPU_TILE if device.type == "cpu" else OTHER_TILE


@dataclass
class Tile:
    """Logits of some rows (images) and some columns (texts) of a block; its user may overwrite both buffers."""

    rows: slice
    cols: slice
    image: Tensor  # (r, E)
    text: Tensor  # (c, E)
    logits: Tensor  # (r, c), -inf where a pair is excluded
    spare: Tensor  # (r, c)
    positive: Tensor | None  # bool (r, c); None: no pair is positive
    excluded: Tensor | None  # bool (r, c); None: no pair is excluded

    def sum_where(self, mask: Tensor, dim: int) -> Tensor:
        """Returns the sum of the logits where `mask` is true, along `dim`; overwrites the spare buffer."""
        return torch.where(mask, self.logits, self.logits.new_zeros(()), out=self.spare).sum(dim)


class EqualIds:
    """Pairs of an image and a text with an equal id. own (b, k): ids of each image; others (n): id of each text.

    Ids are sorted once, so that masks are computed only for tiles that have such a pair: without repeats, those on the
    diagonal.
    """

    def __init__(self, own: Tensor, others: Tensor, shape: tuple[int, int]) -> None:
        values, index = torch.cat([own.flatten(), others]).unique(return_inverse=True)
        index = index.int()  # small integers compare faster
        self.own, self.others, self.shape = index[: own.numel()].view_as(own), index[own.numel() :], shape
        has_pairs = []
        for rows in spans(len(own), shape[0]):
            present = torch.zeros_like(values, dtype=torch.bool)
            present[self.own[rows].flatten()] = True
            has_pairs.append(torch.stack([part.any() for part in present[self.others].split(shape[1])]))
        self.has_pairs: list[list[bool]] = torch.stack(has_pairs).tolist()

    def mark(self, mask: Tensor | None, rows: slice, cols: slice, buffer: Tensor, spare: Tensor) -> Tensor | None:
        """Marks this tile's pairs in `mask`; without a mask, in a cleared `buffer` if there are pairs to mark."""
        if not self.has_pairs[rows.start // self.shape[0]][cols.start // self.shape[1]]:
            return mask
        if mask is None:
            mask = buffer.zero_()
        for k in range(self.own.shape[1]):
            mask |= torch.eq(self.own[rows, k, None], self.others[None, cols], out=spare)
        return mask


class Pairs:
    """Which pairs of own images and texts are positives, and which are excluded; all others are negatives."""

    def __init__(self, positive: Sequence[EqualIds], excluded: Sequence[EqualIds], shape: tuple[int, int]) -> None:
        self.positive, self.excluded = positive, excluded
        self.buffers: list[Tensor] = []
        if ids := [*positive, *excluded]:
            self.buffers = [torch.empty(shape, dtype=torch.bool, device=ids[0].own.device) for _ in range(3)]

    def masks(self, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor | None]:
        """Returns positive and excluded pairs of a tile: bool (r, c), valid until the next tile; None: no such pair."""
        positive = excluded = None
        buffers = [_reshaped(buffer, rows, cols) for buffer in self.buffers]
        for ids in self.positive:
            positive = ids.mark(positive, rows, cols, buffers[0], buffers[2])
        for ids in self.excluded:
            excluded = ids.mark(excluded, rows, cols, buffers[1], buffers[2])
        if positive is not None and excluded is not None:
            excluded &= torch.logical_not(positive, out=buffers[2])
        return positive, excluded


Visit = Callable[[Block, Iterator[Tile]], Sequence[Tensor]]


class Grid:
    """The logits scale·x·y + bias of this rank's images and all ranks' texts, tile by tile.

    images, texts: how many there are on all ranks.
    """

    def __init__(self, features: Features, repeats: Repeats, scale: float, bias: float = 0.0) -> None:
        self.features, self.repeats, self.scale, self.bias = features, repeats, scale, bias
        self.columns, self.negative_columns = features.columns(), features.negative_columns()
        self.rows = features.image.detach().float()
        self.images, self.texts = (len(side) * self.columns.ranks for side in (features.image, features.text))
        # Index of each row's sample in the global batch.
        self.sample = torch.arange(len(self.rows), device=self.rows.device) + self.columns.rank * len(self.rows)
        self.shape = tile_shape(self.rows.device)
        self.buffers = [torch.empty(self.shape, device=self.rows.device) for _ in range(2)]

    def visit_texts(self, visit: Visit, ops: Sequence[Op], extra: Block | None = None) -> Sequence[Tensor]:
        """Calls `visit` with each block of texts and its tiles; results are merged as in `Columns.reduce`."""
        captions = self.features.caption_id.shape[1]
        columns: Block = {}
        if self.repeats == "mask":
            columns["sample"] = self.sample.repeat_interleave(captions)
        columns.update(extra or {})

        def work(block: Block) -> Sequence[Tensor]:
            image = EqualIds(self.features.image_id[:, None], block["owner"], self.shape)
            caption = EqualIds(self.features.caption_id, block["caption"], self.shape)
            if self.repeats == "positive":
                return visit(block, self._tiles(block, Pairs([image, caption], [], self.shape)))
            own = EqualIds(self.sample[:, None], block["sample"], self.shape)
            return visit(block, self._tiles(block, Pairs([own], [image, caption], self.shape)))

        return self.columns.reduce(work, ops, columns)

    def visit_negatives(self, visit: Visit, ops: Sequence[Op]) -> Sequence[Tensor]:
        """Does the same for the hard negatives, without positives; returns nothing if there are none."""
        if self.negative_columns is None:
            return []

        def work(block: Block) -> Sequence[Tensor]:
            caption = EqualIds(self.features.caption_id, block["caption"], self.shape)
            absent = EqualIds(torch.zeros_like(self.sample)[:, None], block["present"], self.shape)
            return visit(block, self._tiles(block, Pairs([], [caption, absent], self.shape)))

        return self.negative_columns.reduce(work, ops)

    def _tiles(self, block: Block, pairs: Pairs) -> Iterator[Tile]:
        for cols in spans(len(block["text"]), self.shape[1]):
            text = block["text"][cols].float()
            for rows in spans(len(self.rows), self.shape[0]):
                image = self.rows[rows]
                logits, spare = (_reshaped(buffer, rows, cols) for buffer in self.buffers)
                logits.addmm_(image, text.T, beta=0, alpha=self.scale)
                if self.bias:
                    logits += self.bias
                positive, excluded = pairs.masks(rows, cols)
                if excluded is not None:
                    logits.masked_fill_(excluded, -torch.inf)
                yield Tile(rows, cols, image, text, logits, spare, positive, excluded)


def spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _reshaped(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
    """Returns the front of a buffer as a contiguous matrix of a tile's shape."""
    height, width = rows.stop - rows.start, cols.stop - cols.start
    return buffer.view(-1)[: height * width].view(height, width)


class LogSumExp:
    """A running log Σ exp per anchor, kept as the maximum and the sum relative to it."""

    def __init__(self, anchors: int, like: Tensor) -> None:
        self.maximum = like.new_full((anchors,), -1e30)  # finite, so that a difference of two is never NaN
        self.total = like.new_zeros(anchors)

    def add(self, anchors: slice, logits: Tensor, spare: Tensor, dim: int) -> None:
        """Adds the logits of some anchors, with the other side along `dim`; overwrites `spare`."""
        before = self.maximum[anchors]
        maximum = torch.maximum(before, logits.amax(dim))
        part = torch.sub(logits, maximum.unsqueeze(dim), out=spare).exp_().sum(dim)
        self.total[anchors] = self.total[anchors] * (before - maximum).exp() + part
        self.maximum[anchors] = maximum

    def value(self) -> Tensor:
        return self.maximum + self.total.log()


def attach_gradients(loss: Tensor, gradients: Sequence[Tensor] | None, inputs: Sequence[Tensor | None]) -> Tensor:
    """Returns `loss` as a function of `inputs` with these precomputed gradients; one backward pass consumes them."""
    if gradients is None:
        return loss
    return _Precomputed.apply(loss, gradients, *(tensor for tensor in inputs if tensor is not None))


class _Precomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place: a second copy would be as large as the features.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss's gradients are used up; compute the loss again"
        return None, None, *(gradient.mul_(grads[0]) for gradient in gradients)


def needs_gradients(inputs: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


@torch.no_grad()
def batch_accuracy(features: Features) -> tuple[Tensor, Tensor, int]:
    """Returns how many of this rank's images and texts have a positive at rank 1, and the number of columns.

    Positives are equal image bytes or equal captions, so that repeated class-name captions count as positives.
    """
    grid = Grid(dataclasses.replace(features, negative=None), "positive", 1.0)
    best, best_positive = (grid.rows.new_full((len(grid.rows),), -torch.inf) for _ in range(2))
    columns = 0

    def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor, Tensor]:
        nonlocal columns
        columns += len(block["text"])
        text_best, text_best_positive = (best.new_full((len(block["text"]),), -torch.inf) for _ in range(2))
        for tile in tiles:
            _update_maximum(best[tile.rows], tile.logits.amax(1))
            _update_maximum(text_best[tile.cols], tile.logits.amax(0))
            if tile.positive is not None:
                scores = tile.logits.masked_fill_(tile.positive.logical_not_(), -torch.inf)
                _update_maximum(best_positive[tile.rows], scores.amax(1))
                _update_maximum(text_best_positive[tile.cols], scores.amax(0))
        return text_best, text_best_positive

    text_best, text_best_positive = grid.visit_texts(visit, ["max", "max"])
    return (best == best_positive).sum().float(), (text_best == text_best_positive).sum().float(), columns


def _update_maximum(maximum: Tensor, values: Tensor) -> None:
    torch.maximum(maximum, values, out=maximum)
