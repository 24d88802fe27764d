"""Decodes images to upright RGB pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms, ImageOps

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.pixels import jpeg
from clipwright.pipeline.pixels.formats import PixelError
from clipwright.pipeline.pixels.headers import as_pixel_error, bare_jpeg, check_png, open_image, read_orientation

_JPEG_START = b"\xff\xd8\xff"
# What turns an image of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class EncodedImage:
    """An image file. The constructor reads and checks the header; `decode`, called at most once, decodes the pixels.

    `data` is the file; after `decode`, a JPEG without its end marker has one.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._image: Image.Image | None = None
        header = bare_jpeg(data) if data.startswith(_JPEG_START) else None
        if header is None:
            self._image, header = open_image(data)
        self.header = header

    def decode(self, min_side: int | None = None) -> np.ndarray:
        """Decodes the image; see `pixels.decode`."""
        if self.header.format != "jpeg":
            return np.array(self._decode_with_pillow(1))
        scale = 1
        if min_side is not None:
            short = min(self.header.width, self.header.height)
            scale = next((s for s in (8, 4, 2) if s <= short and -(-short // s) >= min_side), 1)
        pixels = self._decode_plain_jpeg(scale)
        if pixels is not None:
            return pixels
        whole = jpeg.checked(self.data, cmyk=self.header.mode == "CMYK")
        if whole is not self.data:
            self.data, self._image = whole, None
            pixels = self._decode_plain_jpeg(scale)
        return np.array(self._decode_with_pillow(scale)) if pixels is None else pixels

    def _decode_plain_jpeg(self, scale: int) -> np.ndarray | None:
        """Decodes a grayscale or RGB JPEG with libjpeg-turbo. Returns None for every other file and on any error."""
        header = self.header
        if header.mode not in ("RGB", "L"):
            return None
        width, height = -(-header.stored_width // scale), -(-header.stored_height // scale)
        pixels = jpeg.decode_rgb(self.data, width, height)
        if pixels is None or header.orientation == 1:
            return pixels
        return np.array(Image.fromarray(pixels).transpose(_UPRIGHT[header.orientation]))

    def _decode_with_pillow(self, scale: int) -> Image.Image:
        data, kind = self.data, self.header.format
        image = open_image(data)[0] if self._image is None else self._image
        if kind == "png":
            check_png(data)
        if scale > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))
        try:
            image.load()
            # Read the orientation again: loading a TIFF rotates it.
            upright = ImageOps.exif_transpose(image) if read_orientation(image) != 1 else image
            return _rgb(upright)
        except PixelError:
            raise
        except Exception as error:  # malformed data may make Pillow raise anything
            raise as_pixel_error(error, f"{format_count(len(data), 'byte')} of {kind}") from None


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
