"""The size and the encoding in which an image is stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from clipwright.pipeline import pixels
from clipwright.pipeline.core.registry import configclass

EXTENSION = {"jpeg": "jpg", "png": "png", "webp": "webp"}
DHASH_MIN_SIDE = 64  # pixels; the difference hash needs only 9 x 8 of them


@configclass
class ImagesConfig:
    """How images are stored. Images are never enlarged.

    A JPEG, PNG or WebP that needs no change is copied byte for byte, whatever `format` is; only a missing end marker
    of a JPEG is added. Every other image is
    stored upright and re-encoded as `format`: one that is too large, of another format, transparent or animated, and
    one with EXIF, XMP or text metadata, so that no location, name or camera serial number enters a dataset.
    """

    resize: Literal["keep", "shortest", "longest"] = "keep"
    """Side limited to `size`: shortest or longest; keep stores the original size."""
    size: Annotated[int, Field(ge=1, le=pixels.MAX_SIDE)] = 256
    """Limit of that side in pixels; larger images are scaled down, smaller ones are left alone."""
    format: pixels.Format = "jpeg"
    """Encoding of images that are re-encoded: jpeg, png or webp."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """JPEG or WebP quality of images that are re-encoded."""


@dataclass(frozen=True)
class StoredImage:
    """An image as it is stored: file extension, bytes, their SHA-256, size in pixels, difference hash.

    blank: all its pixels have one color.
    """

    extension: str
    data: bytes
    sha256: str
    width: int
    height: int
    dhash: int
    blank: bool


def target_size(width: int, height: int, config: ImagesConfig) -> tuple[int, int]:
    """Returns the upright (width, height) after resizing, in pixels."""
    if config.resize == "keep":
        return width, height
    side = min(width, height) if config.resize == "shortest" else max(width, height)
    if side <= config.size:
        return width, height
    return max(1, round(width * config.size / side)), max(1, round(height * config.size / side))


def store_image(image: bytes | np.ndarray, config: ImagesConfig) -> StoredImage:
    """Returns how original bytes, or pixels uint8 (H, W, 3), are stored. Raises PixelError."""
    if isinstance(image, bytes):
        encoded = pixels.EncodedImage(image)
        header = encoded.header
        size = target_size(header.width, header.height, config)
        if header.plain and size == (header.width, header.height):
            # Decoded even though the bytes are kept: this proves that the image is intact.
            decoded = encoded.decode(min_side=DHASH_MIN_SIDE)
            return _stored(EXTENSION[header.format], encoded.data, size, decoded)
        # DCT scaling down to twice the target size saves most of the decoding and leaves enough for the resize filter.
        decoded = encoded.decode(min_side=2 * min(size))
        if _was_rotated(decoded, size):
            size = target_size(decoded.shape[1], decoded.shape[0], config)
    else:
        decoded = image
        size = target_size(decoded.shape[1], decoded.shape[0], config)
    if (decoded.shape[1], decoded.shape[0]) != size:
        decoded = pixels.resize(decoded, *size)
    data = pixels.encode(decoded, config.format, config.quality)
    return _stored(EXTENSION[config.format], data, size, decoded)


def _was_rotated(decoded: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether decoding applied an orientation that the header did not show: a PNG's EXIF may follow its pixels."""
    return (decoded.shape[1] > decoded.shape[0]) != (size[0] > size[1])


def _stored(extension: str, data: bytes, size: tuple[int, int], decoded: np.ndarray) -> StoredImage:
    sha256 = hashlib.sha256(data).hexdigest()
    return StoredImage(extension, data, sha256, *size, pixels.dhash(decoded), pixels.is_blank(decoded))
