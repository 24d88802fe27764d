"""Training views: random resized crop, flip and color jitter: a pure function of (seed, dataset, epoch, key)."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.order import SampleRng
from clipwright.pipeline.pixels import EncodedImage

Probability = Annotated[float, Field(ge=0, le=1)]
Turns = Annotated[float, Field(ge=0, le=0.5)]

CROP_ATTEMPTS = 10
_SINGLE_THREAD_ELEMENTS = 2**15 - 1  # up to this many elements torch does not split the work among threads
_RESIZE = torch.ops.aten._upsample_bicubic2d_aa.out  # what F.interpolate calls, which has no `out` argument
_LUMA = (0.299, 0.587, 0.114)  # BT.601
_TO_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@configclass
class AugmentConfig:
    """Random resized crop, horizontal flip and color jitter of training images."""

    scale: tuple[float, float] = (0.6, 1.0)
    """Smallest and largest area of the crop, as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of the crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[Probability, Probability, Probability, Turns] = (0.0, 0.0, 0.0, 0.0)
    """Largest change of brightness, contrast and saturation (factors around 1) and of hue (turns around 0)."""
    jitter_probability: Probability = 0.8
    """Probability that a sample's colors are jittered."""
    grayscale: Probability = 0.0
    """Probability that a sample becomes grayscale."""
    views: Annotated[int, Field(ge=1)] | None = None
    """Number of different views per image, which its epochs cycle through; null: a new view in each epoch."""

    def __post_init__(self) -> None:
        for key, limit in (("scale", 1.0), ("ratio", math.inf)):
            low, high = getattr(self, key)
            if not 0 < low <= high <= limit or math.isinf(high):
                allowed = "0 < smallest ≤ largest" + (" ≤ 1" if limit == 1 else "")
                raise ClipwrightError(
                    "E_CONFIG_VALUE",
                    "the range is not allowed",
                    where=f"data.augment.{key}",
                    found=f"[{low}, {high}]; allowed: {allowed}",
                    fix="change the values",
                )

    @property
    def changes_color(self) -> bool:
        """Whether any sample's colors may change."""
        return self.grayscale > 0 or (self.jitter_probability > 0 and any(self.jitter))


def crop_box(width: int, height: int, config: AugmentConfig, rng: SampleRng) -> tuple[int, int, int, int]:
    """Draws (left, top, width, height) of a crop in pixels, distributed as in torchvision's RandomResizedCrop.

    The area is uniform and the ratio log-uniform (Szegedy et al. 2015, section 6); both are drawn again until the crop
    fits. After CROP_ATTEMPTS, the largest center crop of an allowed ratio is taken. All positions are equally likely.
    """
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    for _ in range(CROP_ATTEMPTS):
        area = width * height * (config.scale[0] + rng.uniform() * (config.scale[1] - config.scale[0]))
        ratio = math.exp(low + rng.uniform() * (high - low))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.uniform() * (width - crop_width + 1))
            top = int(rng.uniform() * (height - crop_height + 1))
            return left, top, crop_width, crop_height
    crop_width = max(min(width, round(height * config.ratio[1])), 1)
    crop_height = max(min(height, round(width / config.ratio[0])), 1)
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


class View:
    """A training view of an image file.

    The constructor reads the header and draws the crop; `write` decodes the pixels.
    """

    def __init__(self, data: bytes, config: AugmentConfig, rng: SampleRng) -> None:
        self._image = EncodedImage(data)
        self._box = crop_box(self._image.header.width, self._image.header.height, config, rng)
        self._flipped = rng.uniform() < config.flip

    def write(self, out: UInt8[np.ndarray, "s s 3"]) -> None:
        """Decodes the image no larger than the crop needs, then crops, resizes and flips it into `out`."""
        header = self._image.header
        left, top, width, height = self._box
        # How much smaller the crop may be decoded and still fill the view.
        shrink = min(width, height) / len(out)
        pixels = self._image.decode(min_side=math.ceil(min(header.width, header.height) / max(shrink, 1.0)))
        columns = _decoded_range(left, width, header.width, pixels.shape[1])
        rows = _decoded_range(top, height, header.height, pixels.shape[0])
        if self._flipped:
            _flip(resize(pixels[rows, columns], np.empty_like(out)), out)
        else:
            resize(pixels[rows, columns], out)


