"""Every check of doctor, made to fail or to warn; the command that runs them; what it predicts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import resource
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import ping_ranks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clipwright.pipeline import engine
from clipwright.pipeline.core.command import COMMANDS, Call
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.records import file_sha256
from clipwright.pipeline.data.reader import Dataset
from clipwright.pipeline.distributed import World, process_group
from clipwright.pipeline.doctor import data, device, environment, gradients, loss, model, network, speed
from clipwright.pipeline.doctor.base import GROUPS, Context, Found, asked_for, check, checks, chosen, failure, table
from clipwright.pipeline.run import RunConfig
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        with process_group() as made:
            yield made
        # Or every command that a later test starts would take itself for a rank.
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()


def call(*overrides: str, out: Path | None = None, config: str | None = None) -> Call:
    import clipwright.cli  # noqa: F401  registers the verb

    words = [config] if config else []
    return Call(COMMANDS["doctor"], config, words, list(overrides), out, False, True, False, False, False, False)


def context(world: World, *overrides: str, out: Path | None = None) -> Context:
    made = Context(call(*overrides, out=out))
    made.world = world
    return made


def run(made: Context, *until: str) -> Found:
    """Runs checks in order until the last of `until`, which it gives."""
    for group in GROUPS:
        for one in checks(group):
            if group == "environment" or one.name not in until:
                continue
            made.rows[one.name] = one.outcome(made)
    return made.rows[until[-1]]


DATA = ("config", "dataset")
MODEL = (*DATA, "samples", "tokenizer", "captions", "images", "threads", "towers", "weights")


# The command


def test_without_a_config_the_environment_alone_is_checked(cli: Any) -> None:
    done = cli("doctor", env={"NO_COLOR": "1"})
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["check", "found", "need", "fix"] and "\x1b" not in done.stdout
    assert [line.split()[0] for line in lines[1:11]] == ["ok"] * 10 and "faiss-cpu" in done.stdout
    assert "dataset" not in done.stdout and list(cli.folder.iterdir()) == []


def test_a_config_is_checked_and_its_run_predicted(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    (tmp_path / "run").mkdir()
    words = [*small.settings, f"data.train={scenes}", "schedule.samples=320"]
    found = cli.json("doctor", *words, "-o", "run")
    names = [one["name"] for one in found["checks"]]
    assert names == [one.name for group in GROUPS for one in checks(group)]
    assert {one["status"] for one in found["checks"]} <= {"ok", "warn"}
    assert set(found["checks"][0]) == {"name", "status", "found", "need", "fix"}
    assert found["samples_per_s"] > 1 and found["seconds"] == pytest.approx(320 / found["samples_per_s"])
    assert 0 <= found["data_share"] < 1 and found["bottleneck"] in found["shares"]
    assert all(share >= 0 for share in found["shares"].values()) and sum(found["shares"].values()) > 0
    assert 0.2 < found["memory_gb"] < 4
    assert list(tmp_path.iterdir()) == [tmp_path / "run"] and not list((tmp_path / "run").iterdir())
    # What it predicts of disk and memory is what a run writes and logs.
    small(tmp_path, *words, "runtime.stop_at=12", "-o", "run")
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert found["checkpoint_bytes"] == pytest.approx(written, rel=0.25)
    logged = max(line["memory_gb"] for line in small.losses(tmp_path / "run"))
    assert found["memory_gb"] == pytest.approx(logged, rel=0.25)


def test_failed_checks_are_named_by_one_error(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    done = cli("doctor", *small.settings, f"data.train={scenes}", "image.image_size=33", "--json", code=1)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error[E_DOCTOR]") and "towers" in line and "image_size" in line and "Traceback" not in line
    rows = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert rows["towers"]["status"] == "FAIL" and "33" in rows["towers"]["found"]
    assert rows["step"]["status"] == rows["speed"]["status"] == "skip" and rows["images"]["status"] == "ok"


def test_both_faiss_are_found_by_their_metadata(cli: Any) -> None:
    fake = cli.folder / "site" / "faiss_gpu-1.15.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.15.0\n")
    done = cli("doctor", "--json", code=1, env={"PYTHONPATH": str(cli.folder / "site")})
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error[E_DOCTOR]") and "faiss" in line and "pip uninstall -y faiss-cpu faiss-gpu" in line


def test_two_ranks_speak_with_one_voice(scenes: Path, tmp_path: Path, small: Any) -> None:
    words = [*small.settings, f"data.train={scenes}", "schedule.samples=160"]
    done = small.cli(tmp_path)("doctor", *words, "--json", ranks=2)
    found = json.loads(done.stdout)
    assert found["samples_per_s"] > 1 and {one["status"] for one in found["checks"]} <= {"ok", "warn"}
    [ping] = [one["found"] for one in found["checks"] if one["name"] == "ping"]
    assert "(rank 1)" in ping and "GB/s by gloo" in ping and 0 < found["ping"]["seconds"][0] < 1
    done = small.cli(tmp_path)("doctor", *small.settings, "data.train=nowhere", ranks=2, code=1)
    assert done.stderr.count("error[E_DOCTOR]") == 1 and done.stdout.count("E_INPUT") == 1
    assert "Preempted" not in done.stderr


def test_ranks_check_their_gradients_without_data(small: Any, tmp_path: Path) -> None:
    words = ["check=gradients", "runtime.zero=3", "runtime.micro_batch=8", "runtime.exchange=ring", "precision=fp32"]
    done = small.cli(tmp_path)("doctor", *words, "loss.name=sigmoid", "--json", ranks=2)
    found = json.loads(done.stdout)
    assert [(one["name"], one["status"]) for one in found["checks"]] == [("config", "ok"), ("gradients", "ok")]
    assert found["gradient_check"]["steps"] == 3 and 0 < found["gradient_check"]["gradient"] <= gradients.LIMIT


# How checks are run and told


def test_one_check_brings_what_it_needs() -> None:
    assert [one.name for one in chosen("step")][:3] == ["config", "dataset", "samples"]
    assert [one.name for one in chosen("gradients")] == ["config", "gradients"]
    with pytest.raises(ClipwrightError) as caught:
        chosen("gradient")
    error = caught.value
    assert error.code == "E_CONFIG_CHOICE" and error.where == "check=gradient" and "'gradients'" in error.fix
    made = call("check=gradients", "seed=1")
    assert asked_for(made) == "gradients" and made.overrides == ["seed=1"]


def test_an_error_is_a_row_and_what_needs_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipwright.pipeline.doctor import base

    monkeypatch.setattr(base, "_CHECKS", {})

    @check("first")
    def first(made: Context) -> Found:
        raise ValueError("a\nb")

    @check("second", "first")
    def second(made: Context) -> Found:
        raise AssertionError

    made = Context(call())

    @check("third", "second")
    def third(made: Context) -> Found:
        raise AssertionError

    [group] = base._CHECKS.values()
    for one in group.values():
        made.rows[one.name] = one.outcome(made)
    assert made.rows["first"].status == "FAIL" and made.rows["first"].found == "ValueError: a\nb"
    assert made.rows["second"] == made.rows["third"] == Found("skip", "not tried: `first` failed")
    error = failure(made)
    assert error is not None and error.code == "E_DOCTOR" and error.where == "first" and error.exit_code == 1
    assert failure(Context(call())) is None


def test_the_table_says_status_in_words_and_takes_cells_as_they_are() -> None:
    rows = {"a": Found("ok", "[red]x[/red]"), "b": Found("FAIL", "two\nlines", "need", "f" * 300)}
    with contextlib.redirect_stdout(io.StringIO()):
        lines = table(rows).splitlines()
    assert lines[1].split() == ["ok", "a", "[red]x[/red]"] and len(lines) == 3
    assert lines[2].split() == ["FAIL", "b", "two", "lines", "need", "f" * 300]


# The environment


def test_python_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Context(call())
    assert environment.python(made).status == environment.packages(made).status == "ok"
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.9.2")
    found = environment.python(made)
    assert found.status == "FAIL" and "3.9.2" in found.found and ">=3.11" in found.fix
    real = metadata.version

    def version(name: str) -> str:
        if name == "einops":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "numpy" else real(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    found = environment.packages(made)
    assert found.status == "FAIL" and "einops missing" in found.found and "numpy 0.1" in found.found
    assert sorted(found.fix.split()) == ["'einops>=0.8'", "'numpy>=2.2'", "install", "pip"]


def test_faiss_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.metadata, "distributions", lambda: iter(()))
    found = environment.faiss(Context(call()))
    assert found.status == "FAIL" and "clipwright[cpu]" in found.fix


def test_cores_open_files_disk_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Context(call(out=tmp_path / "not" / "yet"))
    monkeypatch.setattr(environment, "CGROUP", tmp_path)
    assert environment.disk_folder(made) == tmp_path and environment.disk(made).status == "ok"
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    found = environment.cores(made)
    assert found.status == "warn" and found.fix == "export OMP_NUM_THREADS=1"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment.cores(made).status == "ok"
    (tmp_path / "memory.max").write_text(str(2**30))
    (tmp_path / "memory.current").write_text("1000")
    found = environment.memory(made)
    assert found.status == "warn" and "1.0 GiB" in found.found
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    found = environment.open_files(made)
    assert found.status == "warn" and found.fix == "ulimit -n 1024"
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert environment.disk(made).status == "warn"


def test_shared_memory_where_a_gpu_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = Context(call())
    small = shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20)  # as a container has it
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: small)
    monkeypatch.setattr(environment, "NVIDIA", tmp_path / "nvidia0")
    found = environment.shared_memory(made)
    assert found.status == "ok" and "0.062 GiB at /dev/shm" in found.found and "without a GPU" in found.need
    (tmp_path / "nvidia0").touch()
    found = environment.shared_memory(made)
    assert found.status == "warn" and "--shm-size" in found.fix and "1 GiB" in found.need
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**34, 0, 2**34))
    assert environment.shared_memory(made).status == "ok"
    monkeypatch.undo()
    monkeypatch.setattr(environment, "SHARED", tmp_path / "none")
    assert environment.shared_memory(made).status == "ok"


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: World) -> None:
    if torch.cuda.is_available():
        assert "bf16" in device.device(context(world)).found
        return
    monkeypatch.setattr(device, "NVIDIA", tmp_path / "nvidia0")
    assert device.device(context(world)).status == "ok"
    (tmp_path / "nvidia0").touch()
    found = device.device(context(world))
    assert found.status == "warn" and "cannot use" in found.found and "CUDA" in found.fix


# Config and data


@pytest.mark.parametrize(
    ("words", "config", "pieces"),
    [
        (["data.train=x"], "phtos", ["E_CONFIG_FILE", "phtos"]),
        (["data.train=x", "image.name=vit_nanno"], None, ["E_CONFIG_CHOICE", "vit_nanno"]),
        (["schedule.samples=9"], None, ["E_CONFIG_VALUE", "data.train"]),
    ],
)
def test_a_config_that_is_refused(words: list[str], config: str | None, pieces: list[str], world: World) -> None:
    made = Context(call(*words, config=config))
    made.world = world
    found = run(made, "config")
    assert found.status == "FAIL" and all(piece in found.found for piece in pieces) and found.fix
    assert run(made, "dataset").status == "skip"


def test_a_dataset_that_is_missing_or_changed(scenes: Path, tmp_path: Path, world: World) -> None:
    found = run(context(world, "data.train=nowhere", "precision=fp32"), *DATA)
    assert found.status == "FAIL" and "E_INPUT" in found.found and "nowhere" in found.found
    shutil.copytree(scenes, tmp_path / "data")
    tar = next((tmp_path / "data").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    found = run(context(world, f"data.train={tmp_path / 'data'}", "precision=fp32"), *DATA)
    assert found.status == "FAIL" and "E_DATA_HASH" in found.found and tar.name in found.found


def test_too_few_samples_and_a_batch_that_ranks_cannot_share(scenes: Path, world: World) -> None:
    made = context(world, f"data.train={scenes}", "schedule.global_batch=97", "precision=fp32")
    found = run(made, *DATA, "samples")
    assert found.status == "FAIL" and "96" in found.found and "global_batch" in found.fix
    made.world = dataclasses.replace(world, size=2)
    [one] = [one for one in checks("data") if one.name == "samples"]
    found = one.outcome(made)
    assert found.status == "FAIL" and "E_BATCH" in found.found


@pytest.mark.parametrize(
    ("words", "ranks", "fix"),
    [
        (["data.streams=4"], 3, "data.streams=6"),
        (["data.streams=2"], 3, "data.streams=3"),
        (["data.streams=1", "schedule.global_batch=96"], 1, "data.streams=2"),
        ([], 4, "shards.samples"),
        ([], 2, ""),
    ],
)
def test_shards_against_ranks(words: list[str], ranks: int, fix: str, scenes: Path, world: World) -> None:
    made = context(world, f"data.train={scenes}", "precision=fp32", *words)
    run(made, *DATA)
    made.world = dataclasses.replace(world, size=ranks)
    found = data.shards(made)
    assert found.status == ("warn" if fix else "ok") and fix in found.fix


def test_shards_against_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, tmp_path: Path, world: World
) -> None:
    """Of each dataset of a mixture, as many as its reader keeps open."""
    shutil.copytree(scenes, tmp_path / "more")
    paths = f"data.train=[{{path: {scenes}}}, {{path: {tmp_path / 'more'}}}]"
    made = context(world, paths, "precision=fp32", "runtime.workers=3")
    run(made, *DATA)
    need = 2 * 3 + 3 + data.OTHER_FILES
    monkeypatch.setattr(resource, "getrlimit", lambda which: (need - 1, 4096))
    found = data.shard_files(made)
    assert found.status == "FAIL" and found.fix == f"ulimit -n {need}" and found.found.startswith("6 shards")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (need - 1, need - 1))
    assert "hard limit" in data.shard_files(made).fix
    monkeypatch.setattr(resource, "getrlimit", lambda which: (need, need))
    assert data.shard_files(made).status == "ok"
    monkeypatch.setattr(data, "OPEN_TARS", 2)
    assert data.shard_files(made).found.startswith("4 shards")


def edited(scenes: Path, folder: Path, change: Any) -> Path:
    """A copy of the dataset with the first sidecar changed, and the manifest's hash of it."""
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
        (replaced("key", ["../x"]), "1 of another form"),
        (replaced("key", ["0" * 32, "0" * 32]), "1 twice"),
        (replaced("captions", [[]]), "1 without caption"),
    ],
)
def test_keys_and_captions_of_another_form(change: Any, piece: str, scenes: Path, tmp_path: Path, world: World) -> None:
    folder = edited(scenes, tmp_path / "data", change)
    found = run(context(world, f"data.train={folder}", "precision=fp32"), *DATA, "keys")
    assert found.status == "FAIL" and piece in found.found and "prep" in found.fix


