"""Doctor's checks of the machine, the config and the data; each is state to fail or warn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from doctor_checks import DATA, call, context, run

from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.doctor import data, device, environment
from clipwright.pipeline.doctor.base import DoctorContext, checks
from clipwright.pipeline.folders.dataset import Dataset

pytestmark = pytest.mark.xdist_group("ranks")


def test_python_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    state = DoctorContext(call())
    assert environment.python(state).status == environment.packages(state).status == "ok"
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.9.2")
    found = environment.python(state)
    assert found.status == "FAIL" and "3.9.2" in found.found and ">=3.11" in found.fix
    real = metadata.version

    def version(name: str) -> str:
        if name == "einops":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "numpy" else real(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    found = environment.packages(state)
    assert found.status == "FAIL" and "einops missing" in found.found and "numpy 0.1" in found.found
    assert sorted(found.fix.split()) == ["'einops>=0.8'", "'numpy>=2.2'", "install", "pip"]


def test_missing_faiss_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.metadata, "distributions", lambda: iter(()))
    found = environment.faiss(DoctorContext(call()))
    assert found.status == "FAIL" and "clipwright[cpu]" in found.fix


def test_cores_open_files_disk_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = DoctorContext(call(out=tmp_path / "not" / "yet"))
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    assert environment.disk_folder(state) == tmp_path and environment.disk(state).status == "ok"
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    found = environment.cores(state)
    assert found.status == "warn" and found.fix == "export OMP_NUM_THREADS=1"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment.cores(state).status == "ok"
    (tmp_path / "memory.max").write_text(str(2**30))
    (tmp_path / "memory.current").write_text("1000")
    found = environment.memory(state)
    assert found.status == "warn" and "1.0 GiB" in found.found
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    found = environment.open_files(state)
    assert found.status == "warn" and found.fix == "ulimit -n 1024"
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert environment.disk(state).status == "warn"


def test_shared_memory_is_checked_with_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = DoctorContext(call())
    small = shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20)  # the default of containers
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: small)
    monkeypatch.setattr(environment, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    found = environment.shared_memory(state)
    assert found.status == "ok" and "0.062 GiB at /dev/shm" in found.found and "without a GPU" in found.need
    (tmp_path / "nvidia0").touch()
    found = environment.shared_memory(state)
    assert found.status == "warn" and "--shm-size" in found.fix and "1 GiB" in found.need
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**34, 0, 2**34))
    assert environment.shared_memory(state).status == "ok"
    monkeypatch.undo()
    monkeypatch.setattr(environment, "SHARED_MEMORY", tmp_path / "none")
    assert environment.shared_memory(state).status == "ok"


def test_warns_of_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: World) -> None:
    monkeypatch.setattr(device, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    assert device.device(context(world)).status == "ok"
    (tmp_path / "nvidia0").touch()
    found = device.device(context(world))
    assert found.status == "warn" and "cannot use" in found.found and "CUDA" in found.fix


# Config and data


@pytest.mark.parametrize(
    ("overrides", "config", "pieces"),
    [
        (["data.train=x"], "phtos", ["E_CONFIG_FILE", "phtos"]),
        (["data.train=x", "image.name=vit_nanno"], None, ["E_CONFIG_CHOICE", "vit_nanno"]),
        (["schedule.samples=900"], None, ["E_CONFIG_VALUE", "data.train"]),
    ],
)
def test_refused_config_is_a_failed_check(
    overrides: list[str], config: str | None, pieces: list[str], world: World
) -> None:
    state = DoctorContext(call(*overrides, config=config))
    state.world = world
    found = run(state, "config")
    assert found.status == "FAIL" and all(piece in found.found for piece in pieces) and found.fix
    assert run(state, "dataset").status == "skip"


def test_missing_or_changed_dataset_fails(scenes: Path, tmp_path: Path, world: World) -> None:
    found = run(context(world, "data.train=nowhere", "precision=fp32"), *DATA)
    assert found.status == "FAIL" and "E_INPUT" in found.found and "nowhere" in found.found
    shutil.copytree(scenes, tmp_path / "data")
    tar = next((tmp_path / "data").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    found = run(context(world, f"data.train={tmp_path / 'data'}", "precision=fp32"), *DATA)
    assert found.status == "FAIL" and "E_DATA_HASH" in found.found and tar.name in found.found


def test_too_few_samples_or_uneven_batch_fails(scenes: Path, world: World) -> None:
    state = context(world, f"data.train={scenes}", "schedule.global_batch=97", "precision=fp32")
    found = run(state, *DATA, "samples")
    assert found.status == "FAIL" and "96" in found.found and "global_batch" in found.fix
    state.world = dataclasses.replace(world, size=2)
    [check] = [check for check in checks("data") if check.name == "samples"]
    found = check.evaluate(state)
    assert found.status == "FAIL" and "E_BATCH" in found.found


@pytest.mark.parametrize(
    ("overrides", "ranks", "fix"),
    [
        (["data.streams=4"], 3, "data.streams=6"),
        (["data.streams=2"], 3, "data.streams=3"),
        (["data.streams=1", "schedule.global_batch=96"], 1, "data.streams=2"),
        ([], 4, "shards.samples"),
        ([], 2, ""),
    ],
)
def test_shards_and_streams_against_world_size(
    overrides: list[str], ranks: int, fix: str, scenes: Path, world: World
) -> None:
    state = context(world, f"data.train={scenes}", "precision=fp32", *overrides)
    run(state, *DATA)
    state.world = dataclasses.replace(world, size=ranks)
    found = data.shards(state)
    assert found.status == ("warn" if fix else "ok") and fix in found.fix


def test_open_shards_against_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, tmp_path: Path, world: World
) -> None:
    """Counts the shards that the reader of each dataset in a mixture keeps open."""
    shutil.copytree(scenes, tmp_path / "more")
    paths = f"data.train=[{{path: {scenes}}}, {{path: {tmp_path / 'more'}}}]"
    state = context(world, paths, "precision=fp32", "runtime.workers=3")
    run(state, *DATA)
    need = 2 * 3 + 3 + data.OTHER_FILES
    monkeypatch.setattr(resource, "getrlimit", lambda which: (need - 1, 4096))
    found = data.shard_files(state)
    assert found.status == "FAIL" and found.fix == f"ulimit -n {need}" and found.found.startswith("6 shards")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (need - 1, need - 1))
    assert "hard limit" in data.shard_files(state).fix
    monkeypatch.setattr(resource, "getrlimit", lambda which: (need, need))
    assert data.shard_files(state).status == "ok"
    monkeypatch.setattr(data, "OPEN_TARS", 2)
    assert data.shard_files(state).found.startswith("4 shards")


def edited(scenes: Path, folder: Path, change: Any) -> Path:
    """Copies the dataset with a changed first sidecar and the matching hash in the manifest."""
    shutil.copytree(scenes, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][0]
    path = folder / entry["sidecar"]
    pq.write_table(change(pq.read_table(path)), path)
    entry |= {"sidecar_bytes": path.stat().st_size, "sidecar_sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def replaced(column: str, values: list[Any], kind: Any = None) -> Any:
    def change(table: pa.Table) -> pa.Table:
        old = table[column].to_pylist()
        new = pa.array([*values, *old[len(values) :]], kind or table.schema.field(column).type)
        return table.set_column(table.schema.get_field_index(column), column, new)

    return change


@pytest.mark.parametrize(
    ("change", "piece"),
    [
        (replaced("key", ["../x"]), "1 malformed"),
        (replaced("key", ["0" * 32, "0" * 32]), "1 repeated"),
        (replaced("captions", [[]]), "1 without caption"),
    ],
)
def test_malformed_keys_and_missing_captions_fail(
    change: Any, piece: str, scenes: Path, tmp_path: Path, world: World
) -> None:
    folder = edited(scenes, tmp_path / "data", change)
    found = run(context(world, f"data.train={folder}", "precision=fp32"), *DATA, "keys")
    assert found.status == "FAIL" and piece in found.found and "prep" in found.fix


def test_warns_of_a_context_too_short_for_the_captions(scenes: Path, world: World) -> None:
    state = context(world, f"data.train={scenes}", "precision=fp32", "text.context=8")
    found = run(state, *DATA, "tokenizer", "captions")
    assert found.status == "warn" and "cut" in found.found
    enough = int(found.fix.removeprefix("set text.context="))
    state = context(world, f"data.train={scenes}", "precision=fp32", f"text.context={enough}")
    assert run(state, *DATA, "tokenizer", "captions").status == "ok"
    assert run(state, "unknown tokens").found == "none: every byte has an id"


def test_warns_of_many_unknown_tokens(scenes: Path, world: World) -> None:
    state = context(world, f"data.train={scenes}", "precision=fp32")
    run(state, *DATA, "tokenizer")
    # Count all of CLIP's merges but the last few as unknown.
    state.tokenizer.unknown_ids = range(0, 49_000)
    run(state, "captions")
    found = data.unknown_tokens(state)
    assert found.status == "warn" and state.unknown_share > 0.5 and "another tokenizer" in found.fix


def test_tokenizer_that_cannot_be_trained_fails(scenes: Path, world: World) -> None:
    overrides = ["tokenizer.name=sentencepiece", "tokenizer.vocab_size=100000"]
    state = context(world, f"data.train={scenes}", "precision=fp32", *overrides)
    found = run(state, *DATA, "tokenizer")
    assert found.status == "FAIL" and "vocab_size" in found.found
    state = context(world, f"data.train={scenes}", "precision=fp32", overrides[0], "tokenizer.vocab_size=330")
    assert run(state, *DATA, "tokenizer").status == "ok"
    assert run(state, "captions", "unknown tokens").status in ("ok", "warn") and 0 <= state.unknown_share < 1


def test_changed_or_undecodable_image_fails(scenes: Path, tmp_path: Path, world: World) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    stored = Dataset(scenes).record(0, 0)
    tar = tmp_path / "data" / Dataset(scenes).tar_name(0)
    raw = bytearray(tar.read_bytes())
    raw[stored["offset"] + 5] ^= 255
    tar.write_bytes(raw)
    found = run(context(world, f"data.train={tmp_path / 'data'}", "precision=fp32"), *DATA, "images")
    assert found.status == "FAIL" and "E_DATA_HASH" in found.found and "1 of" in found.found
    # The hash matches but the bytes, the start of the tar, are no image.
    shutil.rmtree(tmp_path / "data")
    sha256 = hashlib.sha256(scenes.joinpath(tar.name).read_bytes()[:100]).hexdigest()

    def change(table: pa.Table) -> pa.Table:
        for column, value in (("offset", 0), ("size", 100), ("sha256", sha256)):
            table = replaced(column, [value])(table)
        return table

    folder = edited(scenes, tmp_path / "data", change)
    found = run(context(world, f"data.train={folder}", "precision=fp32"), *DATA, "images")
    assert found.status == "FAIL" and "E_IMG_FORMAT" in found.found
