"""Embedding folders: the same rows from one process and from two, complete or absent."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from clipwright.eval.embed import _default_part_samples
from clipwright.eval.embed_parts import PartWriter
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.embeddings import canary_samples
from clipwright.pipeline.model.folder import load_model


def read(folder: Path) -> tuple[np.ndarray, list[dict]]:
    names = [part["name"] for part in json.loads((folder / "manifest.json").read_text())["parts"] if part["rows"]]
    embeddings = [np.load(folder / f"{name}.npy") for name in names]
    rows = [row for name in names for row in pq.read_table(folder / f"{name}.parquet").to_pylist()]
    return np.concatenate(embeddings).astype(np.float32), rows


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def embed_folder(out: Path) -> dict[str, bytes]:
    """The files of an embedding folder that do not depend on when, where and in how many processes it was made."""
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    return {name: data for name, data in files.items() if name not in ("config.yaml", "status.json", "origin.json")}


def srun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`clipwright ARGUMENTS` in two processes that are started with Slurm's variables only."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "clipwright", *map(str, arguments)],
            env=os.environ
            | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [task.communicate(timeout=1200) for task in tasks]
    out, errors = ("".join(texts) for texts in zip(*printed, strict=True))
    return subprocess.CompletedProcess([], max(task.returncode for task in tasks), out, errors)


def test_one_process_ignores_a_local_rank_that_a_shell_left_set(model, small, tmp_path):
    arguments = [sys.executable, "-m", "clipwright", "embed", f"model={model}", f"data={small}", "-o", "out", "--json"]
    env = os.environ | {"LOCAL_RANK": "3"}
    done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 7


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("samples", [1, 7, 1001])
def test_one_and_two_processes_write_the_same_bytes(cli, make_dataset, samples, model, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = make_dataset(tmp_path / "data", samples, shard=3 if samples < 10 else 400)
    keys = [key for s in range(len(Dataset(data).sizes)) for key in Dataset(data).sidecar(s)["key"].to_pylist()]
    parts = {1: 1, 7: 4, 1001: 4}[samples]
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        own = ["part_samples=2"] if samples == 7 else []
        arguments = ("embed", f"model={model}", f"data={data}", *own, "-o", out)
        done = srun(*arguments) if (ranks, samples) == (2, 7) else cli(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("embedded") == 1
        embeddings, rows = read(out)
        assert [row["key"] for row in rows] == keys and len(set(keys)) == samples
        assert len(embeddings) == samples and len(list(out.glob("part-*.npy"))) == parts
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)
        assert not list(out.glob(".*"))
        assert json.loads((out / "status.json").read_text())["exit_code"] == 0
    assert embed_folder(tmp_path / "ranks-1") == embed_folder(tmp_path / "ranks-2")
    images = [row["canary"] for row in rows if row["canary"] is not None]
    assert len(images) == min(samples, 8) and all(part["samples"] for part in manifest(out)["parts"])


@pytest.mark.parametrize(
    ("samples", "expected"), [(0, 256), (16_384, 256), (16_385, 257), (524_288, 8192), (10**9, 8192)]
)
def test_default_part_is_a_64th_of_the_dataset(samples, expected):
    assert _default_part_samples(samples) == expected


def test_kept_images_are_spread_evenly_with_one_in_each_part():
    assert list(canary_samples(1000, 10)) == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert list(canary_samples(100, 2)) == [6, 18, 31, 43, 56, 68, 81, 93]
    assert list(canary_samples(3, 1)) == [0, 1, 2] and list(canary_samples(0, 0)) == []


def test_progress_counts_samples_of_images_and_of_captions(make_dataset, model, tmp_path):
    data = Dataset(make_dataset(tmp_path / "data", 7, shard=3, captions=lambda i: [f"text {j}" for j in range(i % 3)]))
    (tmp_path / "out/.embed").mkdir(parents=True)
    for what, rows in (("image", 5), ("text", 4)):
        identity = {"model": "m", "data": "d", "what": what, "part_samples": 5}
        writer = PartWriter(tmp_path / "out", identity, load_model(model), data, what, batch=2, workers=1)
        assert writer.ranges == [range(5), range(5, 7)]
        done: list[int] = []
        receipt = writer.write(0, done.append)
        assert sum(done) == 5 == receipt["samples"] and receipt["rows"] == rows and len(done) > 1
        assert writer.sealed(0) == receipt and writer.sealed(1) is None
        other = PartWriter(tmp_path / "out", {**identity, "model": "n"}, load_model(model), data, what, 2, 1)
        assert other.sealed(0) is None


def test_rows_describe_their_sample(embedded, small):
    _, rows = read(embedded)
    data = Dataset(small)
    row, sidecar = rows[4], data.sidecar(1).slice(1, 1).to_pylist()[0]
    assert row["key"] == sidecar["key"] and row["caption"] == sidecar["captions"][0]
    assert (row["source"], row["source_key"]) == ("list.csv#4", "photos/4.jpg")
    assert row["canary"] == data.image(1, 1)
    assert row["metadata"] == {name: sidecar[name] for name in ("id", "colour", "held_out")}
    with (small / row["tar"]).open("rb") as tar:
        tar.seek(row["offset"])
        assert tar.read(row["size"]) == data.image(1, 1)


def test_text_embeddings_have_a_row_per_caption(cli, model, small, tmp_path):
    done = cli("embed", f"model={model}", f"data={small}", "what=text", "runtime.batch=4", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    embeddings, rows = read(tmp_path / "out")
    assert len(embeddings) == len(rows) == 14
    assert [row["caption"] for row in rows] == [caption for row in rows[::2] for caption in row["captions"]]


def test_finished_folder_is_kept_and_other_inputs_are_refused(cli, refused, model, small, embedded, tmp_path):
    out = shutil.copytree(embedded, tmp_path / "out")
    before = file_sha256(out / "manifest.json")
    again = cli("embed", f"model={model}", f"data={small}", "-o", out)
    assert again.returncode == 0 and "already embedded" in again.stdout
    refused(cli("embed", f"model={model}", f"data={small}", "what=text", "-o", out), "E_OUTPUT", 2, out, "what")
    assert file_sha256(out / "manifest.json") == before
    fresh = cli("embed", f"model={model}", f"data={small}", "what=text", "-o", out, "--fresh", "--json")
    assert json.loads(fresh.stdout)["rows"] == 14 and len(read(out)[0]) == 14


STOP = """
import os, signal
from clipwright.eval.embed_parts import PartWriter
write, written = PartWriter.write, []
def stopping(self, number, progress):
    def stop(samples):
        if len(written) == 1:
            os.kill(os.getpid(), signal.{name})
        progress(samples)
    receipt = write(self, number, stop)
    written.append(number)
    return receipt
