"""Which size and which bytes an image is stored with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from clipwright.pipeline import pixels
from clipwright.pipeline.core.registry import configclass

EXTENSION = {"jpeg": "jpg", "png": "png", "webp": "webp"}


@configclass
class ImagesConfig:
    """How images are stored; they are only ever made smaller.

    `resize` bounds the shortest or the longest side by `size` pixels, or keeps the size. A JPEG, PNG or WebP that
    needs no change passes byte for byte, whatever `format` says. Everything else is stored upright as `format`: a
    file that is too large, of another format, transparent, animated, or with any EXIF, XMP or text in it (turned or
    not), so that no place, name or serial number of a camera gets into a dataset.
    """

    resize: Literal["keep", "shortest", "longest"] = "keep"
    size: Annotated[int, Field(ge=1, le=pixels.MAX_SIDE)] = 256
    format: pixels.Format = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 90


@dataclass(frozen=True)
class Stored:
    """An image as it is stored: file extension, bytes, their SHA-256, size in pixels, difference hash."""

    extension: str
    data: bytes
    sha256: str
    width: int
    height: int
    dhash: int


def target_size(width: int, height: int, config: ImagesConfig) -> tuple[int, int]:
    """Upright (width, height) after resizing, in pixels."""
    if config.resize == "keep":
        return width, height
    side = (min if config.resize == "shortest" else max)(width, height)
    if side <= config.size:
        return width, height
    return max(1, round(width * config.size / side)), max(1, round(height * config.size / side))


def store(image: bytes | np.ndarray, config: ImagesConfig) -> Stored:
    """What is stored of original bytes or of pixels uint8 (H, W, 3). Raises PixelError."""
    if isinstance(image, bytes):
        header = pixels.probe(image)
        wanted = target_size(header.width, header.height, config)
        if header.plain and wanted == (header.width, header.height):
            # Decoded all the same, to know that it is whole; the hash needs 9 x 8 pixels of it.
            seen = pixels.decode(image, min_side=64)
            return _stored(EXTENSION[header.format], image, wanted, pixels.dhash(seen))
        # Twice the wanted side is decoded, where the DCT can: an eighth of the work, and the filter still sees enough.
        shown = pixels.decode(image, min_side=2 * min(wanted))
        wanted = target_size(shown.shape[1], shown.shape[0], config) if _turned(shown, wanted) else wanted
    else:
        shown = image
        wanted = target_size(shown.shape[1], shown.shape[0], config)
    if (shown.shape[1], shown.shape[0]) != wanted:
        shown = pixels.resize(shown, *wanted)
    data = pixels.encode(shown, config.format, config.quality)
    return _stored(EXTENSION[config.format], data, wanted, pixels.dhash(shown))


def _turned(shown: np.ndarray, wanted: tuple[int, int]) -> bool:
    """Whether decoding found an orientation that the header did not show (a PNG's EXIF may follow its pixels)."""
    return (shown.shape[1] > shown.shape[0]) != (wanted[0] > wanted[1])


def _stored(extension: str, data: bytes, size: tuple[int, int], dhash: int) -> Stored:
    return Stored(extension, data, hashlib.sha256(data).hexdigest(), size[0], size[1], dhash)
