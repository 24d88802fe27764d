"""The contract of a contrastive loss, and the registry of losses."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from clipwright.pipeline.core.registry import Registry, configclass


@configclass
class LossConfig:
    """Fields every loss has."""

    name: str


@dataclass
class Features:
    """The unit vectors of a global batch, and who belongs to whom.

    image (B, E); text (B·K, E): the K captions of image i are rows iK to (i+1)K-1; image_id (B): the image's key as an
    integer; caption_id (B, K): the caption's. Rank r of W owns images `first` to `first + count` and their captions.
    """

    image: Float[Tensor, "b e"]
    text: Float[Tensor, "t e"]
    image_id: Int[Tensor, " b"]
    caption_id: Int[Tensor, "b k"]
    first: int
    count: int


class ContrastiveLoss(nn.Module):
    """Base of losses. A loss owns its temperature and bias: fp32 parameters of shape (1,), never DeepSpeed's.

    `forward` returns this rank's share L_r, with L = Σ L_r over ranks the loss of the global batch, so that gradients
    with respect to all features and to the loss's parameters are summed over ranks, not averaged.
    """

    def forward(self, features: Features) -> Float[Tensor, ""]:
        raise AssertionError("a loss defines forward")

    def constrain(self) -> None:
        """Puts parameters back into their range after a step."""

    def report(self) -> dict[str, float]:
        """Numbers for the step line."""
        return {}


LOSSES: Registry[ContrastiveLoss] = Registry("loss", "clipwright.pipeline.losses")
