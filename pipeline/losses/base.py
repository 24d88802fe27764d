"""The contract of a contrastive loss, and the registry of losses."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.distributed.exchange import Columns

MAX_LOG_SCALE = math.log(100.0)

Repeats = Literal["positive", "mask"]


@configclass
class Matryoshka:
    """Lengths of the vectors' beginnings that have a loss each, and their weights; no `dims`: the whole vectors alone.

    The whole length counts like any other, so it is to be named too. No `weights`: 1 each.
    """

    dims: tuple[Annotated[int, Field(ge=1)], ...] = ()
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()


@configclass
class LossConfig:
    """Fields every loss has.

    init_scale: exp(t) at the start. repeats: what a pair of different samples is whose images or captions are equal: a
    positive, or masked, neither positive nor negative.
    """

    name: str
    init_scale: Annotated[float, Field(ge=1, le=100)]
    repeats: Repeats = "positive"
    matryoshka: Matryoshka = Matryoshka()


@dataclass
class Features:
    """This rank's unit vectors of a global batch, and who belongs to whom.

    image (b, E); text (b·K, E): the K captions of image i are rows iK to (i+1)K-1; image_id (b): the image's key as an
    integer; caption_id (b, K): the caption's. A text repeats a positive of an image when they come from equal image
    bytes, or when its caption equals one of the image's. exchange: how texts of other ranks are met; the class alone
    means none.

    negative (h, E): texts that describe no image, of which all images are told apart, with their captions negative_id
    (h); h is equal on all ranks, and where negative_present (h) is false there is none. A negative is left out for an
    image that has the same caption.
    """

    image: Float[Tensor, "b e"]
    text: Float[Tensor, "t e"]
    image_id: Int[Tensor, " b"]
    caption_id: Int[Tensor, "b k"]
    exchange: type[Columns] = Columns
    negative: Float[Tensor, "h e"] | None = None
    negative_id: Int[Tensor, " h"] | None = None
    negative_present: Bool[Tensor, " h"] | None = None

    def columns(self) -> Columns:
        """The texts of all ranks as blocks of `text` (n, E), their images' `owner` (n) and their `caption` (n)."""
        owner = self.image_id.repeat_interleave(self.caption_id.shape[1])
        return self.exchange({"text": self.text.detach(), "owner": owner, "caption": self.caption_id.flatten()})

    def negative_columns(self) -> Columns | None:
        """The negatives of all ranks as blocks of `text` (n, E), their `caption` (n) and `present` (n), 0 or 1."""
        if self.negative is None:
            return None
        assert self.negative_id is not None and self.negative_present is not None
        known = {"caption": self.negative_id, "present": self.negative_present.long()}
        return self.exchange({"text": self.negative.detach(), **known})

    def truncate(self, dim: int) -> Features:
        """The first `dim` numbers of all vectors, made unit vectors again."""
        if dim == self.image.shape[1]:
            return self
        image, text, negative = (
            None if side is None else F.normalize(side[:, :dim].float(), dim=1)
            for side in (self.image, self.text, self.negative)
        )
        assert image is not None and text is not None
        return dataclasses.replace(self, image=image, text=text, negative=negative)


class ContrastiveLoss(nn.Module):
    """Base of losses. A loss owns its temperature and bias: fp32 parameters of shape (1,), never DeepSpeed's.

    `forward` returns this rank's share L_r, with L = Σ L_r over ranks the loss of the global batch. Its gradient with
    respect to this rank's features is that of L, exchanged with the other ranks; that with respect to the loss's own
    parameters is of L_r, to be summed over ranks, not averaged.

    Source of `matryoshka`: Kusupati et al. 2022, Matryoshka Representation Learning, section 3: L = Σ weight · L of the
    vectors' beginnings, with one temperature. E_CONFIG_VALUE when a beginning is longer than the vectors.
    """

    def __init__(self, config: LossConfig, *, embed_dim: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.init_scale)]))
        self.repeats: Repeats = config.repeats
        dims, weights = config.matryoshka.dims, config.matryoshka.weights
        if max(dims, default=0) > embed_dim or (weights and len(weights) != len(dims)):
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "lengths of nested vectors that do not fit",
                where="loss.matryoshka",
                found=f"dims {list(dims)} with {len(weights)} weights, embed_dim is {embed_dim}",
                fix=f"take dims up to {embed_dim}, and a weight for each or none",
            )
        self.nested = list(zip(dims, weights or [1.0] * len(dims), strict=True))

    def forward(self, features: Features) -> Float[Tensor, ""]:
        if not self.nested:
            return self.local_loss(features)
        return torch.stack([weight * self.local_loss(features.truncate(dim)) for dim, weight in self.nested]).sum()

    def local_loss(self, features: Features) -> Float[Tensor, ""]:
        """L_r of one set of vectors."""
        raise AssertionError("a loss defines local_loss")

    @torch.no_grad()
    def clamp(self) -> None:
        """Puts t back into [0, ln 100] after a step: the parameter, not the used value, whose gradient would die."""
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def report(self) -> dict[str, float]:
        """Numbers for the step line."""
        return {"scale": float(self.logit_scale.detach().exp())}


LOSSES: Registry[ContrastiveLoss] = Registry("loss", "clipwright.pipeline.losses")
