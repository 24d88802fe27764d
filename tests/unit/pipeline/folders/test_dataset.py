"""The dataset reader: what is checked when, and what is kept in memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.folders import dataset
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import read_manifest


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ClipwrightError) as caught:
        call()
    assert caught.value.fix
    return str(caught.value)


def descriptors(folder: Path) -> int:
    """Returns how many files of the folder are open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists them is closed by now
            found += str(link.readlink()).startswith(str(folder))
    return found


def test_samples_are_read_as_written(make_dataset: Any) -> None:
    data = Dataset(make_dataset("d", [3, 1, 4], captions=lambda i: [f"a {i}", f"b {i}"][: 1 + i % 2]))
    seen = 0
    for shard, size in enumerate(data.sizes):
        for row in range(size):
            record = data.record(shard, row)
            assert record["captions"] == [f"a {seen}", f"b {seen}"][: 1 + seen % 2]
            assert record["key"] == record["sha256"][:32] and len(data.image(shard, row)) == record["size"]
            seen += 1


def test_open_files_and_rows_stay_within_bounds(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "OPEN_TARS", 3)
    folder = make_dataset("d", [2] * 12)
    data = Dataset(folder, keep=4)
    for _ in range(2):
        for shard in range(12):
            data.image(shard, 1)
            assert descriptors(folder) <= 4  # a new file is opened before the oldest is closed
    assert data.rows.cache_info().currsize == 4
    rows = data.rows(0)
    arrays = (rows.key, rows.offset, rows.size, rows.sha256, rows.captions.starts)
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in arrays)
    del data, rows
    gc.collect()
    assert descriptors(folder) == 0


