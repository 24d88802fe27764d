"""The only path from bytes to pixels: detect the format, check the header, decode upright RGB, resize, encode, hash.

Preparation, loader, evaluation and service use nothing else, so they all see the same pixels. The bytes are untrusted:
sizes are checked before anything is decoded, and only six formats reach a decoder.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import (
    BmpImagePlugin,  # noqa: F401  imported to register the format, so that Pillow does not load all its plugins
    GifImagePlugin,  # noqa: F401
    Image,
    ImageCms,
    ImageOps,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from clipwright.pipeline.core.messages import format_count

MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MAX_ASPECT = 100

Format = Literal["jpeg", "png", "webp"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]  # all antialiased

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
)
_ORIENTATION = 0x0112
# JPEG markers: frame headers with the size, start of scan, tables and comments before it, and JFIF with its length.
_JPEG_START, _JPEG_SCAN = b"\xff\xd8\xff", 0xFFDA
_JPEG_FRAMES, _JPEG_TABLES = (0xFFC0, 0xFFC1, 0xFFC2), (0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE)
_JFIF = (0xFFE0, 16)

# Pillow's warnings about unusual files are harmless or also raised as errors. Its bomb warning is an error here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _silence_libtiff() -> None:
    """Stops libtiff from printing errors to stderr, which Pillow raises anyway."""
    # Pillow's extension has its own copy of libtiff; a build without it has no such symbol.
    library = ctypes.CDLL(Image.core.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetErrorHandlerExt", "TIFFSetWarningHandler", "TIFFSetWarningHandlerExt"):
        if hasattr(library, name):
            setter = getattr(library, name)
            setter.restype, setter.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            setter(None)


_silence_libtiff()


class PixelError(ValueError):
    """A rejected image: `args[0]` is its E_IMG code, `args[1]` the detail."""


@dataclass(frozen=True)
class Header:
    """An image's header, read before any pixel is decoded.

    `format` is jpeg, png, webp, gif, bmp or tiff. `width` and `height` are upright (after applying `orientation`,
    EXIF 1-8), `stored_*` as stored. `plain` files may be stored unchanged: a jpeg, png or webp of one frame, 8-bit
    grayscale, palette or RGB, without EXIF, XMP, text or transparency.
    """

    format: str
    width: int
    height: int
    stored_width: int
    stored_height: int
    orientation: int
    mode: str
    plain: bool


def sniff(data: bytes) -> str:
    """Detects the format from the first bytes. Raises PixelError E_IMG_EMPTY or E_IMG_FORMAT."""
    if not data:
        raise PixelError("E_IMG_EMPTY", "0 bytes")
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise PixelError("E_IMG_FORMAT", f"{_describe(data)} (supported: jpeg, png, webp, gif, bmp, tiff)")


def _describe(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "text/html"
    if start.startswith((b"<?xml", b"<svg")):
        return "XML or SVG text"
    if data[4:8] == b"ftyp":
        return f"an ISO media file ({data[8:12].decode('latin-1').strip()!r}, such as AVIF or HEIC)"
    return f"data that starts with the bytes {data[:8].hex(' ')}"


def probe(data: bytes) -> Header:
    """Reads the header and checks all limits without decoding pixels. Raises PixelError."""
    return _open(data)[1]


def _open(data: bytes) -> tuple[Image.Image, Header]:
    kind = sniff(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PixelError("E_IMG_PIXELS", str(error)) from None
    except Image.UnidentifiedImageError:
        raise PixelError(
            "E_IMG_TRUNCATED", f"{format_count(len(data), 'byte')} of {kind} without a readable header"
        ) from None
    except Exception as error:  # a malformed header may make Pillow raise anything
        raise PixelError("E_IMG_TRUNCATED", f"{kind} header: {_reason(error)}") from None
    width, height = image.size
    _check_size(width, height)
    orientation = _orientation(image)
    turned = orientation >= 5
    # Pillow gives the upright size of a TIFF and the stored size of other formats.
    upright = (height, width) if turned and kind != "tiff" else (width, height)
    stored = (upright[1], upright[0]) if turned else upright
    plain = _plain(image, kind, data, orientation)
    return image, Header(kind, *upright, *stored, orientation, image.mode, plain)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise PixelError("E_IMG_TRUNCATED", f"the header states {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise PixelError(
            "E_IMG_PIXELS", f"{width} x {height} = {format_count(width * height, 'pixel')} ({MAX_PIXELS} allowed)"
        )
    if max(width, height) > MAX_SIDE:
        raise PixelError("E_IMG_PIXELS", f"{width} x {height} pixels ({MAX_SIDE} per side allowed)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PixelError("E_IMG_PIXELS", f"{width} x {height} pixels (aspect ratio up to {MAX_ASPECT} allowed)")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a malformed EXIF block states no orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _plain(image: Image.Image, kind: str, data: bytes, orientation: int) -> bool:
    if kind not in ("jpeg", "png", "webp") or orientation != 1 or getattr(image, "is_animated", False):
        return False
    if image.mode not in ("RGB", "L", "P", "1") or "transparency" in image.info:
        return False
    if kind == "png":
        try:
            return not {b"eXIf", b"tEXt", b"zTXt", b"iTXt"} & {name for name, _, _ in _png_chunks(data)}
        except PixelError:
            return False
    if kind == "webp":
        return not ({"exif", "xmp"} & image.info.keys())
    return not any(marker in ("APP1", "APP13") for marker, _ in getattr(image, "applist", []))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, start, length) of each chunk's data. Raises PixelError if image data is truncated."""
    offset = 8
    while offset + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        if offset + 12 + length > len(data):
            if name in (b"IHDR", b"PLTE", b"IDAT"):
                detail = f"{format_count(len(data), 'byte')} of at least {offset + 12 + length}"
                raise PixelError("E_IMG_TRUNCATED", detail)
            return
        yield name, offset + 8, length
        if name == b"IEND":
            return
        offset += 12 + length


