"""The one way from bytes to pixels: sniff, check the header, decode upright RGB, resize, crop, encode, hash.

Preparation, loader, evaluation and service use nothing else, so a picture looks the same to all of them. Bytes are
untrusted: sizes are checked before anything is decoded, and only six formats are let near a decoder.
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
    BmpImagePlugin,  # noqa: F401  registers its format, so that Pillow need not load all of its plugins
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
# Markers of a JPEG: the picture's size, where its data begin, what may stand before, and JFIF's segment by its length.
_JPEG, _JPEG_FRAMES, _JPEG_SCAN = b"\xff\xd8\xff", (0xFFC0, 0xFFC1, 0xFFC2), 0xFFDA
_JPEG_TABLES, _JFIF = (0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE), (0xFFE0, 16)

# What Pillow says about odd files is either harmless or raised as well. Its bomb warning is an error here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _silence_libtiff() -> None:
    """libtiff prints its complaints to stderr; Pillow raises them as well, so the print is only noise."""
    # Found through Pillow's own extension, since it carries its own copy; a build without libtiff has no symbol.
    library = ctypes.CDLL(Image.core.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetErrorHandlerExt", "TIFFSetWarningHandler", "TIFFSetWarningHandlerExt"):
        if hasattr(library, name):
            setter = getattr(library, name)
            setter.restype, setter.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            setter(None)


_silence_libtiff()


class PixelError(ValueError):
    """An image that is refused; `args[0]` is its E_IMG code, `args[1]` the detail."""


@dataclass(frozen=True)
class Header:
    """What an image's header says, before any pixel is decoded.

    `format` is sniffed: jpeg, png, webp, gif, bmp or tiff. `width` and `height` are upright (after `orientation`,
    EXIF 1-8), `stored_*` as stored. `plain` means: a jpeg, png or webp of one frame, without EXIF, XMP, text or
    transparency, 8 bits of grey, palette or RGB; such a file may be handed on as it is.
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
    """The format of an image by its first bytes. Raises PixelError E_IMG_EMPTY or E_IMG_FORMAT."""
    if not data:
        raise PixelError("E_IMG_EMPTY", "0 bytes")
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise PixelError("E_IMG_FORMAT", f"{_describe(data)}; jpeg, png, webp, gif, bmp, tiff are read")


