"""Training views: random-resized crop and flip, parameters a pure function of (seed, dataset, epoch, key)."""

from __future__ import annotations

import math

import numpy as np

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.order import Draw
from clipwright.pipeline.pixels import crop_resize, decode, probe


@configclass
class AugmentConfig:
    """Random-resized crop: area share and aspect ratio of the crop; `flip`: chance of a mirror image."""

    scale: tuple[float, float] = (0.6, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


def crop_box(width: int, height: int, config: AugmentConfig, draw: Draw) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a crop inside the image, in pixels.

    Area share uniform, ratio log-uniform (Szegedy et al. 2015, section 6). Where they do not fit together the crop is
    cut to the image instead of drawn again: one draw a sample keeps the function pure.
    """
    area = width * height * (config.scale[0] + draw.uniform() * (config.scale[1] - config.scale[0]))
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = math.exp(low + draw.uniform() * (high - low))
    box_width, box_height = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    return draw.uniform() * (width - box_width), draw.uniform() * (height - box_height), box_width, box_height


def training_view(data: bytes, size: int, config: AugmentConfig, draw: Draw) -> np.ndarray:
    """uint8 (size, size, 3): decoded no larger than the crop needs, cropped, resized, perhaps mirrored."""
    header = probe(data)
    left, top, width, height = crop_box(header.width, header.height, config, draw)
    shrink = min(width, height) / size  # how much smaller the crop may be decoded and still hold `size` pixels
    pixels = decode(data, min_side=math.ceil(min(header.width, header.height) / max(shrink, 1.0)))
    scale_x, scale_y = pixels.shape[1] / header.width, pixels.shape[0] / header.height
    view = crop_resize(pixels, (left * scale_x, top * scale_y, width * scale_x, height * scale_y), size)
    return np.ascontiguousarray(view[:, ::-1]) if draw.uniform() < config.flip else view
