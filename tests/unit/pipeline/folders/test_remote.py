"""Remote shards: the same samples as from a local disk, through a bounded cache, from a slow S3 server that fails."""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from waiting import wait_for_lines, wait_until

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import staged_path
from clipwright.pipeline.data.batch import RankBatch
from clipwright.pipeline.data.datasets import DataConfig, Datasets
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.doctor.data import shard_cache
from clipwright.pipeline.folders import remote
from clipwright.pipeline.folders.cache import GB, CacheConfig
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.towers.base import TEXT_TOWERS
from clipwright.pipeline.train.config import RuntimeConfig
from clipwright.pipeline.train.run_folder import StepFile
from clipwright.pipeline.train.sample_log import line

Maker = Callable[..., Path]
SECRET = "do-not-show-this"
SOAK = "CLIPWRIGHT_SOAK" in os.environ  # see tests/soak.py
LATENCY, FAILING, STEPS = 0.005, 0.01, 24


@dataclass
class Proxy:
    """A slow proxy of another server that sometimes fails. `requests` are the requested paths."""

    port: int = 0
    latency: float = LATENCY
    failing: float = FAILING
    requests: list[str] = field(default_factory=list)
    failures: int = 0
    corrupt_suffix: str = ""  # responses whose path ends with it have a byte changed


def start_proxy(target: int) -> tuple[Proxy, ThreadingHTTPServer]:
    proxy, draw = Proxy(), random.Random(3)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(proxy.latency)
            path = self.path.partition("?")[0]
            proxy.requests.append(path)
            number = draw.random()
            proxy.failures += number < proxy.failing
            if number < proxy.failing / 2:
                self.send_error(503)
                return
            forwarded = {
                name: self.headers[name] for name in ("Authorization", "Range", "Host") if name in self.headers
            }
            forwarded |= {name: value for name, value in self.headers.items() if name.lower().startswith("x-amz")}
            connection = http.client.HTTPConnection("127.0.0.1", target)
            connection.request("GET", self.path, headers=forwarded)
            response = connection.getresponse()
            data = response.read()
            if proxy.corrupt_suffix and path.endswith(proxy.corrupt_suffix):
                data = bytes([data[0] ^ 1]) + data[1:]
            self.send_response(response.status)
            for name in ("Content-Range", "Last-Modified", "ETag", "Content-Type"):
                if response.headers[name]:
                    self.send_header(name, response.headers[name])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if number < proxy.failing:  # the response breaks off
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy.port = server.server_port
    return proxy, server


@pytest.fixture(scope="module")
def s3() -> Iterator[int]:
    """Starts an S3 server on this machine; yields its port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


def put(port: int, path: str, data: bytes = b"") -> None:
    authorization = "Credential=x/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
    headers = {"Authorization": f"AWS4-HMAC-SHA256 {authorization}", "x-amz-acl": "public-read"}
    headers["Content-Type"] = "application/octet-stream"
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method="PUT")
    urllib.request.urlopen(request).close()


@pytest.fixture
def cloud(s3: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A bucket named `bucket` behind the proxy, with the environment set as for S3."""
    proxy, server = start_proxy(s3)
    put(s3, "/bucket")
    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    for name, value in {**credentials, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}.items():
        monkeypatch.setenv(name, value)
    remote._store.cache_clear()
    yield proxy
    server.shutdown()
    server.server_close()