def test_a_context_too_short_for_the_captions(scenes: Path, world: World) -> None:
    made = context(world, f"data.train={scenes}", "precision=fp32", "text.context=4")
    found = run(made, *DATA, "tokenizer", "captions")
    assert found.status == "warn" and "cut" in found.found
    enough = int(found.fix.removeprefix("set text.context="))
    made = context(world, f"data.train={scenes}", "precision=fp32", f"text.context={enough}")
    assert run(made, *DATA, "tokenizer", "captions").status == "ok"
    assert run(made, "unknown tokens").found == "none: every byte has an id"


def test_a_vocabulary_that_lacks_much(scenes: Path, world: World) -> None:
    made = context(world, f"data.train={scenes}", "precision=fp32")
    run(made, *DATA, "tokenizer")
    # As if all of CLIP's merges but the last few stood for what is unknown.
    made.tokenizer.unknown_ids = range(0, 49_000)
    run(made, "captions")
    found = data.unknown_tokens(made)
    assert found.status == "warn" and made.odd_tokens > 0.5 and "another tokenizer" in found.fix


def test_a_tokenizer_that_cannot_be_had(scenes: Path, world: World) -> None:
    words = ["tokenizer.name=sentencepiece", "tokenizer.vocab_size=100000"]
    made = context(world, f"data.train={scenes}", "precision=fp32", *words)
    found = run(made, *DATA, "tokenizer")
    assert found.status == "FAIL" and "vocab_size" in found.found
    made = context(world, f"data.train={scenes}", "precision=fp32", words[0], "tokenizer.vocab_size=330")
    assert run(made, *DATA, "tokenizer").status == "ok"
    assert run(made, "captions", "unknown tokens").status in ("ok", "warn") and 0 <= made.odd_tokens < 1


