"""Image formats by their first bytes: those that are decoded, and others, which are refused by name."""

from __future__ import annotations

import re

SUPPORTED = "jpeg, png, webp, avif, gif, bmp, tiff, and heic with the extra `heif`"

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
# Brands of an ISO media file, its own one first.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"\xff\xd8", "a JPEG without its first header"),
    (b"qoif", "QOI"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\0\0\2\0", "a cursor (CUR)"),
    (b"icns", "an icon (ICNS)"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"SIMPLE  =", "FITS"),
    (b"farbfeld", "farbfeld"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"FLV\x01", "a Flash video"),
    (b"OggS", "an Ogg file"),
    (b"\0\0\1\xba", "an MPEG video"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
_RIFF = {b"AVI ": "an AVI video", b"WAVE": "a WAVE sound"}
_PNM = re.compile(rb"P[1-7][\s#]")


class PixelError(ValueError):
    """A rejected image: `args[0]` is its E_IMG code, `args[1]` the detail."""


def sniff(data: bytes) -> str:
    """Detects the format from the first bytes. Raises PixelError E_IMG_EMPTY or E_IMG_FORMAT."""
    if not data:
        raise PixelError("E_IMG_EMPTY", "0 bytes")
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        brands = _brands(data)
        if any(brand in _AVIF_BRANDS for brand in brands):
            return "avif"
        if brands[0] in _HEIF_BRANDS:
            return "heif"
    raise PixelError("E_IMG_FORMAT", f"{_describe(data)} (supported: {SUPPORTED})")


def _brands(data: bytes) -> list[bytes]:
    size = min(int.from_bytes(data[:4], "big"), 256)
    return [data[8:12], *(data[start : start + 4] for start in range(16, size, 4))]


def _describe(data: bytes) -> str:
    """Returns what data of no supported format is."""
    for magic, name in _REFUSED:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] in _RIFF:
        return _RIFF[data[8:12]]
    if data[4:8] == b"ftyp":
        return f"a video or another ISO media file ({_brands(data)[0].decode('latin-1').strip()!r})"
    if _PNM.match(data):
        return "PNM (PBM, PGM, PPM or PAM)"
    if data[128:132] == b"DICM":
        return "DICOM"
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "text/html"
    if b"<svg" in start:
        return "SVG"
    if start.startswith(b"<?xml"):
        return "XML text"
    return f"data that starts with the bytes {data[:8].hex(' ')}"
