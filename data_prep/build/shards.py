"""One shard: a deterministic tar, its sidecar and its rejects, staged and renamed, with a receipt written last."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.build.captions import choose
from clipwright.data_prep.build.images import Stored, store
from clipwright.data_prep.build.plan import WORK, Job, ShardTask, record_key
from clipwright.data_prep.sources.base import Record
from clipwright.pipeline.core.captions import CaptionError
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import canonical_json, fsync_folder, write_json
from clipwright.pipeline.pixels import PixelError

SIDECAR = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("dhash", pa.uint64()),
        ("source", pa.string()),
        ("source_key", pa.string()),
    ]
)
REJECTS = pa.schema(
    [
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("kept_row", pa.int64()),
        ("kept_key", pa.string()),
        ("record", pa.string()),
    ]
)


def user_columns(schema: pa.Schema) -> pa.Schema:
    """A source's columns as the sidecar names them: one of a name that the sidecar uses itself gets `input_` before."""
    taken = {*SIDECAR.names, *schema.names}
    fields: list[pa.Field] = []
    for field in schema:
        name = field.name
        if name in SIDECAR.names:
            while name in taken:
                name = f"input_{name}"
            taken.add(name)
        fields.append(pa.field(name, field.type))
    return pa.schema(fields)


def receipt_path(folder: Path, number: int) -> Path:
    return folder / WORK / f"shard-{number:06d}.json"


def rejects_path(folder: Path, number: int) -> Path:
    return folder / WORK / f"rejects-{number:06d}.parquet"


def write_shard(job: Job, task: ShardTask) -> dict[str, Any]:
    """Writes one shard and returns its receipt: counts, file names, sizes and hashes.

    Nothing lies under a final name before all of it is on disk; the receipt, written last, says that it is.
    """
    shard = _Shard(job, task.number)
    try:
        twins = {record.row: replace(record, image=None) for record in job.source.read(_twin_rows(task))}
        known = task.keys or [None] * len(task.rows)
        for record, key in zip(job.source.read(task.rows.tolist()), known, strict=True):
            shard.sample(record, [twins[row] for row in task.twins.get(record.row, [])], key, task.copies)
        return shard.close()
    except OSError as error:
        raise ClipwrightError(
            "E_OUTPUT",
            "a shard that cannot be written",
            where=shard.tar_path,
            found=str(error),
            fix="free space or mend permissions and run the same command again; it goes on where it stopped",
        ) from error
    finally:
        with suppress(OSError, ValueError):
            shard.tar.close()  # before its file, into which it flushes
        shard.file.close()


def _twin_rows(task: ShardTask) -> list[int]:
    return sorted(row for rows in task.twins.values() for row in rows)