def test_a_picture_that_does_not_decode_or_has_changed(scenes: Path, tmp_path: Path, world: World) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    stored = Dataset(scenes).record(0, 0)
    tar = tmp_path / "data" / Dataset(scenes).tar_name(0)
    raw = bytearray(tar.read_bytes())
    raw[stored["offset"] + 5] ^= 255
    tar.write_bytes(raw)
    found = run(context(world, f"data.train={tmp_path / 'data'}", "precision=fp32"), *DATA, "images")
    assert found.status == "FAIL" and "E_DATA_HASH" in found.found and "1 of" in found.found
    # Whole by its hash, yet no picture: the first bytes of the tar.
    shutil.rmtree(tmp_path / "data")
    sha256 = hashlib.sha256(scenes.joinpath(tar.name).read_bytes()[:100]).hexdigest()

    def change(table: pa.Table) -> pa.Table:
        for column, value in (("offset", 0), ("size", 100), ("sha256", sha256)):
            table = replaced(column, [value])(table)
        return table

    folder = edited(scenes, tmp_path / "data", change)
    found = run(context(world, f"data.train={folder}", "precision=fp32"), *DATA, "images")
    assert found.status == "FAIL" and "E_IMG_FORMAT" in found.found


# Model and speed


def test_threads_memory_and_disk(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, tmp_path: Path) -> None:
    made = context(world, f"data.train={scenes}", "precision=fp32", "image.depth=2", "runtime.threads=1", out=tmp_path)
    assert run(made, *DATA, "tokenizer", "threads").status == "ok"
    monkeypatch.setattr(model, "usable_cores", lambda: 0)
    found = model.threads(made)
    assert found.status == "warn" and found.fix == "set runtime.threads=1"
    run(made, "towers")
    assert model.weights(made).status == model.checkpoints(made).status == "ok"
    monkeypatch.setattr(model, "free_memory", lambda: 10_000_000)
    found = model.weights(made)
    assert found.status == "FAIL" and "GiB" in found.need and "runtime.zero=3" in found.fix
    monkeypatch.setattr(model, "free_disk", lambda made: 10_000_000)
    found = model.checkpoints(made)
    assert found.status == "FAIL" and "2 newest + 1 being written" in found.need and "-o" in found.fix
    assert "lower runtime.keep" in found.fix


