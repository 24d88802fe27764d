"""Logits of images and texts a tile at a time: memory O(b·E + n·E + one tile), never O(b·n).

What softmax and sigmoid losses share: which pairs are positives, the logits of a tile, and the way of a tile's
gradient back to the features. Everything is float32, whatever the features are. Nothing the size of a tile is
allocated for a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipwright.pipeline.distributed import Block
from clipwright.pipeline.losses.base import Features

# Rows and columns. 512 × 2,048 was the fastest of eight shapes from 256 × 1,024 to 1,024 × 4,096 that fit 4 MB, on a
# Zen 4 with 1 MB of second-level cache. Elsewhere a tile is to outlast its launch.
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
    logits: Tensor  # (r, c)
    spare: Tensor  # (r, c)
    positive: Tensor | None  # bool (r, c); None: no pair is one


class Pairs:
    """Which texts of a block are positives of which own images.

    Ids are sorted once, so that masks are made only of tiles that hold a positive: without repeats, those on the
    diagonal.
    """

    def __init__(self, features: Features, block: Block) -> None:
        self.keys = [(features.image_id[:, None], block["owner"]), (features.caption_id, block["caption"])]
        self.shape = tile_shape(features.image.device)
        self.held = torch.stack([self._held(*pair) for pair in self.keys]).any(0).tolist()
        self.buffers = [torch.empty(self.shape, dtype=torch.bool, device=features.image.device) for _ in range(2)]

    def _held(self, own: Tensor, others: Tensor) -> Tensor:
        """Which tiles (rows of tiles, columns of tiles) hold a pair of equal ids."""
        values, number = torch.cat([own.flatten(), others]).unique(return_inverse=True)
        own_number, other_number = number[: own.numel()].view_as(own), number[own.numel() :]
        held = []
        for rows in spans(len(own), self.shape[0]):
            present = torch.zeros_like(values, dtype=torch.bool)
            present[own_number[rows].flatten()] = True
            held.append(torch.stack([part.any() for part in present[other_number].split(self.shape[1])]))
        return torch.stack(held)

    def positive(self, rows: slice, cols: slice) -> Tensor | None:
        """Of one tile: bool (r, c), in a buffer that the next tile takes."""
        if not self.held[rows.start // self.shape[0]][cols.start // self.shape[1]]:
            return None
        found, spare = (_shaped(buffer, rows, cols) for buffer in self.buffers)
        found.zero_()
        for own, others in self.keys:
            for k in range(own.shape[1]):
                found |= torch.eq(own[rows, k, None], others[None, cols], out=spare)
        return found


class Grid:
    """The logits scale·x·y of own rows and a block's columns, tile by tile, and their gradient's way back."""

    def __init__(self, rows: Tensor, scale: float) -> None:
        self.rows, self.scale = rows.float(), scale
        self.shape = tile_shape(rows.device)
        self.buffers = [torch.empty(self.shape, device=rows.device) for _ in range(2)]

    def tiles(self, block: Block, pairs: Pairs) -> Iterator[Tile]:
        for cols in spans(len(block["text"]), self.shape[1]):
            text = block["text"][cols].float()
            for rows in spans(len(self.rows), self.shape[0]):
                image = self.rows[rows]
                logits, spare = (_shaped(buffer, rows, cols) for buffer in self.buffers)
                logits.addmm_(image, text.T, beta=0, alpha=self.scale)
                yield Tile(rows, cols, image, text, logits, spare, pairs.positive(rows, cols))


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


def with_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> Tensor:
    """`loss` as a function of `inputs` whose gradients are known already; they are used up by one backward pass."""
    return loss if gradients is None else _Known.apply(loss, gradients, *inputs)


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


def wants_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
