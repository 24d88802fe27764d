"""Reads and checks an image's header: size, frames and metadata are limited before any pixel is decoded."""

from __future__ import annotations

import ctypes
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,  # noqa: F401  imported to register the format, so that Pillow does not load all its plugins
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.pixels.formats import PixelError, sniff

MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MAX_ASPECT = 100
MAX_FRAMES = 10_000
MAX_TEXT_BYTES = 1 << 20  # of one text or profile when it is decompressed; Pillow's limit for PNG
MAX_METADATA_BYTES = 16 << 20  # of profile, EXIF and texts together

_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # TIFF tags
# JPEG markers: frame headers with the size, start of scan, tables and comments before it, and JFIF with its length.
_JPEG_SCAN = 0xFFDA
_JPEG_FRAMES, _JPEG_TABLES = (0xFFC0, 0xFFC1, 0xFFC2), (0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE)
_JFIF = (0xFFE0, 16)
# What Pillow says about texts and profiles beyond its limits.
_TEXT_LIMIT_MESSAGES = ("Decompressed data too large", "Too much memory used in text chunks")

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each worker has one core

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


@dataclass(frozen=True)
class Header:
    """An image's header, read before any pixel is decoded.

    `format` is jpeg, png, webp, avif, heif, gif, bmp or tiff. `width` and `height` are upright (after applying
    `orientation`, EXIF 1-8), `stored_*` as stored. `plain` files may be stored unchanged: a jpeg, png or webp of one
    frame, 8-bit grayscale, palette or RGB, without EXIF, XMP, text or transparency.
    """

    format: str
    width: int
    height: int
    stored_width: int
    stored_height: int
    orientation: int
    mode: str
    plain: bool


def probe(data: bytes) -> Header:
    """Reads the header and checks all limits without decoding pixels. Raises PixelError."""
    return open_image(data)[1]


def open_image(data: bytes) -> tuple[Image.Image, Header]:
    """Opens an image with Pillow and checks all limits; its pixels are not decoded yet. Raises PixelError."""
    kind = sniff(data)
    if kind == "webp":
        _check_webp_size(data)
    elif kind == "gif":
        _check_gif(data)
    elif kind in ("avif", "heif"):
        _require_decoder(kind)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except Image.UnidentifiedImageError:
        found = f"{format_count(len(data), 'byte')} of {kind} without a readable header"
        raise PixelError("E_IMG_TRUNCATED", found) from None
    except Exception as error:  # a malformed header may make Pillow raise anything
        raise as_pixel_error(error, f"{kind} header") from None
    width, height = image.size
    check_size(width, height)
    _check_frames(image, kind)
    _check_metadata(image)
    if kind == "tiff":
        _check_tiles(image)
    if kind == "png":
        _find_late_exif(image, data)
    orientation = read_orientation(image)
    turned = orientation >= 5
    # Pillow gives the upright size of a TIFF and the stored size of other formats.
    upright = (height, width) if turned and kind != "tiff" else (width, height)
    stored = (upright[1], upright[0]) if turned else upright
    plain = _plain(image, kind, data, orientation)
    return image, Header(kind, *upright, *stored, orientation, image.mode, plain)


def as_pixel_error(error: Exception, place: str) -> PixelError:
    """Returns the PixelError for an exception of Pillow."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, PixelError):
        return error
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return PixelError("E_IMG_PIXELS", reason)
    if any(message in reason for message in _TEXT_LIMIT_MESSAGES):
        return PixelError(
            "E_IMG_METADATA", f"a text or profile of more than {format_count(MAX_TEXT_BYTES, 'byte')} when decompressed"
        )
    return PixelError("E_IMG_TRUNCATED", f"{place}: {reason}")


def check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise PixelError("E_IMG_TRUNCATED", f"the header states {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        found = f"{width} x {height} = {format_count(width * height, 'pixel')} ({MAX_PIXELS:,} allowed)"
        raise PixelError("E_IMG_PIXELS", found)
    if max(width, height) > MAX_SIDE:
        raise PixelError("E_IMG_PIXELS", f"{width} x {height} pixels ({MAX_SIDE} per side allowed)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PixelError("E_IMG_PIXELS", f"{width} x {height} pixels (aspect ratio up to {MAX_ASPECT} allowed)")


def read_orientation(image: Image.Image) -> int:
    try:
        # Not the method of PngImageFile, which decodes the pixels and would hide their errors here.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # a malformed EXIF block states no orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _require_decoder(kind: str) -> None:
    """Raises E_IMG_FORMAT if AVIF or HEIC cannot be decoded in this installation."""
    if kind == "avif" and not AvifImagePlugin.SUPPORTED:
        raise PixelError("E_IMG_FORMAT", "AVIF, which this build of Pillow does not read")
    if kind == "heif" and "HEIF" not in Image.OPEN:
        try:
            import_module("pi_heif").register_heif_opener()
        except ImportError:
            raise PixelError("E_IMG_FORMAT", "HEIC; install the extra: pip install 'clipwright[heif]'") from None


def _check_webp_size(data: bytes) -> None:
    """Checks the canvas before Pillow's decoder allocates it."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        check_size(int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)


