"""Preparation end to end: bytes, offsets, foreign readers, duplicates, conservation."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipwright.pipeline import pixels
from clipwright.pipeline.folders.records import DatasetFingerprint

MakeImage, Write, Run = Callable[..., bytes], Callable[..., Path], Callable[..., Any]


def table_arguments(path: Path, *more: str) -> list[str]:
    return ["source.name=table", f"source.path={path}", "source.caption=captions", *more]


def sidecar(out: Path) -> list[dict[str, Any]]:
    manifest = json.loads((out / "manifest.json").read_text())
    return [row for shard in manifest["shards"] for row in pq.read_table(out / shard["sidecar"]).to_pylist()]


def rejects(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "rejects.parquet").to_pylist()


def files(out: Path) -> dict[str, str]:
    keep = ("status.json", "config.yaml")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir()) if p.name not in keep}


@pytest.fixture
def mixed(write_table: Write, make_image: MakeImage) -> Path:
    """30 rows in several formats: one pair of duplicates, one truncated, one without caption."""
    formats = ["JPEG", "PNG", "WEBP", "TIFF", "GIF"]
    images = [make_image(i, format=formats[i % 5]) for i in range(30)]
    images[20] = images[3]
    images[9] = images[9][:200]
    captions: list[Any] = [[f"caption {i}", f"another of {i}"] for i in range(30)]
    captions[15] = ["  ", ""]
    return write_table(images, captions, label=pa.array(range(30), pa.int16()), width=pa.array([1.5] * 30))


def test_output_bytes_do_not_depend_on_workers(mixed: Path, tmp_path: Path, run_prep: Run) -> None:
    arguments = table_arguments(mixed, "images.resize=longest", "images.size=32", "shards.samples=4")
    for workers in (1, 2, 3):
        run_prep(tmp_path / f"out{workers}", *arguments, f"runtime.workers={workers}")
    assert files(tmp_path / "out1") == files(tmp_path / "out2") == files(tmp_path / "out3")
    assert not [p.name for p in (tmp_path / "out2").rglob("*") if p.name.endswith(".partial") or ".prep" in str(p)]


def test_sidecar_offsets_match_tar_members(mixed: Path, tmp_path: Path, run_prep: Run) -> None:
    manifest = run_prep(tmp_path / "out", *table_arguments(mixed, "shards.samples=8")).manifest
    assert (manifest["rows_in"], manifest["written"], manifest["merged"], manifest["rejected"]) == (30, 27, 1, 2)
    assert manifest["rejects"] == {"E_CAP_EMPTY": 1, "E_IMG_TRUNCATED": 1}
    fingerprint = DatasetFingerprint()
    for shard in manifest["shards"]:
        tar_path, side_path = tmp_path / "out" / shard["tar"], tmp_path / "out" / shard["sidecar"]
        assert hashlib.sha256(tar_path.read_bytes()).hexdigest() == shard["tar_sha256"]
        assert hashlib.sha256(side_path.read_bytes()).hexdigest() == shard["sidecar_sha256"]
        assert tar_path.stat().st_size == shard["tar_bytes"]
        rows = pq.read_table(side_path).to_pylist()
        assert len(rows) == shard["samples"]
        with tarfile.open(tar_path) as tar:
            members = {m.name: m for m in tar}
            assert len(members) == 3 * len(rows)
            assert all((m.mtime, m.uname, m.uid, m.pax_headers) == (0, "", 0, {}) for m in members.values())
            for row in rows:
                (image,) = [
                    m for m in members.values() if m.name.startswith(row["key"]) and m.offset_data == row["offset"]
                ]
                assert image.size == row["size"] and image.name.rpartition(".")[2] in ("jpg", "png", "webp")
                data = tar_path.read_bytes()[row["offset"] : row["offset"] + row["size"]]
                assert hashlib.sha256(data).hexdigest() == row["sha256"]
                decoded = pixels.decode(data)
                assert decoded.shape[:2] == (row["height"], row["width"])
                read = {x: tar.extractfile(f"{row['key']}.{x}") for x in ("txt", "json")}
                assert read["txt"] is not None and read["txt"].read().decode() == row["captions"][0]
                assert read["json"] is not None
                metadata = json.load(read["json"])
                assert metadata["captions"] == row["captions"] and metadata["columns"]["label"] == row["label"]
                fingerprint.sample(row["key"], row["sha256"], row["captions"])
        fingerprint.shard(len(rows))
    assert fingerprint.hexdigest() == manifest["fingerprint"]


def test_user_columns_keep_their_types_and_are_renamed_on_conflict(mixed: Path, tmp_path: Path, run_prep: Run) -> None:
    manifest = run_prep(tmp_path / "out", *table_arguments(mixed)).manifest
    schema = pq.read_schema(tmp_path / "out" / manifest["shards"][0]["sidecar"])
    assert schema.field("label").type == pa.int16() and schema.field("input_width").type == pa.float64()
    assert schema.field("width").type == pa.int32() and "image" not in schema.names
    assert sidecar(tmp_path / "out")[0]["source"] == "pairs.parquet#0"


def test_webdataset_reads_the_same_samples(mixed: Path, tmp_path: Path, run_prep: Run) -> None:
    import webdataset

    out = tmp_path / "out"
    manifest = run_prep(out, *table_arguments(mixed, "shards.samples=10")).manifest
    tars = [str(out / shard["tar"]) for shard in manifest["shards"]]
    rows = sidecar(out)
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))  # pyright: ignore
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["json"]["captions"] == row["captions"] and sample["txt"] == row["captions"][0]
        decoded = next(sample[x] for x in ("jpg", "png", "webp") if x in sample)
        with Path(sample["__url__"]).open("rb") as file:
            file.seek(row["offset"])
            assert (np.asarray(decoded) == pixels.decode(file.read(row["size"]))).all()


def test_unchanged_images_are_copied_and_others_encoded(
    write_table: Write, make_image: MakeImage, tmp_path: Path, run_prep: Run
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gps = Image.Exif()
    gps.get_ifd(0x8825)[1] = "N"
    images = [
        make_image(1),
        make_image(2, format="PNG"),
        make_image(3, 200, 100),
        make_image(4, exif=exif),
        make_image(5, exif=gps),
    ]
    out = tmp_path / "out"
    arguments = table_arguments(write_table(images, [["x"]] * 5), "images.resize=longest", "images.size=64")
    run_prep(out, *arguments)
    rows = sidecar(out)
    assert [row["key"] for row in rows] == [hashlib.sha256(data).hexdigest()[:32] for data in images]
    assert [row["sha256"] == hashlib.sha256(d).hexdigest() for row, d in zip(rows, images, strict=True)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert [(row["width"], row["height"]) for row in rows] == [(48, 36), (48, 36), (64, 32), (36, 48), (48, 36)]
    tar = (out / "data-000000.tar").read_bytes()
    for row in rows[2:]:
        stored = Image.open(io.BytesIO(tar[row["offset"] : row["offset"] + row["size"]]))
        assert stored.format == "JPEG" and not dict(stored.getexif())


DUPLICATES = [(0, ["b", "a"]), (1, ["c"]), (0, ["a", "d"]), (2, ["e"]), (0, ["f"]), (2, ["e"])]


@pytest.mark.parametrize("workers", [1, 2])
def test_merge_collects_captions_of_duplicates(
    write_table: Write, make_image: MakeImage, tmp_path: Path, run_prep: Run, workers: int
) -> None:
    path = write_table([make_image(i) for i, _ in DUPLICATES], [c for _, c in DUPLICATES], label=pa.array(range(6)))
    arguments = table_arguments(path, "shards.samples=2", f"runtime.workers={workers}")
    manifest = run_prep(tmp_path / "out", *arguments).manifest
    assert (manifest["written"], manifest["merged"], manifest["rejected"], manifest["rejects"]) == (3, 3, 0, {})
    rows = sidecar(tmp_path / "out")
    assert [(r["row"], r["captions"], r["label"]) for r in rows] == [
        (0, ["b", "a", "d", "f"], 0),
        (1, ["c"], 1),
        (3, ["e"], 3),
    ]
    rejected = rejects(tmp_path / "out")
    assert [(r["row"], r["reason"], r["kept_row"]) for r in rejected] == [
        (2, "merged", 0),
        (4, "merged", 0),
        (5, "merged", 3),
    ]
    assert rejected[0]["kept_key"] == rows[0]["key"]
    assert json.loads(rejected[0]["record"]) == {"captions": ["a", "d"], "source_key": None, "columns": {"label": 2}}


def test_first_keeps_only_its_own_captions(
    write_table: Write, make_image: MakeImage, tmp_path: Path, run_prep: Run
) -> None:
    path = write_table([make_image(i) for i, _ in DUPLICATES], [c for _, c in DUPLICATES])
    manifest = run_prep(tmp_path / "out", *table_arguments(path, "duplicates=first")).manifest
    assert (manifest["written"], manifest["merged"], manifest["rejected"]) == (3, 0, 3)
    assert manifest["rejects"] == {"duplicate": 3}
    assert [r["captions"] for r in sidecar(tmp_path / "out")] == [["b", "a"], ["c"], ["e"]]


def test_keep_numbers_duplicate_keys(write_table: Write, make_image: MakeImage, tmp_path: Path, run_prep: Run) -> None:
    path = write_table([make_image(i) for i, _ in DUPLICATES], [c for _, c in DUPLICATES])
    manifest = run_prep(tmp_path / "out", *table_arguments(path, "duplicates=keep", "shards.samples=4")).manifest
    assert (manifest["written"], manifest["rejected"]) == (6, 0)
    keys = [r["key"] for r in sidecar(tmp_path / "out")]
    assert [key[32:] for key in keys] == ["", "", "_1", "", "_2", "_1"]
    assert keys[0] == keys[2][:32] == keys[4][:32]


def test_duplicates_of_a_rejected_row_are_rejected_with_its_code(
    write_table: Write, make_image: MakeImage, tmp_path: Path, run_prep: Run
) -> None:
    corrupt, bare, rescued = make_image(0)[:150], make_image(1), make_image(2)
    images = [corrupt, bare, corrupt, bare, rescued, rescued, make_image(3), b"", b""]
    captions = [["a"], [""], ["b"], ["   "], [""], ["late"], ["good"], ["x"], ["y"]]
    run_prep(tmp_path / "merge", *table_arguments(write_table(images, captions)))
    reasons = {r["row"]: r["reason"] for r in rejects(tmp_path / "merge")}
    assert reasons == {
        0: "E_IMG_TRUNCATED",
        1: "E_CAP_EMPTY",
        2: "E_IMG_TRUNCATED",
        3: "E_CAP_EMPTY",
        5: "merged",
        7: "E_IMG_EMPTY",
        8: "E_IMG_EMPTY",
    }
    assert [(r["row"], r["captions"]) for r in sidecar(tmp_path / "merge")] == [(4, ["late"]), (6, ["good"])]
    run_prep(tmp_path / "first", *table_arguments(write_table(images, captions), "duplicates=first"))
    reasons = {r["row"]: r["reason"] for r in rejects(tmp_path / "first")}
    assert reasons[4] == reasons[5] == "E_CAP_EMPTY" and reasons[2] == "E_IMG_TRUNCATED"


def test_invalid_captions_are_dropped_and_the_row_is_kept(
    write_table: Write, make_image: MakeImage, tmp_path: Path, run_prep: Run
) -> None:
    texts = ["  two\n words ", "", "two words", "cafe\u0301", "x" * 9000, "a\x00b\u202e c", None]
    manifest = run_prep(tmp_path / "out", *table_arguments(write_table([make_image(0)], [texts]))).manifest
    (row,) = sidecar(tmp_path / "out")
    assert row["captions"] == ["two words", "caf\u00e9", "a b c"]
    assert (manifest["captions"], manifest["captions_dropped"]) == (3, 3)


def test_random_tables_conserve_rows(write_table: Write, make_image: MakeImage, tmp_path: Path, run_prep: Run) -> None:
    """Every plan row occurs once, counts add up, keys are unique, and a slow reference writes the same captions."""
    bad = [b"", b"<html>", make_image(0)[:99]]
    for seed in range(12):
        draw = np.random.default_rng(seed)
        count = int(draw.integers(1, 40))
        pool = [make_image(100 + i) for i in range(int(draw.integers(1, 12)))] + bad
        images = [make_image(100)] + [pool[draw.integers(len(pool))] for _ in range(count)]
        arguments = ["", " ", "a", "b", "a  b", "c"]
        captions = [
            ["first"],
            *([arguments[draw.integers(6)] for _ in range(draw.integers(0, 4))] for _ in range(count)),
        ]
        mode = ("merge", "first", "keep")[seed % 3]
        path = write_table(images, captions, f"{seed}.parquet")
        out = tmp_path / f"out{seed}"
        run_prep(out, *table_arguments(path, f"duplicates={mode}", f"shards.samples={draw.integers(1, 9)}"))
        manifest = json.loads((out / "manifest.json").read_text())
        written, rejected = sidecar(out), rejects(out)
        assert sorted([r["row"] for r in written] + [r["row"] for r in rejected]) == list(range(count + 1))
        assert manifest["rows_in"] == manifest["written"] + manifest["merged"] + manifest["rejected"] == count + 1
        assert len({r["key"] for r in written}) == len(written) == manifest["written"]
        assert Counter(r["reason"] for r in rejected if r["reason"] != "merged") == manifest["rejects"]
        assert {r["row"]: r["captions"] for r in written} == reference(images, captions, mode, bad), seed


def reference(images: list[bytes], captions: list[list[str]], mode: str, bad: list[bytes]) -> dict[int, list[str]]:
    groups: dict[object, list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(row if mode == "keep" else image, []).append(row)
    expected: dict[int, list[str]] = {}
    for rows in groups.values():
        taken = rows if mode == "merge" else rows[:1]
        texts = [" ".join(text.split()) for row in taken for text in captions[row]]
        texts = list(dict.fromkeys(text for text in texts if text))
        if texts and images[rows[0]] not in bad:
            expected[rows[0]] = texts
    return expected
