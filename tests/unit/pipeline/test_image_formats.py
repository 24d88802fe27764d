"""Image formats: those that are decoded, those refused by name, damaged data, and files made to exhaust a decoder."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipwright.pipeline import pixels
from clipwright.pipeline.pixels import headers

# 32 × 24 pixels, the left half (200, 30, 40), the right half (20, 60, 220).
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAA"
    "AAAERAAAEAAQAAAAABoAABAAAAAAAAAH4AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/GlwcnAA"
    "AADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkA"
    "AAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAA"
    "AChjbGFwAAAAIAAAAAEAAAAYAAAAAf///+AAAAAC////2AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAhm"
    "1kYXQAAAB6KAGvEyGcjQj1JyL//2jyn/oqGf9s93Rf+iYPvxkKv/L61qcb0MLo4IfeLLaikLzyNXljyouv6eXGblobolFOjj5Et6p8vjCs/aqP"
    "kscHyEix0cAyRP0l3H4Kls0TBE/0e07fTo473peG5sN1XoVotBiCvy9/ibRyenw="
)


def picture(width: int = 200, height: int = 150, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def rejection(data: bytes) -> tuple[str, str]:
    with pytest.raises(pixels.PixelError) as caught:
        pixels.decode(data)
    return caught.value.args


def test_avif_is_decoded_upright() -> None:
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    got = pixels.decode(saved(image, "AVIF", quality=95, exif=exif))
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert got.shape == (200, 150, 3) and np.abs(got - expected).mean() < 3
    header = pixels.probe(saved(image, "AVIF"))
    assert (header.format, header.width, header.height, header.plain) == ("avif", 200, 150, False)
    assert rejection(saved(image, "AVIF")[:-40])[0] == "E_IMG_TRUNCATED"


def test_heic_is_decoded_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delitem(Image.OPEN, "HEIF", raising=False)

        def no_module(name: str) -> None:
            raise ImportError(name)

        patch.setattr(headers, "import_module", no_module)
        code, detail = rejection(HEIC)
        assert code == "E_IMG_FORMAT" and "pip install 'clipwright[heif]'" in detail
    got = pixels.decode(HEIC).astype(int)
    assert got.shape == (24, 32, 3)
    assert np.abs(got[:, :14] - (200, 30, 40)).max() < 8 and np.abs(got[:, 18:] - (20, 60, 220)).max() < 8
    assert pixels.probe(HEIC).format == "heif" and not pixels.probe(HEIC).plain
    assert rejection(HEIC[:-60])[0] == "E_IMG_TRUNCATED"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n", "JPEG XL"),
        (b"P6\n4 4\n255\n", "PNM"),
        (b"P1 4 4", "PNM"),
        (b"qoif\0\0", "QOI"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"\n<?xml version='1.0'?><svg xmlns='x'>", "SVG"),
        (b"\xef\xbb\xbf<svg>", "SVG"),
        (b"<?xml version='1.0'?><a/>", "XML text"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (b"\x1aE\xdf\xa3\x01", "Matroska"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"<!DOCTYPE html>", "text/html"),
        (b"nothing known", "the bytes 6e 6f"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, name: str) -> None:
    code, detail = rejection(data)
    assert code == "E_IMG_FORMAT" and name in detail and "supported: jpeg, png, webp, avif" in detail


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}])
def test_damaged_jpeg_data_is_rejected_and_a_missing_end_marker_is_added(options: dict[str, Any]) -> None:
    image = picture(480, 360)
    exif = Image.Exif()
    exif[0x0112] = 6
    for extra, mode in (({}, "RGB"), ({}, "L"), ({}, "CMYK"), ({"exif": exif}, "RGB")):
        data = saved(image.convert(mode), "JPEG", quality=90, **options, **extra)
        whole = pixels.decode(data)
        encoded = pixels.EncodedImage(data[:-2])
        assert (encoded.decode() == whole).all() and encoded.data == data
        assert (pixels.decode(data[:-2], min_side=90) == pixels.decode(data, min_side=90)).all()
        padded = data[:-2] + bytes(9) + data[-2:]  # some cameras do so
        assert (pixels.decode(padded) == whole).all() and pixels.EncodedImage(padded).data == padded
        start = data.index(b"\xff\xda")
        code, detail = rejection(data[: start + (len(data) - start) // 2])
        assert code == "E_IMG_TRUNCATED" and "before the last pixel" in detail
        assert rejection(data[:-30])[0] == rejection(data[: len(data) // 3])[0] == "E_IMG_TRUNCATED"
        removed = data[: start + 300] + data[start + 900 :]
        code, detail = rejection(removed)
        assert code == "E_IMG_DAMAGED" and "Corrupt JPEG data" in detail
    codes = []
    for offset in np.linspace(start + 40, len(data) - 400, 12).astype(int):
        zeroed = data[:offset] + bytes(200) + data[offset + 200 :]
        codes.append(outcome(lambda zeroed=zeroed: pixels.decode(zeroed)))
    # Not all: zeros may be the code of valid pixels, after which the decoder is in step again.
    assert codes.count("E_IMG_DAMAGED") >= 4, codes


def outcome(read: Callable[[], np.ndarray]) -> str:
    try:
        read()
        return "ok"
    except pixels.PixelError as error:
        return error.args[0]


def chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def png_with(*chunks: bytes, late: bool = False) -> bytes:
    """A PNG with chunks before its pixels, or after them."""
    data = saved(picture(20, 10), "PNG")
    offset = data.index(b"IEND" if late else b"IDAT") - 4
    return data[:offset] + b"".join(chunks) + data[offset:]


def test_png_whose_pixel_stream_ends_early_is_rejected() -> None:
    """Its chunks are whole and have the right CRC: only the decoder sees it."""
    image = picture(64, 48)
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(image))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0))
    stream = zlib.compress(rows)
    for kept, code in ((len(stream), "ok"), (len(stream) - 300, "E_IMG_TRUNCATED"), (300, "E_IMG_TRUNCATED")):
        pixel_data = chunk(b"IDAT", stream[:kept])
        data = b"\x89PNG\r\n\x1a\n" + header + pixel_data + chunk(b"IEND", b"")
        assert outcome(lambda data=data: pixels.decode(data)) == code


def test_exif_after_the_pixels_of_a_png_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    for late in (False, True):
        data = png_with(chunk(b"eXIf", body), late=late)
        header = pixels.probe(data)
        assert (header.width, header.height, header.orientation, header.plain) == (10, 20, 6, False)
        assert (pixels.decode(data) == np.asarray(picture(20, 10).transpose(Image.Transpose.ROTATE_270))).all()


def gif_with(frames: int = 1, comment_bytes: int = 0) -> bytes:
    data = saved(Image.new("P", (4, 4)), "GIF")
    start = data.index(b",", 13)
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * (comment_bytes // 255) + b"\0" if comment_bytes else b""
    return data[:start] + comment + data[start:-1] * frames + b";"


def webp_with(width: int, height: int, exif_bytes: int = 0) -> bytes:
    """A WebP of one small picture in a canvas of that size."""
    image = saved(picture(20, 10), "WEBP")[12:]
    exif = b"EXIF" + struct.pack("<I", exif_bytes) + bytes(exif_bytes) if exif_bytes else b""
    flags = b"\x08\0\0\0" if exif_bytes else b"\0\0\0\0"
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + flags + canvas + image + exif
    return b"RIFF" + struct.pack("<I", len(body)) + body


def apng_that_states(frames: int) -> bytes:
    images = [picture(20, 10, seed) for seed in (1, 2)]
    data = saved(images[0], "PNG", save_all=True, append_images=images[1:])
    offset = data.index(b"acTL") - 4
    return data[:offset] + chunk(b"acTL", struct.pack(">II", frames, 0)) + data[offset + 20 :]


def tiff_with_tiles(side: int) -> bytes:
    """A TIFF of 16 × 16 pixels in one tile of side × side."""
    tags = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, 1),
        (262, 1),
        (277, 1),
        (322, side),
        (323, side),
        (324, 8),
        (325, 256),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 264) + bytes(256) + struct.pack("<H", len(tags)) + entries + bytes(4)


MIB = 1 << 20
BOMB = zlib.compress(bytes(40 * MIB))
BOMBS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "zTXt": (lambda: png_with(chunk(b"zTXt", b"Comment\0\0" + BOMB)), "E_IMG_METADATA", str(MIB)),
    "iTXt": (lambda: png_with(chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)), "E_IMG_METADATA", str(MIB)),
    "late zTXt": (lambda: png_with(chunk(b"zTXt", b"a\0\0" + BOMB), late=True), "E_IMG_METADATA", str(MIB)),
    "iCCP": (lambda: png_with(chunk(b"iCCP", b"profile\0\0" + BOMB)), "E_IMG_METADATA", str(MIB)),
    "GIF comment": (lambda: gif_with(comment_bytes=2 * MIB), "E_IMG_METADATA", str(MIB)),
    "WebP EXIF": (lambda: webp_with(20, 10, exif_bytes=17 * MIB), "E_IMG_METADATA", str(16 * MIB)),
    "GIF frames": (lambda: gif_with(frames=10_001), "E_IMG_FRAMES", "10000"),
    "APNG frames": (lambda: apng_that_states(2**31 - 1), "E_IMG_FRAMES", "10000"),
    "WebP canvas": (lambda: webp_with(16_000, 12_000), "E_IMG_PIXELS", "64000000"),
    "TIFF tile": (lambda: tiff_with_tiles(60_000), "E_IMG_PIXELS", "64000000"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_rejected_with_their_limit(name: str) -> None:
    make, code, limit = BOMBS[name]
    got, detail = rejection(make())
    assert got == code and limit in detail.replace(",", "")


def test_metadata_and_animations_within_the_limits_are_accepted() -> None:
    for data in (
        png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(MIB - 1)))),
        gif_with(frames=10_000, comment_bytes=MIB - 9000),
        webp_with(20, 10, exif_bytes=MIB),
        apng_that_states(2),
        tiff_with_tiles(16),
    ):
        assert pixels.decode(data).shape[2] == 3


def test_blank_images_are_recognized() -> None:
    transparent = np.zeros((40, 40, 4), np.uint8)
    transparent[..., :3] = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    bmp = bytearray(saved(Image.fromarray(transparent), "BMP"))
    for data in (saved(Image.fromarray(transparent), "PNG"), bytes(bmp)):
        decoded = pixels.decode(data)
        assert pixels.is_blank(decoded) == bool((decoded == 255).all())
    assert pixels.is_blank(pixels.decode(saved(Image.fromarray(transparent), "PNG")))
    assert pixels.is_blank(np.full((1, 1, 3), 7, np.uint8))
    for row, column, channel in ((0, 1, 0), (39, 39, 2), (17, 0, 1)):
        one_differs = np.full((40, 40, 3), 7, np.uint8)
        one_differs[row, column, channel] = 8
        assert not pixels.is_blank(one_differs)
