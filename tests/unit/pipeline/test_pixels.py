"""Pixels: unusual and malicious files, orientation, modes, evaluation preprocessing, keys."""

from __future__ import annotations

import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from clipwright.pipeline import pixels
from clipwright.pipeline.pixels import decoding, headers

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def smooth(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A smooth image, which a JPEG reproduces closely."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def saved(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, format, **options)
    return out.getvalue()


def rejection(data: bytes) -> tuple[str, str]:
    with pytest.raises(pixels.PixelError) as caught:
        pixels.decode(data)
    return caught.value.args


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_decoded_upright(format: str, orientation: int) -> None:
    image = smooth(61, 43)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 98} if format == "JPEG" else {}
    data = saved(image, format, exif=exif, **options)
    upright = Image.fromarray(image)
    if orientation > 1:
        upright = upright.transpose(TURNS[orientation])
    expected = np.asarray(upright)
    got, header = pixels.decode(data), pixels.probe(data)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() < (3 if format == "JPEG" else 1e-9)
    assert (header.height, header.width) == got.shape[:2]
    assert (header.stored_width, header.stored_height, header.orientation) == (61, 43, orientation)
    assert not header.plain


def test_modes_are_converted_to_rgb() -> None:
    gray = np.linspace(0, 255, 16 * 12).reshape(12, 16).astype(np.uint8)
    as_rgb = np.repeat(gray[..., None], 3, axis=2)
    assert (pixels.decode(saved(gray, "PNG")) == as_rgb).all()
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert (pixels.decode(saved(deep, "PNG")) == as_rgb).all()
    assert (pixels.decode(saved(deep, "TIFF")) == as_rgb).all()
    unit = Image.fromarray(gray.astype(np.float32) / 255)
    assert np.abs(pixels.decode(saved(unit, "TIFF")).astype(int) - as_rgb).max() <= 1
    bits = Image.fromarray(gray).convert("1")
    assert (pixels.decode(saved(bits, "PNG")) == np.asarray(bits.convert("RGB"))).all()
    cmyk = Image.fromarray(smooth(32, 24)).convert("CMYK")
    assert np.abs(pixels.decode(saved(cmyk, "JPEG", quality=98)).astype(int) - smooth(32, 24)).mean() < 4
    lab = Image.new("LAB", (4, 4), (128, 128, 128))
    assert np.ptp(pixels.decode(saved(lab, "TIFF"))) <= 3  # neutral gray stays neutral


def test_transparency_becomes_white() -> None:
    red = np.zeros((8, 8, 4), dtype=np.uint8)
    red[..., 0], red[:, :4, 3], red[:, 4:, 3] = 255, 0, 128
    for data in (saved(red, "PNG"), saved(red, "WEBP", lossless=True, exact=True), saved(red, "TIFF")):
        got = pixels.decode(data)
        assert (got[:, :4] == 255).all() and (got[0, 4] == (255, 127, 127)).all()
        assert not pixels.probe(data).plain
    half = np.full((8, 8, 2), (0, 128), dtype=np.uint8)
    assert (pixels.decode(saved(Image.fromarray(half, "LA"), "PNG")) == 127).all()
    palette = Image.fromarray(red[..., :3]).quantize(2)
    assert (pixels.decode(saved(palette, "PNG", transparency=palette.getpixel((0, 0)))) == 255).all()


