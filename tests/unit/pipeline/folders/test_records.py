"""Folder formats: canonical JSON, fingerprints, atomic writes, manifests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from clipwright.pipeline.core import files
from clipwright.pipeline.core.captions import MAX_BYTES, CaptionError, normalize
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders import records


def test_canonical_json_of_equal_values_is_equal() -> None:
    assert files.canonical_json({"b": 1.5, "a": ["é", None]}) == '{"a":["é",null],"b":1.5}'
    with pytest.raises(ValueError, match="Out of range"):
        files.canonical_json(float("nan"))


def test_dataset_fingerprint_is_the_documented_hash() -> None:
    fingerprint = records.DatasetFingerprint()
    fingerprint.sample("k1", "s1", ["a", "b"])
    fingerprint.shard(1)
    texts = hashlib.sha256(b'["a","b"]').hexdigest()
    assert fingerprint.hexdigest() == hashlib.sha256(f"k1\ts1\t{texts}\n#1\n".encode()).hexdigest()


def test_failed_write_leaves_the_old_file_and_no_staged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    files.atomic_write(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_missing_manifest_and_manifest_of_another_format_or_version_are_refused(tmp_path: Path) -> None:
    for body, found in (
        (None, "it is an empty folder"),
        ("{", "Expecting"),
        (json.dumps({"format": "model", "version": 1}), "it is a model folder"),
        (json.dumps({"format": "dataset", "version": 9}), "version 9"),
    ):
        if body is not None:
            (tmp_path / "manifest.json").write_text(body)
        with pytest.raises(ClipwrightError) as caught:
            records.read_manifest(tmp_path, "dataset")
        assert caught.value.code == "E_MANIFEST" and found in str(caught.value)
    with pytest.raises(ClipwrightError) as caught:
        records.read_manifest(tmp_path / "absent", "dataset")
    assert caught.value.code == "E_INPUT" and "no such folder" in str(caught.value)
    with pytest.raises(ClipwrightError, match="it is a file — name a folder"):
        records.read_manifest(tmp_path / "manifest.json", "dataset")


def test_differences_lists_changed_leaves() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": "x" * 99}, "e": None}
    assert records.differences(old, {"a": 1, "b": {"c": (1, 2), "d": "x" * 99}}) == []
    lines = records.differences(old, {"a": 2, "b": {"c": [1, 2]}, "e": None})
    assert lines[0] == "a: 1 → 2" and lines[1].startswith('b.d: "xxx') and lines[1].endswith(" → null")
    assert len(lines) == 2


def test_origin_survives_a_move_of_both_folders(tmp_path: Path) -> None:
    (tmp_path / "here" / "index").mkdir(parents=True)
    records.write_origin(tmp_path / "here" / "index", model=tmp_path / "here" / "model", data="s3://bucket/d")
    (tmp_path / "here").rename(tmp_path / "there")
    found = records.read_origin(tmp_path / "there" / "index")
    assert found == {"model": str(tmp_path / "there" / "model"), "data": "s3://bucket/d"}
    assert records.read_origin(tmp_path) == {}


def test_check_files_finds_changed_truncated_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abcdef")
    entries = records.file_entries(tmp_path, ["f"])
    records.check_files(tmp_path, entries, "E_MODEL_HASH")
    for data in (b"abcdeg", b"abcde", None):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ClipwrightError) as caught:
            records.check_files(tmp_path, entries, "E_MODEL_HASH")
        assert caught.value.code == "E_MODEL_HASH" and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\tdog \n", "a dog"),
        ("cafe\u0301", "café"),
        ("a\x00b", "a b"),
        ("\u202eabc", "abc"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        ("👩‍🚀", "👩‍🚀"),
    ],
)
def test_captions_are_normalized(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "E_CAP_EMPTY"),
        (" \n\x00", "E_CAP_EMPTY"),
        ("x" * (MAX_BYTES + 1), "E_CAP_LONG"),
        ("\ud800", "E_CAP_ENCODING"),
    ],
)
def test_refused_captions_have_a_code(text: str, code: str) -> None:
    with pytest.raises(CaptionError) as caught:
        normalize(text)
    assert caught.value.args[0] == code
