"""Small inputs for preparation."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipwright.data_prep.build.pack import Prepared, PrepConfig, prepare
from clipwright.pipeline.core.config import resolve


def image_bytes(seed: int, width: int = 48, height: int = 36, format: str = "JPEG", **options: Any) -> bytes:
    """Returns an image that depends only on `seed`."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, format, **options)
    return out.getvalue()


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    return image_bytes


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., Path]:
    """Writes a parquet table of `image` bytes, `captions` lists and any other columns."""

    def write(images: Sequence[bytes], captions: Sequence[Any], name: str = "pairs.parquet", **columns: Any) -> Path:
        typed = {"image": pa.array(images, pa.binary()), "captions": pa.array(captions, pa.list_(pa.string()))}
        path = tmp_path / name
        pq.write_table(pa.table({**typed, **columns}), path, row_group_size=7)
        return path

    return write


@pytest.fixture
def run_prep() -> Callable[..., Prepared]:
    """Runs preparation in this process, as the command does."""

    def run(out: Path, *overrides: str, fresh: bool = False) -> Prepared:
        resolved = resolve(PrepConfig, overrides=["runtime.workers=1", *overrides])
        return prepare(resolved, out, fresh=fresh, quiet=True)

    return run


SCRIPT = "<script>alert(1)</script> & <b>bold</b>"


@pytest.fixture
def dataset(tmp_path: Path, write_table: Callable[..., Path], run_prep: Callable[..., Prepared]) -> Path:
    """A dataset folder of three shards of 4, 3 and 3 samples; one row merged, one truncated, one without caption."""
    images = [image_bytes(i, 40 + 8 * i, 48) for i in range(13)]
    images[5], images[8] = images[1], images[8][:200]
    captions: list[Any] = [["a red circle", f"number {i}"] for i in range(13)]
    captions[2], captions[3], captions[11] = ["빨간 원", SCRIPT, "猫とねこ"], ["W" * 300], [" "]
    table = write_table(images, captions, n=pa.array(range(13)))
    arguments = ("source.name=table", f"source.path={table}", "source.caption=captions", "shards.samples=4")
    run_prep(tmp_path / "data", *arguments)
    return tmp_path / "data"