def test_memory_of_a_rank_under_each_stage(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World) -> None:
    """What one stage has no room for another may have: it is named."""
    made = context(world, f"data.train={scenes}", "precision=fp32", "image.depth=2", "runtime.threads=1")
    run(made, *DATA, "tokenizer", "towers")
    count = made.predicted["parameters"]["all"]
    made.world = dataclasses.replace(world, size=4, local_size=2)
    # A parameter takes 16 bytes under ZeRO 0 (weight, gradient, two moments), of 4 ranks 11, 8 and 5 under 1, 2 and 3.
    for free, fix in ((32, ""), (31, "runtime.zero=1"), (21, "runtime.zero=2"), (15, "runtime.zero=3"), (9, "smaller")):
        monkeypatch.setattr(model, "free_on", lambda made, free=free: free * count)
        found = model.weights(made)
        assert found.status == ("FAIL" if fix else "ok") and fix in found.fix, (free, found)
        assert "under ZeRO 0; ranks here: 2" in found.need
    assert made.predicted["state_bytes"] == 16 * count
    # Offloaded from a GPU, the device keeps weight and gradient; both ranks' moments and master weights go to the host.
    words = ["runtime.zero=1", "runtime.offload=optimizer", "precision=fp32", "image.depth=2", "runtime.threads=1"]
    made = context(world, f"data.train={scenes}", *words)
    run(made, *DATA, "tokenizer", "towers")
    made.world = dataclasses.replace(world, size=4, local_size=2, device=torch.device("cuda"))
    for device_bytes, host_bytes, fix in ((8, 6, ""), (7, 6, "runtime.zero=2"), (8, 5, "runtime.offload=none")):
        monkeypatch.setattr(model, "free_on", lambda made, free=device_bytes: free * count)
        monkeypatch.setattr(model, "free_memory", lambda free=host_bytes: free * count)
        found = model.weights(made)
        assert found.status == ("FAIL" if fix else "ok") and fix in found.fix, (device_bytes, host_bytes, found)
    assert made.predicted["state_bytes"] == 8 * count


