"""How images are stored: exact bytes for each setting, repaired, blank, damaged and refused images."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipwright.data_prep.build.images import ImagesConfig, store_image

MakeImage = Callable[..., bytes]


def photo(width: int = 1000, height: int = 750) -> bytes:
    """A JPEG with detail in every pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    return out.getvalue()


def reference(data: bytes, size: tuple[int, int], format: str, quality: int) -> bytes:
    """Written out: decoded at the smallest scale of at least twice the size, resized, encoded."""
    image = Image.open(io.BytesIO(data))
    if image.format == "JPEG":
        scale = next((s for s in (8, 4, 2) if -(-min(image.size) // s) >= 2 * min(size)), 1)
        image.draft("RGB", (image.width // scale, image.height // scale))
    out = io.BytesIO()
    options = {} if format == "png" else {"quality": quality}
    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(out, format.upper(), **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("resize", "size", "format", "quality", "stored"),
    [
        ("shortest", 93, "jpeg", 90, (124, 93)),  # decoded at 1/4
        ("shortest", 94, "jpeg", 35, (125, 94)),  # 1/4 gives exactly 188 rows
        ("shortest", 95, "jpeg", 35, (127, 95)),  # 1/4 would be too small: decoded at 1/2
        ("longest", 200, "webp", 40, (200, 150)),
        ("longest", 600, "jpeg", 1, (600, 450)),  # decoded whole
        ("shortest", 300, "png", 5, (400, 300)),
    ],
)
def test_stored_bytes_follow_every_setting(
    resize: Literal["shortest", "longest"],
    size: int,
    format: Literal["jpeg", "png", "webp"],
    quality: int,
    stored: tuple[int, int],
) -> None:
    data = photo()
    config = ImagesConfig(resize=resize, size=size, format=format, quality=quality)
    got = store_image(data, config)
    assert (got.width, got.height) == stored and got.extension == {"jpeg": "jpg"}.get(format, format)
    assert got.data == reference(data, stored, format, quality)
    assert got.sha256 == hashlib.sha256(got.data).hexdigest()
    assert Image.open(io.BytesIO(got.data)).size == stored


def test_images_are_never_enlarged_and_small_sides_stay_at_least_one_pixel() -> None:
    data = photo(200, 100)
    assert store_image(data, ImagesConfig(resize="longest", size=200)).data == data
    assert store_image(data, ImagesConfig(resize="shortest", size=101)).data == data
    thin = store_image(photo(400, 4), ImagesConfig(resize="longest", size=10, format="png"))
    assert (thin.width, thin.height) == (10, 1)
    assert store_image(photo(99, 50), ImagesConfig(resize="longest", size=98)).width == 98


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    """Returns a PNG with a chunk before its pixels."""
    offset = png.index(b"IDAT") - 4
    chunk = len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    return png[:offset] + chunk + png[offset:]


def test_odd_images_through_the_command(tmp_path: Path, cli: Any, make_image: MakeImage) -> None:
    """Blank images are kept and counted, a missing end marker is added, damage and refused formats have reasons."""
    folder = tmp_path / "photos"
    folder.mkdir()
    jpeg = photo(320, 240)
    start = jpeg.index(b"\xff\xda")
    transparent = Image.new("RGBA", (40, 30), (10, 20, 30, 0))
    out = io.BytesIO()
    transparent.save(out, "PNG")
    flat = io.BytesIO()
    Image.new("RGB", (64, 64)).save(flat, "PNG")
    files = {
        "whole.jpg": make_image(1),
        "noend.jpg": jpeg[:-2],
        "blank.png": out.getvalue(),
        "black.jpg": flat.getvalue(),
        "damaged.jpg": jpeg[: start + 2000] + jpeg[start + 4000 :],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "old.jp2": b"\0\0\0\x0cjP  \r\n",
        "new.jxl": b"\xff\x0a\0\0",
        "p.ppm": b"P6 1 1 255 abc",
        "q.qoi": b"qoif\0\0",
        "text.png": with_chunk(flat.getvalue(), b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))),
        "frames.png": with_chunk(flat.getvalue(), b"acTL", (20_000).to_bytes(4, "big") + bytes(4)),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    result = cli.json("prep", "folder", "source.path=photos", "source.caption=none", "-o", "out")
    assert result["rejects"] == {
        "E_IMG_DAMAGED": 1,
        "E_IMG_FORMAT": 4,
        "E_IMG_FRAMES": 1,
        "E_IMG_METADATA": 1,
        "E_IMG_TRUNCATED": 1,
    }
    assert result["decisions"] == {"blank": 2}
    details = {r["source"]: r["detail"] for r in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}
    for name, word in (("old.jp2", "JPEG 2000"), ("new.jxl", "JPEG XL"), ("p.ppm", "PNM"), ("q.qoi", "QOI")):
        assert word in details[name] and "supported: jpeg" in details[name]
    rows = {r["source"]: r for r in pq.read_table(tmp_path / "out" / "data-000000.parquet").to_pylist()}
    tar = (tmp_path / "out" / "data-000000.tar").read_bytes()
    stored = {name: tar[row["offset"] : row["offset"] + row["size"]] for name, row in rows.items()}
    assert stored["noend.jpg"] == jpeg and rows["noend.jpg"]["key"] == hashlib.sha256(jpeg[:-2]).hexdigest()[:32]
    assert stored["whole.jpg"] == files["whole.jpg"] and Image.open(io.BytesIO(stored["noend.jpg"])).load()
    decisions = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    assert decisions == [
        {"key": rows[name]["key"], "rule": "blank", "value": "", "keep": True} for name in ("black.jpg", "blank.png")
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "decisions.parquet" in manifest["files"]
    again = cli("prep", "folder", "source.path=photos", "source.caption=none", "-o", "out").stdout
    assert "2 blank images of one color only kept, listed in decisions.parquet" in again
    assert cli.json("data", "verify", "out")["ok"]
    assert cli.json("data", "stats", "out")["decisions"] == {"blank": 2}
    assert "samples of one color only (blank), kept: 2" in cli("data", "stats", "out").stdout
    (tmp_path / "out" / "decisions.parquet").write_bytes(b"changed")
    assert "decisions.parquet" in cli.error("data", "verify", "out", code=3)
    (tmp_path / "photos" / "blank.png").unlink()
    (tmp_path / "photos" / "black.jpg").unlink()
    result = cli.json("prep", "folder", "source.path=photos", "source.caption=none", "-o", "out", "--fresh")
    assert result["decisions"] == {} and not (tmp_path / "out" / "decisions.parquet").exists()
