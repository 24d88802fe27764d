"""The only path from bytes to pixels: detect the format, check the header, decode upright RGB, resize, encode, hash.

Preparation, loader, evaluation and service use nothing else, so they all see the same pixels. The bytes are untrusted:
sizes, frames and metadata are limited before anything is decoded, and only eight formats reach a decoder.
"""

from clipwright.pipeline.pixels.decoding import EncodedImage, decode
from clipwright.pipeline.pixels.formats import PixelError, sniff
from clipwright.pipeline.pixels.headers import (
    MAX_ASPECT,
    MAX_FRAMES,
    MAX_METADATA_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    MAX_TEXT_BYTES,
    Header,
    probe,
)
from clipwright.pipeline.pixels.views import (
    Format,
    Interpolation,
    bytes_key,
    dhash,
    encode,
    evaluation_view,
    is_blank,
    pixel_key,
    resize,
)

__all__ = [
    "MAX_ASPECT",
    "MAX_FRAMES",
    "MAX_METADATA_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "MAX_TEXT_BYTES",
    "EncodedImage",
    "Format",
    "Header",
    "Interpolation",
    "PixelError",
    "bytes_key",
    "decode",
    "dhash",
    "encode",
    "evaluation_view",
    "is_blank",
    "pixel_key",
    "probe",
    "resize",
    "sniff",
]
