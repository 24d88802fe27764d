"""Small dataset folders, written without `clipwright prep`."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.folders.records import DatasetFingerprint, write_manifest

Maker = Callable[..., Path]


def write_shard(folder: Path, stem: str, samples: Sequence[tuple[bytes, list[str]]], extra: dict[str, Any]) -> dict:
    rows: dict[str, list[Any]] = {name: [] for name in ("key", "captions", "offset", "size", "sha256")}
    with tarfile.open(folder / f"{stem}.tar", "w") as tar:
        for data, captions in samples:
            member = tarfile.TarInfo(f"{hashlib.sha256(data).hexdigest()[:32]}.png")
            member.size = len(data)
            rows["offset"].append(tar.offset + 512)
            tar.addfile(member, io.BytesIO(data))
            rows["key"].append(member.name[:32])
            rows["captions"].append(captions)
            rows["size"].append(len(data))
            rows["sha256"].append(hashlib.sha256(data).hexdigest())
    table = pa.table({**rows, **extra}, schema=None)
    pq.write_table(table, folder / f"{stem}.parquet")
    tar_path, sidecar = folder / f"{stem}.tar", folder / f"{stem}.parquet"
    return {
        "tar": tar_path.name,
        "tar_bytes": tar_path.stat().st_size,
        "tar_sha256": file_sha256(tar_path),
        "sidecar": sidecar.name,
        "sidecar_bytes": sidecar.stat().st_size,
        "sidecar_sha256": file_sha256(sidecar),
        "samples": len(samples),
    }


@pytest.fixture
def make_dataset(tmp_path: Path) -> Maker:
    """`make_dataset(name, sizes, captions=…, **columns)`: the color and the captions of image i encode i."""

    def make(
        name: str,
        sizes: Sequence[int],
        captions: Callable[[int], list[str]] = lambda i: [f"picture {i}"],
        **columns: list[Any],
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        fingerprint, shards, first = DatasetFingerprint(), [], 0
        for number, size in enumerate(sizes):
            samples = []
            for i in range(first, first + size):
                out = io.BytesIO()
                color = (i % 256, i // 256 % 256, 77)
                Image.fromarray(np.full((9, 12, 3), color, np.uint8)).save(out, "PNG")
                samples.append((out.getvalue(), captions(i)))
                fingerprint.sample(hashlib.sha256(out.getvalue()).hexdigest()[:32], "", captions(i))
            extra = {column: values[first : first + size] for column, values in columns.items()}
            shards.append(write_shard(folder, f"{name}-{number:06d}", samples, extra))
            fingerprint.shard(size)
            first += size
        write_manifest(folder, "dataset", fingerprint.hexdigest(), {"shards": shards})
        return folder

    return make
