"""CLIP's symmetric softmax loss with global negatives and several positives."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed import Block
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features, LossConfig
from clipwright.pipeline.losses.tiles import Grid, LogSumExp, Pairs, Tile, wants_gradients, with_gradients

MAX_LOG_SCALE = math.log(100.0)


@configclass
class SoftmaxConfig(LossConfig):
    """`init_scale`: exp(t) at the start; CLIP's is 1/0.07."""

    init_scale: Annotated[float, Field(ge=1, le=100)] = 1 / 0.07


class SoftmaxLoss(ContrastiveLoss):
    """InfoNCE both ways over the global batch.

    L = ½ (mean over images + mean over texts) of the cross-entropy between softmax(exp(t)·cos) and the uniform
    distribution over an anchor's positives, in float32.
    Source: Radford et al. 2021, section 2.3 and figure 3, whose target is the diagonal alone. The parameter t, not the
    used value, is clamped to [0, ln 100] after a step: a clamp inside the graph would kill its gradient.
    """

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.init_scale)]))

    def forward(self, features: Features) -> Float[Tensor, ""]:
        inputs = features.image, features.text, self.logit_scale
        with_grad = wants_gradients(*inputs)
        with torch.no_grad():
            passes = _Passes(features, float(self.logit_scale.exp()))
            loss = passes.first()
            gradients = passes.second() if with_grad else None
        return with_gradients(loss, inputs, gradients)

    @torch.no_grad()
    def constrain(self) -> None:
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def report(self) -> dict[str, float]:
        return {"scale": float(self.logit_scale.detach().exp())}


class _Passes:
    """Two passes over all tiles: the log-sum-exps of rows and columns, then, from them, the gradient.

    A pass makes each tile's logits anew, so that with the two products of the way back there are four matmuls. A rank
    holds its own images' rows; what it finds of a column is merged with what the other ranks find.
    """

    def __init__(self, features: Features, scale: float) -> None:
        self.features, self.columns, self.grid = features, features.columns(), Grid(features.image, scale)
        self.images, self.texts = (len(side) * self.columns.ranks for side in (features.image, features.text))

    def first(self) -> Tensor:
        """This rank's share of the loss: its images' terms and its own texts'."""
        rows = self.grid.rows
        row_sum, row_positive = LogSumExp(len(rows), rows), rows.new_zeros(len(rows), 2)

        def visit(block: Block) -> tuple[Tensor, Tensor]:
            size = len(block["text"])
            column_sum, positive = LogSumExp(size, rows), rows.new_zeros(size, 2)
            for tile in self.grid.tiles(block, Pairs(self.features, block)):
                row_sum.add(tile.rows, tile.logits, tile.spare, 1)
                column_sum.add(tile.cols, tile.logits, tile.spare, 0)
                _count(row_positive[tile.rows], tile, 1)
                _count(positive[tile.cols], tile, 0)
            return column_sum.value(), positive

        lse, positive = self.columns.reduce(visit, ["logaddexp", "sum"])
        self.row_lse, self.row_count = row_sum.value(), row_positive[:, 0]
        self.found = {"lse": lse, "count": positive[:, 0]}
        image_terms = (self.row_lse - row_positive[:, 1] / row_positive[:, 0]).sum() / self.images
        text_terms = (lse - positive[:, 1] / positive[:, 0]).sum() / self.texts
        return (image_terms + text_terms) / 2

    def second(self) -> list[Tensor]:
        """The gradients of the loss with respect to images, texts and log-scale."""
        rows, scale = self.grid.rows, self.grid.scale
        image_grad = torch.zeros_like(rows)
        row_shift, row_target = self.row_lse + math.log(self.images), 1 / (self.row_count * self.images)

        def visit(block: Block) -> tuple[Tensor]:
            text_grad = rows.new_zeros(block["text"].shape)
            shift, target = block["lse"] + math.log(self.texts), 1 / (block["count"] * self.texts)
            for tile in self.grid.tiles(block, Pairs(self.features, block)):
                grad = torch.sub(tile.logits, row_shift[tile.rows, None], out=tile.spare).exp_()
                grad += tile.logits.sub_(shift[tile.cols]).exp_()
                if tile.positive is not None:
                    share = torch.add(row_target[tile.rows, None], target[tile.cols], out=tile.logits)
                    grad -= share.mul_(tile.positive)
                image_grad[tile.rows].addmm_(grad, tile.text)
                text_grad[tile.cols].addmm_(grad.T, tile.image)
            return (text_grad.mul_(scale / 2),)

        (text_grad,) = self.columns.reduce(visit, ["sum"], self.found)
        image_grad.mul_(scale / 2)
        # Σ_ij g_ij·logit_ij = Σ_i x_i · Σ_j g_ij·scale·y_j
        return [image_grad, text_grad, torch.dot(rows.flatten(), image_grad.flatten())[None]]


def _count(seen: Tensor, tile: Tile, dim: int) -> None:
    """Adds to each anchor's number of positives and the sum of their logits, (anchors, 2)."""
    if tile.positive is not None:
        logits = torch.where(tile.positive, tile.logits, seen.new_zeros(()), out=tile.spare)
        seen += torch.stack([tile.positive.sum(dim), logits.sum(dim)], 1)


LOSSES.add(
    SoftmaxConfig,
    SoftmaxLoss,
    {"softmax": {}},
    source="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision",
)
