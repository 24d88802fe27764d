"""SigLIP's pairwise sigmoid loss with global negatives and several positives."""

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
from clipwright.pipeline.losses.tiles import Grid, Tile, known_gradients, wants_gradients


@configclass
class SigmoidConfig(LossConfig):
    """Scale and bias at the start are SigLIP's."""

    init_scale: Annotated[float, Field(ge=1, le=100)] = 10.0
    init_bias: Annotated[float, Field(allow_inf_nan=False)] = -10.0


class SigmoidLoss(ContrastiveLoss):
    """Is this text this image's? Each pair is asked alone.

    L = Σ over all pairs of -log σ(z·(exp(t)·cos + b)) / number of images, z = 1 for positives and -1 for all others, in
    float32. Each of an image's positives, and a hard negative for each image, is a pair of its own. A masked pair is
    left out.
    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, section 3.2 and algorithm 1.
    """

    def __init__(self, config: SigmoidConfig, *, embed_dim: int) -> None:
        super().__init__(config, embed_dim=embed_dim)
        self.bias = nn.Parameter(torch.tensor([config.init_bias]))

    def local_loss(self, features: Features) -> Float[Tensor, ""]:
        inputs = features.image, features.text, self.logit_scale, self.bias, features.negative
        with_gradients = wants_gradients(inputs)
        with torch.no_grad():
            grid = Grid(features, self.repeats, math.exp(float(self.logit_scale)), float(self.bias))
            loss, gradients = _pass(grid, with_gradients)
        return known_gradients(loss, gradients, inputs)

    def report(self) -> dict[str, float]:
        return {**super().report(), "bias": float(self.bias.detach())}


def _pass(grid: Grid, with_gradients: bool) -> tuple[Tensor, list[Tensor] | None]:
    """This rank's rows of the loss, and the gradients for images, texts, log-scale, bias and hard negatives.

    One pass: a pair's gradient depends on its own logit alone, so there are three matmuls.
    """
    rows = grid.rows
    terms, bias_grad, zero = rows.new_zeros(len(rows)), rows.new_zeros(len(rows)), rows.new_zeros(())
    image_grad = torch.zeros_like(rows) if with_gradients else rows

    def visit(block: Block, tiles: Iterator[Tile]) -> tuple[Tensor, ...]:
        text_grad = rows.new_zeros(block["text"].shape) if with_gradients else None
        for tile in tiles:
            signed = tile.logits
            if tile.positive is not None:  # their logits turned over
                signed = tile.spare.copy_(tile.positive).mul_(-2).add_(1).mul_(tile.logits)
            terms[tile.rows] += torch.logaddexp(signed, zero, out=tile.spare).sum(1)  # -log σ(-l) = log(1 + exp(l))
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
    loss = terms.sum() / grid.images
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
