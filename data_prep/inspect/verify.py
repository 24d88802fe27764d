"""Verification of a dataset folder: every byte against its manifest and sidecars."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipwright.data_prep.build.engines import worker_count
from clipwright.data_prep.build.finish import add_to_fingerprint, count_reasons
from clipwright.data_prep.build.images import EXTENSION
from clipwright.data_prep.foreign.tars import BLOCK, HashingReader, TarError, members
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import shown
from clipwright.pipeline.folders.dataset import read_dataset_manifest, read_table
from clipwright.pipeline.folders.output import REJECTS
from clipwright.pipeline.folders.records import MANIFEST, DatasetFingerprint, file_difference
from clipwright.pipeline.folders.schema import JSON_COLUMNS, SIDECAR_REQUIRED


@dataclass(frozen=True)
class Fault:
    """A problem with a file, with key and offset of the first bad sample if a sample is affected."""

    file: str
    problem: str
    key: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        place = self.file
        if self.key is not None or self.offset is not None:
            place += ":"
        if self.key is not None:
            place += f" sample {self.key}"
        if self.offset is not None:
            place += f" at offset {self.offset}"
        return f"{place}: {self.problem}"


@dataclass(frozen=True)
class _CheckedShard:
    """The faults of one shard, and its sidecar if that is intact."""

    faults: list[Fault]
    sidecar: pa.Table | None


_CompareTar = Callable[[HashingReader, list[dict[str, Any]]], None]


class _Mismatch(ValueError):
    """The first difference between a tar and its sidecar; `args` are problem, key, offset."""


def verify(folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Reads a complete dataset folder and returns the result, with all problems under `faults`. Writes nothing.

    Raises E_INPUT or E_MANIFEST only if there is no valid manifest to compare with.
    """
    manifest = read_dataset_manifest(folder, totals=True)
    shards = manifest["shards"]
    faults = _check_files(folder, manifest["files"])
    rejects: pa.Table | None = None
    if not any(fault.file == REJECTS for fault in faults):
        try:
            rejects = read_table(folder / REJECTS, ["row", "reason"])
        except ClipwrightError as error:
            faults.append(Fault(REJECTS, f"the file cannot be read: {error.found}"))
    samples = sum(shard["samples"] for shard in shards)
    sidecars_intact = True
    fingerprint = DatasetFingerprint()
    rows: list[np.ndarray] = []
    bad_shards = captions = 0
    with Progress("verify", samples, "sample", quiet=quiet) as progress:
        for shard, checked in zip(shards, _check_shards(folder, manifest), strict=True):
            faults += checked.faults
            if checked.faults:
                bad_shards += 1
            if checked.sidecar is None:
                sidecars_intact = False
            elif sidecars_intact:
                captions += add_to_fingerprint(fingerprint, checked.sidecar)
                rows.append(checked.sidecar["row"].to_numpy())
            progress.add(shard["samples"], shard["samples"] if checked.faults else 0)
    if sidecars_intact and rejects is not None:
        totals = {"captions": captions, "fingerprint": fingerprint.hexdigest()}
        faults += _check_totals(manifest, rejects, rows, totals)
    return {
        "data": str(folder),
        "fingerprint": manifest["fingerprint"],
        "shards": len(shards),
        "shards_ok": len(shards) - bad_shards,
        "shards_bad": bad_shards,
        "samples": samples,
        "bytes": sum(shard["tar_bytes"] for shard in shards),
        "ok": not faults,
        "faults": [{**asdict(fault), "text": str(fault)} for fault in faults],
    }


def failure(result: dict[str, Any]) -> ClipwrightError | None:
    """Returns the error of a result with faults: E_MANIFEST if only the manifest is wrong, else E_DATA_HASH."""
    faults = result["faults"]
    if not faults:
        return None
    manifest_only = all(fault["file"] == MANIFEST for fault in faults)
    return ClipwrightError(
        "E_MANIFEST" if manifest_only else "E_DATA_HASH",
        "the dataset does not match its manifest",
        where=Path(result["data"]) / faults[0]["file"],
        found=f"{result['shards_bad']} of {format_count(result['shards'], 'shard')} bad; the first fault "
        f"is {faults[0]['text']}",
        fix="restore the named files, or make the dataset again with --fresh",
    )


