"""Logits of images and texts a tile at a time: memory O(b·E + n·E + one tile), never O(b·n).

What softmax and sigmoid losses share: which pairs are positives, the logits of a tile, and the way of a tile's
gradient back to the features. Everything is float32, whatever the features are. Nothing the size of a tile is
allocated for a tile.
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
# cache; twice that gave 1 % more. Elsewhere a tile is to outlast its launch: not measured.
CPU_TILE, OTHER_TILE = (512, 2048), (2048, 8192)


def tile_shape(device: torch.device) -> tuple[int, int]:
    return CPU_TILE if device.type == "cpu" else OTHER_TILE


@dataclass
class Tile:
    """Logits of some rows (images) and some columns (texts) of a block; both buffers are the user's to spoil."""

    rows: slice
    cols: slice
    image: Tensor  # (r, E)
    text: Tensor  # (c, E)
    logits: Tensor  # (r, c), -inf where a pair is excluded
    spare: Tensor  # (r, c)
    positive: Tensor | None  # bool (r, c); None: no pair is
    excluded: Tensor | None  # likewise

    def sum_where(self, mask: Tensor, dim: int) -> Tensor:
        """The sum of the logits that `mask` chooses, along `dim`; the spare buffer is overwritten."""
        return torch.where(mask, self.logits, self.logits.new_zeros(()), out=self.spare).sum(dim)