def test_disk_for_checkpoints_that_are_kept_for_good(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, tmp_path: Path
) -> None:
    words = ["runtime.keep=3", "runtime.keep_every=10", "runtime.keep_best=loss", "schedule.samples=1600"]
    made = context(world, f"data.train={scenes}", "precision=fp32", "schedule.global_batch=16", *words, out=tmp_path)
    run(made, *DATA, "tokenizer", "towers")
    found = model.checkpoints(made)
    size = made.predicted["checkpoint_bytes"]
    assert found.status == "ok" and "3 newest + 10 kept for good + 1 best + 1 being written" in found.need
    monkeypatch.setattr(model, "free_disk", lambda made: 15 * size)
    assert model.checkpoints(made).status == "ok"
    monkeypatch.setattr(model, "free_disk", lambda made: 15 * size - 1)
    found = model.checkpoints(made)
    assert found.status == "FAIL" and "raise runtime.keep_every=10" in found.fix


@pytest.mark.parametrize(
    ("words", "piece"), [(["image.image_size=33"], "33"), (["image.projection=none"], "embed_dim")]
)
def test_sizes_that_do_not_go_together(words: list[str], piece: str, scenes: Path, world: World) -> None:
    made = context(world, f"data.train={scenes}", "precision=fp32", "image.name=vit_nano", *words)
    found = run(made, *DATA, "tokenizer", "towers")
    assert found.status == "FAIL" and "E_CONFIG_VALUE" in found.found and piece in found.found