def test_sidecar_hash_is_checked_at_first_use(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dataset("d", [2, 2])
    checked: list[Path] = []
    sha256 = dataset.file_sha256
    monkeypatch.setattr(dataset, "file_sha256", lambda path: checked.append(path) or sha256(path))
    data = Dataset(folder, keep=1)
    assert not checked
    for shard in (0, 1, 0, 1):
        data.image(shard, 0)
    assert [path.name for path in checked] == ["d-000000.parquet", "d-000001.parquet"]
    sidecar = folder / "d-000001.parquet"
    valid = sidecar.read_bytes()
    sidecar.write_bytes(valid[:-9] + b"?" + valid[-8:])
    fresh = Dataset(folder)
    fresh.image(0, 0)
    assert "E_DATA_HASH" in (line := refused(lambda: fresh.image(1, 0))) and sidecar.name in line


def test_changed_and_truncated_members_are_refused(make_dataset: Any) -> None:
    folder = make_dataset("d", [3])
    data = Dataset(folder)
    record = data.record(0, 1)
    with data.tar_path(0).open("r+b") as file:
        file.seek(record["offset"] + 5)
        file.write(b"\xff")
    assert data.image(0, 0)
    line = refused(lambda: data.image(0, 1))
    assert "E_DATA_HASH" in line and record["key"] in line and str(record["offset"]) in line
    os.truncate(data.tar_path(0), record["offset"] + 9)  # after the check at the start
    assert record["key"] in refused(lambda: data.image(0, 1))


def test_sample_hash_is_checked_at_first_use(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, checked = make_dataset("d", [3, 3]), []
    matches = dataset._matches
    monkeypatch.setattr(dataset, "_matches", lambda data, sha256: checked.append(data) or matches(data, sha256))
    data = Dataset(folder)
    first = [data.image(shard, row) for shard in (0, 1) for row in range(3)]
    again = [data.image(shard, row) for shard in (0, 1) for row in range(3)]
    assert first == again == checked
    record = data.record(0, 1)
    with data.tar_path(0).open("r+b") as file:
        file.seek(record["offset"] + 5)
        file.write(b"\xff")
    fresh = Dataset(folder)
    for _ in range(2):  # a failed check is repeated
        assert record["key"] in refused(lambda: fresh.image(0, 1))


def test_missing_truncated_and_duplicate_shards_are_refused_at_the_start(make_dataset: Any) -> None:
    folder = make_dataset("d", [2, 2, 2])
    tar = folder / "d-000001.tar"
    valid = tar.read_bytes()
    tar.unlink()
    assert "E_DATA_HASH" in (line := refused(lambda: Dataset(folder))) and tar.name in line and "missing" in line
    tar.write_bytes(valid[:-512])
    assert tar.name in (line := refused(lambda: Dataset(folder))) and str(len(valid)) in line
    tar.write_bytes(valid)
    sidecar = folder / "d-000001.parquet"
    rows = sidecar.read_bytes()
    sidecar.write_bytes(rows[:-1])
    assert sidecar.name in (line := refused(lambda: Dataset(folder))) and f"the manifest states {len(rows)}" in line
    sidecar.unlink()
    assert sidecar.name in (line := refused(lambda: Dataset(folder))) and "missing" in line
    sidecar.write_bytes(rows)
    manifest = read_manifest(folder, "dataset")
    manifest["shards"][2] = manifest["shards"][1]
    write_json(folder / "manifest.json", manifest)
    assert tar.name in (line := refused(lambda: Dataset(folder))) and "twice" in line


def test_negatives_are_texts_or_lists_of_texts(make_dataset: Any) -> None:
    wrong = [["x", "y"], None, [], ["z"]]
    columns = {"wrong": wrong, "one": ["p", None, "q", "r"], "mark": [1, 2, 3, 4], "torn": [["x", None]] * 4}
    folder = make_dataset("d", [2, 2], **columns)
    data = Dataset(folder, negatives="wrong")
    found = [data.rows(shard).negatives for shard in (0, 1)]
    texts = [[column.text(row, i) for i in range(column.count(row))] for column in found for row in (0, 1)]
    assert texts == [["x", "y"], [], [], ["z"]]
    column = Dataset(folder, negatives="one").rows(0).negatives
    assert column is not None and [column.count(0), column.count(1), column.text(0, 0)] == [1, 0, "p"]
    line = refused(lambda: Dataset(folder, negatives="wrongs"))
    assert "E_COLUMN" in line and "d-000000.parquet: wrongs" in line and "did you mean 'wrong'?" in line
    assert "int64" in refused(lambda: Dataset(folder, negatives="mark"))
    assert "has a null" in refused(lambda: Dataset(folder, negatives="torn").rows(0))
    assert Dataset(folder).rows(0).negatives is None


def test_malformed_manifest_is_refused(make_dataset: Any) -> None:
    folder = make_dataset("d", [2])
    manifest = read_manifest(folder, "dataset")
    for name, value in (("shards", None), ("shards", [{"tar": "d-000000.tar"}]), ("fingerprint", 1)):
        write_json(folder / "manifest.json", {**manifest, name: value})
        line = refused(lambda: Dataset(folder))
        assert "E_MANIFEST" in line and name in line
    write_json(folder / "manifest.json", manifest)
    assert dataset.read_dataset_manifest(folder) == manifest
    line = refused(lambda: dataset.read_dataset_manifest(folder, totals=True))
    assert "E_MANIFEST" in line and "rows_in" in line and "rejects" in line and "shards" not in line


def test_sidecar_is_checked_against_its_manifest_entry(make_dataset: Any) -> None:
    folder = make_dataset("d", [2], gap=["x", None])
    [entry] = read_manifest(folder, "dataset")["shards"]
    path = folder / entry["sidecar"]
    assert dataset.read_sidecar(path, entry, ["key", "captions"]).num_rows == 2
    for wrong, columns, found in (
        ({**entry, "samples": 3}, ["key"], "2 rows, the manifest states 3"),
        (entry, ["key", "width"], "width"),
        (entry, ["gap"], "rows without gap"),
    ):
        line = refused(lambda wrong=wrong, columns=columns: dataset.read_sidecar(path, wrong, columns))
        assert "E_DATA_HASH" in line and found in line and path.name in line
    path.write_bytes(b"no table")
    assert "E_DATA_HASH" in refused(lambda: dataset.read_sidecar(path, entry))