class _Shard:
    """A shard being written."""

    def __init__(self, job: Job, number: int) -> None:
        # webdataset imports torch, for which only workers wait.
        from webdataset.writer import TarWriter  # noqa: PLC0415

        self.job, self.number = job, number
        self.stem = f"{job.name}-{number:06d}"
        self.tar_path, self.sidecar_path = job.folder / f"{self.stem}.tar", job.folder / f"{self.stem}.parquet"
        self.file: BinaryIO = _staged(self.tar_path).open("wb")
        self.hashing = _Hashing(self.file)
        self.tar = TarWriter(cast(Any, self.hashing), mtime=0, user="", group="", encoder=False)
        self.rows: list[dict[str, Any]] = []
        self.columns: list[pa.RecordBatch] = []
        self.rejects: list[dict[str, Any]] = []
        self.merged = self.dropped = 0

    def sample(self, record: Record, twins: list[Record], known: str | None, copies: dict[int, int]) -> None:
        """Writes a row and accounts for its twins, or rejects them all for the same reason."""
        key, merge = record_key(record), self.job.duplicates == "merge"
        if known is not None and key != known:
            raise ClipwrightError(
                "E_INPUT",
                "an image that changed while it was read",
                where=f"{record.source}, {record.source_key}",
                found=f"its key was {known or 'none'} and is {key or 'none'}",
                fix="leave the input alone while it is prepared, and run again with --fresh",
            )
        try:
            if record.image is None:
                assert record.reject is not None, record.source
                raise PixelError(*record.reject)
            captions, dropped = choose([*record.captions, *(c for t in twins if merge for c in t.captions)])
            stored = store(record.image, self.job.images)
        except (PixelError, CaptionError) as error:
            self._refuse(record, twins, key, error)
            return
        self.dropped += dropped
        key += f"_{copies[record.row]}" if record.row in copies else ""
        self._write(record, key, captions, stored)
        reason = "merged" if merge else "duplicate"
        for twin in twins:
            self._reject(twin, reason, f"same image as row {record.row}", key, (record.row, key))
        self.merged += len(twins) if merge else 0

    def _refuse(self, record: Record, twins: list[Record], key: str, error: PixelError | CaptionError) -> None:
        code, detail = error.args
        self._reject(record, code, detail, key)
        for twin in twins:
            self._reject(twin, code, f"same image as row {record.row}, which was refused: {detail}", key)

    def _write(self, record: Record, key: str, captions: list[str], stored: Stored) -> None:
        row = {
            "row": record.row,
            "key": key,
            "captions": captions,
            "width": stored.width,
            "height": stored.height,
            "size": len(stored.data),
            "sha256": stored.sha256,
            "dhash": stored.dhash,
            "source": record.source,
            "source_key": record.source_key,
        }
        named = ("key", "captions", "width", "height", "sha256", "source", "source_key")
        about = {name: row[name] for name in named} | {"columns": plain_columns(record.columns)}
        members = {
            stored.extension: stored.data,
            "json": canonical_json(about).encode(),
            "txt": captions[0].encode(),
        }
        # TarWriter sorts members by extension; each takes a header block and its data, padded to blocks of 512.
        start = self.tar.tarstream.offset
        before = sum(512 + -(-len(members[name]) // 512) * 512 for name in members if name < stored.extension)
        self.tar.write({"__key__": key, **members})
        self.rows.append({**row, "offset": start + before + 512})
        self.columns.append(record.columns)

    def _reject(self, record: Record, reason: str, detail: str, key: str, kept: tuple[int, str] | None = None) -> None:
        row: dict[str, Any] = {"row": record.row, "reason": reason, "detail": detail, "source": record.source}
        row["key"] = key or None
        if kept is not None:
            texts = [_plain(text) for text in record.captions if not isinstance(text, tuple)]
            whole = {"captions": texts, "source_key": record.source_key}
            row |= {"kept_row": kept[0], "kept_key": kept[1]}
            row["record"] = canonical_json({**whole, "columns": plain_columns(record.columns)})
        self.rejects.append(row)

    def close(self) -> dict[str, Any]:
        self.tar.close()
        receipt: dict[str, Any] = {
            "shard": self.number,
            "samples": len(self.rows),
            "merged": self.merged,
            "rejects": dict(sorted(Counter(row["reason"] for row in self.rejects).items())),
            "captions": sum(len(row["captions"]) for row in self.rows),
            "captions_dropped": self.dropped,
        }
        if self.rows:
            _seal(self.file)
            sidecar = self._write_sidecar()
            _staged(self.tar_path).replace(self.tar_path)
            _staged(self.sidecar_path).replace(self.sidecar_path)
            receipt |= {
                "tar": self.tar_path.name,
                "tar_bytes": self.hashing.bytes,
                "tar_sha256": self.hashing.sha256.hexdigest(),
                "sidecar": self.sidecar_path.name,
                "sidecar_bytes": sidecar.bytes,
                "sidecar_sha256": sidecar.sha256.hexdigest(),
            }
        else:
            _staged(self.tar_path).unlink()
        part = rejects_path(self.job.folder, self.number)
        _write_table(pa.Table.from_pylist(self.rejects, schema=REJECTS), part)
        _staged(part).replace(part)
        fsync_folder(self.job.folder)
        write_json(receipt_path(self.job.folder, self.number), receipt)
        return receipt

    def _write_sidecar(self) -> _Hashing:
        ours = pa.Table.from_pylist(self.rows, schema=SIDECAR)
        named = user_columns(self.job.source.columns)
        theirs = pa.Table.from_batches(self.columns, schema=self.job.source.columns).combine_chunks()
        for field, column in zip(named, theirs.columns, strict=True):
            ours = ours.append_column(field, column)
        return _write_table(ours, self.sidecar_path)


class _Hashing:
    """A file that knows the bytes and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _staged(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _seal(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _write_table(table: pa.Table, path: Path) -> _Hashing:
    """Writes parquet under the staged name of `path`, to disk; returns what knows its size and SHA-256."""
    with _staged(path).open("wb") as file:
        hashing = _Hashing(file)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        hashing.write(sink.getvalue().to_pybytes())
        _seal(file)
    return hashing


def plain_columns(columns: pa.RecordBatch) -> dict[str, Any]:
    """One row of typed columns as values that JSON can hold."""
    made: dict[str, Any] = {}
    for field, column in zip(columns.schema, columns.columns, strict=True):
        if pa.types.is_temporal(field.type):
            column = column.cast(pa.string())  # Python has no nanoseconds
        try:
            made[field.name] = _plain(column[0].as_py())
        except UnicodeDecodeError:
            made[field.name] = None
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def read_receipt(folder: Path, number: int) -> dict[str, Any] | None:
    """The receipt of a shard that an earlier run finished, if its files are there as it says."""
    path = receipt_path(folder, number)
    if not path.is_file():
        return None
    receipt = json.loads(path.read_text(encoding="utf-8"))
    tar = receipt.get("tar")
    if tar is None:
        return receipt
    for kind in ("tar", "sidecar"):
        path = folder / receipt[kind]
        if not path.is_file() or path.stat().st_size != receipt.get(f"{kind}_bytes"):
            return None
    return receipt
