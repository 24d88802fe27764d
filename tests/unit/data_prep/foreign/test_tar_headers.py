"""Tars whose headers contradict each other: refused with tar, member and offset wherever a tar is read."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.inspect.verify import verify
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.folders.dataset import Dataset

MakeImage = Callable[..., bytes]


def block(name: str, size: int, kind: bytes = b"0", size_field: bytes = b"") -> bytes:
    """A ustar header; `size_field` replaces the octal size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size_field:
        header[124:136] = size_field.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        length = len(text) + len(str(len(text) + 2))
        body += str(length).encode() + text
    return block("././@PaxHeader", len(body), kind) + padded(body)


def plain(name: str, data: bytes) -> bytes:
    return block(name, len(data)) + padded(data)


def base256(value: int) -> bytes:
    return bytes([0x80 if value >= 0 else 0xFF]) + value.to_bytes(11, "big", signed=True)


TEXT = b"words of b"
# Each makes the headers and data of the member b.txt, and is refused with these words.
CONTRADICTIONS: dict[str, tuple[bytes, str, str]] = {
    "pax states more": (pax({"size": "900"}) + plain("b.txt", TEXT), "E_TAR", "states 10 bytes, the pax header 900"),
    "pax states less": (pax({"size": "4"}) + plain("b.txt", TEXT), "E_TAR", "states 10 bytes, the pax header 4"),
    "two sizes": (pax({"size": "10"}) + pax({"size": "10"}) + plain("b.txt", TEXT), "E_TAR", "two extended headers"),
    "size twice": (
        pax({"size": "10", "comment": "x"})[:512] + padded(b"11 size=10\n11 size=11\n"),
        "E_TAR",
        "states the size twice: 10 and 11",
    ),
    "global size": (pax({"size": "10"}, b"g") + plain("b.txt", TEXT), "E_TAR", "a global header"),
    "negative": (block("b.txt", 0, size_field=base256(-512)) + padded(TEXT), "E_TAR", "negative size"),
    "beyond the end": (block("b.txt", 0, size_field=base256(10**12)) + padded(TEXT), "E_TAR_TRUNCATED", "b.txt"),
    "pax beyond the end": (
        pax({"size": str(10**12)}) + block("b.txt", 0) + padded(TEXT),
        "E_TAR_TRUNCATED",
        "b.txt",
    ),
    "a folder with data": (block("b/", 512, b"5") + padded(TEXT) + plain("b.txt", TEXT), "E_TAR", "a folder of 512"),
}


def fixed_length(data: bytes) -> bytes:
    """Sets the size of an extended header that was written by hand."""
    body = data[512:].rstrip(b"\0")
    return block("././@PaxHeader", len(body), b"x") + padded(body)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradicting_headers_are_refused(tmp_path: Path, make_image: MakeImage, cli: Any, name: str) -> None:
    member, code, words = CONTRADICTIONS[name]
    if name == "size twice":
        member = fixed_length(member) + plain("b.txt", TEXT)
    first = plain("a.jpg", make_image(0)) + plain("a.txt", b"words of a")
    image = plain("b.jpg", make_image(1))
    last = plain("c.jpg", make_image(2)) + plain("c.txt", b"words of c")
    (tmp_path / "tars").mkdir()
    tar = tmp_path / "tars" / "0.tar"
    tar.write_bytes(first + image + member + last + bytes(1024))
    result = cli.json("data", "index", "tars")
    assert result["written"] == 1 and result["rejects"] == {code: 1}
    [reject] = pq.read_table(tmp_path / "tars" / "rejects.parquet").to_pylist()
    assert reject["source"] == "0.tar" and words in reject["detail"] and "group b at offset" in reject["detail"]
    assert str(len(first)) in reject["detail"]
    # A dataset of ours over such a tar: hashes that match do not make it valid.
    sidecar = tmp_path / "tars" / "0.sidecar.parquet"
    table = pq.read_table(sidecar)
    row = {**table.to_pylist()[0], "key": hashlib.sha256(make_image(2)).hexdigest()[:32], "row": 1}
    row |= {"sha256": hashlib.sha256(make_image(2)).hexdigest(), "size": len(make_image(2))}
    row["offset"] = tar.read_bytes().index(make_image(2))
    pq.write_table(type(table).from_pylist([table.to_pylist()[0], row], schema=table.schema), sidecar)
    manifest = json.loads((tmp_path / "tars" / "manifest.json").read_text())
    manifest["shards"][0] |= {"sidecar_sha256": file_sha256(sidecar), "samples": 2}
    manifest["shards"][0]["sidecar_bytes"] = sidecar.stat().st_size
    (tmp_path / "tars" / "manifest.json").write_text(json.dumps(manifest))
    faults = [fault["text"] for fault in verify(tmp_path / "tars", quiet=True)["faults"] if fault["file"] == "0.tar"]
    assert len(faults) == 1 and words in faults[0] and row["key"] in faults[0]


def test_equal_sizes_and_large_members_are_no_contradiction(tmp_path: Path, make_image: MakeImage, cli: Any) -> None:
    image = make_image(0)
    size_field = base256(len(image))
    data = pax({"size": str(len(image)), "comment": "x"}) + block("a.jpg", 0, size_field=size_field) + padded(image)
    data += pax({"comment": "y"}, b"g") + pax({"path": "a.txt"}) + plain("b.txt", TEXT)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(data + bytes(1024))
    assert tarfile.open(fileobj=io.BytesIO(data)).getnames() == ["a.jpg", "a.txt"]  # noqa: SIM115
    assert cli.json("data", "index", "tars")["written"] == 1 and verify(tmp_path / "tars", quiet=True)["ok"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": -512}, "at offset -512"),
        ({"size": 10**9}, "the tar has"),
        ({"size": -1}, "has -1 bytes"),
        ({"offset": 600}, "it overlaps"),
    ],
)
def test_the_reader_refuses_places_that_no_tar_has(dataset: Path, change: dict[str, int], words: str) -> None:
    sidecar = dataset / "data-000000.parquet"
    table = pq.read_table(sidecar)
    rows = table.to_pylist()
    rows[1] |= change
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), sidecar)
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["shards"][0] |= {"sidecar_sha256": file_sha256(sidecar), "sidecar_bytes": sidecar.stat().st_size}
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ClipwrightError) as caught:
        Dataset(dataset).image(0, 1)
    assert caught.value.code == "E_DATA_HASH" and words in caught.value.found and "data-000000.tar" in str(caught.value)
    assert rows[1]["key"] in caught.value.found or words == "it overlaps"
