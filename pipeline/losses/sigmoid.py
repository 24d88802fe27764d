"""SigLIP's pairwise sigmoid loss with global negatives and several positives per image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed.exchange import Block, Op
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features, LossConfig
from clipwright.pipeline.losses.tiles import Grid, Tile, attach_gradients, needs_gradients


@configclass
class SigmoidConfig(LossConfig):
    """The sigmoid loss; initial scale and bias are SigLIP's."""

    init_scale: Annotated[float, Field(ge=1, le=100)] = 10.0
    """Initial logit scale exp(t), the inverse temperature."""
    init_bias: Annotated[float, Field(allow_inf_nan=False)] = -10.0
    """Initial bias of the logits."""


class SigmoidLoss(ContrastiveLoss):
    """A binary classification of each pair: does this text belong to this image?

    L = Σ over all pairs of -log σ(z·(exp(t)·cos + b)) / number of images, z = 1 for positives and -1 for all others, in
    float32. Each positive of an image, and each hard negative for each image, is a pair. Masked pairs are left out.
    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, section 3.2 and algorithm 1.
    """

    def __init__(self, config: SigmoidConfig, *, embed_dim: int) -> None:
        super().__init__(config, embed_dim=embed_dim)
        self.bias = nn.Parameter(torch.tensor([config.init_bias]))

    def local_loss(self, features: Features) -> Float[Tensor, ""]:
        inputs = features.image, features.text, self.logit_scale, self.bias, features.negative
        with_gradients = needs_gradients(inputs)
        with torch.no_grad():
            grid = Grid(features, self.repeats, math.exp(float(self.logit_scale)), float(self.bias))
            loss, gradients = _single_pass(grid, with_gradients)
        return attach_gradients(loss, gradients, inputs)

    def report(self) -> dict[str, float]:
        return {**super().report(), "bias": float(self.bias.detach())}


def _single_pass(grid: Grid, with_gradients: bool) -> tuple[Tensor, list[Tensor] | None]:
    """Returns this rank's share of the loss, and the gradients for images, texts, log-scale, bias, hard negatives.

    The gradient of a pair depends on its own logit only, so one pass with three matmuls is enough.
    """
    rows = grid.rows
    row_losses, bias_grad, zero = rows.new_zeros(len(rows)), rows.new_zeros(len(rows)), rows.new_zeros(())
    image_grad = torch.zeros_like(rows) if with_gradients else rows

    def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor, ...]:
        text_grad = rows.new_zeros(block["text"].shape) if with_gradients else None
        for tile in tiles:
            negated = tile.logits  # -z·logit
            if tile.positive is not None:
                negated = tile.spare.copy_(tile.positive).mul_(-2).add_(1).mul_(tile.logits)
            row_losses[tile.rows] += torch.logaddexp(negated, zero, out=tile.spare).sum(1)  # -log σ(-x) = log(1 + eˣ)
            if text_grad is None:
                continue
            grad = tile.logits.sigmoid_()
            if tile.positive is not None:
                grad -= tile.spare.copy_(tile.positive)
            bias_grad[tile.rows] += grad.sum(1)
            image_grad[tile.rows].addmm_(grad, tile.text)
            text_grad[tile.cols].addmm_(grad.T, tile.image)
        return () if text_grad is None else (text_grad.mul_(grid.scale / grid.images),)

    ops: list[Op] = ["sum"] if with_gradients else []
    text_grad, negative_grad = grid.visit_texts(visit, ops), grid.visit_negatives(visit, ops)
    loss = row_losses.sum() / grid.images
    if not with_gradients:
        return loss, None
    image_grad.mul_(grid.scale / grid.images)
    # Σ_ij g_ij·scale·cos_ij = Σ_i x_i · Σ_j g_ij·scale·y_j
    scale_grad = torch.dot(rows.flatten(), image_grad.flatten())[None]
    return loss, [image_grad, *text_grad, scale_grad, bias_grad.sum()[None] / grid.images, *negative_grad]


LOSSES.add(
    SigmoidConfig,
    SigmoidLoss,
    {"sigmoid": {}},
    source="Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training",
)
