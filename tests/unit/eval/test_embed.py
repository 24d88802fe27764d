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

from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.folders.dataset import Dataset


def read(folder: Path) -> tuple[np.ndarray, list[dict]]:
    names = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    embeddings = [np.load(folder / name) for name in names if name.endswith(".npy")]
    rows = [row for name in names if name.endswith(".parquet") for row in pq.read_table(folder / name).to_pylist()]
    return np.concatenate(embeddings).astype(np.float32), rows


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
def test_one_and_two_processes_agree(cli, make_dataset, samples, model, tmp_path):
    data = make_dataset(tmp_path / "data", samples, shard=3 if samples < 10 else 400)
    keys = [key for s in range(len(Dataset(data).sizes)) for key in Dataset(data).sidecar(s)["key"].to_pylist()]
    folders = {}
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        arguments = ("embed", f"model={model}", f"data={data}", "-o", out)
        done = srun(*arguments) if (ranks, samples) == (2, 7) else cli(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("embedded") == 1
        embeddings, rows = folders[ranks] = read(out)
        assert [row["key"] for row in rows] == keys and len(set(keys)) == samples
        assert len(embeddings) == samples
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)
        assert not list(out.glob(".*"))
        assert json.loads((out / "status.json").read_text())["exit_code"] == 0
    assert len(list((tmp_path / "ranks-2").glob("part-*.npy"))) == min(samples, 2)
    np.testing.assert_allclose(folders[1][0], folders[2][0], atol=1e-3)
    assert folders[1][1] == folders[2][1]


def test_rows_describe_their_sample(embedded, small):
    _, rows = read(embedded)
    data = Dataset(small)
    row, sidecar = rows[4], data.sidecar(1).slice(1, 1).to_pylist()[0]
    assert row["key"] == sidecar["key"] and row["caption"] == sidecar["captions"][0]
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


def test_unfinished_folder_is_completed(cli, refused, model, small, embedded, tmp_path):
    out = shutil.copytree(embedded, tmp_path / "out")
    (out / "manifest.json").unlink()
    (out / ".part-00007.npy.partial").write_bytes(b"left by a killed process")
    refused(cli("index", "build", f"embeddings={out}", "-o", tmp_path / "index"), "E_MANIFEST", 3, out)
    assert not (tmp_path / "index").exists()
    assert cli("embed", f"model={model}", f"data={small}", "-o", out).returncode == 0
    assert not list(out.glob(".*")) and len(read(out)[0]) == 7


@pytest.mark.xdist_group("ranks")
def test_failing_rank_fails_all_ranks_and_leaves_no_files(cli, make_dataset, model, tmp_path):
    data = make_dataset(tmp_path / "data", 7, shard=3, broken=5)
    key = Dataset(data).sidecar(1)["key"][2].as_py()
    for ranks, exit_code in ((1, 3), (2, 1)):  # torchrun turns every failure into 1
        out = tmp_path / f"out-{ranks}"
        done = cli("embed", f"model={model}", f"data={data}", "-o", out, ranks=ranks)
        assert done.returncode == exit_code, done.stderr
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error[")]
        assert line.startswith("error[E_IMG_FORMAT]") and key in line and "set-000001.tar" in line and "prep" in line
        status = json.loads((out / "status.json").read_text())
        assert (status["exit_code"], status["error"]["code"]) == (3, "E_IMG_FORMAT")
        assert [path.name for path in out.iterdir()] == ["status.json"]


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


def embed_folder(out: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    return {name: data for name, data in files.items() if name not in ("config.yaml", "status.json", "origin.json")}


@pytest.fixture
def one_thread():
    """The number of threads that torchrun sets for its ranks; the last bits of the results depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.xdist_group("ranks")
def test_job_array_gives_the_folder_of_as_many_ranks(cli, quick_cli, model, small, tmp_path, one_thread):
    arguments = ("embed", f"model={model}", f"data={small}", "-o")
    assert cli(*arguments, tmp_path / "ranks", ranks=2).returncode == 0
    out = tmp_path / "parts"
    assert (done := quick_cli(*arguments, out, "runtime.part=2/2")).returncode == 0, done.stderr
    assert done.stdout.startswith("part 2/2: embedded 4 images") and not (out / "status.json").exists()
    done = quick_cli(*arguments, out, "runtime.part=finish")
    assert done.returncode == 3 and "error[E_UNFINISHED]" in done.stderr and "1 of 2 parts" in done.stderr
    assert "missing: 1" in done.stderr and not (out / "manifest.json").exists()
    assert "part 2/2: already embedded: 4" in quick_cli(*arguments, out, "runtime.part=2/2").stdout
    # A part without a receipt is embedded again; receipts of other inputs do not count.
    (out / ".part-00001.json.partial").unlink()
    assert "part 2/2: embedded 4" in quick_cli(*arguments, out, "runtime.part=2/2").stdout
    assert "part 1/2: embedded 3" in quick_cli(*arguments, out, "runtime.part=1/2").stdout
    done = quick_cli(*arguments, out, "what=text", "runtime.part=finish")
    assert done.returncode == 3 and "no part of this model and dataset" in done.stderr
    # A file that changed after its receipt was written; a `finish` that was interrupted between two renames.
    content = (out / ".part-00000.npy.partial").read_bytes()
    (out / ".part-00000.npy.partial").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = quick_cli(*arguments, out, "runtime.part=finish")
    assert done.returncode == 3 and "error[E_EMBED_HASH]" in done.stderr and ".part-00000.npy" in done.stderr
    (out / ".part-00000.npy.partial").write_bytes(content)
    (out / ".part-00001.npy.partial").rename(out / "part-00001.npy")
    assert quick_cli(*arguments, out, "runtime.part=finish").returncode == 0
    assert embed_folder(out) == embed_folder(tmp_path / "ranks")
    assert "already embedded: 7" in quick_cli(*arguments, out, "runtime.part=1/2").stdout
    for part, code in (("3/2", "E_CONFIG_VALUE"), ("plan", "E_CONFIG_VALUE")):
        done = quick_cli(*arguments, out, f"runtime.part={part}")
        assert done.returncode == 2 and f"error[{code}]" in done.stderr and "K/N with K from 1 to N" in done.stderr
    done = quick_cli(*arguments, tmp_path / "new", "runtime.part=1/2", "--fresh")
    assert done.returncode == 2 and "error[E_USAGE]" in done.stderr and not (tmp_path / "new").exists()
