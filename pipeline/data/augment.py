"""Training views: random-resized crop, flip and colours, parameters a pure function of (seed, dataset, epoch, key)."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.order import Draw
from clipwright.pipeline.pixels import Picture

Chance = Annotated[float, Field(ge=0, le=1)]
Turns = Annotated[float, Field(ge=0, le=0.5)]

TRIES = 10
_GRAIN = 2**15 - 1  # numbers that torch does not share out among threads
_RESIZE = torch.ops.aten._upsample_bicubic2d_aa.out  # what F.interpolate calls, which has no `out`
_LUMA = (0.299, 0.587, 0.114)  # BT.601
_TO_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@configclass
class AugmentConfig:
    """Random-resized crop: area share and aspect ratio of the crop; `flip`: chance of a mirror image.

    jitter: how far brightness, contrast and saturation go from 1 and hue from 0 (in turns), each uniform;
    jitter_chance: how many samples are jittered; grey: how many lose their colour. views: how many different views
    an image has, taken in turn by its epochs; none: a new one in each.
    """

    scale: tuple[float, float] = (0.6, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Chance = 0.5
    jitter: tuple[Chance, Chance, Chance, Turns] = (0.0, 0.0, 0.0, 0.0)
    jitter_chance: Chance = 0.8
    grey: Chance = 0.0
    views: Annotated[int, Field(ge=1)] | None = None

    @property
    def colours(self) -> bool:
        """Whether colours change at all."""
        return bool(self.grey or (self.jitter_chance and any(self.jitter)))


def crop_box(width: int, height: int, config: AugmentConfig, draw: Draw) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop inside the image, in pixels: the law of torchvision's RandomResizedCrop.

    Area share uniform, ratio log-uniform (Szegedy et al. 2015, section 6), drawn again where they do not fit together;
    after TRIES the largest middle crop whose ratio is allowed. Every place it fits in is equally likely.
    """
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    for _ in range(TRIES):
        area = width * height * (config.scale[0] + draw.uniform() * (config.scale[1] - config.scale[0]))
        ratio = math.exp(low + draw.uniform() * (high - low))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return int(draw.uniform() * (width - wide + 1)), int(draw.uniform() * (height - tall + 1)), wide, tall
    wide = max(min(width, round(height * config.ratio[1])), 1)
    tall = max(min(height, round(width / config.ratio[0])), 1)
    return (width - wide) // 2, (height - tall) // 2, wide, tall


class View:
    """A training view of an image file: its header is read and its crop drawn at once, its pixels follow by `write`."""

    def __init__(self, data: bytes, config: AugmentConfig, draw: Draw) -> None:
        self._picture = Picture(data)
        self._box = crop_box(self._picture.header.width, self._picture.header.height, config, draw)
        self._mirrored = draw.uniform() < config.flip

    def write(self, out: UInt8[np.ndarray, "s s 3"]) -> None:
        """The pixels: decoded no larger than the crop needs, cropped, resized, perhaps mirrored."""
        header, (left, top, width, height) = self._picture.header, self._box
        shrink = min(width, height) / len(out)  # how much smaller the crop may be decoded and still fill the view
        pixels = self._picture.decode(min_side=math.ceil(min(header.width, header.height) / max(shrink, 1.0)))
        columns = _whole(left, width, header.width, pixels.shape[1])
        rows = _whole(top, height, header.height, pixels.shape[0])
        if self._mirrored:
            _mirror(resize(pixels[rows, columns], np.empty_like(out)), out)
        else:
            resize(pixels[rows, columns], out)


def _whole(start: int, length: int, side: int, decoded: int) -> slice:
    """A stretch of a side of `side` pixels, in whole pixels of the same side decoded to `decoded`."""
    first = min(round(start * decoded / side), decoded - 1)
    return slice(first, max(round((start + length) * decoded / side), first + 1))


def resize(pixels: np.ndarray, out: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """Antialiased bicubic resize of uint8 (H, W, 3) to the size of `out`, which it fills and returns.

    Pillow's filter, in a sixth of its time: torch keeps to integers and to three channels. Equal to one level, but
    for tall narrow crops, where Pillow takes its two passes in the other order and clips other values between them.
    """
    # A crop is copied by numpy: torch would take a team of threads for it from within each thread of the loader.
    _RESIZE(_planes(np.ascontiguousarray(pixels)), list(out.shape[:2]), False, out=_planes(out))
    return out


def _planes(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "1 3 h w"]:
    """The same memory as torch takes it, with strides that say: channels last."""
    return torch.from_numpy(pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2))


def _mirror(view: UInt8[np.ndarray, "s s 3"], out: UInt8[np.ndarray, "s s 3"]) -> None:
    """Writes a view's mirror image to `out`: by torch, ten times as fast as numpy, a few rows at a time."""
    step = max(_GRAIN // view[0].size, 1)
    for first in range(0, len(view), step):
        rows = slice(first, first + step)
        out[rows] = torch.from_numpy(view[rows]).flip(1).numpy()


def draw_colour(config: AugmentConfig, draw: Draw) -> tuple[float, float, float, float]:
    """A sample's brightness, contrast, saturation (factors; 1 changes nothing) and hue (turns)."""
    jittered = draw.uniform() < config.jitter_chance
    brightness, contrast, saturation, hue = (
        width * (2 * draw.uniform() - 1) if jittered else 0.0 for width in config.jitter
    )
    grey = draw.uniform() < config.grey
    return 1 + brightness, 1 + contrast, 0.0 if grey else 1 + saturation, hue


def recolour(views: UInt8[Tensor, "b h w 3"], colour: Float[Tensor, "b 4"]) -> UInt8[Tensor, "b h w 3"]:
    """The views of a batch with the colours that `draw_colour` drew, on whatever device they are.

    Hue, saturation, brightness and contrast are one matrix and one offset an image. Differs from torchvision's
    ColorJitter in its fixed order, in turning the hue in YIQ (luma stays) and in clipping once, at the end.
    """
    brightness, contrast, saturation, hue = colour.unbind(1)
    to_yiq = torch.tensor(_TO_YIQ, device=views.device)
    cosine, sine = (saturation * f(2 * math.pi * hue) for f in (torch.cos, torch.sin))
    zero, one = torch.zeros_like(hue), torch.ones_like(hue)
    turn = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], dim=1).view(-1, 3, 3)
    matrix = (torch.linalg.inv(to_yiq) @ turn @ to_yiq) * (brightness * contrast)[:, None, None]
    pixels = views.flatten(1, 2).float()
    middle = (pixels.mean(dim=1) @ to_yiq[0]) * brightness * (1 - contrast)
    made = torch.baddbmm(middle[:, None, None].expand(-1, 1, 3), pixels, matrix.transpose(1, 2))
    return made.round().clamp(0, 255).to(torch.uint8).view(views.shape)
