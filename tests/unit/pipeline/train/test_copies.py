"""Copies of checkpoints in a bucket: a run that lost its disk resumes from them."""

from __future__ import annotations

import logging
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from fake_engine import fake_engine

from clipwright.pipeline.distributed.group import World, process_group
from clipwright.pipeline.folders import remote
from clipwright.pipeline.train.checkpoints.copies import Copies
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.config import RuntimeConfig

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`bucket(name)` makes a bucket and returns an address in it; the environment is set up for S3."""
    variables = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    remote._store.cache_clear()

    def make(name: str) -> str:
        credential = "Credential=x/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 {credential}"}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", headers=headers, method="PUT")).close()
        return f"s3://{name}/runs/one"

    return make


def object_names(address: str) -> set[str]:
    """The names of all objects at an address."""
    return {entry["path"] for page in obstore.list(remote._store(address)) for entry in page}


def save_four_times(run: Path, world: World, address: str) -> None:
    """Four saves, as the trainer makes them; of two numbers, without DeepSpeed."""
    (run / "tokenizer").mkdir(parents=True)
    for name in ("config.yaml", "identity.json", "log.jsonl", "ledger.jsonl", "tokenizer/vocabulary"):
        (run / name).write_text(name)
    engine = fake_engine()
    runtime = RuntimeConfig(keep=1, save_every=1, copy_to=address)
    saver = Saver(run, world, runtime, {"identity": {}, "accepted": []}, 0)
    for step in range(1, 5):
        saver.save(engine, step)
    saver.save(engine, 4, wait=True)
    saver.finish()


def download(address: str, folder: Path) -> None:
    for name in object_names(address):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(remote.fetch(f"{address}/{name}"))


def test_run_that_lost_its_disk_resumes_from_the_copy(
    scenes: Path, tmp_path: Path, bucket: Callable[[str], str], small: Any, here: Callable[..., Any]
) -> None:
    address = bucket("trained")
    args = ["train", *small.settings, f"data.train={scenes}", "schedule.samples=80", "runtime.save_every=2"]
    here(tmp_path, *args, f"runtime.copy_to={address}", "runtime.stop_at=3", "-o", "lost")
    download(address, tmp_path / "back")
    done = here(tmp_path, *args, "-o", "back")
    assert "resuming at step 3" in done.out and "warning" not in done.err
    here(tmp_path, *args, "-o", "straight")
    curves = [[(line["step"], line["loss"]) for line in small.losses(tmp_path / run)] for run in ("back", "straight")]
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [1, 2, 3, 4, 5]
    last = "checkpoints/step-00000005/model.safetensors"
    assert (tmp_path / "back" / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()


def test_run_is_copied(
    tmp_path: Path, bucket: Callable[[str], str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = bucket("kept")
    run, uploaded, upload = tmp_path / "run", list[str](), remote.upload

    def record(path: Path, to: str) -> None:
        uploaded.append(to.removeprefix(f"{address}/"))
        upload(path, to)

    monkeypatch.setattr(remote, "upload", record)
    with process_group() as world:
        save_four_times(run, world, address)
    assert "warning" not in capfd.readouterr().err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    own = {"latest", "config.yaml", "identity.json", "log.jsonl", "ledger.jsonl", "tokenizer/vocabulary"}
    last = {f"checkpoints/step-00000004/{path.name}" for path in (run / "checkpoints" / "step-00000004").iterdir()}
    assert len(last) == 4 and last | own <= object_names(address)
    manifest = "checkpoints/step-00000004/manifest.json"
    at = {name: uploaded.index(name) for name in last}
    assert all(position < at[manifest] for name, position in at.items() if name != manifest)
    assert uploaded[at[manifest] :].index("latest") == len({*own, manifest}) - 1  # after all of these
    assert uploaded[-4:] == ["config.yaml", "log.jsonl", "ledger.jsonl", "identity.json"]  # what was logged since

    before = object_names(address)
    copies = Copies(run, address)  # another start of the run: all checkpoints are copied already
    shutil.move(run / "latest", run / "hidden")
    copies.start()
    copies.finish()
    assert object_names(address) == before and "warning" not in capfd.readouterr().err
    shutil.move(run / "hidden", run / "latest")

    copies = Copies(run, address.replace("kept", "later"))
    copies.start()
    copies.finish()
    stderr = capfd.readouterr().err
    assert stderr.count("warning: step-00000004 was not copied to s3://later/runs/one") == 2, stderr
    bucket("later")
    copies.start()
    copies.finish()
    assert object_names(address.replace("kept", "later")) == last | own
    assert "warning" not in capfd.readouterr().err


def test_invalid_copy_address_is_refused(scenes: Path, tmp_path: Path, small: Any, here: Callable[..., Any]) -> None:
    arguments = ["train", *small.settings, f"data.train={scenes}", "runtime.copy_to=ftp://somewhere/x", "-o", "run"]
    line = here(tmp_path, *arguments, code=3).error
    assert line.startswith("error[E_REMOTE]") and "ftp://somewhere" in line and "s3" in line
    assert not (tmp_path / "run").exists()