def _check_gif(data: bytes) -> None:
    """Counts frames and comment bytes up to their limits, without Pillow, which joins comments block by block."""
    frames = texts = 0
    try:
        flags = data[10]
        offset = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        while data[offset] in (0x21, 0x2C):
            is_frame, label = data[offset] == 0x2C, data[offset + 1]
            if is_frame:
                flags = data[offset + 9]
                offset += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
                frames += 1
            else:
                offset += 2
            start = offset
            while data[offset]:
                offset += data[offset] + 1
            offset += 1
            if not is_frame and label == 0xFE:
                texts += offset - start
            if frames > MAX_FRAMES:
                raise PixelError("E_IMG_FRAMES", f"more than {format_count(MAX_FRAMES, 'frame')}")
            if texts > MAX_TEXT_BYTES:
                raise PixelError("E_IMG_METADATA", f"comments of more than {format_count(MAX_TEXT_BYTES, 'byte')}")
    except IndexError:  # truncated; decoding the first frame decides
        return


def _check_frames(image: Image.Image, kind: str) -> None:
    """Checks the number of frames that the header states. For a GIF or TIFF, Pillow would read them one by one."""
    frames = 1 if kind in ("gif", "tiff") else getattr(image, "n_frames", 1)
    if frames > MAX_FRAMES:
        raise PixelError("E_IMG_FRAMES", f"{format_count(frames, 'frame')} ({MAX_FRAMES:,} allowed)")


def _check_metadata(image: Image.Image) -> None:
    size = sum(len(value) for value in image.info.values() if isinstance(value, (bytes, str)))
    if size > MAX_METADATA_BYTES:
        found = f"{format_count(size, 'byte')} of profile, EXIF and texts ({MAX_METADATA_BYTES:,} allowed)"
        raise PixelError("E_IMG_METADATA", found)


def _check_tiles(image: Image.Image) -> None:
    """Checks a TIFF's tiles, which are decoded whole however small the image is."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1)
    if isinstance(width, int) and isinstance(height, int) and width * height > MAX_PIXELS:
        raise PixelError("E_IMG_PIXELS", f"tiles of {width} x {height} pixels ({MAX_PIXELS:,} allowed)")


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


def _find_late_exif(image: Image.Image, data: bytes) -> None:
    """Gives Pillow the EXIF that follows the pixels, which it would find only when it decodes them."""
    if "exif" in image.info:
        return
    with suppress(PixelError):
        for name, start, length in _png_chunks(data):
            if name == b"eXIf":
                image.info["exif"] = b"Exif\0\0" + data[start : start + length]


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, start, length) of each chunk's data. Raises PixelError if image data is truncated."""
    offset = 8
    while offset + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        if offset + 12 + length > len(data):
            if name in (b"IHDR", b"PLTE", b"IDAT"):
                detail = f"{format_count(len(data), 'byte')} of at least {offset + 12 + length:,}"
                raise PixelError("E_IMG_TRUNCATED", detail)
            return
        yield name, offset + 8, length
        if name == b"IEND":
            return
        offset += 12 + length


def check_png(data: bytes) -> None:
    """Checks the CRCs of a PNG's image data, which Pillow does not. Raises PixelError."""
    view = memoryview(data)
    for name, start, length in _png_chunks(data):
        if name in (b"IHDR", b"PLTE", b"IDAT"):
            (stated,) = struct.unpack_from(">I", data, start + length)
            if zlib.crc32(view[start - 4 : start + length]) != stated:
                raise PixelError("E_IMG_TRUNCATED", f"wrong CRC in the {name.decode()} chunk at byte {start - 8}")


def bare_jpeg(data: bytes) -> Header | None:
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
                check_size(*size)
            except PixelError:
                return None
            return Header("jpeg", *size, *size, 1, "RGB" if channels == 3 else "L", True)
        elif marker not in _JPEG_TABLES and (marker, length) != _JFIF:
            return None
        offset += 2 + length
    return None