PartWriter.write = stopping
"""


@pytest.mark.xdist_group("ranks")
def test_stopped_embed_continues_with_the_parts_that_are_missing(
    cli, quick_cli, refused, make_dataset, model, small, tmp_path, monkeypatch
):
    """SIGKILL, SIGTERM and Ctrl-C, each in the middle of the second part of a start; then two ranks complete it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    data = make_dataset(tmp_path / "data", 23, shard=5)
    arguments = ("embed", f"model={model}", f"data={data}", "part_samples=3", "runtime.batch=2", "-o")
    assert cli(*arguments, tmp_path / "whole").returncode == 0
    out = tmp_path / "out"
    for number, (name, code, kept) in enumerate(
        [("SIGKILL", -9, ""), ("SIGTERM", 85, "kept 2 finished parts"), ("SIGINT", 130, "kept 3 finished parts")], 1
    ):
        Path("stop.py").write_text(STOP.format(name=name))
        done = cli(*arguments, out, "plugins=stop.py")
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert kept in done.stdout and len(list(out.glob("part-*.npy"))) == number
        assert number == 1 or f"resuming: {number - 1} of 8 parts" in done.stdout
        assert number == 1 or not list(out.glob(".part-*"))  # SIGKILL leaves what it was writing
    refused(cli("index", "build", "flat", f"embeddings={out}", "-o", tmp_path / "index"), "E_MANIFEST", 3, out)
    others = ("what=text", "part_samples=4")
    refused(quick_cli(*arguments, out, *others), "E_RESUME", 2, out, 'what: "image" → "text"', "part_samples: 3 → 4")
    damaged = out / "part-00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    done = cli(*arguments, out, "--json", ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_rows"] == 23 - 2 * 3  # the damaged part too
    assert embed_folder(out) == embed_folder(tmp_path / "whole")
    assert "already embedded: 23 images" in quick_cli(*arguments, out).stdout