def test_corrupt_files_are_rejected_and_never_padded(capfd: pytest.CaptureFixture[str]) -> None:
    image = smooth(200, 150)
    assert rejection(b"")[0] == "E_IMG_EMPTY"
    code, detail = rejection(b"\n<!DOCTYPE html><html>not found</html>")
    assert code == "E_IMG_FORMAT" and "text/html" in detail
    assert rejection(saved(image, "PPM"))[0] == "E_IMG_FORMAT"
    assert rejection(b"\xff\xd8\xff\xe0nothing")[0] == "E_IMG_TRUNCATED"
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = saved(image, format)
        assert pixels.decode(data).shape == image.shape
        for fraction in (0.3, 0.7, 0.9):
            assert rejection(data[: int(len(data) * fraction)])[0] == "E_IMG_TRUNCATED", (format, fraction)
    assert rejection(saved(image, "JPEG", progressive=True)[:-900])[0] == "E_IMG_TRUNCATED"
    data = bytearray(saved(image, "PNG"))
    data[data.index(b"IDAT") + 60] ^= 1
    code, detail = rejection(bytes(data))
    assert code == "E_IMG_TRUNCATED" and "CRC" in detail
    assert capfd.readouterr().err == ""


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header states a size, with hardly any data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height", "limit"),
    [(30_000, 30_000, "64000000"), (8001, 8000, "64000000"), (16_385, 300, "16384"), (1, 101, "100")],
)
def test_sizes_beyond_the_limits_are_rejected_before_decoding(width: int, height: int, limit: str) -> None:
    code, detail = rejection(png_header(width, height))  # decoding it would need gigabytes
    assert code == "E_IMG_PIXELS"
    if width < 20_000:  # above, Pillow rejects the file first
        assert f"{width} x {height}" in detail and limit in detail.replace(",", "")


def test_sizes_at_the_limits_are_accepted() -> None:
    for width, height in ((8000, 8000), (16_384, 164), (1, 100)):
        assert pixels.probe(png_header(width, height)).width == width


def test_jpeg_header_of_65500_pixels_per_side_is_rejected() -> None:
    data = bytearray(saved(smooth(16, 16), "JPEG"))
    offset = data.index(b"\xff\xc0") + 5
    data[offset : offset + 4] = (65_500).to_bytes(2, "big") * 2
    assert rejection(bytes(data))[0] == "E_IMG_PIXELS"


@pytest.mark.parametrize("size", [(300, 200), (97, 301), (224, 224), (50, 70), (1001, 600)])
@pytest.mark.parametrize("side", [64, 224])
def test_evaluation_view_matches_clip(size: tuple[int, int], side: int) -> None:
    width, height = size
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = min(size)
    resized = int(side * width / short), int(side * height / short)
    left, top = round((resized[0] - side) / 2.0), round((resized[1] - side) / 2.0)
    pillow = Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC)
    expected = np.asarray(pillow.crop((left, top, left + side, top + side))).astype(int)
    assert np.abs(pixels.evaluation_view(saved(image, "PNG"), side) - expected).max() <= 1