def test_a_step_without_memory_or_finite_numbers(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any
) -> None:
    made = context(world, f"data.train={scenes}", *small.settings)
    assert run(made, *MODEL, "step").status == "ok"
    assert all(p.grad is None for p in made.parts.towers.parameters())
    monkeypatch.setattr(model, "forward_backward", lambda made, few: (math.nan, 1.0))
    found = model.step(made)
    assert found.status == "FAIL" and "nan" in found.found and "precision=fp32" in found.fix
    monkeypatch.undo()
    monkeypatch.setattr(model, "free_on", lambda made: -1)
    found = model.step(made)
    assert found.status == "FAIL" and "global_batch" in found.fix


def test_what_was_timed_becomes_a_prediction(
    monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any
) -> None:
    """On a clock of our own: four seconds of work in steps of which each waits one second for data."""
    made = context(world, f"data.train={scenes}", *small.settings, "schedule.samples=1600")
    assert run(made, *MODEL, "step").status == "ok"
    towers = iter([1.0, 0.5])
    monkeypatch.setattr(speed, "tower_seconds", lambda made, encode, parts: next(towers) * parts)
    times = speed.Times(steps=[4.0, 5.0, 3.0], waits=[1.0, 1.0, 1.0], processor=24.0)
    monkeypatch.setattr(speed, "measure", lambda made: times)
    found = speed.speed(made)
    assert found.status == "ok" and "4 samples/s, 1,600 in 6 min 40 s, 3 steps timed" in found.found, found
    shares = {"data": 0.25, "image tower": 0.25, "text tower": 0.125, "loss and optimiser": 0.375}
    told = {"samples_per_s": 4, "processor_s_per_sample": 0.5, "data_share": 0.25, "seconds": 400, "measured_steps": 3}
    assert made.predicted["shares"] == shares and made.predicted.items() >= told.items()


