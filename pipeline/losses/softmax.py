"""CLIP's symmetric softmax loss with global negatives and several positives per image."""

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
from clipwright.pipeline.losses.tiles import Grid, LogSumExp, Tile, attach_gradients, needs_gradients


@configclass
class SoftmaxConfig(LossConfig):
    """The softmax loss; the initial scale is CLIP's."""

    init_scale: Annotated[float, Field(ge=1, le=100)] = 1 / 0.07
    """Initial logit scale exp(t), the inverse temperature."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread evenly over all candidates."""


class SoftmaxLoss(ContrastiveLoss):
    """InfoNCE in both directions over the global batch.

    L = ½ (mean over images + mean over texts) of the cross-entropy between softmax(exp(t)·cos) and the uniform
    distribution over an anchor's positives, in float32. Hard negatives are candidates for images only. A masked pair is
    not a candidate.
    Source: Radford et al. 2021, section 2.3 and figure 3, whose target is the diagonal only; label smoothing as in
    Szegedy et al. 2016, section 7.
    """

    def __init__(self, config: SoftmaxConfig, *, embed_dim: int) -> None:
        super().__init__(config, embed_dim=embed_dim)
        self.label_smoothing = config.label_smoothing

    def local_loss(self, features: Features) -> Float[Tensor, ""]:
        inputs = features.image, features.text, self.logit_scale, features.negative
        with_gradients = needs_gradients(inputs)
        with torch.no_grad():
            grid = Grid(features, self.repeats, math.exp(float(self.logit_scale)))
            passes = _TwoPasses(grid, self.label_smoothing)
            loss = passes.loss()
            gradients = passes.gradients() if with_gradients else None
        return attach_gradients(loss, gradients, inputs)


@dataclass
class _Anchors:
    """What the second pass needs of some anchors, which are either rows or columns."""

    log_normalizer: Tensor  # log-sum-exp, plus the log of the number of anchors that the mean is over
    positive: Tensor  # target of each positive, divided by that number
    candidate: Tensor | None  # target that label smoothing gives each candidate, divided by that number

    def __getitem__(self, index: slice | tuple[slice, None]) -> _Anchors:
        candidate = None if self.candidate is None else self.candidate[index]
        return _Anchors(self.log_normalizer[index], self.positive[index], candidate)


class _TwoPasses:
    """Two passes over all tiles: first the log-sum-exps of rows and columns, from which the second gets the gradient.

    Each pass recomputes a tile's logits, so with the two products of the backward pass there are four matmuls. A rank
    computes the rows of its own images; its results for a column are merged with those of the other ranks. `stats` of
    anchors are the number of their positives and the sum of those logits, and with label smoothing the same for their
    candidates.
    """

    def __init__(self, grid: Grid, smoothing: float) -> None:
        self.grid, self.smoothing = grid, smoothing
        self.width = 4 if smoothing else 2

    def loss(self) -> Tensor:
        """Returns this rank's share of the loss: the terms of its own images and texts."""
        rows = self.grid.rows
        row_lse, self.row_stats = LogSumExp(len(rows), rows), rows.new_zeros(len(rows), self.width)

        def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor, Tensor]:
            size = len(block["text"])
            column_lse, column_stats = LogSumExp(size, rows), rows.new_zeros(size, self.width)
            for tile in tiles:
                row_lse.add(tile.rows, tile.logits, tile.spare, 1)
                column_lse.add(tile.cols, tile.logits, tile.spare, 0)
                self._add_stats(self.row_stats[tile.rows], tile, 1)
                self._add_stats(column_stats[tile.cols], tile, 0)
            return column_lse.value(), column_stats

        def visit_negatives(block: Block, tiles: Iterator[Tile]) -> tuple[()]:
            for tile in tiles:
                row_lse.add(tile.rows, tile.logits, tile.spare, 1)
                self._add_stats(self.row_stats[tile.rows], tile, 1)
            return ()

        lse, stats = self.grid.visit_texts(visit, ["logaddexp", "sum"])
        self.grid.visit_negatives(visit_negatives, [])
        self.row_lse, self.column_results = row_lse.value(), {"lse": lse, "stats": stats}
        image_terms = self._cross_entropy(self.row_lse, self.row_stats).sum() / self.grid.images
        return (image_terms + self._cross_entropy(lse, stats).sum() / self.grid.texts) / 2

    def _add_stats(self, stats: Tensor, tile: Tile, dim: int) -> None:
        if tile.positive is not None:
            stats[:, 0] += tile.positive.sum(dim)
            stats[:, 1] += tile.sum_where(tile.positive, dim)
        if self.smoothing:
            stats[:, 2] += tile.logits.shape[dim]
            if tile.excluded is None:
                stats[:, 3] += tile.logits.sum(dim)
            else:
                stats[:, 2] -= tile.excluded.sum(dim)
                stats[:, 3] += tile.spare.copy_(tile.logits).masked_fill_(tile.excluded, 0.0).sum(dim)

    def _cross_entropy(self, lse: Tensor, stats: Tensor) -> Tensor:
        """Returns the cross-entropy of each anchor."""
        terms = lse - (1 - self.smoothing) * stats[:, 1] / stats[:, 0]
        return terms - self.smoothing * stats[:, 3] / stats[:, 2] if self.smoothing else terms

    def gradients(self) -> list[Tensor]:
        """Returns the gradients of the loss with respect to images, texts, log-scale and hard negatives."""
        rows, half_scale = self.grid.rows, self.grid.scale / 2
        image_grad = torch.zeros_like(rows)
        row_anchors = self._anchors(self.row_lse, self.row_stats, self.grid.images)

        def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor]:
            # The columns of a block of texts are anchors too; hard negatives are not.
            anchors = self._anchors(block["lse"], block["stats"], self.grid.texts) if "lse" in block else None
            text_grad = rows.new_zeros(block["text"].shape)
            for tile in tiles:
                grad = _gradient(tile, row_anchors[tile.rows, None], None if anchors is None else anchors[tile.cols])
                image_grad[tile.rows].addmm_(grad, tile.text)
                text_grad[tile.cols].addmm_(grad.T, tile.image)
            return (text_grad.mul_(half_scale),)

        text_grad = self.grid.visit_texts(visit, ["sum"], self.column_results)
        negative_grad = self.grid.visit_negatives(visit, ["sum"])
        image_grad.mul_(half_scale)
        # Σ_ij g_ij·logit_ij = Σ_i x_i · Σ_j g_ij·scale·y_j
        scale_grad = torch.dot(rows.flatten(), image_grad.flatten())[None]
        return [image_grad, *text_grad, scale_grad, *negative_grad]

    def _anchors(self, lse: Tensor, stats: Tensor, count: int) -> _Anchors:
        candidate = self.smoothing / (stats[:, 2] * count) if self.smoothing else None
        return _Anchors(lse + math.log(count), (1 - self.smoothing) / (stats[:, 0] * count), candidate)


def _gradient(tile: Tile, row: _Anchors, column: _Anchors | None) -> Tensor:
    """Returns probability minus target, of both directions, in the tile's spare buffer; overwrites the logits."""
    grad = torch.sub(tile.logits, row.log_normalizer, out=tile.spare).exp_()
    if column is not None:
        grad += tile.logits.sub_(column.log_normalizer).exp_()
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
