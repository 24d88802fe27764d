"""CLIP's symmetric softmax loss with global negatives and several positives."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed import Block
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features, LossConfig

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
        return _Softmax.apply(features.image, features.text, self.logit_scale, features)

    @torch.no_grad()
    def constrain(self) -> None:
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def report(self) -> dict[str, float]:
        return {"scale": float(self.logit_scale.detach().exp())}


class _Softmax(torch.autograd.Function):
    """The loss and its gradients in two passes over all columns."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, features: Features) -> Tensor:
        rows, columns, scale = image.float(), features.columns(), logit_scale.float().exp()
        images, texts = len(image) * columns.ranks, len(text) * columns.ranks
        row_lse, row_count = torch.full_like(rows[:, 0], -math.inf), torch.zeros_like(rows[:, 0])

        def first(block: Block) -> tuple[Tensor, Tensor]:
            logits, positive = scale * rows @ block["text"].float().T, features.positive(block)
            row_lse.copy_(torch.logaddexp(row_lse, logits.logsumexp(1)))
            row_count.add_(positive.sum(1))
            return logits.logsumexp(0), positive.sum(0).float()

        lse, count = columns.reduce(first, ["logaddexp", "sum"])
        loss = row_lse.sum() / images + lse.sum() / texts
        image_grad, scale_grad = torch.zeros_like(rows), torch.zeros_like(scale)

        def second(block: Block) -> tuple[Tensor]:
            logits, positive = scale * rows @ block["text"].float().T, features.positive(block)
            target = positive / row_count[:, None] / images + positive / block["count"] / texts
            grad = (logits - row_lse[:, None]).exp() / images + (logits - block["lse"]).exp() / texts - target
            loss.sub_((target * logits).sum())
            scale_grad.add_((grad * logits).sum())
            image_grad.add_(scale * grad @ block["text"].float())
            return (scale * grad.T @ rows,)

        (text_grad,) = columns.reduce(second, ["sum"], {"lse": lse, "count": count})
        ctx.save_for_backward(image_grad / 2, text_grad / 2, scale_grad / 2)
        return loss / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(grads[0] * saved for saved in ctx.saved_tensors), None


LOSSES.add(
    SoftmaxConfig,
    SoftmaxLoss,
    {"softmax": {}},
    source="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision",
)
