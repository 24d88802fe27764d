"""Small versions of images for a page."""

from __future__ import annotations

import numpy as np

from clipwright.pipeline import pixels

SHOWN_FORMATS = ("jpeg", "png", "webp", "gif")  # which every browser shows


def thumbnail(image: bytes | np.ndarray, side: int, *, max_bytes: int = 0) -> bytes:
    """Returns an image as a JPEG whose longer side is at most `side` pixels.

    A file of at most `max_bytes` is returned unchanged. Raises PixelError for bytes that cannot be decoded.
    """
    if isinstance(image, bytes) and len(image) <= max_bytes and pixels.probe(image).format in SHOWN_FORMATS:
        return image
    decoded = pixels.decode(image, min_side=side) if isinstance(image, bytes) else image
    height, width = decoded.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        decoded = pixels.resize(decoded, max(1, round(width * scale)), max(1, round(height * scale)))
    return pixels.encode(decoded, "jpeg", 80)
