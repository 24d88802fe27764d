"""CLIP's symmetric softmax loss with global negatives and several positives."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss, Features, LossConfig

MAX_LOG_SCALE = math.log(100.0)


@configclass
class SoftmaxConfig(LossConfig):
    """`init_scale`: exp(t) at the start; CLIP's is 1/0.07."""

    init_scale: Annotated[float, Field(ge=1, le=100)] = 1 / 0.07


class SoftmaxLoss(ContrastiveLoss):
    """InfoNCE both ways over the global batch.

    L = ½ (mean over images + mean over texts) of the cross-entropy between softmax(exp(t)·cos) and the uniform
    distribution over an anchor's positives, in float32. A text is a positive of an image when they come from equal
    image bytes, or when its caption equals one of the image's.
    Source: Radford et al. 2021, section 2.3 and figure 3, whose target is the diagonal alone. The parameter t, not the
    used value, is clamped to [0, ln 100] after a step: a clamp inside the graph would kill its gradient.
    """

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.init_scale)]))

    def forward(self, features: Features) -> Float[Tensor, ""]:
        scale = self.logit_scale.float().exp()
        image, text = features.image.float(), features.text.float()
        per_image = features.caption_id.shape[1]
        own_images = slice(features.first, features.first + features.count)
        own_texts = slice(own_images.start * per_image, own_images.stop * per_image)
        positive = positives(features)
        rows = scale * image[own_images] @ text.T
        columns = scale * text[own_texts] @ image.T
        loss_images = _cross_entropy(rows, positive[own_images]).sum() / len(image)
        loss_texts = _cross_entropy(columns, positive[:, own_texts].T).sum() / len(text)
        return (loss_images + loss_texts) / 2

    @torch.no_grad()
    def constrain(self) -> None:
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def report(self) -> dict[str, float]:
        return {"scale": float(self.logit_scale.detach().exp())}


def positives(features: Features) -> Bool[Tensor, "b t"]:
    """Which texts are positives of which images: equal image bytes, or a caption equal to one of the image's."""
    per_image = features.caption_id.shape[1]
    text_owner = features.image_id.repeat_interleave(per_image)
    text_id = features.caption_id.reshape(-1)
    positive = features.image_id[:, None] == text_owner[None, :]
    for k in range(per_image):
        positive |= features.caption_id[:, k, None] == text_id[None, :]
    return positive


def _cross_entropy(logits: Float[Tensor, "n m"], positive: Bool[Tensor, "n m"]) -> Float[Tensor, " n"]:
    target = positive / positive.sum(1, keepdim=True)
    return logits.logsumexp(1) - (target * logits).sum(1)


LOSSES.add(
    SoftmaxConfig,
    SoftmaxLoss,
    {"softmax": {}},
    source="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision",
)