def _decoded_range(start: int, length: int, side: int, decoded: int) -> slice:
    """Maps a range of a side of `side` pixels to the same side decoded to `decoded` pixels."""
    first = min(round(start * decoded / side), decoded - 1)
    return slice(first, max(round((start + length) * decoded / side), first + 1))


def resize(pixels: np.ndarray, out: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes uint8 (H, W, 3) to the size of `out` with an antialiased bicubic filter; fills and returns `out`.

    Pillow's filter, six times as fast, because torch computes in integers on three channels. It is equal to within one
    level, except for tall narrow crops, where Pillow swaps its two passes and clips other values between them.
    """
    # numpy copies the crop: torch would start a thread pool for the copy in each thread of the loader.
    _RESIZE(_as_nchw(np.ascontiguousarray(pixels)), list(out.shape[:2]), False, out=_as_nchw(out))
    return out


def _as_nchw(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "1 3 h w"]:
    """Wraps the same memory as a channels-last tensor."""
    return torch.from_numpy(pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2))


def _flip(view: UInt8[np.ndarray, "s s 3"], out: UInt8[np.ndarray, "s s 3"]) -> None:
    """Writes the horizontally flipped view to `out`, a few rows at a time; torch is ten times as fast as numpy here."""
    step = max(_SINGLE_THREAD_ELEMENTS // view[0].size, 1)
    for first in range(0, len(view), step):
        rows = slice(first, first + step)
        out[rows] = torch.from_numpy(view[rows]).flip(1).numpy()


def draw_color_jitter(config: AugmentConfig, rng: SampleRng) -> tuple[float, float, float, float]:
    """Draws a sample's brightness, contrast and saturation (factors; 1 changes nothing) and hue (turns)."""
    jittered = rng.uniform() < config.jitter_probability
    changes = [width * (2 * rng.uniform() - 1) if jittered else 0.0 for width in config.jitter]
    brightness, contrast, saturation, hue = changes
    gray = rng.uniform() < config.grayscale
    return 1 + brightness, 1 + contrast, 0.0 if gray else 1 + saturation, hue


def adjust_colors(views: UInt8[Tensor, "b h w 3"], jitter: Float[Tensor, "b 4"]) -> UInt8[Tensor, "b h w 3"]:
    """Applies the jitter that `draw_color_jitter` drew to the views of a batch, on their device.

    Hue, saturation, brightness and contrast are one matrix and one offset per image. This differs from torchvision's
    ColorJitter in the fixed order, in rotating the hue in YIQ (luma is kept) and in clipping once, at the end.
    """
    brightness, contrast, saturation, hue = jitter.unbind(1)
    to_yiq = torch.tensor(_TO_YIQ, device=views.device)
    angle = 2 * math.pi * hue
    cosine, sine = saturation * torch.cos(angle), saturation * torch.sin(angle)
    zero, one = torch.zeros_like(hue), torch.ones_like(hue)
    rotation = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], dim=1).view(-1, 3, 3)
    matrix = (torch.linalg.inv(to_yiq) @ rotation @ to_yiq) * (brightness * contrast)[:, None, None]
    pixels = views.flatten(1, 2).float()
    offset = (pixels.mean(dim=1) @ to_yiq[0]) * brightness * (1 - contrast)
    adjusted = torch.baddbmm(offset[:, None, None].expand(-1, 1, 3), pixels, matrix.transpose(1, 2))
    return adjusted.round().clamp(0, 255).to(torch.uint8).view(views.shape)