def _check_files(folder: Path, files: dict[str, Any]) -> list[Fault]:
    """Checks the plan and the rejects."""
    faults: list[Fault] = []
    if REJECTS not in files:
        faults.append(Fault(MANIFEST, f"the manifest does not list {REJECTS}"))
    for name, entry in files.items():
        problem = file_difference(folder / name, entry)
        if problem is not None:
            faults.append(Fault(name, problem))
    return faults


def _check_shards(folder: Path, manifest: dict[str, Any]) -> Iterator[_CheckedShard]:
    """Yields the results of all shards, in order. Threads suffice: hashing releases the interpreter lock."""
    compare = _compare_images if manifest.get("foreign") else _compare_members
    pool = ThreadPoolExecutor(worker_count(0, len(manifest["shards"])))
    try:
        yield from pool.map(lambda shard: _check_shard(folder, shard, compare), manifest["shards"])
    finally:
        pool.shutdown(cancel_futures=True)


def _check_shard(folder: Path, shard: dict[str, Any], compare: _CompareTar) -> _CheckedShard:
    sidecar, fault = _check_sidecar(folder, shard)
    faults = [] if fault is None else [fault]
    path = folder / shard["tar"]
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            reader = HashingReader(file, size)
            if sidecar is not None:
                compare(reader, sidecar.to_pylist())
            reader.skip(size)  # hash what follows the last sample
        if size != shard["tar_bytes"]:
            raise _Mismatch(f"{format_count(size, 'byte')}, the manifest has {shard['tar_bytes']}", None, None)
        if reader.sha256.hexdigest() != shard["tar_sha256"]:
            problem = "the SHA-256 differs from the manifest"
            if sidecar is not None:
                problem += ", although every sample matches the sidecar: headers or padding have changed"
            raise _Mismatch(problem, None, None)
    except FileNotFoundError:
        faults.append(Fault(shard["tar"], "the file is missing"))
    except OSError as error:
        faults.append(Fault(shard["tar"], f"the file cannot be read: {error.strerror}"))
    except _Mismatch as mismatch:
        faults.append(Fault(shard["tar"], *mismatch.args))
    return _CheckedShard(faults, sidecar)


def _check_sidecar(folder: Path, shard: dict[str, Any]) -> tuple[pa.Table | None, Fault | None]:
    """Returns a shard's sidecar, or None and the fault that makes it unusable."""
    name = shard["sidecar"]
    path = folder / name
    if not path.is_file():
        return None, Fault(name, "the file is missing")
    if file_sha256(path) != shard["sidecar_sha256"]:
        return None, Fault(name, "the SHA-256 differs from the manifest")
    try:
        table = read_table(path, SIDECAR_REQUIRED)
    except ClipwrightError as error:
        return None, Fault(name, f"the file cannot be read: {error.found}")
    if table.num_rows != shard["samples"]:
        return None, Fault(name, f"{format_count(table.num_rows, 'row')}, the manifest has {shard['samples']}")
    return table, None


def _compare_members(reader: HashingReader, rows: list[dict[str, Any]]) -> None:
    """Compares a tar, member by member, with its sidecar's rows. Raises _Mismatch at the first difference."""
    for row in rows:
        key = row["key"]
        names: list[str] = []
        texts = {"json", "txt"} if row["captions"] else {"json"}
        for _ in range(1 + len(texts)):
            header = reader.position
            name, offset, data = _read_member(reader, key)
            names.append(name)
            stem, _, extension = name.rpartition(".")
            if stem != key:
                raise _Mismatch(f"the member is {name!r}, expected one of {key}", key, header)
            problem = _member_problem(extension, offset, data, row)
            if problem:
                raise _Mismatch(problem, key, offset)
        extensions = {name.rpartition(".")[2] for name in names}
        if names != sorted(names) or len(extensions) != 1 + len(texts) or not texts < extensions:
            raise _Mismatch(f"its members are {', '.join(names)}", key, None)
    header = reader.position
    if reader.read(BLOCK).strip(b"\0"):
        raise _Mismatch("the tar has more members than the sidecar has rows", None, header)


