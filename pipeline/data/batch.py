"""What the loader hands to the engine, and which samples of a global batch belong to a rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.augment import adjust_colors
from clipwright.pipeline.data.batch_samples import BatchSamples


@dataclass
class Batch:
    """One rank's samples of a global batch: b images with K captions and up to H hard negatives each.

    `tokens` holds each distinct text once, since class-name captions repeat and a text tower that encodes each only
    once costs a fraction. Row `text_row[i * K + k]` is caption k of image i. Equal numbers in `image_id` and
    `caption_id` mean equal image bytes and equal captions.
    """

    views: UInt8[Tensor, "b s s 3"]
    tokens: Int[Tensor, "u n"]
    text_row: Int[Tensor, " t"]
    image_id: Int[Tensor, " b"]
    caption_id: Int[Tensor, "b k"]
    color_jitter: Float[Tensor, "b 4"] | None = None
    """Brightness, contrast, saturation and hue for `augment.adjust_colors`; None if colors do not change."""
    negative_row: Int[Tensor, " h"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Rows of `tokens` of the hard negatives, H per image, -1 where an image has fewer."""
    negative_id: Int[Tensor, " h"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    lengths: Int[Tensor, " u"] | None = None
    """Number of tokens of each text, ascending; None if the text tower takes fixed-length captions."""
    batch_samples: BatchSamples = field(default_factory=BatchSamples)
    wait_seconds: float = 0.0
    """How long the step waited for this batch."""

    def images(self, device: torch.device) -> UInt8[Tensor, "b s s 3"]:
        """Returns the views on `device` with color jitter applied."""
        views = self.views.to(device, non_blocking=True)
        if self.color_jitter is None:
            return views
        return adjust_colors(views, self.color_jitter.to(device))


@dataclass(frozen=True)
class RankBatch:
    """The part of each global batch that a rank reads: the indices ≡ rank (mod world size)."""

    rank: int
    world_size: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ClipwrightError(
                "E_BATCH",
                "the global batch is not divisible by the world size",
                where=f"schedule.global_batch={self.global_batch}",
                found=f"world size {self.world_size}",
                fix=f"use a multiple of {self.world_size}",
            )
