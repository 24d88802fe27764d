"""Pixels as models, datasets and pages need them: resized, cropped, encoded, hashed."""

from __future__ import annotations

import hashlib
import io
from typing import Literal

import numpy as np
from PIL import Image

from clipwright.pipeline.pixels.decoding import decode

Format = Literal["jpeg", "png", "webp"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]  # all antialiased


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes uint8 (H, W, 3) to (height, width, 3), antialiased bicubic."""
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def evaluation_view(
    data: bytes,
    size: int,
    *,
    interpolation: Interpolation = "bicubic",
    fit: Literal["crop", "squash"] = "crop",
    crop_rounding: Literal["even", "down"] = "even",
) -> np.ndarray:
    """Preprocesses an image file for evaluation, uint8 (size, size, 3); the defaults are CLIP's.

    fit: `crop` resizes the shorter side to `size` and crops the center; `squash` resizes both sides to `size`.
    crop_rounding: how a crop offset of half a pixel is rounded, to `even` or `down`.
    Source: openai/CLIP `_transform`, with torchvision's rounding (longer side down, crop offset half to even);
    transformers rounds down. The image is resized before it is cropped: Pillow orders its two passes by shape and clips
    to 8 bits between them, so resizing the crop alone differs by up to 20 levels.
    """
    image = Image.fromarray(decode(data))
    resample = Image.Resampling[interpolation.upper()]
    if fit == "squash":
        return np.array(image.resize((size, size), resample))
    short = min(image.size)
    width, height = size * image.width // short, size * image.height // short
    image = image.resize((width, height), resample)
    offset = round if crop_rounding == "even" else int
    left, top = offset((width - size) / 2), offset((height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def encode(pixels: np.ndarray, format: Format, quality: int = 90) -> bytes:
    """Encodes uint8 (H, W, 3) without metadata; equal pixels give equal bytes. PNG ignores `quality`."""
    out = io.BytesIO()
    options: dict[str, int] = {} if format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(out, format=format.upper(), **options)
    return out.getvalue()


def dhash(pixels: np.ndarray) -> int:
    """Returns the 64-bit difference hash of uint8 (H, W, 3): similar images differ in few bits.

    Source: N. Krawetz, "Kind of Like That" (2013): 9 × 8 grayscale; a bit is set where brightness falls to the right.
    """
    gray = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BICUBIC))
    bits = np.packbits(gray[:, :-1] > gray[:, 1:])
    return int.from_bytes(bits.tobytes(), "big")


def is_blank(pixels: np.ndarray) -> bool:
    """Whether all pixels, uint8 (H, W, 3), have one color, as those of a transparent image have."""
    few = pixels[:: max(1, pixels.shape[0] // 8), :: max(1, pixels.shape[1] // 8)]  # enough for almost every image
    return bool((few == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all())


def bytes_key(data: bytes) -> str:
    """Returns the key of a sample: the first 32 hex digits of the SHA-256 of the original image bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def pixel_key(pixels: np.ndarray) -> str:
    """Returns the key of a sample without image bytes: SHA-256 of `RGB WxH` and the raw pixels, uint8 (H, W, 3)."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)
    sha256 = hashlib.sha256(f"RGB {pixels.shape[1]}x{pixels.shape[0]}".encode())
    sha256.update(np.ascontiguousarray(pixels).data)
    return sha256.hexdigest()[:32]