def _check_png(data: bytes) -> None:
    """Checks the CRCs of a PNG's image data, which Pillow does not."""
    view = memoryview(data)
    for name, start, length in _png_chunks(data):
        if name in (b"IHDR", b"PLTE", b"IDAT"):
            (stated,) = struct.unpack_from(">I", data, start + length)
            if zlib.crc32(view[start - 4 : start + length]) != stated:
                raise PixelError("E_IMG_TRUNCATED", f"wrong CRC in the {name.decode()} chunk at byte {start - 8}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _bare_jpeg(data: bytes) -> Header | None:
    """Reads the header of a grayscale or RGB JPEG without metadata like `probe`, six times as fast.

    Returns None for every other file, which Pillow then decides on.
    """
    offset, size, channels = 2, (0, 0), 0
    while offset + 10 <= len(data):
        marker, length = struct.unpack_from(">HH", data, offset)
        if marker in _JPEG_FRAMES and not channels:
            height, width, channels = struct.unpack_from(">HHB", data, offset + 5)
            if channels not in (1, 3):
                return None
            size = width, height
        elif marker == _JPEG_SCAN and channels:
            try:
                _check_size(*size)
            except PixelError:
                return None
            return Header("jpeg", *size, *size, 1, "RGB" if channels == 3 else "L", True)
        elif marker not in _JPEG_TABLES and (marker, length) != _JFIF:
            return None
        offset += 2 + length
    return None


class EncodedImage:
    """An image file. The constructor reads and checks the header; `decode`, called at most once, decodes the pixels."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._image: Image.Image | None = None
        header = _bare_jpeg(data) if data.startswith(_JPEG_START) else None
        if header is None:
            self._image, header = _open(data)
        self.header = header

    def decode(self, min_side: int | None = None) -> np.ndarray:
        """Decodes the image; see `pixels.decode`."""
        scale = 1
        if self.header.format == "jpeg" and min_side is not None:
            short = min(self.header.width, self.header.height)
            scale = next((s for s in (8, 4, 2) if s <= short and -(-short // s) >= min_side), 1)
        pixels = self._decode_plain_jpeg(scale)
        return np.array(self._decode_with_pillow(scale)) if pixels is None else pixels

    def _decode_plain_jpeg(self, scale: int) -> np.ndarray | None:
        """Decodes a plain JPEG with libjpeg-turbo: the same pixels as Pillow in 0.6 of the time.

        Returns None for every other file and on any error, so that Pillow decides.
        """
        header = self.header
        if header.format != "jpeg" or header.mode not in ("RGB", "L") or header.orientation != 1:
            return None
        width, height = -(-header.stored_width // scale), -(-header.stored_height // scale)
        try:
            pixels = simplejpeg.decode_jpeg(self._data, min_width=width, min_height=height)
        except ValueError:
            return None
        return pixels if pixels.shape == (height, width, 3) else None

    def _decode_with_pillow(self, scale: int) -> Image.Image:
        data, kind = self._data, self.header.format
        image = _open(data)[0] if self._image is None else self._image
        if kind == "png":
            _check_png(data)
        if scale > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))
        try:
            image.load()
            # Read the orientation again: a PNG may have its EXIF after the pixels, and loading a TIFF rotates it.
            upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
            return _rgb(upright)
        except PixelError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise PixelError("E_IMG_PIXELS", str(error)) from None
        except Exception as error:  # malformed data may make Pillow raise anything
            raise PixelError(
                "E_IMG_TRUNCATED", f"{format_count(len(data), 'byte')} of {kind}: {_reason(error)}"
            ) from None


def _rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: transparency becomes white, deep grayscale is scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scale_deep_grayscale(image)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _scale_deep_grayscale(image: Image.Image) -> np.ndarray:
    """Scales grayscale of more than 8 bits to uint8 (H, W).

    16-bit files have a fixed range. 32-bit and float files do not, so the smallest usual range that contains the
    brightest pixel is taken: 1.0 (for floats), 255, 65535, or else the brightest pixel itself.
    """
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return ((wide * 255 + 32767) // 65535).astype(np.uint8)
    wide = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    brightest = float(wide.max())
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    white = next((value for value in ranges if brightest <= value), brightest)
    return np.rint(wide * (255.0 / white)).astype(np.uint8)


def decode(data: bytes, min_side: int | None = None) -> np.ndarray:
    """Decodes an image's first frame as upright RGB, uint8 (H, W, 3).

    With `min_side`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (in the DCT, several times faster) if its
    shorter side stays at least `min_side`. Raises PixelError; truncated or corrupt data is never padded.
    """
    return EncodedImage(data).decode(min_side)


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


def bytes_key(data: bytes) -> str:
    """Returns the key of a sample: the first 32 hex digits of the SHA-256 of the original image bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def pixel_key(pixels: np.ndarray) -> str:
    """Returns the key of a sample without image bytes: SHA-256 of `RGB WxH` and the raw pixels, uint8 (H, W, 3)."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)
    sha256 = hashlib.sha256(f"RGB {pixels.shape[1]}x{pixels.shape[0]}".encode())
    sha256.update(np.ascontiguousarray(pixels).data)
    return sha256.hexdigest()[:32]