# Margins of 0 to 3 pixels around the crop in either direction, and images smaller than the crop.
SHAPES = [(300, 200), (97, 301), (40, 40), (43, 40), (40, 41), (42, 40), (123, 40), (1001, 600), (17, 30)]


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_evaluation_view_matches_transformers(fit: Literal["crop", "squash"], resample: pixels.Interpolation) -> None:
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    options: dict[str, Any] = {"resample": Image.Resampling[resample.upper()], "do_rescale": False}
    if fit == "crop":
        processor = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=40, do_normalize=False, **options)
    else:
        processor = SiglipImageProcessorPil(size={"height": 40, "width": 40}, do_normalize=False, **options)
    rounding_matters = False
    for width, height in SHAPES:
        data = saved(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8), "PNG")
        expected = processor([Image.open(io.BytesIO(data))], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        view = pixels.evaluation_view(data, 40, interpolation=resample, fit=fit, crop_rounding="down")
        assert view.dtype == np.uint8 and np.abs(view - expected.astype(int)).max() <= 1, (width, height)
        rounding_matters |= bool((view != pixels.evaluation_view(data, 40, interpolation=resample, fit=fit)).any())
    assert rounding_matters == (fit == "crop")  # OpenAI's rounding differs for some of these shapes


def test_jpeg_is_never_decoded_below_min_side() -> None:
    data = saved(smooth(1000, 750), "JPEG")
    for min_side, short in ((94, 94), (95, 188), (188, 188), (189, 375), (376, 750), (2000, 750)):
        assert min(pixels.decode(data, min_side=min_side).shape[:2]) == short
    full = pixels.decode(data)
    small = pixels.decode(data, min_side=100)
    assert np.abs(pixels.resize(full, small.shape[1], small.shape[0]).astype(int) - small).mean() < 2


def by_pillow(data: bytes, scale: int) -> np.ndarray:
    """Decodes a JPEG at 1/scale with Pillow alone."""
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": "4:1:1"}])
def test_fast_jpeg_decoder_matches_pillow(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fast: list[np.ndarray] = []
    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: fast.append(decode_jpeg(*a, **k)) or fast[-1])
    noise = np.random.default_rng(0).integers(0, 256, (151, 203, 3), dtype=np.uint8)
    images = [noise, noise[..., 0], noise[:9, :17], noise[:1, :5], smooth(640, 481)]
    for number, image in enumerate(images):
        data = saved(image, "JPEG", quality=(30, 95, 100)[number % 3], **options)
        for scale in (1, 2, 4, 8):
            if min(image.shape[:2]) >= scale:
                small = -(-min(image.shape[:2]) // scale)
                assert (pixels.decode(data, min_side=small) == by_pillow(data, scale)).all(), (number, scale)
    assert len(fast) == 4 * 3 + 4 + 1
    # With an error that does not concern the pixels: decoded by Pillow.
    before = len(fast)
    data = saved(noise, "JPEG", **options)
    offset = data.index(b"\xff\xdb")
    junk = data[:offset] + b"junk" + data[offset:]
    assert (pixels.decode(junk) == by_pillow(junk, 1)).all() and len(fast) == before
    cmyk = saved(Image.fromarray(noise).convert("CMYK"), "JPEG")
    assert (pixels.decode(cmyk) == by_pillow(cmyk, 1)).all()


def outcome(read: Callable[[], np.ndarray]) -> bytes | str:
    try:
        return read().tobytes()
    except pixels.PixelError as error:
        return error.args[0]


def test_fast_jpeg_header_reader_matches_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any bytes, the header and the result, an image or an error, are the same as with Pillow."""
    read, rng = headers.bare_jpeg, np.random.default_rng(0)
    noise = rng.integers(0, 256, (23, 31, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    bare: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"words"}, {"optimize": 1}]
    files = [saved(image, "JPEG", **options) for image in (noise, noise[..., 0]) for options in bare]
    for data in files:
        assert read(data) == pixels.probe(data) is not None
    others = [{"exif": exif}, {"icc_profile": b"p" * 40}, {"xmp": b"<x:xmpmeta/>"}]
    cmyk = saved(Image.fromarray(noise).convert("CMYK"), "JPEG")
    assert not any(map(read, [cmyk, b"\xff\xd8\xff", *(saved(noise, "JPEG", **options) for options in others)]))
    accepted = 0
    for _ in range(4000):
        data = bytearray(files[rng.integers(len(files))])
        end = data.index(b"\xff\xda") + 14
        for _ in range(rng.integers(1, 3)):
            data[rng.integers(2, end)] = rng.integers(256)
        cut = int(rng.integers(2, end))
        del data[cut : cut + rng.integers(3) * rng.integers(20)]
        changed = bytes(data)
        if read(changed) is not None:
            accepted += 1
            fast = outcome(lambda changed=changed: pixels.decode(changed))
            with monkeypatch.context() as patch:
                patch.setattr(decoding, "bare_jpeg", lambda data: None)
                assert fast == outcome(lambda changed=changed: pixels.decode(changed)), changed.hex()
    assert accepted > 500
    monkeypatch.setattr(decoding, "open_image", None)
    assert pixels.decode(files[0]).shape == noise.shape


def test_tiny_images_are_not_decoded_too_small() -> None:
    data = saved(smooth(40, 3), "JPEG")
    assert pixels.decode(data, min_side=1).shape == (2, 20, 3)


def test_keys_encoding_and_difference_hash() -> None:
    image = smooth(40, 30)
    assert pixels.bytes_key(b"abc") == hashlib.sha256(b"abc").hexdigest()[:32]
    assert pixels.pixel_key(image) == hashlib.sha256(b"RGB 40x30" + image.tobytes()).hexdigest()[:32]
    assert pixels.pixel_key(image) == pixels.pixel_key(np.asfortranarray(image))
    for format in ("jpeg", "png", "webp"):
        data = pixels.encode(image, format, 90)
        assert data == pixels.encode(image, format, 90) and pixels.probe(data).plain
        assert np.abs(pixels.decode(data).astype(int) - image).mean() < 6
        assert (pixels.dhash(pixels.decode(data)) ^ pixels.dhash(image)).bit_count() <= 6
    assert (pixels.dhash(smooth(40, 30, 7)) ^ pixels.dhash(image)).bit_count() > 12
    ramp = np.repeat(np.arange(0, 180, 20, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    assert pixels.dhash(ramp) == 0 and pixels.dhash(ramp[:, ::-1]) == 2**64 - 1


def test_file_with_metadata_is_not_plain() -> None:
    image = smooth(40, 30)
    assert pixels.probe(saved(image, "JPEG")).plain and pixels.probe(saved(image, "PNG")).plain
    exif = Image.Exif()
    exif[0x010F] = "maker"
    text = Image.new("RGB", (1, 1)).info
    assert text == {}
    assert not pixels.probe(saved(image, "JPEG", exif=exif)).plain
    assert not pixels.probe(saved(image, "PNG", exif=exif)).plain
    assert not pixels.probe(saved(image, "WEBP", exif=exif)).plain
    assert not pixels.probe(saved(image, "JPEG", xmp=b"<x:xmpmeta/>")).plain
    frames = [Image.fromarray(smooth(40, 30, seed)) for seed in (1, 2)]
    animated = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert not pixels.probe(animated).plain
    assert (pixels.decode(animated) == np.asarray(frames[0])).all()


def test_importing_pixels_does_not_import_torch() -> None:
    code = "import sys; from clipwright.pipeline import pixels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Pillow decodes these, but we reject them: wrong CRC, truncated chunk, beyond the aspect limit.
STRICTER = {
    "derived_a__bad_crc.png": "E_IMG_TRUNCATED",
    "pillow__broken_data_stream.png": "E_IMG_TRUNCATED",
    "pillow__truncated_end_chunk.png": "E_IMG_TRUNCATED",
    "derived_a__tall_1x3000.png": "E_IMG_PIXELS",
    "derived_a__wide_3000x2.jpg": "E_IMG_PIXELS",
    # Pillow rejects these, but all their pixels are there: without an end marker, and HEIC.
    "pillow__truncated_jpeg.jpg": "ok",
    "pillow__avif_hopper.heif": "ok",
}
ALLOWED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")


# pytest replaces our warning filters with its own.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_every_unusual_file_decodes_or_is_rejected_with_a_code(
    shared_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (shared_data / "messy" / "messy-manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    unexpected: list[tuple[str, str]] = []
    with tarfile.open(shared_data / "messy" / "messy-images.tar") as tar:
        for member in tar:
            opened = tar.extractfile(member)
            assert opened is not None
            started = time.process_time()
            try:
                got = pixels.decode(opened.read())
                result = "ok"
                assert got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3
            except pixels.PixelError as error:
                result, detail = error.args
                assert result.startswith("E_IMG_") and detail
            assert time.process_time() - started < 5, member.name
            row = rows.pop(member.name)
            if row["format"] not in ALLOWED_FORMATS and member.name not in STRICTER:
                assert result != "ok", member.name
                continue
            code = STRICTER.get(member.name) or ("ok" if row["pillow_decodes"] == "1" else "E_IMG")
            if not result.startswith(code):
                unexpected.append((member.name, result))
    assert not unexpected and not rows
    assert capfd.readouterr().err == ""
