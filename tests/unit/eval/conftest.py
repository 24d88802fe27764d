"""Small model and dataset folders, and the command line as a user runs it."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from output_checks import check_output
from PIL import Image

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.folders.records import DatasetFingerprint, write_manifest
from clipwright.pipeline.model.folder import save_model
from clipwright.pipeline.model.two_tower import ModelConfig, build_model
from clipwright.pipeline.tokenizers.base import TOKENIZERS

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def _make_model(folder: Path, dim: int = 16, seed: int = 0, scale: float = 1.0) -> Path:
    """A model folder of random weights; a huge `scale` makes its embeddings overflow."""
    torch.manual_seed(seed)
    tree = resolve(
        ModelConfig,
        overrides=[
            f"embed_dim={dim}",
            "image.name=vit_nano",
            "image.image_size=32",
            "image.dim=32",
            "image.depth=1",
            "image.heads=2",
            "text.width=32",
            "text.depth=1",
            "text.heads=2",
            "text.context=24",
        ],
    )
    tokenizer = TOKENIZERS.build(tree.value.tokenizer)
    weights = dict(build_model(tree.value, tokenizer).state_dict())
    weights["image_projection.weight"] = weights["image_projection.weight"] * scale
    save_model(folder, config=tree.tree, weights=weights, tokenizer=tokenizer, made_from={}, card="a test's model\n")
    return folder


def _image(i: int) -> bytes:
    """A JPEG of noise, different for every number."""
    color = list(COLORS.values())[i % 3]
    noise = np.random.default_rng(i).integers(-30, 30, (40, 48, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _captions(i: int) -> list[str]:
    return [f"a {list(COLORS)[i % 3]} image, number {i}", f"image {i}"]


def _make_dataset(
    folder: Path,
    samples: int,
    shard: int = 400,
    broken: int | None = None,
    captions: Callable[[int], list[str]] = _captions,
) -> Path:
    """A dataset folder with two captions per sample. The bytes of sample `broken` are not an image."""
    folder.mkdir(parents=True)
    total, shards = DatasetFingerprint(), []
    for number, first in enumerate(range(0, samples, shard)):
        numbers = range(first, min(first + shard, samples))
        shards.append(_write_shard(folder, f"set-{number:06d}", numbers, total, broken, captions))
    body = {"shards": shards, "rows_in": samples, "written": samples, "merged": 0, "rejected": 0}
    body["captions"] = sum(len(captions(i)) for i in range(samples))
    write_manifest(folder, "dataset", total.hexdigest(), body)
    return folder


def _write_shard(
    folder: Path,
    stem: str,
    numbers: range,
    total: DatasetFingerprint,
    broken: int | None,
    captions: Callable[[int], list[str]],
) -> dict:
    rows = []
    with tarfile.open(folder / f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in numbers:
            data = _image(i) if i != broken else b"no image"
            key = hashlib.sha256(data).hexdigest()[:32]
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(data)
            offset = tar.offset + 512
            tar.addfile(member, io.BytesIO(data))
            color = list(COLORS)[i % 3]
            rows.append(
                {
                    "row": i,
                    "key": key,
                    "captions": captions(i),
                    "width": 48,
                    "height": 40,
                    "offset": offset,
                    "size": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "dhash": i,
                    "source": f"list.csv#{i}",
                    "source_key": f"photos/{i}.jpg",
                    "id": f"user-{i}",
                    "colour": color,
                    "held_out": i % 3 != 2,
                }
            )
            total.sample(key, rows[-1]["sha256"], rows[-1]["captions"])
        total.shard(len(numbers))
    table = pa.Table.from_pylist(rows)
    listed = table.schema.get_field_index("captions")
    table = table.set_column(listed, "captions", table["captions"].cast(pa.list_(pa.string())))
    pq.write_table(table, folder / f"{stem}.parquet")
    return {
        "sidecar": f"{stem}.parquet",
        "sidecar_sha256": file_sha256(folder / f"{stem}.parquet"),
        "tar": f"{stem}.tar",
        "tar_bytes": (folder / f"{stem}.tar").stat().st_size,
        "tar_sha256": file_sha256(folder / f"{stem}.tar"),
        "samples": len(numbers),
    }


def _cli(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs `clipwright ARGUMENTS` in a process of its own, or in several ranks."""
    server = sys.modules["conftest_root"].fork_server()
    ranks = ranks if ranks > 1 else 0
    done = server.run(list(map(str, arguments)), Path.cwd(), dict(os.environ), 1200, ranks)
    check_output(list(map(str, arguments)), done.returncode, done.stdout, done.stderr, ranks=ranks)
    return done


def _refused(done: subprocess.CompletedProcess[str], code: str, exit_code: int, *named: object) -> None:
    """Checks that the last line on stderr is an error of this code that names the culprit and a remedy."""
    assert done.returncode == exit_code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error[{code}]: "), done.stderr
    assert "Traceback" not in done.stderr
    assert len(last.split(" — ")) >= 3, last  # FOUND may be part of WHAT
    for name in named:
        assert str(name) in last, (name, last)


@pytest.fixture(scope="session")
def cli():
    return _cli


@pytest.fixture(scope="session")
def refused():
    return _refused


@pytest.fixture(scope="session")
def make_model():
    return _make_model


@pytest.fixture(scope="session")
def make_dataset():
    return _make_dataset


@pytest.fixture(scope="session")
def image():
    return _image


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples in three shards."""
    return _make_dataset(tmp_path_factory.mktemp("small") / "data", 7, shard=3)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory, model: Path, small: Path) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "embeddings"
    done = _cli("embed", f"model={model}", f"data={small}", "-o", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Path:
    out = tmp_path_factory.mktemp("indexed") / "index"
    done = _cli("index", "build", "flat", f"embeddings={embedded}", "-o", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def quick_cli(monkeypatch, capfd):
    """Runs `clipwright ARGUMENTS` in this process, which has imported torch already: faster for many errors."""
    from clipwright.cli import app

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def run(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        code = app(list(map(str, arguments)), standalone_mode=False)
        printed = capfd.readouterr()
        check_output(list(map(str, arguments)), code, printed.out, printed.err)
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run
