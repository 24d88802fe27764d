"""`data index`: foreign tars become a dataset; every malformed group is rejected with its reason."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.build.engines import WorkerRuntime
from clipwright.data_prep.foreign import groups
from clipwright.data_prep.foreign.index import ForeignIndexConfig, index
from clipwright.data_prep.foreign.tars import HashingReader, TarError, members
from clipwright.data_prep.inspect.stats import stats
from clipwright.data_prep.inspect.verify import verify
from clipwright.data_prep.inspect.view import ViewConfig, view
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import DatasetFingerprint, write_manifest
from clipwright.pipeline.folders.schema import SIDECAR_SCHEMA

MakeImage = Callable[..., bytes]


def info(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    tar_info = tarfile.TarInfo(name)
    tar_info.size, tar_info.type, tar_info.linkname = len(data), kind, link
    return tar_info, data


def write_tar(path: Path, entries: list[Any], format: int = tarfile.PAX_FORMAT) -> Path:
    """`entries`: (name, bytes), or (TarInfo, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in entries:
            tar_info = info(name, data)[0] if isinstance(name, str) else name
            tar.addfile(tar_info, io.BytesIO(data))
    return path


def pair(key: str, image: bytes, caption: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]


def sidecar_rows(folder: Path) -> list[dict[str, Any]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [row for shard in manifest["shards"] for row in pq.read_table(folder / shard["sidecar"]).to_pylist()]


def rejects(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "rejects.parquet").to_pylist()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "status.json"}


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return index(ForeignIndexConfig(data=str(folder), **options), quiet=True).manifest


def check_conservation(folder: Path) -> None:
    manifest, rows = json.loads((folder / "manifest.json").read_text()), sidecar_rows(folder)
    assert manifest["rows_in"] == manifest["written"] + manifest["merged"] + manifest["rejected"]
    assert sorted(row["row"] for row in [*rows, *rejects(folder)]) == list(range(manifest["rows_in"]))
    assert verify(folder, quiet=True)["faults"] == []


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.fixture
def tars(tmp_path: Path, make_image: MakeImage) -> Path:
    """Two tars of 5 and 4 samples as img2dataset writes them. The caption contains the number of the image."""
    folder, number = tmp_path / "tars", 0
    for name, count in (("00000", 5), ("00001", 4)):
        entries: list[tuple[str, bytes]] = []
        for _ in range(count):
            metadata = {"url": f"https://x.test/{number}", "caption": f"picture {number}", "similarity": 0.3}
            image = make_image(number)
            entries += [
                *pair(f"{number:09d}", image, f"picture {number}"),
                (f"{number:09d}.json", json.dumps(metadata).encode()),
            ]
            number += 1
        write_tar(folder / f"{name}.tar", entries)
        (folder / f"{name}.parquet").write_bytes(b"img2dataset's own table")
        (folder / f"{name}_stats.json").write_text("{}")
    return folder


def test_index_img2dataset_tars(tars: Path, tmp_path: Path, cli: Any, make_image: MakeImage) -> None:
    before = content(tars)
    result = cli.json("data", "index", "tars")
    assert (result["rows_in"], result["written"], result["rejected"], result["ignored"]) == (9, 9, 0, 0)
    after = content(tars)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {
        "manifest.json",
        "rejects.parquet",
        "00000.sidecar.parquet",
        "00001.sidecar.parquet",
    }
    assert json.loads((tars / "status.json").read_text())["verb"] == "data index"
    for number, row in enumerate(sidecar_rows(tars)):
        image = make_image(number)
        assert row["key"] == hashlib.sha256(image).hexdigest()[:32] and row["source_key"] == f"{number:09d}"
        assert row["captions"] == [f"picture {number}"] and (row["width"], row["height"]) == (48, 36)
        assert (row["url"], row["similarity"]) == (f"https://x.test/{number}", 0.3) and "caption" not in row
        tar = (tars / row["source"]).read_bytes()
        assert tar[row["offset"] : row["offset"] + row["size"]] == image
    check_conservation(tars)
    # The inspection commands and the dataset reader accept the folder.
    assert stats(tars, quiet=True)["samples"] == 9
    shown = view(ViewConfig(data=str(tars)), tmp_path / "page", quiet=True)
    assert shown["kept"] == 9
    data = Dataset(tars)
    assert data.samples == 9 and data.image(1, 3) == make_image(8)
    # A second run does nothing. Elsewhere, with more workers, the bytes are the same.
    assert index(ForeignIndexConfig(data=str(tars)), quiet=True).already_finished
    other = tmp_path / "elsewhere"
    other.mkdir()
    for tar in tars.glob("*.tar"):
        shutil.copy(tar, other)
    run(other, runtime=WorkerRuntime(workers=2))
    assert content(other).items() <= after.items()


def test_json_members_become_typed_columns(tmp_path: Path, make_image: MakeImage) -> None:
    deep = {"b": [1, {"c": None}], "a": "\ud800"}
    metadata: list[Any] = [
        {"id": 1, "score": 1, "tags": ["x", "é"], "key": "k0", "mixed": 1, "deep": deep, "flag": True, "wide": 2**60},
        {"id": 2, "score": 0.5, "tags": [], "mixed": "x", "deep": [[1]], "none": None, "wide": 7, "row": 1.5},
        None,
        {"id": 3, "score": float("nan"), "tags": None, "mixed": [1], "huge": 2**63, "caption": "mine", "ids": [1, 2.5]},
        [1, 2],
        {"id": 2**53 + 2, "more": "only here", "part": 2**53 + 1, "row": -1},
        {"part": 0.5, "dates": ["2026", None, 7]},
    ]
    entries = [pair(str(n), make_image(n), f"picture {n}") for n in range(len(metadata))]
    for n, one in enumerate(metadata):
        entries[n] += [] if one is None else [(f"{n}.json", json.dumps(one).encode())]
    write_tar(tmp_path / "t" / "a.tar", [*itertools.chain(*entries[:3])])
    write_tar(tmp_path / "t" / "b.tar", [*itertools.chain(*entries[3:])])
    run(tmp_path / "t", runtime=WorkerRuntime(workers=2))
    check_conservation(tmp_path / "t")
    schemas = [pq.read_schema(tmp_path / "t" / f"{name}.sidecar.parquet") for name in "ab"]
    assert schemas[0].equals(schemas[1])
    types = {field.name: str(field.type) for field in schemas[0] if field.name not in SIDECAR_SCHEMA.names}
    columns = {
        "id": ("int64", [1, 2, None, 3, None, 2**53 + 2, None]),
        "score": ("double", [1.0, 0.5, None, None, None, None, None]),
        "tags": ("list<element: string>", [["x", "é"], [], None, None, None, None, None]),
        "input_key": ("string", ["k0", None, None, None, None, None, None]),
        "mixed": ("string", ["1", "x", None, "[1]", None, None, None]),
        "deep": ("string", ['{"a":"?","b":[1,{"c":null}]}', "[[1]]", None, None, None, None, None]),
        "flag": ("bool", [True, None, None, None, None, None, None]),
        "wide": ("int64", [2**60, 7, None, None, None, None, None]),
        "none": ("string", [None] * 7),
        "input_row": ("double", [None, 1.5, None, None, None, -1.0, None]),
        "huge": ("string", [None, None, None, str(2**63), None, None, None]),
        "ids": ("list<element: double>", [None, None, None, [1.0, 2.5], None, None, None]),
        "more": ("string", [None, None, None, None, None, "only here", None]),
        "part": ("string", [None, None, None, None, None, str(2**53 + 1), "0.5"]),  # no float64 represents both
        "dates": ("list<element: string>", [None, None, None, None, None, None, ["2026", None, "7"]]),
    }
    assert types == {name: kind for name, (kind, _) in columns.items()}
    rows = sidecar_rows(tmp_path / "t")
    for name, (_, values) in columns.items():
        assert [row[name] for row in rows] == values, name
    assert [row["captions"] for row in rows] == [[f"picture {n}"] for n in range(7)]
    assert Dataset(tmp_path / "t", negatives="tags").rows(0).negatives is not None
    # A different name in every sample: too many for columns.
    many = [[*pair(str(n), make_image(n), "x"), (f"{n}.json", json.dumps({f"id{n}": n}).encode())] for n in range(300)]
    write_tar(tmp_path / "u" / "a.tar", [*itertools.chain(*many)])
    run(tmp_path / "u")
    rows = sidecar_rows(tmp_path / "u")
    assert set(rows[0]) - {*SIDECAR_SCHEMA.names} == {"json"} and rows[7]["json"] == '{"id7":7}'


def test_dataset_reader_opens_cut_over_foreign_tars(tars: Path, tmp_path: Path) -> None:
    """A cut has sidecars of selected rows in its own folder; the images stay in their tars."""
    whole, cut = run(tars), tmp_path / "cut"
    cut.mkdir()
    fingerprint, kept = DatasetFingerprint(), 0
    for shard in whole["shards"]:
        table = pq.read_table(tars / shard["sidecar"])
        table = table.filter(pa.array([row % 2 == 0 for row in table["row"].to_pylist()]))
        pq.write_table(table, cut / shard["sidecar"])
        for row in table.to_pylist():
            fingerprint.sample(row["key"], row["sha256"], row["captions"])
        fingerprint.shard(table.num_rows)
        shard["sidecar_bytes"] = (cut / shard["sidecar"]).stat().st_size
        shard |= {"sidecar_sha256": file_sha256(cut / shard["sidecar"]), "samples": table.num_rows}
        shard["tar"] = f"../tars/{shard['tar']}"
        kept += table.num_rows
    write_manifest(cut, "dataset", fingerprint.hexdigest(), {"shards": whole["shards"]})
    data, original = Dataset(cut), Dataset(tars)
    images = [data.image(shard, row) for shard, size in enumerate(data.sizes) for row in range(size)]
    every = [original.image(shard, row) for shard, size in enumerate(original.sizes) for row in range(size)]
    assert images == every[::2] and data.samples == kept == 5 and data.fingerprint != original.fingerprint
    assert data.sidecar(1)["url"].to_pylist() == ["https://x.test/6", "https://x.test/8"]
    (tars / "00001.tar").unlink()
    with pytest.raises(ClipwrightError) as caught:
        Dataset(cut)
    assert caught.value.code == "E_DATA_HASH" and "../tars/00001.tar" in str(caught.value)


def bad_groups(make_image: MakeImage, canary: Path) -> dict[str, tuple[list[Any], str]]:
    """Malformed groups, each with the expected reason for its rejection."""
    image, text = make_image(1000), b"a caption"
    return {
        "noimage": ([("noimage.txt", text)], "E_PAIR_IMAGE"),
        "nocaption": ([("nocaption.jpg", image)], "E_CAP_EMPTY"),
        "blank": ([("blank.jpg", image), ("blank.txt", b" \n")], "E_CAP_EMPTY"),
        "latin": ([("latin.jpg", image), ("latin.txt", b"caf\xe9")], "E_CAP_ENCODING"),
        "torn": ([("torn.jpg", image), ("torn.json", b"{")], "E_CAP_FILE"),
        "deep": ([("deep.jpg", image), ("deep.json", b"[" * 100_000)], "E_CAP_FILE"),
        "number": ([("number.jpg", image), ("number.json", b'{"caption": {"a": 1}}')], "E_CAP_FILE"),
        "twoimages": ([("twoimages.jpg", image), ("twoimages.png", image), ("twoimages.txt", text)], "E_PAIR_IMAGE"),
        "twice": ([("twice.jpg", image), ("twice.txt", text), ("twice.jpg", make_image(1001))], "E_PAIR_DUPLICATE"),
        "dots": ([("dots.b.jpg", image), ("dots.b.txt", text)], "E_PAIR_KEY"),
        "dots2": ([*pair("dots2", image, "x"), *pair("dots2.b", make_image(1002), "y")], "E_PAIR_KEY"),
        "cut": ([("broken.jpg", image[:300]), ("broken.txt", text)], "E_IMG_TRUNCATED"),
        "html": ([("html.jpg", b"<html>"), ("html.txt", text)], "E_IMG_FORMAT"),
        "empty": ([("empty.jpg", b""), ("empty.txt", text)], "E_IMG_EMPTY"),
        "pickle": ([("pickle.pkl", pickle.dumps(Bomb(canary))), ("pickle.txt", text)], "E_PAIR_IMAGE"),
        "up": ([("../up.jpg", image), ("../up.txt", text)], "E_TAR_MEMBER"),
        "root": ([("/root.jpg", image), ("/root.txt", text)], "E_TAR_MEMBER"),
        "bell": ([("be\all.jpg", image), ("be\all.txt", text)], "E_TAR_MEMBER"),
        "link": ([info("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), ("link.txt", text)], "E_TAR_MEMBER"),
        "hard": ([info("hard.jpg", kind=tarfile.LNKTYPE, link="good0.jpg"), ("hard.txt", text)], "E_TAR_MEMBER"),
        "device": ([info("device.jpg", kind=tarfile.CHRTYPE), ("device.txt", text)], "E_TAR_MEMBER"),
        "pipe": ([info("pipe.jpg", kind=tarfile.FIFOTYPE), ("pipe.txt", text)], "E_TAR_MEMBER"),
        "bare": ([info("bare", kind=tarfile.SYMTYPE, link="/")], "E_TAR_MEMBER"),
        "longcut": ([("k" * 120, image)], "E_PAIR_KEY"),
        "overlong": ([(f"{'k' * 1100}.jpg", image), (f"{'k' * 1100}.txt", text)], "E_TAR_MEMBER"),
    }


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_malformed_groups_are_rejected_with_their_reason(
    tmp_path: Path, make_image: MakeImage, format: int, cli: Any
) -> None:
    canary = tmp_path / "canary"
    bad = bad_groups(make_image, canary)
    entries: list[Any] = []
    for number, (members_of_it, _) in enumerate(bad.values()):
        entries += [*pair(f"good{number}", make_image(number), f"good {number}"), *members_of_it]
    write_tar(tmp_path / "t" / "a.tar", entries, format)
    manifest = run(tmp_path / "t")
    reasons = [reason for _, reason in bad.values()]
    assert [row["reason"] for row in rejects(tmp_path / "t")] == reasons
    assert [row["row"] for row in rejects(tmp_path / "t")] == list(range(1, 2 * len(bad), 2))
    assert all(row["source"] == "a.tar" and "offset" in row["detail"] for row in rejects(tmp_path / "t"))
    assert manifest["written"] == len(bad)
    assert cli.json("data", "index", "t")["rejects"].keys() == set(reasons)
    assert [row["captions"] for row in sidecar_rows(tmp_path / "t")] == [[f"good {n}"] for n in range(len(bad))]
    check_conservation(tmp_path / "t")
    assert not canary.exists() and not (tmp_path / "up.jpg").exists()


def test_split_groups_and_reused_keys_are_rejected(tmp_path: Path, make_image: MakeImage, cli: Any) -> None:
    one, two, three, four = (make_image(n) for n in range(4))
    entries = [
        *[("a.jpg", one), ("b.jpg", two), ("a.txt", b"of a"), ("b.txt", b"of b")],
        *pair("c", three, "fine"),
        *[*pair("d", three, "first d"), *pair("e", four, "fine too"), *pair("d", one, "second d")],
    ]
    write_tar(tmp_path / "t" / "a.tar", entries)
    run(tmp_path / "t")
    assert [row["captions"] for row in sidecar_rows(tmp_path / "t")] == [["fine"], ["fine too"]]
    assert [row["reason"] for row in rejects(tmp_path / "t")] == ["E_PAIR_DUPLICATE"] * 6
    assert cli.json("data", "index", "t")["rejects"] == {"E_PAIR_DUPLICATE": 6}
    check_conservation(tmp_path / "t")
    # The same key in two tars means two samples.
    write_tar(tmp_path / "u" / "a.tar", pair("0", one, "one"))
    write_tar(tmp_path / "u" / "b.tar", pair("0", two, "two"))
    assert run(tmp_path / "u")["written"] == 2


def test_unusual_but_valid_tars_are_accepted(tmp_path: Path, make_image: MakeImage) -> None:
    long = f"folder/{'n' * 150}/{'k' * 120}"
    entries = [
        info("nested", kind=tarfile.DIRTYPE),
        ("README", b"read me"),
        ("nested/._x.jpg", b"resource fork"),
        *pair("./nested/deep/x", make_image(0), "nested"),
        *[("mask.mask.png", make_image(5, format="PNG")), *pair("mask", make_image(1), "with a mask")],
        *[*pair(long, make_image(2), "long"), (f"{long}.cls", b"3")],
        *[("UP.JPG", make_image(3)), ("UP.TXT", "빨간 원".encode())],
        *[
            ("j.json", b'{"captions": ["one", "two", "one"], "caption": "three"}'),
            ("j.png", make_image(4, format="PNG")),
        ],
        *[("l.jpg", make_image(6)), ("l.json", b'{"caption": ["four", "five"]}')],
    ]
    for name, format in (("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT)):
        write_tar(tmp_path / name / "a.tar", entries, format)
        done = index(ForeignIndexConfig(data=str(tmp_path / name)), quiet=True)
        rows = sidecar_rows(tmp_path / name)
        assert done.ignored == 2 and not rejects(tmp_path / name)
        assert [row["source_key"] for row in rows] == ["nested/deep/x", "mask", long, "UP", "j", "l"]
        assert [row["captions"] for row in rows[2:]] == [["long"], ["빨간 원"], ["one", "two"], ["four", "five"]]
        check_conservation(tmp_path / name)


def test_truncated_and_invalid_tars_keep_their_good_samples(
    tars: Path, tmp_path: Path, make_image: MakeImage, cli: Any
) -> None:
    whole = (tars / "00000.tar").read_bytes()
    third = whole.index(b"000000002.txt")
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512  # end of the last member
    cases = {
        "1-cut": (whole[: third + 520], "E_TAR_TRUNCATED", 2),
        "2-header": (whole[: third + 100], "E_TAR_TRUNCATED", 2),
        "3-garbage": (whole[:third] + b"\xff" * 5000, "E_TAR", 2),
        "4-empty": (b"", None, 0),
        "5-zip": (b"PK\x03\x04" * 500, "E_TAR", 0),
        "6-two": (whole + whole, "E_TAR", 5),
        "7-noend": (whole[:end], None, 5),
    }
    for name, (data, reason, good) in cases.items():
        folder = tmp_path / name
        write_tar(folder / "z.tar", pair("z", make_image(100), "z"))
        (folder / "a.tar").write_bytes(data)
        assert run(folder)["written"] == good + 1, name
        assert [row["reason"] for row in rejects(folder)] == ([reason] if reason else []), name
        check_conservation(folder)
    assert cli.json("data", "index", "1-cut")["rejects"] == {"E_TAR_TRUNCATED": 1}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.tar").write_bytes(b"PK\x03\x04" * 500)
    error = cli.error("data", "index", "none", code=3)
    assert "E_PREP_EMPTY" in error and "E_TAR 1" in error and "a.tar" in error and "clipwright prep" in error
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["a.tar"]


def test_hostile_headers_fail_fast_in_bounded_memory(tmp_path: Path) -> None:
    def read(data: bytes) -> TarError:
        with pytest.raises(TarError) as caught:
            list(members(HashingReader(io.BytesIO(data), len(data))))
        return caught.value

    def header(kind: bytes, size: int) -> bytes:
        tar_info = tarfile.TarInfo("a.jpg")
        tar_info.type, tar_info.size = kind, size
        return tar_info.tobuf(tarfile.GNU_FORMAT)

    assert "extended header of" in read(header(tarfile.XHDTYPE, 5 << 30)).args[1]
    assert "extended header of" in read(header(tarfile.GNUTYPE_LONGNAME, 5 << 30)).args[1]
    assert read(header(tarfile.REGTYPE, 5 << 30)).args[0] == "E_TAR_TRUNCATED"
    assert "negative" in read(header(tarfile.REGTYPE, -5)).args[1]
    for record in (b"-9 size=-512\n", b"999 path=x\n", b"13 size=-512\n", b"0 =\n", b"path\n"):
        assert read(header(tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")).args[0] == "E_TAR", record
    sparse = b"22 GNU.sparse.major=1\n"
    data = header(tarfile.XHDTYPE, len(sparse)) + sparse.ljust(512, b"\0") + header(tarfile.REGTYPE, 0)
    (found,) = [member for member, _ in members(HashingReader(io.BytesIO(data), len(data)))]
    assert found.refused == "a sparse file"


@pytest.mark.parametrize("duplicates", ["merge", "first", "keep"])
def test_duplicate_images_across_tars(tmp_path: Path, make_image: MakeImage, duplicates: str) -> None:
    same = make_image(0)
    write_tar(tmp_path / "t" / "a.tar", [*pair("a", same, "one"), *pair("b", make_image(1), "other")])
    write_tar(tmp_path / "t" / "b.tar", [*pair("c", same, "two"), ("c.json", b'{"n": 3}'), *pair("d", same, "one")])
    manifest = run(tmp_path / "t", duplicates=duplicates)
    rows, left = sidecar_rows(tmp_path / "t"), rejects(tmp_path / "t")
    captions = [row["captions"] for row in rows]
    if duplicates == "keep":
        assert captions == [["one"], ["other"], ["two"], ["one"]] and not left
        assert [row["key"][32:] for row in rows] == ["", "", "_1", "_2"]
    else:
        assert captions == [["one", "two"] if duplicates == "merge" else ["one"], ["other"]]
        assert [row["reason"] for row in left] == ["merged" if duplicates == "merge" else "duplicate"] * 2
        assert [(row["row"], row["kept_row"], row["kept_key"]) for row in left] == [
            (2, 0, rows[0]["key"]),
            (3, 0, rows[0]["key"]),
        ]
        assert json.loads(left[0]["record"]) == {"captions": ["two"], "source_key": "c", "columns": {"n": 3}}
        assert len(manifest["shards"]) == 1 and rows[0]["n"] is None
    check_conservation(tmp_path / "t")


def test_interrupted_index_leaves_no_final_file_and_resumes(
    tars: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(tars, tmp_path / "clean")
    run(tmp_path / "clean")
    before, real, read = content(tars), groups._TarScan.read, []

    def stop(self: Any, reader: Any) -> None:
        if self.tar == "00001.tar" and len(read) == 1:
            read.append("interrupted")
            raise KeyboardInterrupt
        read.append(self.tar)
        real(self, reader)

    monkeypatch.setattr(groups._TarScan, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tars, runtime=WorkerRuntime(workers=1))
    assert content(tars) == before
    run(tars)
    assert read == ["00000.tar", "interrupted", "00001.tar"]
    assert content(tars) == content(tmp_path / "clean") and not (tars / ".prep").exists()


def test_index_refuses_unsuitable_folders(tars: Path, tmp_path: Path, cli: Any, dataset: Path) -> None:
    def refused(folder: Path, **options: Any) -> str:
        with pytest.raises(ClipwrightError) as caught:
            run(folder, **options)
        return str(caught.value)

    assert "E_INPUT" in refused(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    assert "E_PREP_EMPTY" in refused(tmp_path / "bare") and "an empty folder" in refused(tmp_path / "bare")
    assert "E_OUTPUT" in (line := refused(dataset)) and "clipwright prep" in line
    (tars / "rejects.parquet").write_bytes(b"mine")
    assert "E_OUTPUT" in (line := refused(tars)) and "rejects.parquet" in line
    (tars / "rejects.parquet").unlink()
    run(tars)
    assert "E_RESUME" in refused(tars, duplicates="first")
    shutil.copy(tars / "00001.tar", tars / "00002.tar")
    assert "E_RESUME" in (line := refused(tars)) and "--fresh" in line
    index(ForeignIndexConfig(data=str(tars), duplicates="first"), fresh=True, quiet=True)
    assert [row["reason"] for row in rejects(tars)] == ["duplicate"] * 4
    (tars / "00001.tar").write_bytes(b"")
    assert "E_DATA_HASH" in refused(tars, duplicates="first")


def test_verify_reports_changed_image_in_foreign_tar(tars: Path) -> None:
    run(tars)
    row = sidecar_rows(tars)[6]
    tar = bytearray((tars / "00001.tar").read_bytes())
    tar[row["offset"] + 40] ^= 1
    (tars / "00001.tar").write_bytes(tar)
    (fault,) = verify(tars, quiet=True)["faults"]
    assert (fault["file"], fault["key"], fault["offset"]) == ("00001.tar", row["key"], row["offset"])


@pytest.mark.parametrize("text", ["lines", "whole"])
def test_text_members_and_text_files_follow_one_rule(
    tmp_path: Path, make_image: MakeImage, cli: Any, text: str
) -> None:
    """Case by case, a folder and a tar of the same files give the same captions."""
    caption = json.dumps({"caption": "in the JSON"}).encode()
    files: dict[str, bytes] = {
        "s0.txt": "\ufefffirst\r\n\n second \r third\n".encode(),
        "s1.jpg.txt": b"beside the whole name",
        "s2.caption": b"a\nb",
        "s3.en.txt": b"english",
        "s3.ko.txt": "빨간 원".encode(),
        "s4.json": json.dumps({"text": "under text", "blip_caption": "a column"}).encode(),
        "s5.json": json.dumps({"captions": ["one", "two"]}).encode(),
        "s5.txt": b"one",
        "s6.json": caption,
        "s6.txt": b"words",
        "s7.txt": b"w\0o\0r\0d\0",
        "s7.json": caption,
        "s8.txt": b"caf\xe9",
    }
    names = sorted([*files, *(f"s{n}.jpg" for n in range(9))])
    data = {name: files.get(name) or make_image(int(name[1])) for name in names}
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).write_bytes(data[name])
    write_tar(tmp_path / "tars" / "0.tar", [(name, data[name]) for name in names])
    cli("prep", "folder", "source.path=folder", "-o", "out", f"source.text={text}")
    cli("data", "index", "tars", f"text={text}")
    rows, ours = sidecar_rows(tmp_path / "tars"), sidecar_rows(tmp_path / "out")
    for name in ("captions", "blip_caption"):
        assert [row[name] for row in rows] == [row[name] for row in ours], name
    assert [row["captions"] for row in rows] == [
        ["first", "second", "third"] if text == "lines" else ["first second third"],
        ["beside the whole name"],
        ["a", "b"] if text == "lines" else ["a b"],
        ["english", "빨간 원"],
        ["under text"],
        ["one", "two"],
        ["words"],
        ["in the JSON"],
    ]
    for folder in ("tars", "out"):
        [reject] = rejects(tmp_path / folder)
        assert reject["reason"] == "E_CAP_ENCODING" and "s8.txt is not utf-8" in reject["detail"]
        assert "encoding=latin-1" in reject["detail"]
        assert json.loads((tmp_path / folder / "manifest.json").read_text())["captions_dropped"] == 1  # s7.txt
    check_conservation(tmp_path / "tars")


def class_tar(path: Path, labels: list[bytes], make_image: MakeImage) -> None:
    members = [[(f"s{n}.jpg", make_image(n)), (f"s{n}.cls", label)] for n, label in enumerate(labels)]
    write_tar(path, [*itertools.chain(*members)])


def test_class_tars_become_a_labeled_set(tmp_path: Path, make_image: MakeImage, cli: Any) -> None:
    """As CLIP_benchmark and open_clip write them: classnames.txt above the folder of the split."""
    from clipwright.eval.labeled import open_labeled
    from clipwright.eval.zeroshot import make_task

    class_tar(tmp_path / "set" / "test" / "0.tar", [b"1", b"0\n", b"2", b"1", b"x" * 300], make_image)
    (tmp_path / "set" / "classnames.txt").write_text("cat\ndog\n  sea lion \n")
    result = cli.json("data", "index", "set/test")
    assert (result["written"], result["rejects"]) == (4, {"E_PAIR_LABEL": 1})
    assert result["notes"] == ["class labels 0 to 2 in the column label; class names from classnames.txt"]
    rows = sidecar_rows(tmp_path / "set" / "test")
    assert [row["label"] for row in rows] == [1, 0, 2, 1] and all(row["captions"] == [] for row in rows)
    assert [row["class_name"] for row in rows] == ["dog", "cat", "sea lion", "dog"]
    check_conservation(tmp_path / "set" / "test")
    labeled = open_labeled(tmp_path / "set" / "test")
    task = make_task(labeled, None, None, {})
    assert [task.names[label] for label in task.labels] == ["dog", "cat", "sea lion", "dog"]
    # Without classnames.txt there are only numbers; with names as members, only names.
    class_tar(tmp_path / "numbers" / "0.tar", [b"1", b"0"], make_image)
    assert "no classnames.txt" in cli("data", "index", "numbers").stdout
    assert [row["label"] for row in sidecar_rows(tmp_path / "numbers")] == [1, 0]
    class_tar(tmp_path / "words" / "0.tar", [b"cat", "바다사자".encode()], make_image)
    run(tmp_path / "words")
    assert [row["class_name"] for row in sidecar_rows(tmp_path / "words")] == ["cat", "바다사자"]


@pytest.mark.parametrize(
    ("names", "found"),
    [("cat\ndog\n", "2 names, of the classes 0 to 1; the labels are 1 to 2"), ("a\n\nb\n", "line 2 is empty")],
)
def test_class_names_that_do_not_fit_are_refused(
    tmp_path: Path, make_image: MakeImage, cli: Any, names: str, found: str
) -> None:
    class_tar(tmp_path / "t" / "0.tar", [b"1", b"2"], make_image)
    (tmp_path / "t" / "classnames.txt").write_text(names)
    error = cli.error("data", "index", "t", code=3)
    assert (
        error.startswith("error[E_CLASSES]") and "classnames.txt" in error and found in error and "line k + 1" in error
    )
    assert not (tmp_path / "t" / "manifest.json").exists()
