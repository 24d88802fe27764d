"""CLIP's symmetric softmax loss with global negatives and several positives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed.exchange import Block
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features, LossConfig
from clipwright.pipeline.losses.tiles import Grid, LogSumExp, Tile, known_gradients, wants_gradients


@configclass
class SoftmaxConfig(LossConfig):
    """The scale at the start is CLIP's. label_smoothing: the share of a target spread evenly over all candidates."""

    init_scale: Annotated[float, Field(ge=1, le=100)] = 1 / 0.07
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SoftmaxLoss(ContrastiveLoss):
    """InfoNCE both ways over the global batch.

    L = ½ (mean over images + mean over texts) of the cross-entropy between softmax(exp(t)·cos) and the uniform
    distribution over an anchor's positives, in float32. Hard negatives are candidates of the images alone. A masked
    pair is no candidate.
    Source: Radford et al. 2021, section 2.3 and figure 3, whose target is the diagonal alone; label smoothing as in
    Szegedy et al. 2016, section 7.
    """

    def __init__(self, config: SoftmaxConfig, *, embed_dim: int) -> None:
        super().__init__(config, embed_dim=embed_dim)
        self.label_smoothing = config.label_smoothing

    def local_loss(self, features: Features) -> Float[Tensor, ""]:
        inputs = features.image, features.text, self.logit_scale, features.negative
        with_gradients = wants_gradients(inputs)
        with torch.no_grad():
            grid = Grid(features, self.repeats, math.exp(float(self.logit_scale)))
            passes = _Passes(grid, self.label_smoothing)
            loss = passes.first()
            gradients = passes.second() if with_gradients else None
        return known_gradients(loss, gradients, inputs)


@dataclass
class _Side:
    """What the second pass wants to know of anchors: rows or columns, the one broadcast against the other."""

    shift: Tensor  # log-sum-exp, and the log of how many anchors the mean is over
    positive: Tensor  # what the target says of each positive, and
    candidate: Tensor | None  # of each candidate, over as many

    def __getitem__(self, where: slice | tuple[slice, None]) -> _Side:
        candidate = None if self.candidate is None else self.candidate[where]
        return _Side(self.shift[where], self.positive[where], candidate)


class _Passes:
    """Two passes over all tiles: the log-sum-exps of rows and columns, then, from them, the gradient.

    A pass makes each tile's logits anew, so that with the two products of the way back there are four matmuls. A rank
    holds its own images' rows; what it finds of a column is merged with what the other ranks find. `seen` of anchors
    holds the number of their positives and the sum of those logits, and with smoothing the same of the candidates.
    """

    def __init__(self, grid: Grid, smoothing: float) -> None:
        self.grid, self.smoothing = grid, smoothing
        self.width = 4 if smoothing else 2

    def first(self) -> Tensor:
        """This rank's share of the loss: its images' terms and its own texts'."""
        rows = self.grid.rows
        row_sum, self.row_seen = LogSumExp(len(rows), rows), rows.new_zeros(len(rows), self.width)

        def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor, Tensor]:
            size = len(block["text"])
            column_sum, seen = LogSumExp(size, rows), rows.new_zeros(size, self.width)
            for tile in tiles:
                row_sum.add(tile.rows, tile.logits, tile.spare, 1)
                column_sum.add(tile.cols, tile.logits, tile.spare, 0)
                self._see(self.row_seen[tile.rows], tile, 1)
                self._see(seen[tile.cols], tile, 0)
            return column_sum.value(), seen

        def visit_negatives(block: Block, tiles: Iterator[Tile]) -> tuple[()]:
            for tile in tiles:
                row_sum.add(tile.rows, tile.logits, tile.spare, 1)
                self._see(self.row_seen[tile.rows], tile, 1)
            return ()

        lse, seen = self.grid.visit_texts(visit, ["logaddexp", "sum"])
        self.grid.visit_negatives(visit_negatives, [])
        self.row_lse, self.found = row_sum.value(), {"lse": lse, "seen": seen}
        image_terms = self._terms(self.row_lse, self.row_seen).sum() / self.grid.images
        return (image_terms + self._terms(lse, seen).sum() / self.grid.texts) / 2

    def _see(self, seen: Tensor, tile: Tile, dim: int) -> None:
        if tile.positive is not None:
            seen[:, 0] += tile.positive.sum(dim)
            seen[:, 1] += tile.sum_where(tile.positive, dim)
        if self.smoothing:
            seen[:, 2] += tile.logits.shape[dim]
            if tile.excluded is None:
                seen[:, 3] += tile.logits.sum(dim)
            else:
                seen[:, 2] -= tile.excluded.sum(dim)
                seen[:, 3] += tile.spare.copy_(tile.logits).masked_fill_(tile.excluded, 0.0).sum(dim)

    def _terms(self, lse: Tensor, seen: Tensor) -> Tensor:
        terms = lse - (1 - self.smoothing) * seen[:, 1] / seen[:, 0]
        return terms - self.smoothing * seen[:, 3] / seen[:, 2] if self.smoothing else terms

    def second(self) -> list[Tensor]:
        """The gradients of the loss with respect to images, texts, log-scale and hard negatives."""
        rows, half = self.grid.rows, self.grid.scale / 2
        image_grad = torch.zeros_like(rows)
        row_side = self._side(self.row_lse, self.row_seen, self.grid.images)

        def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor]:
            # The columns of a block of texts are anchors too; negatives are not.
            side = self._side(block["lse"], block["seen"], self.grid.texts) if "lse" in block else None
            text_grad = rows.new_zeros(block["text"].shape)
            for tile in tiles:
                grad = _gradient(tile, row_side[tile.rows, None], None if side is None else side[tile.cols])
                image_grad[tile.rows].addmm_(grad, tile.text)
                text_grad[tile.cols].addmm_(grad.T, tile.image)
            return (text_grad.mul_(half),)

        text_grad = self.grid.visit_texts(visit, ["sum"], self.found)
        negative_grad = self.grid.visit_negatives(visit, ["sum"])
        image_grad.mul_(half)
        # Σ_ij g_ij·logit_ij = Σ_i x_i · Σ_j g_ij·scale·y_j
        scale_grad = torch.dot(rows.flatten(), image_grad.flatten())[None]
        return [image_grad, *text_grad, scale_grad, *negative_grad]

    def _side(self, lse: Tensor, seen: Tensor, anchors: int) -> _Side:
        candidate = self.smoothing / (seen[:, 2] * anchors) if self.smoothing else None
        return _Side(lse + math.log(anchors), (1 - self.smoothing) / (seen[:, 0] * anchors), candidate)


def _gradient(tile: Tile, row: _Side, column: _Side | None) -> Tensor:
    """Probability less target, in both directions, in the tile's spare buffer; the logits are overwritten."""
    grad = torch.sub(tile.logits, row.shift, out=tile.spare).exp_()
    if column is not None:
        grad += tile.logits.sub_(column.shift).exp_()
    if tile.positive is not None:
        assert column is not None
        target = torch.add(row.positive, column.positive, out=tile.logits)
        grad -= target.mul_(tile.positive)
    if row.candidate is not None:
        target = tile.logits.copy_(row.candidate)
        if column is not None and column.candidate is not None:
            target += column.candidate
        grad -= target if tile.excluded is None else target.masked_fill_(tile.excluded, 0.0)
    return grad


LOSSES.add(
    SoftmaxConfig,
    SoftmaxLoss,
    {"softmax": {}},
    source="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision",
)
