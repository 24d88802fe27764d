"""Every byte of a dataset folder against its manifest and sidecars."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.build.images import EXTENSION
from clipwright.data_prep.build.output import REJECTS
from clipwright.data_prep.foreign.tars import HashingReader
from clipwright.data_prep.inspect.dataset_files import open_dataset, read_part
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.folders.records import MANIFEST, DatasetFingerprint

_NAMED = ("key", "captions", "width", "height", "sha256", "source", "source_key")
_NEEDED = ("row", *_NAMED, "offset", "size")
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file; `key` and `offset` of the first sample that is not as it should be, if any is."""

    file: str
    found: str
    key: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        sample = "" if self.key is None else f" sample {self.key}"
        place = "" if self.offset is None else f" at offset {self.offset}"
        return f"{self.file}:{sample}{place}{':' if sample or place else ''} {self.found}"


@dataclass(frozen=True)
class _Checked:
    """One shard: its faults, and its sidecar if that is whole."""

    faults: list[Fault]
    sidecar: pa.Table | None


_Walk = Callable[[HashingReader, list[dict[str, Any]]], None]


class _Wrong(ValueError):
    """The first place where a tar is not as its sidecar says; `args`: what, key, offset."""


def verify(folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Reads all of a dataset folder and returns what was found, `faults` first of all; writes nothing.

    Raises E_INPUT or E_MANIFEST only where there is no manifest to compare with.
    """
    manifest = open_dataset(folder)
    shards = manifest["shards"]
    faults = _check_files(folder, manifest["files"])
    rejects = None
    if not any(fault.file == REJECTS for fault in faults):
        try:
            rejects = read_part(folder / REJECTS, ["row", "reason"])
        except ClipwrightError as error:
            faults.append(Fault(REJECTS, f"it cannot be read: {error.found}"))
    fingerprint: DatasetFingerprint | None = DatasetFingerprint()
    rows = [] if rejects is None else [rejects["row"].to_numpy()]
    bad = captions = 0
    with Progress("verify", sum(shard["samples"] for shard in shards), "samples", quiet=quiet) as progress:
        for shard, checked in zip(shards, _check_shards(folder, manifest), strict=True):
            faults += checked.faults
            bad += bool(checked.faults)
            if checked.sidecar is None:
                fingerprint = None
            elif fingerprint is not None:
                _feed(fingerprint, checked.sidecar)
                rows.append(checked.sidecar["row"].to_numpy())
                captions += len(checked.sidecar["captions"].combine_chunks().flatten())
            progress.add(shard["samples"], shard["samples"] if checked.faults else 0)
    if fingerprint is not None and rejects is not None:
        counted = {"captions": captions, "fingerprint": fingerprint.hexdigest()}
        faults += _check_whole(manifest, rejects, np.concatenate(rows), counted)
    return {
        "data": str(folder),
        "fingerprint": manifest["fingerprint"],
        "shards": len(shards),
        "shards_ok": len(shards) - bad,
        "shards_bad": bad,
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["tar_bytes"] for shard in shards),
        "ok": not faults,
        "faults": [asdict(fault) | {"text": str(fault)} for fault in faults],
    }


def refuse(result: dict[str, Any]) -> None:
    """Raises the error of a result with faults: E_MANIFEST if only the manifest is wrong, else E_DATA_HASH."""
    faults = result["faults"]
    if not faults:
        return
    only = all(fault["file"] == MANIFEST for fault in faults)
    raise ClipwrightError(
        "E_MANIFEST" if only else "E_DATA_HASH",
        "a dataset that is not what its manifest says",
        where=Path(result["data"]) / faults[0]["file"],
        found=f"{result['shards_bad']} of {result['shards']} shards are bad; first {faults[0]['text']}",
        fix="restore the files named, or make the dataset again with --fresh",
    )


def _check_files(folder: Path, files: dict[str, Any]) -> list[Fault]:
    """The plan and the rejects."""
    faults = [] if REJECTS in files else [Fault(MANIFEST, f"names no {REJECTS}")]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(Fault(name, "the file is missing"))
        elif path.stat().st_size != entry["bytes"]:
            faults.append(Fault(name, f"{path.stat().st_size} bytes, the manifest says {entry['bytes']}"))
        elif file_sha256(path) != entry["sha256"]:
            faults.append(Fault(name, "its SHA-256 is not the manifest's"))
    return faults


def _check_shards(folder: Path, manifest: dict[str, Any]) -> Iterator[_Checked]:
    """All shards, in order. Threads: hashing, which is nearly all of the work, releases the interpreter."""
    walk = _walk_images if manifest.get("foreign") else _walk
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    try:
        yield from pool.map(lambda shard: _check_shard(folder, shard, walk), manifest["shards"])
    finally:
        pool.shutdown(cancel_futures=True)


def _check_shard(folder: Path, shard: dict[str, Any], walk: _Walk) -> _Checked:
    sidecar, fault = _check_sidecar(folder, shard)
    faults = [fault] if fault is not None else []
    path, rows = folder / shard["tar"], None if sidecar is None else sidecar.to_pylist()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            reader = HashingReader(file, size)
            if rows is not None:
                walk(reader, rows)
            while reader.read(1 << 20):
                pass
        if size != shard["tar_bytes"]:
            raise _Wrong(f"{size} bytes, the manifest says {shard['tar_bytes']}", None, None)
        if reader.sha256.hexdigest() != shard["tar_sha256"]:
            where = "" if rows is None else ", though every sample is as the sidecar says: headers or padding changed"
            raise _Wrong(f"its SHA-256 is not the manifest's{where}", None, None)
    except FileNotFoundError:
        faults.append(Fault(shard["tar"], "the file is missing"))
    except OSError as error:
        faults.append(Fault(shard["tar"], f"it cannot be read: {error.strerror}"))
    except _Wrong as wrong:
        faults.append(Fault(shard["tar"], *wrong.args))
    return _Checked(faults, sidecar)


def _check_sidecar(folder: Path, shard: dict[str, Any]) -> tuple[pa.Table | None, Fault | None]:
    name = shard["sidecar"]
    path = folder / name
    if not path.is_file():
        return None, Fault(name, "the file is missing")
    if file_sha256(path) != shard["sidecar_sha256"]:
        return None, Fault(name, "its SHA-256 is not the manifest's")
    try:
        table = pq.read_table(path, columns=list(_NEEDED))
    except (pa.ArrowException, OSError) as error:
        return None, Fault(name, f"it cannot be read: {str(error).splitlines()[0]}")
    if absent := [column for column in _NEEDED if column not in table.column_names]:
        return None, Fault(name, f"it has no column {', '.join(absent)}")
    if table.num_rows != shard["samples"]:
        return None, Fault(name, f"{table.num_rows} rows, the manifest says {shard['samples']}")
    return table, None


def _walk(reader: HashingReader, rows: list[dict[str, Any]]) -> None:
    """Compares a tar, member after member, with its sidecar's rows; raises _Wrong at the first difference."""
    for row in rows:
        names: list[str] = []
        for _ in range(3):
            header = reader.place
            name, offset, data = _member(reader, row["key"])
            names.append(name)
            stem, _, extension = name.rpartition(".")
            if stem != row["key"]:
                raise _Wrong(f"a member {name!r} where {row['key']} should stand", row["key"], header)
            problem = _compare(extension, offset, data, row)
            if problem:
                raise _Wrong(problem, row["key"], offset)
        kinds = {name.rpartition(".")[2] for name in names}
        if names != sorted(names) or len(kinds) != 3 or not {"json", "txt"} < kinds:
            raise _Wrong(f"its members are {', '.join(names)}", row["key"], None)
    header = reader.place
    if reader.read(_BLOCK).strip(b"\0"):
        raise _Wrong("more members than the sidecar has rows", None, header)


def _walk_images(reader: HashingReader, rows: list[dict[str, Any]]) -> None:
    """The same of a tar that others made: of its members only the images are the sidecar's."""
    for row in rows:
        reader.pass_over(row["offset"] - reader.place)
        if reader.place != row["offset"]:
            raise _Wrong(f"the sidecar says offset {row['offset']}", row["key"], reader.place)
        sha256 = hashlib.sha256(reader.read(row["size"])).hexdigest()
        if sha256 != row["sha256"] or not row["key"].startswith(sha256[:32]):
            raise _Wrong("the image's SHA-256 is not the sidecar's", row["key"], row["offset"])


def _member(reader: HashingReader, key: str) -> tuple[str, int, bytes]:
    """The next member's name, the place of its data, and the data; `key` is the sample it should belong to."""
    start = reader.place
    header = reader.read(_BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _Wrong(f"no tar header: {error}", key, start) from None
    if info.size < 0:
        raise _Wrong("a tar header of a negative size", key, start)
    offset = reader.place
    whole = reader.read(info.size)
    reader.read(-info.size % _BLOCK)
    if len(whole) != info.size:
        raise _Wrong(f"the file ends after {len(whole)} of {info.size} bytes of {info.name}", key, offset)
    return info.name, offset, whole


def _compare(extension: str, offset: int, data: bytes, row: dict[str, Any]) -> str:
    """What differs between a member and its sidecar row, if anything."""
    if extension == "txt":
        return "" if data == (row["captions"] or [""])[0].encode() else "the text is not the sidecar's first caption"
    if extension == "json":
        try:
            about = json.loads(data)
            differing = [name for name in _NAMED if about[name] != row[name]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return f"the JSON member cannot be read: {error}"
        return f"the JSON member's {', '.join(differing)} differ from the sidecar" if differing else ""
    if extension not in EXTENSION.values():
        return f"a member of the kind {extension!r}"
    if (offset, len(data)) != (row["offset"], row["size"]):
        return f"{len(data)} bytes of image, the sidecar says {row['size']} at {row['offset']}"
    return "" if hashlib.sha256(data).hexdigest() == row["sha256"] else "the image's SHA-256 is not the sidecar's"


def _feed(fingerprint: DatasetFingerprint, sidecar: pa.Table) -> None:
    columns = (sidecar[name].to_pylist() for name in ("key", "sha256", "captions"))
    for key, sha256, captions in zip(*columns, strict=True):
        fingerprint.sample(key, sha256, captions)
    fingerprint.shard(sidecar.num_rows)


def _check_whole(manifest: dict[str, Any], rejects: pa.Table, rows: np.ndarray, counted: dict[str, Any]) -> list[Fault]:
    """What no single file shows: conservation of rows, reasons, and what was `counted` over all sidecars."""
    reasons = Counter(rejects["reason"].to_pylist())
    merged = reasons.pop("merged", 0)
    found = {
        "rows_in": len(rows),
        "written": len(rows) - rejects.num_rows,
        "merged": merged,
        "rejected": reasons.total(),
        "rejects": dict(reasons),
        **counted,
    }
    faults = [
        Fault(MANIFEST, f"{name} is {manifest[name]}, the files say {value}")
        for name, value in found.items()
        if manifest[name] != value
    ]
    if not np.array_equal(np.sort(rows), np.arange(manifest["rows_in"])):
        faults.append(Fault(MANIFEST, "not every plan row stands exactly once, in a sidecar or in the rejects"))
    return faults
