"""Evaluation and embedding of a dataset at an https:// address, through a cache that holds two shards."""

from __future__ import annotations

import datetime
import functools
import http.server
import ipaddress
import json
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from waiting import wait_until

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkContext, EvalRuntime
from clipwright.eval.encode import dataset_images, encode_images
from clipwright.eval.labeled import open_labeled
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders import remote
from clipwright.pipeline.folders.cache import GB, CacheConfig
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.model.folder import load_model


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges of files; complete files only if `ignore_ranges` is set."""

    ignore_ranges = False

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (
            (int(requested[1]), int(requested[2])) if requested and not self.ignore_ranges else (0, len(data) - 1)
        )
        self.send_response(206 if requested and not self.ignore_ranges else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, format: str, *args: Any) -> None:
        pass


def write_certificates(folder: Path) -> tuple[Path, Path]:
    """Writes the certificate of an authority, and the certificate and key of a server; returns both paths."""
    now = datetime.datetime.now(datetime.UTC)
    root, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def make(name: str, key: ec.EllipticCurvePrivateKey, authority: bool) -> bytes:
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, "root")]
        builder = x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(authority, None), critical=True)
        if not authority:
            places = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(places), critical=False)
            use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
            builder = builder.add_extension(use, critical=False)
        return builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "root.pem").write_bytes(make("root", root, authority=True))
    (folder / "own.pem").write_bytes(make("own", own, authority=False) + own.private_bytes(*plain))
    return folder / "root.pem", folder / "own.pem"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of `tmp_path` whose certificate the environment trusts."""
    root, own = write_certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote._store.cache_clear()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_remote_dataset_gives_the_results_of_a_local_dataset(
    tmp_path: Path, web: str, make_model: Any, make_dataset: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = make_model(tmp_path / "model"), make_dataset(tmp_path / "data", 50, shard=10)
    entries = json.loads((data / "manifest.json").read_text())["shards"]
    bound = 2 * max(entry["tar_bytes"] for entry in entries) / GB
    places = {"local": str(data), "remote": f"{web}/data"}
    runtime = EvalRuntime(cache_dir=str(tmp_path / "cache"), cache_gb=bound, batch=7)
    results = {}
    for name, place in places.items():
        benchmark = BENCHMARKS.build(BENCHMARKS.preset("retrieval"))
        opened = load_model(model)
        context = BenchmarkContext("retrieval", open_model=lambda m=opened: m, data=place, runtime=runtime, quiet=True)
        outcome = benchmark.run(context)
        labeled = open_labeled(place, runtime.cache)
        images = [image.read() for image in labeled.images(np.arange(3, 50, 7))]
        results[name] = (outcome.numbers, outcome.fingerprints, labeled.name, labeled.read(["colour"]), images)
    assert results["local"] == results["remote"]
    arguments = [f"model={model}", f"data={places['remote']}", f"runtime.cache_dir={tmp_path / 'cache'}"]
    done = cli("embed", *arguments, f"runtime.cache_gb={bound:.9f}", "-o", tmp_path / "embeddings", "--quiet")
    assert done.returncode == 0, done.stderr
    rows = encode_images(load_model(model), dataset_images(Dataset(data), range(50)), batch=64, workers=1)
    [(_, unit)] = list(rows)
    np.testing.assert_allclose(np.load(tmp_path / "embeddings" / "part-00000.npy"), unit.numpy(), atol=1e-3)
    assert json.loads((tmp_path / "embeddings" / "origin.json").read_text())["data"] == places["remote"]
    folders = list((tmp_path / "cache").glob("*/tars-*"))
    cached = [sum(tar.stat().st_size for tar in folder.glob("*.tar")) for folder in folders]
    assert cached and all(0 < size <= round(bound * GB) for size in cached)
    wait_until(lambda: not any(thread.name.startswith("fetch-") for thread in threading.enumerate()))

    def refused() -> ClipwrightError:
        cache = CacheConfig(folder=str(tmp_path / "other"))
        with pytest.raises(ClipwrightError) as caught:
            Dataset(places["remote"], cache=cache).image(0, 0)
        return caught.value

    monkeypatch.setattr(Handler, "ignore_ranges", True)
    error = refused()
    assert error.code == "E_REMOTE" and "Range request not supported" in error.found
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0,))
    monkeypatch.delenv("SSL_CERT_FILE")
    remote._store.cache_clear()
    assert refused().code == "E_REMOTE"  # the certificate is not trusted