def test_a_loss_is_predicted_from_two_sizes(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """What grows with the square of the batch and what grows with the batch are told apart."""
    monkeypatch.setattr(loss, "timed", lambda made, built, rows: 3e-7 * rows**2 + 5e-5 * rows)
    made = context(world)
    built = loss.LOSSES.build(loss.LOSSES.preset("softmax"), embed_dim=8)
    for images, ranks in ((64, 1), (512, 1), (8192, 1), (65_536, 8)):
        want = 3e-7 * images**2 * ranks + 5e-5 * images
        assert loss.predicted(made, built, images, ranks) == pytest.approx(want)


def test_waiting_for_data_and_a_tight_machine_are_warned_of(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    made = context(world)
    made.predicted = {"shares": {"data": 0.4, "image tower": 0.5, "text tower": 0.1}, "memory_gb": 1.0}
    found = speed.bottleneck(made)
    assert found.status == "warn" and "runtime.workers" in found.fix and found.found.startswith("image tower 50%")
    assert made.predicted["bottleneck"] == "image tower"
    made.predicted["shares"]["data"] = 0.1
    assert speed.bottleneck(made).status == "ok"
    monkeypatch.setattr(speed, "free_on", lambda made: 2**20)
    found = speed.memory(made)
    assert found.status == "warn" and "global_batch" in found.fix
    monkeypatch.setattr(speed, "free_on", lambda made: 2**32)
    assert speed.memory(made).status == "ok"


def test_gradients_equal_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    words = ["runtime.micro_batch=8", "image.name=clip_rn_nano", "optim.clip=0.1", "precision=fp32"]
    made = context(world, *words, "runtime.activation_checkpointing.image=all")
    made.without_data = True
    found = run(made, "config", "gradients")
    assert found.status == "ok", found
    assert 0 < made.predicted["gradient_check"]["gradient"] <= gradients.LIMIT
    # A factor on the scale's gradient, which AdamW makes invisible in the parameter.
    monkeypatch.setattr(engine, "sum_ranks", lambda tensor: tensor.mul_(2 if tensor.shape == (1,) else 1))
    found = run(made, "gradients")
    assert found.status == "FAIL" and "gradient" in found.found and "runtime.zero=0" in found.fix


def test_every_tower_has_a_shallow_form() -> None:
    for registry in (IMAGE_TOWERS, TEXT_TOWERS):
        for name in registry.entries:
            if name == "huggingface":
                continue
            sizes = {"vocab_size": 64, "eot_id": 63} if registry is TEXT_TOWERS else {}
            with torch.device("meta"):
                registry.build(gradients.shallow(registry.preset(name)), **sizes)


def test_what_the_loss_will_cost(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    made = context(world, "schedule.global_batch=256", "embed_dim=32", "precision=fp32")
    made.without_data = True
    found = run(made, "config", "threads", "loss fit", "loss")
    assert found.status == "ok" and "256 images × 256 texts" in found.found
    # Four times the work, and from the second rank on the texts of the others.
    assert 0 < made.predicted["loss_seconds"] < 1
    vectors = 4 * 4096 * made.config.embed_dim
    sizes = [loss.loss_bytes(made.config, 4096, ranks, (1, 1)) / vectors for ranks in (1, 4)]
    assert 2 < sizes[0] < 3.1 + 1 < sizes[1]
    wrong = context(world, "schedule.global_batch=256", "embed_dim=32", "data.negatives=wrong", "data.negative_count=2")
    wrong.without_data = True
    assert "256 images × 768 texts" in run(wrong, "config", "threads", "loss fit", "loss").found
    more = loss.loss_bytes(wrong.config, 4096, 1, (1, 1)) / vectors
    assert more > sizes[0] + 2
    monkeypatch.setattr(loss, "free_on", lambda made: 2**20)
    found = loss.loss(made)
    assert found.status == "FAIL" and "runtime.exchange=ring" in found.fix


def test_a_loss_that_does_not_fit_the_model(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    words = ["embed_dim=32", "precision=fp32", "schedule.global_batch=16"]

    def fitted(*more: str) -> Found:
        made = context(world, *words, *more)
        made.without_data = True
        return run(made, "config", "loss fit")

    found = fitted("loss.name=sigmoid")
    assert found.status == "ok" and "vectors of 32 numbers, own parameters: logit_scale, bias" in found.found
    found = fitted("loss.matryoshka.dims=[16, 64]")
    assert found.status == "FAIL" and "E_CONFIG_VALUE" in found.found and "take dims up to 32" in found.fix
    real = loss.LOSSES.build

    def spoiled(change: Any) -> Any:
        def build(*given: Any, **more: Any) -> Any:
            made = real(*given, **more)
            change(made)
            return made

        return build

    for change, words_of_it in (
        (lambda made: setattr(made, "odd", torch.nn.Parameter(torch.tensor(1.0))), "odd is torch.float32 ()"),
        (lambda made: made.half(), "logit_scale is torch.float16 (1,)"),
        (lambda made: setattr(made, "spare", torch.nn.Parameter(torch.ones(1))), "spare has no part in it"),
        (lambda made: made.logit_scale.data.fill_(math.nan), "it is nan for 4 random pairs"),
    ):
        monkeypatch.setattr(loss.LOSSES, "build", spoiled(change))
        found = fitted()
        assert found.status == "FAIL" and words_of_it in found.found and "plugin" in found.fix, found


def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, script: Any) -> None:
    script(ping_ranks, tmp_path)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["trips"] == seen[1]["trips"] and len(seen[0]["trips"]) == 2 and seen[0]["rate"] > 1e6
    assert all(0 < seconds < 1 for seconds in seen[0]["trips"])
    said = seen[0]["said"]
    assert said["status"] == "FAIL" and said["found"] == "no answer from rank 2 of 3 (on node 1, counted from 0)"
    assert max(one["seconds"] for one in seen) < 20 * ping_ranks.SECONDS and "firewall" in said["fix"]


def test_nobody_is_waited_for_once_a_rank_is_silent(tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, and the error, though no rank can be asked for its outcome any more."""
    from clipwright.pipeline.doctor import run as examined

    monkeypatch.setattr(examined, "silent", lambda world: Found("FAIL", "no answer from rank 3 of 4", "", "look there"))
    monkeypatch.setattr(examined, "from_all", lambda outcome: pytest.fail("an exchange"))
    done = here(tmp_path, "doctor", code=1)
    assert done.error.startswith("error[E_DOCTOR]") and "ping: no answer from rank 3 of 4 — look there" in done.error
    assert "no answer" in done.out


def test_a_rank_far_away_is_warned_of(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    made = context(world)
    assert network.ping(made).found == "one process"
    made.world = dataclasses.replace(world, size=4)
    monkeypatch.setattr(network, "sum_rate", lambda world: 2.5e9)
    monkeypatch.setattr(network, "round_trips", lambda world: [1e-4, 2e-2, 1e-4])
    found = network.ping(made)
    assert found.status == "warn" and "0.1 ms there and back, at most 20 ms (rank 2)" in found.found
    assert "2.5 GB/s" in found.found and "rank 2's machine" in found.fix
    monkeypatch.setattr(network, "round_trips", lambda world: [1e-4, 2e-4, 1e-4])
    assert network.ping(made).status == "ok" and made.predicted["ping"]["seconds"] == [1e-4, 2e-4, 1e-4]


def test_steps_that_fail_are_a_row(monkeypatch: pytest.MonkeyPatch, scenes: Path, world: World, small: Any) -> None:
    made = context(world, f"data.train={scenes}", *small.settings)

    def broken(*words: object) -> None:
        raise RuntimeError("out of memory")

    run(made, *MODEL, "shards", "step")
    monkeypatch.setattr(speed, "measure", broken)
    found = run(made, "speed")
    assert found.status == "FAIL" and "out of memory" in found.found
    assert run(made, "bottleneck").status == "skip"


@pytest.mark.parametrize(
    ("name", "zero", "each"), [("adamw", 0, 12), ("adamw", 2, 12), ("adamw", 3, 12), ("sgd", 0, 4)]
)
def test_bytes_a_parameter(name: Any, zero: int, each: int) -> None:
    optim = dataclasses.replace(RunConfig.__dataclass_fields__["optim"].default, name=name)
    assert model.checkpoint_bytes(optim) == each
    assert model.state_bytes(optim, zero, 1) == (16 if name == "adamw" and zero == 0 else 20 if zero else 8)
