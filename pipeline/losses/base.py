"""The contract of a loss term and of a contrastive loss, and the registry of contrastive losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.distributed.exchange import Columns

MAX_LOG_SCALE = math.log(100.0)

Repeats = Literal["positive", "mask"]


@configclass
class Matryoshka:
    """Losses on truncated embeddings (Matryoshka representation learning)."""

    dims: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Lengths to which embeddings are truncated, each with a loss; list embed_dim too. Empty: full length only."""
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """Weight of the loss at each length of `dims`. Empty: 1 each."""


@configclass
class LossConfig:
    """Fields every contrastive loss has."""

    name: str
    """Preset name of the loss; `clipwright list losses` shows all."""
    init_scale: Annotated[float, Field(ge=1, le=100)]
    """Initial logit scale exp(t), the inverse temperature."""
    repeats: Repeats = "positive"
    """Different samples with equal images or captions: `positive` pairs, or `mask`, neither positive nor negative."""
    matryoshka: Matryoshka = Matryoshka()
    """Losses on truncated embeddings."""


@dataclass
class Features:
    """This rank's part of the unit embeddings of a global batch, and which of them belong together.

    image (b, E); text (b·K, E): the K captions of image i are rows iK to (i+1)K-1. image_id (b): the image's key as an
    integer; caption_id (b, K): the caption's. An image and a text are a positive pair if they come from equal image
    bytes, or if the text equals a caption of the image. exchange: how the texts of the other ranks are obtained; the
    base class uses this rank's texts only.

    negative (h, E): hard negatives, texts that are negatives of every image, with their captions negative_id (h). h is
    equal on all ranks; where negative_present (h) is false the row is padding. A hard negative is ignored for an image
    that has the same caption.
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
        """Returns the texts of all ranks as blocks of `text` (n, E), their image's `owner` (n), their `caption` (n)."""
        owner = self.image_id.repeat_interleave(self.caption_id.shape[1])
        return self.exchange({"text": self.text.detach(), "owner": owner, "caption": self.caption_id.flatten()})

    def negative_columns(self) -> Columns | None:
        """Returns the hard negatives of all ranks as blocks of `text` (n, E), `caption` (n) and `present` (n), 0 or 1.

        None if there are none.
        """
        if self.negative is None:
            return None
        assert self.negative_id is not None and self.negative_present is not None
        return self.exchange(
            {
                "text": self.negative.detach(),
                "caption": self.negative_id,
                "present": self.negative_present.long(),
            }
        )

    def truncate(self, dim: int) -> Features:
        """Returns the features truncated to their first `dim` numbers and normalized to unit length again."""
        if dim == self.image.shape[1]:
            return self
        image, text, negative = (
            None if side is None else F.normalize(side[:, :dim].float(), dim=1)
            for side in (self.image, self.text, self.negative)
        )
        assert image is not None and text is not None
        return dataclasses.replace(self, image=image, text=text, negative=negative)


class LossTerm(nn.Module):
    """One term of the training loss.

    `forward` returns this rank's share L_r, with L = Σ L_r over ranks the term for the global batch. Its gradient with
    respect to this rank's features is that of L, so a term exchanges what it needs with the other ranks. Its gradient
    with respect to the term's own parameters is that of L_r, which the engine sums, not averages, over ranks.
    Parameters are fp32 of shape (1,), replicated on all ranks and never managed by DeepSpeed.
    """

    weight: float = 1.0

    def forward(self, features: Features) -> Float[Tensor, ""]:
        raise AssertionError("a loss term defines forward")

    def clamp(self) -> None:
        """Puts parameters back into their allowed range after an update."""

    def report(self) -> dict[str, float]:
        """Returns numbers for the log and the step line."""
        return {}


class TotalLoss(LossTerm):
    """The weighted sum of loss terms, which is what the engine minimizes.

    In state dicts the tensors of the first term have no prefix and those of another have its name, so that checkpoints
    and model folders have the contrastive loss's `logit_scale` whatever joins it.
    """

    def __init__(self, terms: Mapping[str, LossTerm]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.register_state_dict_post_hook(_to_stored_names)
        self.register_load_state_dict_pre_hook(_from_stored_names)

    def forward(self, features: Features) -> Float[Tensor, ""]:
        total, *others = [term.weight * term(features) for term in self._terms()]
        for value in others:
            total = total + value
        return total

    def clamp(self) -> None:
        for term in self._terms():
            term.clamp()

    def report(self) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for term in self._terms():
            numbers.update(term.report())
        return numbers

    def _terms(self) -> Iterable[LossTerm]:
        return cast(Iterable[LossTerm], self.terms.values())


def _to_stored_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    assert isinstance(module, TotalLoss)
    first = next(iter(module.terms))
    for name in [name for name in state if name.startswith(f"{prefix}terms.")]:
        stored = name.removeprefix(f"{prefix}terms.").removeprefix(f"{first}.")
        state[prefix + stored] = state.pop(name)


def _from_stored_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    assert isinstance(module, TotalLoss)
    first, *others = module.terms
    for name in [name for name in state if name.startswith(prefix)]:
        stored = name.removeprefix(prefix)
        term = "" if stored.partition(".")[0] in others else f"{first}."
        state[f"{prefix}terms.{term}{stored}"] = state.pop(name)


class ContrastiveLoss(LossTerm):
    """Base of contrastive losses. A loss owns its temperature and bias.

    Source of `matryoshka`: Kusupati et al. 2022, Matryoshka Representation Learning, section 3: L = Σ weight · L of the
    truncated embeddings, with one temperature. E_CONFIG_VALUE if a length exceeds that of the embeddings.
    """

    def __init__(self, config: LossConfig, *, embed_dim: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.init_scale)]))
        self.repeats: Repeats = config.repeats
        dims, weights = config.matryoshka.dims, config.matryoshka.weights
        if max(dims, default=0) > embed_dim or (weights and len(weights) != len(dims)):
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the Matryoshka lengths do not fit the embedding or their weights",
                where="loss.matryoshka",
                found=f"dims {list(dims)} with {format_count(len(weights), 'weight')}, embed_dim is {embed_dim}",
                fix=f"use dims up to {embed_dim}, and either one weight per length or none",
            )
        self.nested = list(zip(dims, weights or [1.0] * len(dims), strict=True))

    def forward(self, features: Features) -> Float[Tensor, ""]:
        if not self.nested:
            return self.local_loss(features)
        return torch.stack([weight * self.local_loss(features.truncate(dim)) for dim, weight in self.nested]).sum()

    def local_loss(self, features: Features) -> Float[Tensor, ""]:
        """Returns this rank's share of the loss at one embedding length."""
        raise AssertionError("a loss defines local_loss")

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamps t to [0, ln 100]: the parameter, not the value used in forward, whose gradient would vanish."""
        self.logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def report(self) -> dict[str, float]:
        return {"scale": float(self.logit_scale.detach().exp())}


LOSSES: Registry[ContrastiveLoss] = Registry("loss", "clipwright.pipeline.losses")
