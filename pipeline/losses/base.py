"""The contract of a contrastive loss, and the registry of losses."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.distributed import Block, Columns


@configclass
class LossConfig:
    """Fields every loss has."""

    name: str


@dataclass
class Features:
    """This rank's unit vectors of a global batch, and who belongs to whom.

    image (b, E); text (b·K, E): the K captions of image i are rows iK to (i+1)K-1; image_id (b): the image's key as an
    integer; caption_id (b, K): the caption's. A text is a positive of an image when they come from equal image bytes,
    or when its caption equals one of the image's. exchange: how texts of other ranks are met; the class alone means
    none.
    """

    image: Float[Tensor, "b e"]
    text: Float[Tensor, "t e"]
    image_id: Int[Tensor, " b"]
    caption_id: Int[Tensor, "b k"]
    exchange: type[Columns] = Columns

    def columns(self) -> Columns:
        """The texts of all ranks as blocks of `text` (n, E), their images' `owner` (n) and their `caption` (n)."""
        owner = self.image_id.repeat_interleave(self.caption_id.shape[1])
        return self.exchange({"text": self.text.detach(), "owner": owner, "caption": self.caption_id.flatten()})

    def positive(self, block: Block) -> Tensor:
        """Which texts of a block (n) are positives of which own images: bool (b, n)."""
        positive = self.image_id[:, None] == block["owner"][None, :]
        for k in range(self.caption_id.shape[1]):
            positive |= self.caption_id[:, k, None] == block["caption"][None, :]
        return positive


class ContrastiveLoss(nn.Module):
    """Base of losses. A loss owns its temperature and bias: fp32 parameters of shape (1,), never DeepSpeed's.

    `forward` returns this rank's share L_r, with L = Σ L_r over ranks the loss of the global batch. Its gradient with
    respect to this rank's features is that of L, exchanged with the other ranks; that with respect to the loss's own
    parameters is of L_r, to be summed over ranks, not averaged.
    """

    def forward(self, features: Features) -> Float[Tensor, ""]:
        raise AssertionError("a loss defines forward")

    def constrain(self) -> None:
        """Puts parameters back into their range after a step."""

    def report(self) -> dict[str, float]:
        """Numbers for the step line."""
        return {}


LOSSES: Registry[ContrastiveLoss] = Registry("loss", "clipwright.pipeline.losses")