def _compare_images(reader: HashingReader, rows: list[dict[str, Any]]) -> None:
    """Compares a foreign tar with its sidecar, which lists only the image members. Raises _Mismatch."""
    if not rows:
        return
    number = 0
    try:
        for member, data in members(reader):
            row = rows[number]
            if member.offset < row["offset"]:
                continue
            if (member.offset, member.size) != (row["offset"], row["size"]):
                found = (
                    f"the tar has {shown(member.name)} of {format_count(member.size, 'byte')} at offset {member.offset}"
                )
                raise _Mismatch(
                    f"{found}, the sidecar has {format_count(row['size'], 'byte')}", row["key"], row["offset"]
                )
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 != row["sha256"] or not row["key"].startswith(sha256[:32]):
                raise _Mismatch("the image's SHA-256 differs from the sidecar", row["key"], row["offset"])
            number += 1
            if number == len(rows):
                return
    except TarError as error:
        raise _Mismatch(error.args[1], rows[number]["key"], rows[number]["offset"]) from None
    raise _Mismatch("the tar ends before it", rows[number]["key"], rows[number]["offset"])


def _read_member(reader: HashingReader, key: str) -> tuple[str, int, bytes]:
    """Returns the next member's name, the offset of its data, and the data. `key` is the expected sample."""
    start = reader.position
    header = reader.read(BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _Mismatch(f"the tar header is malformed: {error}", key, start) from None
    if info.size < 0:
        raise _Mismatch("the tar header has a negative size", key, start)
    offset = reader.position
    data = reader.read(info.size)
    reader.read(-info.size % BLOCK)
    if len(data) != info.size:
        raise _Mismatch(
            f"the file ends after {len(data)} of {format_count(info.size, 'byte')} of {info.name}", key, offset
        )
    return info.name, offset, data


def _member_problem(extension: str, offset: int, data: bytes, row: dict[str, Any]) -> str:
    """Returns how a member differs from its sidecar row, or an empty string."""
    if extension == "txt":
        first_caption = row["captions"][0].encode() if row["captions"] else None
        return "" if data == first_caption else "the text is not the sidecar's first caption"
    if extension == "json":
        return _json_problem(data, row)
    if extension not in EXTENSION.values():
        return f"the extension {extension!r} is not one of a sample"
    if (offset, len(data)) != (row["offset"], row["size"]):
        return (
            f"the image has {format_count(len(data), 'byte')}, the sidecar has {row['size']} at offset {row['offset']}"
        )
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return "the image's SHA-256 differs from the sidecar"
    return ""


def _json_problem(data: bytes, row: dict[str, Any]) -> str:
    try:
        metadata = json.loads(data)
        differing = [name for name in JSON_COLUMNS if metadata[name] != row[name]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"the JSON member cannot be read: {error}"
    return f"the JSON member's {', '.join(differing)} differ from the sidecar" if differing else ""


def _check_totals(
    manifest: dict[str, Any], rejects: pa.Table, sidecar_rows: list[np.ndarray], totals: dict[str, Any]
) -> list[Fault]:
    """Checks what no single file shows: the manifest's totals, and that every plan row occurs exactly once."""
    rows = np.concatenate([rejects["row"].to_numpy(), *sidecar_rows])
    reasons = count_reasons(rejects)
    merged = reasons.pop("merged", 0)
    counted = {
        "rows_in": len(rows),
        "written": len(rows) - rejects.num_rows,
        "merged": merged,
        "rejected": reasons.total(),
        "rejects": dict(reasons),
        **totals,
    }
    faults: list[Fault] = []
    for name, value in counted.items():
        if manifest[name] != value:
            faults.append(Fault(MANIFEST, f"{name} is {manifest[name]}, but the files have {value}"))
    if not np.array_equal(np.sort(rows), np.arange(manifest["rows_in"])):
        faults.append(Fault(MANIFEST, "not every plan row occurs exactly once in the sidecars and rejects"))
    return faults