def upload(port: int, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        put(port, f"/bucket/{prefix}/{path.name}", path.read_bytes())
    return f"s3://bucket/{prefix}"


def loader(train: object, cache: CacheConfig | None = None, share: RankBatch | None = None, **config: Any) -> Loader:
    return Loader(
        DataConfig(**{"train": str(train), "streams": 4, "window": 40, **config}),
        share or RankBatch(0, 1, 16),
        tokenizer=TOKENIZERS.build(TOKENIZERS.preset("clip_bpe")),
        text=TEXT_TOWERS.preset("text_nano"),
        image_size=16,
        seed=5,
        workers=2,
        cache=cache,
    )


def keys(source: Loader, position: int, count: int, on_batch: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Returns the image ids of `count` batches from a position on."""
    batches = source.batches(position)
    try:
        ids = []
        for batch in itertools.islice(batches, count):
            on_batch()
            ids.append(batch.image_id.tolist())
        return ids
    finally:
        batches.close()


def minimum(folder: Path, shards: int) -> float:
    """Returns the gigabytes of the `shards` largest shards with their sidecars."""
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    return sum(sorted((entry["tar_bytes"] + entry["sidecar_bytes"] for entry in entries), reverse=True)[:shards]) / GB


class SizeMonitor:
    """Measures the size of a cache, without manifests, again and again in a thread; keeps the largest."""

    def __init__(self, root: Path) -> None:
        self.root, self.largest, self.stopped = root, 0, False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def measure(self) -> None:
        size = 0
        for path in self.root.glob("*/tars-*/*"):
            try:
                size += path.stat().st_size
            except OSError:
                continue
        self.largest = max(self.largest, size)

    def run(self) -> None:
        while not self.stopped:
            self.measure()
            time.sleep(0.005)


def test_remote_samples_equal_local_samples_and_the_cache_stays_within_its_limit(
    make_dataset: Maker, tmp_path: Path, cloud: Proxy, s3: int
) -> None:
    folder = make_dataset("d", [20] * 23 + [7])
    train = upload(s3, folder, "stream")
    # P/W × (⌈window / samples per shard⌉ + 1) shards.
    bound = minimum(folder, 4 * 4)
    cache = CacheConfig(folder=str(tmp_path / "cache"), gb=bound)
    expected = keys(loader(folder), 0, 2 * STEPS)
    monitor = SizeMonitor(tmp_path / "cache")
    first = loader(train, cache)
    assert keys(first, 0, STEPS, monitor.measure) == expected[:STEPS]
    # As after SIGKILL: the lock is free, a staged shard is left, nothing was cleaned up.
    tars = first.data.datasets[0]._cache
    assert tars is not None
    wait_until(lambda: not any(thread.name.startswith("fetch-") for thread in threading.enumerate()))
    coming = first.order.locate(np.arange(16 * STEPS, 16 * STEPS + 64)).shard.tolist()
    here = [tars.path(shard) for shard in dict.fromkeys(coming) if shard in tars._cached]
    here[0].rename(staged_path(here[0]))
    corrupt = here[1].with_suffix(".parquet")
    corrupt.write_bytes(bytes(corrupt.stat().st_size))  # as after a power failure
    tars._lock.close()
    before = len(cloud.requests)
    second = loader(train, cache)
    again = second.data.datasets[0]._cache
    assert again is not None and again.folder == tars.folder and not list(again.folder.glob(".*.partial"))
    assert again._cached and not here[0].exists() and not corrupt.exists()  # the other shards are used again
    assert {path.stem for path in again.folder.glob("*.parquet")} == {again.path(shard).stem for shard in again._cached}
    assert keys(second, 16 * STEPS, STEPS, monitor.measure) == expected[STEPS:]
    monitor.stopped = True
    monitor.thread.join()
    assert 0 < monitor.largest <= round(bound * GB)
    sidecars = [path for path in cloud.requests[before:] if path.endswith(".parquet")]
    assert 0 < len(sidecars) <= 24 + 5  # with their tars, and again after a failed request
    # Each rank reads its own samples through its own cache.
    halves = [keys(loader(train, cache, RankBatch(rank, 2, 16)), 0, 3) for rank in range(2)]
    for step in range(3):
        assert [halves[0][step], halves[1][step]] == [expected[step][0::2], expected[step][1::2]]


def test_run_on_fewer_ranks_removes_the_caches_of_ended_ranks(
    make_dataset: Maker, tmp_path: Path, cloud: Proxy, s3: int
) -> None:
    folder = make_dataset("d", [20] * 4)
    train, cache = upload(s3, folder, "fewer"), CacheConfig(folder=str(tmp_path / "cache"))
    ranks = [loader(train, cache, RankBatch(rank, 3, 15)) for rank in range(3)]
    made = [rank.data.datasets[0]._cache for rank in ranks]
    for rank in ranks:
        keys(rank, 0, 2)
    kept = [sorted(tars.folder.glob("*.tar")) for tars in made if tars is not None]
    assert all(kept) and len({path.parent for rank in kept for path in rank}) == 3
    for tars in made[::2]:  # ranks 0 and 2 end; rank 1 continues, as another run on this machine would
        assert tars is not None
        tars._lock.close()
    keys(loader(train, cache), 0, 2)
    assert all(path.exists() for path in [*kept[0], *kept[1]]) and not any(path.exists() for path in kept[2])


def test_killed_run_with_failing_requests_writes_the_same_ledger_as_a_local_run(
    make_dataset: Maker, tmp_path: Path, cloud: Proxy, s3: int, small: Any
) -> None:
    """Killed twice, with the smallest possible cache. `make soak`: 200 ms per request, 1 % fail, three epochs."""
    sizes, epochs, kill_at = ([50] * 59 + [17], 3, (150, 390)) if SOAK else ([20] * 23 + [7], 1, (8, 19))
    cloud.latency, cloud.failing = (0.2, 0.01) if SOAK else (LATENCY, 0.05)
    folder, run, root = make_dataset("d", sizes), tmp_path / "run", tmp_path / "cache"
    window, need = (148, 16) if SOAK else (38, 12)
    steps = -(-epochs * sum(sizes) // 16)
    arguments = ["data.streams=4", f"data.window={window}", "seed=5"]
    arguments += [f"schedule.samples={steps * 16}", "runtime.save_every=6"]
    remote_arguments = [f"data.train={upload(s3, folder, 'killed')}", f"runtime.cache_dir={root}"]
    remote_arguments += [f"runtime.cache_gb={minimum(folder, need):.9f}", "-o", "run"]
    monitor = SizeMonitor(root)
    for lines in kill_at:
        process = subprocess.Popen(
            [sys.executable, "-m", "clipwright", "train", *small.settings, *arguments, *remote_arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_lines(run / "ledger.jsonl", lines, process)
        finally:
            process.kill()
            printed, _ = process.communicate()
            print(printed.decode())
        assert list(root.glob("*/tars-0/*.tar"))
    done = small(tmp_path, *arguments, *remote_arguments)
    monitor.stopped = True
    monitor.thread.join()
    assert "resuming at step" in done.stdout and cloud.failures > 0
    assert 0 < monitor.largest <= round(minimum(folder, need) * GB) and not list(root.glob("*/tars-1"))
    local = ledger_of(loader(folder, window=window), steps, tmp_path / "local.jsonl")
    assert (run / "ledger.jsonl").read_bytes() == local
    if SOAK:
        small(tmp_path, *arguments, f"data.train={folder}", "-o", "local")
        assert (tmp_path / "local" / "ledger.jsonl").read_bytes() == local


def ledger_of(source: Loader, steps: int, path: Path) -> bytes:
    """Returns the ledger of a run of `steps` steps."""
    file, batches = StepFile(path, 0), source.batches(0)
    size = source.rank_batch.global_batch
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        file.write(line(step, (step - 1) * size, size, batch.batch_samples, keys=False))
    batches.close()
    file.close()
    return path.read_bytes()


def test_local_manifest_may_list_remote_shards(make_dataset: Maker, tmp_path: Path, cloud: Proxy, s3: int) -> None:
    folder = make_dataset("d", [5, 5, 5])
    upload(s3, folder, "web")
    manifest = json.loads((folder / "manifest.json").read_text())
    local = Dataset(folder)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut, ignore=shutil.ignore_patterns("*.tar"))
    for shard in manifest["shards"]:
        shard["tar"] = f"http://127.0.0.1:{cloud.port}/bucket/web/{shard['tar']}"
    (cut / "manifest.json").write_text(json.dumps(manifest))
    cache = CacheConfig(folder=str(tmp_path / "cache"), gb=minimum(folder, 1))  # room for one shard at a time
    data = Dataset(cut, cache=cache)
    assert data.fingerprint == local.fingerprint
    for shard, row in itertools.product(range(3), range(5)):
        assert data.image(shard, row) == local.image(shard, row)


def refused(make: Callable[[], Any]) -> ClipwrightError:
    with pytest.raises(ClipwrightError) as caught:
        make()
    assert SECRET not in str(caught.value)
    return caught.value


def test_refused_addresses_caches_and_files(
    make_dataset: Maker, tmp_path: Path, cloud: Proxy, s3: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset("d", [20] * 24)
    train = upload(s3, folder, "refused")
    root = str(tmp_path / "cache")
    small = CacheConfig(folder=root, gb=minimum(folder, 12) * 0.99)
    error = refused(lambda: loader(train, small))
    assert error.code == "E_CACHE" and "12 shards" in error.found
    stated = float(error.fix.split("cache_gb=")[1].split()[0])
    assert minimum(folder, 12) <= stated <= minimum(folder, 12) + 2e-6
    loader(train, CacheConfig(folder=root, gb=stated))
    # If the window covers the dataset, all shards must fit; one of two ranks needs half of them.
    assert "24 shards" in refused(lambda: loader(train, small, window=4096)).found
    assert "6 shards" in refused(lambda: loader(train, CacheConfig(folder=root, gb=1e-9), RankBatch(0, 2, 16))).found
    made = DataConfig(train=train, streams=4, window=40)
    for gb, status in ((small.gb, "FAIL"), (stated, "ok")):
        runtime = RuntimeConfig(cache_dir=root, cache_gb=gb)
        config = SimpleNamespace(seed=0, runtime=runtime)
        context: Any = SimpleNamespace(dataset=Datasets(made, small), config=config, world=SimpleNamespace(size=1))
        found = shard_cache(context)
        assert found.status == status and f"{stated:g} GB per process: 12 shards" in found.need
    cloud.failing = 0.0
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01, 0.01))
    cloud.corrupt_suffix = "d-000003.tar"
    data = Dataset(train, cache=CacheConfig(folder=root, gb=1))
    error = refused(lambda: data.image(3, 0))
    assert error.code == "E_DATA_HASH" and error.where == f"{train}/d-000003.tar"
    cloud.corrupt_suffix = ".parquet"
    elsewhere = CacheConfig(folder=root + "2", gb=1)
    assert refused(lambda: Dataset(train, cache=elsewhere).rows(0)).code == "E_DATA_HASH"
    assert not list((tmp_path / "cache2").glob("*/tars-*/*.*"))
    cloud.corrupt_suffix = ""
    before = len(cloud.requests)
    assert refused(lambda: Dataset("s3://bucket/absent", cache=elsewhere)).code == "E_REMOTE"
    assert len(cloud.requests) == before + 1  # a missing file is not requested again
    cloud.failing = 2.0
    error = refused(lambda: Dataset(train, cache=elsewhere))
    assert error.code == "E_REMOTE" and len(cloud.requests) == before + 4 and "credentials" in error.fix
    for address in ("ftp://host/x", f"https://user:{SECRET}@host/x", f"https://host/x?sig={SECRET}"):
        assert refused(lambda place=address: Dataset(place, cache=elsewhere)).code == "E_REMOTE"


def test_commands_report_cache_and_address_errors(
    make_dataset: Maker, tmp_path: Path, cloud: Proxy, s3: int, cli: Any, here: Any
) -> None:
    cloud.failing = 0.0
    train = upload(s3, make_dataset("d", [20] * 24), "commands")
    arguments = (f"data.train={train}", "data.streams=4", "data.window=40", f"runtime.cache_dir={tmp_path / 'cache'}")
    small = ("schedule.global_batch=16", "image.name=vit_nano", "image.image_size=32", "runtime.threads=1")
    error = here(tmp_path, "train", *arguments, *small, "runtime.cache_gb=0.00001", "-o", "run", code=2).error
    assert "E_CACHE" in error and "12 shards" in error and "runtime.cache_gb=0.00" in error.split(" — ")[-1]
    assert "E_REMOTE" in here(tmp_path, "train", *small, "data.train=s3://bucket/absent", "-o", "run", code=3).error
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['obstore'] = None\n")
    bare = cli("train", *arguments, *small, "-o", "run", code=2, env={"PYTHONPATH": str(tmp_path)}).stderr
    assert "E_EXTRA" in bare and "clipwright[cloud]" in bare and SECRET not in bare
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
