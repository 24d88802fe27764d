"""What the loader hands to the engine, and which part of a global batch is a rank's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.augment import recolour
from clipwright.pipeline.data.batch_samples import BatchSamples


@dataclass
class Batch:
    """One rank's part of a global batch.

    views uint8 (b, S, S, 3); tokens (u, n), each different caption once; text_row (b·K): the row of caption k of image
    i stands at iK + k. Class-name captions repeat, and a text tower that reads each once costs a fraction. image_id (b)
    and caption_id (b, K): equal numbers mean equal image bytes, equal captions. colour: brightness, contrast,
    saturation and hue (`augment.recolour`), if colours change. negative_row, negative_id (b·H): the same for an
    image's wrong captions, row −1 where it has fewer than H. lengths: tokens of each caption, ascending, where a
    text tower takes captions that are trimmed. batch_samples: which samples these are. waited: seconds the step waited.
    """

    views: UInt8[Tensor, "b s s 3"]
    tokens: Int[Tensor, "u n"]
    text_row: Int[Tensor, " t"]
    image_id: Int[Tensor, " b"]
    caption_id: Int[Tensor, "b k"]
    colour: Float[Tensor, "b 4"] | None = None
    negative_row: Int[Tensor, " h"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    negative_id: Int[Tensor, " h"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    lengths: Int[Tensor, " u"] | None = None
    batch_samples: BatchSamples = field(default_factory=BatchSamples)
    waited: float = 0.0

    def images(self, device: torch.device) -> UInt8[Tensor, "b s s 3"]:
        """The views on the device, with the colours that were drawn for them."""
        views = self.views.to(device, non_blocking=True)
        return views if self.colour is None else recolour(views, self.colour.to(device))


@dataclass(frozen=True)
class Share:
    """Which part of each global batch a rank takes: the indices ≡ rank (mod world)."""

    rank: int
    world: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.global_batch % self.world:
            raise ClipwrightError(
                "E_BATCH",
                "a global batch the ranks cannot share evenly",
                where=f"schedule.global_batch={self.global_batch}",
                found=f"{self.world} ranks do not divide it",
                fix=f"take a multiple of {self.world}",
            )