def test_stop_before_the_first_part_says_that_nothing_is_kept(cli, model, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stop.py").write_text(STOP.format(name="SIGINT").replace("== 1", "== 0"))
    done = cli("embed", f"model={model}", f"data={small}", "-o", "out", "plugins=stop.py")
    assert done.returncode == 130 and "nothing is kept" in done.stdout
    assert [path.name for path in Path("out").iterdir()] == ["status.json"]


# Rank 0 waits with its first part until rank 1 has failed.
WAIT = """
import os, time
from clipwright.eval.embed_parts import PartWriter
write = PartWriter.write
def waiting(self, number, progress):
    end = time.monotonic() + 100
    while os.environ["RANK"] == "0" and not list(self.out.glob(".embed/failed*")) and time.monotonic() < end:
        time.sleep(0.02)
    return write(self, number, progress)
PartWriter.write = waiting
"""


@pytest.mark.xdist_group("ranks")
def test_failing_rank_stops_all_ranks_after_their_current_part(cli, make_dataset, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wait.py").write_text(WAIT)
    data = make_dataset(tmp_path / "data", 7, shard=3, broken=5)
    key = Dataset(data).sidecar(1)["key"][2].as_py()
    for ranks, exit_code, more in ((1, 3, ()), (2, 1, ("plugins=wait.py", "part_samples=1"))):  # torchrun exits with 1
        out = tmp_path / f"out-{ranks}"
        for _ in range(ranks):  # the second start of two ranks is not stopped by the mark of the first
            done = cli("embed", f"model={model}", f"data={data}", *more, "-o", out, ranks=ranks)
            assert done.returncode == exit_code, done.stderr
            [line] = [line for line in done.stderr.splitlines() if line.startswith("error[")]
            assert line.startswith("error[E_IMG_FORMAT]") and key in line and "set-000001.tar" in line
            assert "prep" in line
            status = json.loads((out / "status.json").read_text())
            assert (status["exit_code"], status["error"]["code"]) == (3, "E_IMG_FORMAT")
    assert [path.name for path in (tmp_path / "out-1").iterdir()] == ["status.json"]
    sealed = sorted(int(path.stem[-5:]) for path in (tmp_path / "out-2").glob("part-*.npy"))
    assert sealed == [0, 1, 3, 4]  # rank 0 has made one part in each start, rank 1 two in the first


def test_corrupt_inputs_are_refused(cli, refused, make_model, model, small, tmp_path):
    out = tmp_path / "out"
    changed = shutil.copytree(small, tmp_path / "changed")
    tar = changed / "set-000002.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    refused(cli("embed", f"model={model}", f"data={changed}", "-o", out), "E_DATA_HASH", 3, tar.name)
    (changed / "manifest.json").unlink()
    refused(cli("embed", f"model={model}", f"data={changed}", "-o", out), "E_MANIFEST", 3, changed)
    assert not out.exists() or [path.name for path in out.iterdir()] == ["status.json"]
    broken = make_model(tmp_path / "broken", scale=3e38)
    refused(cli("embed", f"model={broken}", f"data={small}", "-o", out), "E_NONFINITE", 1, "image ")


def test_folder_with_other_files_is_refused(cli, refused, model, small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(cli("embed", f"model={model}", f"data={small}", "-o", tmp_path), "E_OUTPUT", 2, tmp_path, "notes.txt")
    assert {path.name for path in tmp_path.iterdir()} <= {"notes.txt", "status.json"}
    before = {path.name for path in small.iterdir()}
    done = cli("embed", f"model={model}", f"data={small}", "-o", small, "--fresh")
    refused(done, "E_OUTPUT", 2, small, "it holds manifest.json, set-000000.parquet")
    done = cli("embed", f"model={model}", f"data={small}", "-o", small)
    refused(done, "E_OUTPUT", 2, small, "it is a dataset folder", "-o")
    assert {path.name for path in small.iterdir()} == before


@pytest.fixture
def one_thread():
    """The number of threads that torchrun sets for its ranks; the last bits of the results depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.xdist_group("ranks")
def test_job_array_gives_the_folder_of_one_start(cli, quick_cli, refused, model, small, tmp_path, one_thread):
    arguments = ("embed", f"model={model}", f"data={small}", "part_samples=2", "-o")
    assert cli(*arguments, tmp_path / "whole").returncode == 0
    out = tmp_path / "parts"
    assert (done := quick_cli(*arguments, out, "runtime.part=2/2")).returncode == 0, done.stderr
    assert done.stdout.startswith("part 2/2: embedded 3 images") and not (out / "status.json").exists()
    done = quick_cli(*arguments, out, "runtime.part=finish")
    refused(done, "E_UNFINISHED", 3, out, "2 of 4: part-00000, part-00001", "run every runtime.part=K/N")
    assert not (out / "manifest.json").exists()
    assert "part 2/2: already embedded: 3" in quick_cli(*arguments, out, "runtime.part=2/2").stdout
    # A part without a receipt, and one that changed after its receipt was written, are embedded again.
    (out / ".embed/part-00002.json").unlink()
    content = (out / "part-00003.npy").read_bytes()
    (out / "part-00003.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "part 2/2: embedded 3" in quick_cli(*arguments, out, "runtime.part=2/2").stdout
    assert "part 1/2: embedded 4" in quick_cli(*arguments, out, "runtime.part=1/2").stdout
    refused(quick_cli(*arguments, out, "what=text", "runtime.part=finish"), "E_RESUME", 2, out, "what")
    assert quick_cli(*arguments, out, "runtime.part=finish").returncode == 0
    assert embed_folder(out) == embed_folder(tmp_path / "whole")
    assert "already embedded: 7" in quick_cli(*arguments, out, "runtime.part=1/2").stdout
    for part, code in (("3/2", "E_CONFIG_VALUE"), ("plan", "E_CONFIG_VALUE")):
        done = quick_cli(*arguments, out, f"runtime.part={part}")
        assert done.returncode == 2 and f"error[{code}]" in done.stderr and "K/N with K from 1 to N" in done.stderr
    done = quick_cli(*arguments, tmp_path / "new", "runtime.part=1/2", "--fresh")
    assert done.returncode == 2 and "error[E_USAGE]" in done.stderr and not (tmp_path / "new").exists()


def test_images_without_captions_are_embedded_and_searched(quick_cli, refused, make_dataset, image, model, tmp_path):
    data = make_dataset(tmp_path / "data", 5, shard=2, captions=lambda i: [])
    some = make_dataset(tmp_path / "some", 5, shard=2, captions=lambda i: ["a caption"] if i != 3 else [])
    out, index = tmp_path / "out", tmp_path / "index"
    for place, expected in ((data, [None] * 5), (some, ["a caption"] * 3 + [None, "a caption"])):
        done = quick_cli("embed", f"model={model}", f"data={place}", "-o", out, "--fresh")
        assert done.returncode == 0, done.stderr
        assert [row["caption"] for row in read(out)[1]] == expected
    done = quick_cli("embed", f"model={model}", f"data={some}", "what=text", "part_samples=3", "-o", tmp_path / "text")
    assert done.returncode == 0 and "embedded 4 texts" in done.stdout
    assert quick_cli("embed", f"model={model}", f"data={data}", "-o", out, "--fresh").returncode == 0
    assert quick_cli("index", "build", "flat", f"embeddings={out}", "-o", index).returncode == 0
    (tmp_path / "query.jpg").write_bytes(image(3))
    hits = json.loads(quick_cli("search", index, f"image={tmp_path / 'query.jpg'}", "--json").stdout)["hits"]
    assert hits[0]["source_key"] == "photos/3.jpg" and hits[0]["caption"] is None and hits[0]["captions"] == []
    assert "photos/3.jpg" in quick_cli("search", index, "text=a red image").stdout
    text = ("embed", f"model={model}", f"data={data}", "what=text", "-o", tmp_path / "new")
    refused(quick_cli(*text), "E_CAP_EMPTY", 3, data, "what=text", "what=image")
    evaluate = ("eval", "retrieval", f"model={model}")
    refused(quick_cli(*evaluate, f"data={data}"), "E_CAP_EMPTY", 3, data, "5 images and 0 captions")
    key = Dataset(some).sidecar(1)["key"][1].as_py()
    refused(quick_cli(*evaluate, f"data={some}"), "E_CAP_EMPTY", 3, some, "1 of 5 images", key, "every image")