class Equal:
    """Pairs of an image and a text with an equal id. own (b, k): an image's ids; others (n): a text's.

    Ids are sorted once, so that masks are made only of tiles that hold such a pair: without repeats, those on the
    diagonal.
    """

    def __init__(self, own: Tensor, others: Tensor, shape: tuple[int, int]) -> None:
        values, number = torch.cat([own.flatten(), others]).unique(return_inverse=True)
        # As small integers, which compare faster.
        self.own, self.others, self.shape = number[: own.numel()].view_as(own).int(), number[own.numel() :].int(), shape
        held = []
        for rows in spans(len(own), shape[0]):
            present = torch.zeros_like(values, dtype=torch.bool)
            present[self.own[rows].flatten()] = True
            held.append(torch.stack([part.any() for part in present[self.others].split(shape[1])]))
        self.held: list[list[bool]] = torch.stack(held).tolist()

    def mark(self, found: Tensor | None, rows: slice, cols: slice, buffer: Tensor, spare: Tensor) -> Tensor | None:
        """`found`, or a cleared `buffer` if there is something to mark and none yet, with this tile's pairs marked."""
        if not self.held[rows.start // self.shape[0]][cols.start // self.shape[1]]:
            return found
        found = buffer.zero_() if found is None else found
        for k in range(self.own.shape[1]):
            found |= torch.eq(self.own[rows, k, None], self.others[None, cols], out=spare)
        return found


class Pairs:
    """Which pairs of own images and texts are positives, and which are excluded; all others are negatives."""

    def __init__(self, positive: Sequence[Equal], excluded: Sequence[Equal], shape: tuple[int, int]) -> None:
        self.positive, self.excluded = positive, excluded
        self.buffers: list[Tensor] = []
        if ids := [*positive, *excluded]:
            self.buffers = [torch.empty(shape, dtype=torch.bool, device=ids[0].own.device) for _ in range(3)]

    def masks(self, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor | None]:
        """positive and excluded of one tile: bool (r, c) in buffers that the next tile takes; None: no such pair."""
        positive = excluded = None
        buffers = [_shaped(buffer, rows, cols) for buffer in self.buffers]
        for equal in self.positive:
            positive = equal.mark(positive, rows, cols, buffers[0], buffers[2])
        for equal in self.excluded:
            excluded = equal.mark(excluded, rows, cols, buffers[1], buffers[2])
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
        # Which sample of all ranks a row is.
        self.sample = torch.arange(len(self.rows), device=self.rows.device) + self.columns.rank * len(self.rows)
        self.shape = tile_shape(self.rows.device)
        self.buffers = [torch.empty(self.shape, device=self.rows.device) for _ in range(2)]

    def visit_texts(self, visit: Visit, ops: Sequence[Op], more: Block | None = None) -> Sequence[Tensor]:
        """Calls `visit` with blocks of texts and their tiles; its results are merged as `Columns.reduce` says."""
        per_image = self.features.caption_id.shape[1]
        sample = {"sample": self.sample.repeat_interleave(per_image)} if self.repeats == "mask" else {}

        def work(block: Block) -> Sequence[Tensor]:
            image = Equal(self.features.image_id[:, None], block["owner"], self.shape)
            caption = Equal(self.features.caption_id, block["caption"], self.shape)
            if self.repeats == "positive":
                return visit(block, self._tiles(block, Pairs([image, caption], [], self.shape)))
            own = Equal(self.sample[:, None], block["sample"], self.shape)
            return visit(block, self._tiles(block, Pairs([own], [image, caption], self.shape)))

        return self.columns.reduce(work, ops, sample | (more or {}))

    def visit_negatives(self, visit: Visit, ops: Sequence[Op]) -> Sequence[Tensor]:
        """The same for the hard negatives, of which no pair is positive; nothing where there are none."""
        if self.negative_columns is None:
            return []

        def work(block: Block) -> Sequence[Tensor]:
            caption = Equal(self.features.caption_id, block["caption"], self.shape)
            absent = Equal(torch.zeros_like(self.sample)[:, None], block["present"], self.shape)
            return visit(block, self._tiles(block, Pairs([], [caption, absent], self.shape)))

        return self.negative_columns.reduce(work, ops)

    def _tiles(self, block: Block, pairs: Pairs) -> Iterator[Tile]:
        for cols in spans(len(block["text"]), self.shape[1]):
            text = block["text"][cols].float()
            for rows in spans(len(self.rows), self.shape[0]):
                image = self.rows[rows]
                logits, spare = (_shaped(buffer, rows, cols) for buffer in self.buffers)
                logits.addmm_(image, text.T, beta=0, alpha=self.scale)
                if self.bias:
                    logits += self.bias
                positive, excluded = pairs.masks(rows, cols)
                if excluded is not None:
                    logits.masked_fill_(excluded, -torch.inf)
                yield Tile(rows, cols, image, text, logits, spare, positive, excluded)


def spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _shaped(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
    """The front of a buffer as a contiguous matrix of a tile's shape."""
    height, width = rows.stop - rows.start, cols.stop - cols.start
    return buffer.view(-1)[: height * width].view(height, width)


class LogSumExp:
    """log Σ exp of all that is shown of each anchor, held as the largest and the sum beside it."""

    def __init__(self, anchors: int, like: Tensor) -> None:
        self.most = like.new_full((anchors,), -1e30)  # finite: a difference of two is no NaN
        self.total = like.new_zeros(anchors)

    def add(self, where: slice, logits: Tensor, spare: Tensor, dim: int) -> None:
        """logits: those of the anchors `where`, over the other side along `dim`. `spare` is overwritten."""
        before = self.most[where]
        most = torch.maximum(before, logits.amax(dim))
        part = torch.sub(logits, most.unsqueeze(dim), out=spare).exp_().sum(dim)
        self.total[where] = self.total[where] * (before - most).exp() + part
        self.most[where] = most

    def value(self) -> Tensor:
        return self.most + self.total.log()


def known_gradients(loss: Tensor, gradients: Sequence[Tensor] | None, inputs: Sequence[Tensor | None]) -> Tensor:
    """`loss` as a function of `inputs` whose gradients are known already; one backward pass uses them up."""
    if gradients is None:
        return loss
    return _Known.apply(loss, gradients, *(tensor for tensor in inputs if tensor is not None))


class _Known(torch.autograd.Function):
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


def wants_gradients(inputs: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


@torch.no_grad()
def batch_accuracy(features: Features) -> tuple[Tensor, Tensor, int]:
    """How many of this rank's images and texts rank one of their positives first, and among how many columns.

    Positives are equal image bytes or equal captions, so that class-name captions count as they should.
    """
    grid = Grid(dataclasses.replace(features, negative=None), "positive", 1.0)
    best, right = (grid.rows.new_full((len(grid.rows),), -torch.inf) for _ in range(2))
    columns = 0

    def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor, Tensor]:
        nonlocal columns
        columns += len(block["text"])
        text_best, text_right = (best.new_full((len(block["text"]),), -torch.inf) for _ in range(2))
        for tile in tiles:
            _raise(best[tile.rows], tile.logits.amax(1))
            _raise(text_best[tile.cols], tile.logits.amax(0))
            if tile.positive is not None:
                scores = tile.logits.masked_fill_(tile.positive.logical_not_(), -torch.inf)
                _raise(right[tile.rows], scores.amax(1))
                _raise(text_right[tile.cols], scores.amax(0))
        return text_best, text_right

    text_best, text_right = grid.visit_texts(visit, ["max", "max"])
    return (best == right).sum().float(), (text_best == text_right).sum().float(), columns


def _raise(largest: Tensor, found: Tensor) -> None:
    torch.maximum(largest, found, out=largest)