def _describe(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "text/html"
    if start.startswith((b"<?xml", b"<svg")):
        return "XML or SVG text"
    if data[4:8] == b"ftyp":
        return f"an ISO media file ({data[8:12].decode('latin-1').strip()!r}, such as AVIF or HEIC)"
    return f"bytes starting {data[:8].hex(' ')}"


def probe(data: bytes) -> Header:
    """The header of an image, with all limits applied and nothing decoded. Raises PixelError."""
    return _open(data)[1]


def _open(data: bytes) -> tuple[Image.Image, Header]:
    kind = sniff(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PixelError("E_IMG_PIXELS", str(error)) from None
    except Image.UnidentifiedImageError:
        raise PixelError("E_IMG_TRUNCATED", f"{len(data)} bytes with a {kind} start and no readable header") from None
    except Exception as error:  # hostile headers make Pillow raise nearly anything
        raise PixelError("E_IMG_TRUNCATED", f"{kind} header: {_reason(error)}") from None
    width, height = image.size
    _check_size(width, height)
    orientation = _orientation(image)
    turned = orientation >= 5
    # Pillow gives the size of a TIFF upright and of all others as stored.
    upright, across = (width, height), (height, width)
    if turned and kind != "tiff":
        upright, across = across, upright
    stored = across if turned else upright
    plain = _plain(image, kind, data, orientation)
    return image, Header(kind, upright[0], upright[1], stored[0], stored[1], orientation, image.mode, plain)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise PixelError("E_IMG_TRUNCATED", f"a header of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise PixelError("E_IMG_PIXELS", f"{width} x {height} = {width * height} pixels, {MAX_PIXELS} allowed")
    if max(width, height) > MAX_SIDE:
        raise PixelError("E_IMG_PIXELS", f"{width} x {height}, {MAX_SIDE} a side allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PixelError("E_IMG_PIXELS", f"{width} x {height}, a ratio of {MAX_ASPECT} allowed")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about how the picture stands
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
    """(type, start, length) of each chunk's data; raises PixelError when picture data is cut off."""
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if place + 12 + length > len(data):
            if name in (b"IHDR", b"PLTE", b"IDAT"):
                detail = f"{len(data)} bytes of at least {place + 12 + length}"
                raise PixelError("E_IMG_TRUNCATED", detail)
            return
        yield name, place + 8, length
        if name == b"IEND":
            return
        place += 12 + length


def _check_png(data: bytes) -> None:
    """Checks the CRC of a PNG's picture data, which Pillow skips."""
    view = memoryview(data)
    for name, start, length in _png_chunks(data):
        if name in (b"IHDR", b"PLTE", b"IDAT"):
            (stated,) = struct.unpack_from(">I", data, start + length)
            if zlib.crc32(view[start - 4 : start + length]) != stated:
                raise PixelError("E_IMG_TRUNCATED", f"bad CRC of the {name.decode()} chunk at byte {start - 8}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _bare_jpeg(data: bytes) -> Header | None:
    """The header of a grey or RGB JPEG without metadata, as `probe` gives it, in a sixth of the time.

    None for all others, and for what is in the least odd: Pillow has the last word.
    """
    place, size, colours = 2, (0, 0), 0
    while place + 10 <= len(data):
        marker, length = struct.unpack_from(">HH", data, place)
        if marker in _JPEG_FRAMES and not colours:
            height, width, colours = struct.unpack_from(">HHB", data, place + 5)
            if colours not in (1, 3):
                return None
            size = width, height
        elif marker == _JPEG_SCAN and colours:
            try:
                _check_size(*size)
            except PixelError:
                return None
            return Header("jpeg", *size, *size, 1, "RGB" if colours == 3 else "L", True)
        elif marker not in _JPEG_TABLES and (marker, length) != _JFIF:
            return None
        place += 2 + length
    return None


class EncodedImage:
    """An image whose header is read and checked, and which is decoded when it is asked for, once."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        bare = _bare_jpeg(data) if data.startswith(_JPEG) else None
        self._image, self.header = (None, bare) if bare else _open(data)

    def decode(self, min_side: int | None = None) -> np.ndarray:
        """What `pixels.decode` returns."""
        scale = 1
        if self.header.format == "jpeg" and min_side is not None:
            short = min(self.header.width, self.header.height)
            scale = next((s for s in (8, 4, 2) if s <= short and -(-short // s) >= min_side), 1)
        fast = self._fast_jpeg(scale)
        return np.array(self._pillow(scale)) if fast is None else fast

    def _fast_jpeg(self, scale: int) -> np.ndarray | None:
        """A plain JPEG by libjpeg-turbo without Pillow's detours: the same bits in 0.6 of the time.

        None for all others, and for what it finds the least fault with: Pillow has the last word.
        """
        header = self.header
        if header.format != "jpeg" or header.mode not in ("RGB", "L") or header.orientation != 1:
            return None
        width, height = -(-header.stored_width // scale), -(-header.stored_height // scale)
        try:
            made = simplejpeg.decode_jpeg(self._data, min_width=width, min_height=height)
        except ValueError:
            return None
        return made if made.shape == (height, width, 3) else None

    def _pillow(self, scale: int) -> Image.Image:
        data, kind = self._data, self.header.format
        image = _open(data)[0] if self._image is None else self._image
        if kind == "png":
            _check_png(data)
        if scale > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))
        try:
            image.load()
            # A PNG may hold its EXIF after the pixels, and loading a TIFF turns it: ask again.
            upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
            return _rgb(upright)
        except PixelError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise PixelError("E_IMG_PIXELS", str(error)) from None
        except Exception as error:  # as above: hostile bytes
            raise PixelError("E_IMG_TRUNCATED", f"{len(data)} bytes of {kind}: {_reason(error)}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency is laid on white, deep grey is scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_deep_grey(image)).convert("RGB")
    if image.mode == "LAB":
        made = ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert made is not None
        return made
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits to uint8 (H, W).

    16-bit files say their range; 32-bit and float ones do not, so the smallest usual range that holds the brightest
    pixel is taken (1.0 for floats, 255, 65535, else the brightest itself).
    """
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return ((wide * 255 + 32767) // 65535).astype(np.uint8)
    wide = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    top = float(wide.max())
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    full = next((r for r in ranges if top <= r), top)
    return np.rint(wide * (255.0 / full)).astype(np.uint8)


def decode(data: bytes, min_side: int | None = None) -> np.ndarray:
    """An image's first frame as upright RGB, uint8 (H, W, 3).

    With `min_side`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (in the DCT, several times faster) as long
    as its shortest side stays at least `min_side`. Raises PixelError E_IMG_EMPTY, E_IMG_FORMAT, E_IMG_PIXELS, or
    E_IMG_TRUNCATED for anything cut off or broken: nothing is padded.
    """
    return EncodedImage(data).decode(min_side)


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Antialiased bicubic resize of uint8 (H, W, 3) to (height, width, 3)."""
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def evaluation_view(
    data: bytes,
    size: int,
    *,
    interpolation: Interpolation = "bicubic",
    fit: Literal["crop", "squash"] = "crop",
    crop_rounding: Literal["even", "down"] = "even",
) -> np.ndarray:
    """A model's view of an image file, uint8 (size, size, 3); the defaults are CLIP's.

    fit: `crop`, short side to `size`, then the centre; `squash`, both sides to `size`. crop_rounding: where the centre
    is when half a pixel is left over.
    Source: openai/CLIP `_transform`, with torchvision's rounding (long side down, crop offset half to even);
    transformers rounds the offset down. The whole is resized, then cropped: Pillow orders its two passes by shape and
    clips to 8 bits between them, so a resize of the crop alone differs by up to 20 levels.
    """
    image = Image.fromarray(decode(data))
    resample = Image.Resampling[interpolation.upper()]
    if fit == "squash":
        return np.array(image.resize((size, size), resample))
    short = min(image.size)
    wide, high = size * image.width // short, size * image.height // short
    image = image.resize((wide, high), resample)
    offset = round if crop_rounding == "even" else int
    left, top = offset((wide - size) / 2), offset((high - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def encode(pixels: np.ndarray, format: Format, quality: int = 90) -> bytes:
    """uint8 (H, W, 3) as a file without metadata; equal pixels give equal bytes. PNG ignores `quality`."""
    out = io.BytesIO()
    options: dict[str, int] = {} if format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(out, format=format.upper(), **options)
    return out.getvalue()


def dhash(pixels: np.ndarray) -> int:
    """64-bit difference hash of uint8 (H, W, 3): near-equal pictures differ in few bits.

    Source: N. Krawetz, "Kind of Like That" (2013): 9 × 8 grey, a bit where brightness falls to the right.
    """
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BICUBIC))
    bits = np.packbits(grey[:, :-1] > grey[:, 1:])
    return int.from_bytes(bits.tobytes(), "big")


def bytes_key(data: bytes) -> str:
    """The key of a sample: the first 32 hex digits of the SHA-256 of the original image bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def pixel_key(pixels: np.ndarray) -> str:
    """The key of a sample that has no bytes: of the SHA-256 of `RGB WxH` and the raw pixels, uint8 (H, W, 3)."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)
    made = hashlib.sha256(f"RGB {pixels.shape[1]}x{pixels.shape[0]}".encode())
    made.update(np.ascontiguousarray(pixels).data)
    return made.hexdigest()[:32]
