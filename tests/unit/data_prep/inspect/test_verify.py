"""`data verify`: an intact folder passes unchanged, and every kind of corruption is reported."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.inspect.verify import failure, verify
from clipwright.pipeline.core.files import file_sha256


def rows_of(dataset: Path, shard: int) -> list[dict[str, Any]]:
    return pq.read_table(dataset / f"data-{shard:06d}.parquet").to_pylist()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def restate(dataset: Path, **changes: Any) -> None:
    """Updates the manifest to match changed files, and sets `changes` in it, as a faulty tool might."""
    path = dataset / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        tar, sidecar = dataset / shard["tar"], dataset / shard["sidecar"]
        shard |= {"tar_bytes": tar.stat().st_size, "tar_sha256": file_sha256(tar)}
        shard["sidecar_sha256"] = file_sha256(sidecar)
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (dataset / name).stat().st_size, "sha256": file_sha256(dataset / name)}
    path.write_text(json.dumps(manifest | changes))


def find_faults(dataset: Path, code: str = "E_DATA_HASH") -> list[dict[str, Any]]:
    result = verify(dataset, quiet=True)
    assert not result["ok"]
    error = failure(result)
    assert error is not None and error.code == code and error.exit_code == 3
    return result["faults"]


def member(dataset: Path, shard: int, name: str) -> tarfile.TarInfo:
    with tarfile.open(dataset / f"data-{shard:06d}.tar") as tar:
        return tar.getmember(name)


@pytest.mark.parametrize("workers", [1, 2])
def test_intact_dataset_passes_and_is_unchanged(
    dataset: Path, tmp_path: Path, cli: Any, run_prep: Callable[..., Any], workers: int
) -> None:
    arguments = ("source.name=table", f"source.path={tmp_path / 'pairs.parquet'}", "source.caption=captions")
    run_prep(tmp_path / "other", *arguments, "shards.samples=3", f"runtime.workers={workers}")
    before = content(tmp_path / "other")
    result = cli.json("data", "verify", "other")
    assert (result["ok"], result["faults"], result["shards_ok"], result["samples"]) == (True, [], 4, 10)
    assert content(tmp_path / "other") == before
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "other").glob("*.tar"))


def test_flipped_byte_is_reported_with_shard_key_and_offset(dataset: Path, cli: Any) -> None:
    row = rows_of(dataset, 1)[2]
    flip(dataset / "data-000001.tar", row["offset"] + 60)
    flip(dataset / "data-000002.tar", 512 + 60)
    before = content(dataset)
    done = cli("data", "verify", "data", "--json", code=3)
    result, error = json.loads(done.stdout), done.stderr.strip().splitlines()[-1]
    assert error.startswith("error[E_DATA_HASH]") and "data-000001.tar" in error and "2 of 3 shards" in error
    assert row["key"] in error and f"offset {row['offset']}" in error and "--fresh" in error
    # The command checks all shards before it fails.
    assert [fault["file"] for fault in result["faults"]] == ["data-000001.tar", "data-000002.tar"]
    assert result["faults"][0]["key"] == row["key"] and result["faults"][0]["offset"] == row["offset"]
    assert (result["shards_ok"], result["shards_bad"]) == (1, 2)
    assert content(dataset) == before
    output = cli("data", "verify", "data", code=3).stdout
    assert (
        f"bad data-000001.tar: sample {row['key']} at offset {row['offset']}" in output
        and "1 shard ok, 2 bad" in output
    )


def test_truncated_and_missing_tars_are_reported(dataset: Path, cli: Any) -> None:
    tar, row = dataset / "data-000001.tar", rows_of(dataset, 1)[2]
    tar.write_bytes(tar.read_bytes()[: row["offset"] + 100])
    error = cli.error("data", "verify", "data", code=3)
    assert "E_DATA_HASH" in error and "data-000001.tar" in error and row["key"] in error and "the file ends" in error
    tar.unlink()
    assert [(fault["file"], fault["problem"]) for fault in find_faults(dataset)] == [
        ("data-000001.tar", "the file is missing")
    ]


def test_headers_and_padding_are_checked(dataset: Path) -> None:
    tar = dataset / "data-000000.tar"
    intact, row = tar.read_bytes(), rows_of(dataset, 0)[1]
    flip(tar, len(intact) - 1)
    assert "headers or padding" in find_faults(dataset)[0]["problem"]
    tar.write_bytes(intact)
    flip(tar, row["offset"] - 512 + 3)
    (fault,) = find_faults(dataset)
    assert fault["key"] == row["key"] and fault["offset"] == row["offset"] - 512 and "header" in fault["problem"]
    tar.write_bytes(intact + b"more")
    assert "the manifest has" in find_faults(dataset)[0]["problem"]


@pytest.mark.parametrize("corruption", ["missing", "flipped"])
def test_bad_sidecar_is_reported(dataset: Path, cli: Any, corruption: str) -> None:
    sidecar = dataset / "data-000002.parquet"
    if corruption == "missing":
        sidecar.unlink()
    else:
        flip(sidecar, 300)
    error = cli.error("data", "verify", "data", code=3)
    assert error.startswith("error[E_DATA_HASH]") and "data-000002.parquet" in error
    assert len(find_faults(dataset)) == 1


def test_sidecar_that_matches_its_hash_but_not_the_shard_is_reported(dataset: Path) -> None:
    sidecar = dataset / "data-000002.parquet"
    table = pq.read_table(sidecar)

    def problem() -> str:
        restate(dataset)
        (fault,) = find_faults(dataset)
        assert fault["file"] == "data-000002.parquet"
        return fault["problem"]

    pq.write_table(table.drop_columns(["offset", "sha256"]), sidecar)
    assert problem() == "the file cannot be read: it has no column offset, sha256"
    pq.write_table(table.slice(1), sidecar)
    assert problem() == f"{table.num_rows - 1} rows, the manifest has {table.num_rows}"
    sidecar.write_bytes(b"no table")
    assert problem().startswith("the file cannot be read: ")


@pytest.mark.parametrize("extension", ["txt", "json"])
def test_changed_caption_is_reported_even_if_hashes_match(dataset: Path, extension: str) -> None:
    key = rows_of(dataset, 0)[0]["key"]
    info = member(dataset, 0, f"{key}.{extension}")
    tar = dataset / "data-000000.tar"
    at = tar.read_bytes().index(b"red", info.offset_data)
    assert at < info.offset_data + info.size
    flip(tar, at)
    restate(dataset)
    (fault,) = find_faults(dataset)
    assert (fault["file"], fault["key"], fault["offset"]) == ("data-000000.tar", key, info.offset_data)
    assert ("first caption" if extension == "txt" else "captions differ") in fault["problem"]


def test_missing_and_duplicate_plan_rows_are_reported(dataset: Path) -> None:
    rejects = pq.read_table(dataset / "rejects.parquet")
    pq.write_table(rejects.slice(1), dataset / "rejects.parquet")
    assert [fault["file"] for fault in find_faults(dataset)] == ["rejects.parquet"]
    (dataset / "rejects.parquet").write_bytes(b"no table")
    restate(dataset)
    assert ["rejects.parquet: the file cannot be read" in fault["text"] for fault in find_faults(dataset)] == [True]
    pq.write_table(rejects.slice(1), dataset / "rejects.parquet")
    restate(dataset)
    text = " ".join(fault["text"] for fault in find_faults(dataset, "E_MANIFEST"))
    assert "rows_in is 13, but the files have 12" in text and "exactly once" in text
    pq.write_table(pa.concat_tables([rejects.slice(0, 1), rejects.slice(0, 2)]), dataset / "rejects.parquet")
    restate(dataset)
    assert "exactly once" in " ".join(fault["text"] for fault in find_faults(dataset, "E_MANIFEST"))


def test_wrong_totals_and_changed_plan_are_reported(dataset: Path) -> None:
    fingerprint = json.loads((dataset / "manifest.json").read_text())["fingerprint"]
    restate(dataset, fingerprint="0" * 64)
    (fault,) = find_faults(dataset, "E_MANIFEST")
    assert fault["file"] == "manifest.json" and fingerprint in fault["problem"]
    captions = json.loads((dataset / "manifest.json").read_text())["captions"]
    restate(dataset, fingerprint=fingerprint, captions=1)
    assert [fault["problem"] for fault in find_faults(dataset, "E_MANIFEST")] == [
        f"captions is 1, but the files have {captions}"
    ]
    restate(dataset, captions=captions)
    restate(dataset, fingerprint=fingerprint)
    assert verify(dataset, quiet=True)["ok"]
    flip(dataset / "plan.parquet", 20)
    assert [fault["file"] for fault in find_faults(dataset)] == ["plan.parquet"]


@pytest.mark.parametrize(
    ("verb", "manifest", "code", "expected"),
    [
        ("verify", None, "E_MANIFEST", "it is an empty folder"),
        ("verify", '{"format": "index", "version": 1}', "E_MANIFEST", "an index folder"),
        ("verify", '{"format": "dataset", "version": 1, "shards": []}', "E_MANIFEST", "shards"),
        ("stats", '{"format": "dataset", "version": 1, "rejects": {"E_X": "many"}}', "E_MANIFEST", "rejects"),
        ("verify", "not json", "E_MANIFEST", "manifest.json"),
        ("verify", "no folder", "E_INPUT", "check the path"),
        ("stats", '{"format": "index", "version": 1}', "E_MANIFEST", "an index folder"),
        ("stats", "no folder", "E_INPUT", "check the path"),
        ("view", '{"format": "index", "version": 1}', "E_MANIFEST", "an index folder"),
        ("view", "no folder", "E_INPUT", "check the path"),
    ],
)
def test_commands_refuse_a_folder_that_is_not_a_dataset(
    tmp_path: Path, cli: Any, verb: str, manifest: str | None, code: str, expected: str
) -> None:
    if manifest != "no folder":
        (tmp_path / "odd").mkdir()
    if manifest not in (None, "no folder"):
        (tmp_path / "odd" / "manifest.json").write_text(str(manifest))
    error = cli.error("data", verb, "odd", *(("-o", "pages") if verb == "view" else ()), code=3)
    assert error.startswith(f"error[{code}]") and "odd" in error and expected in error
    assert not (tmp_path / "pages").exists()
