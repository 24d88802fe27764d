"""One shard: a deterministic tar, its sidecar and its rejects. Files are staged, renamed, and recorded in a receipt."""

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

from clipwright.data_prep.build.captions import select_captions
from clipwright.data_prep.build.images import StoredImage, store_image
from clipwright.data_prep.build.plan import Job, ShardTask, record_key
from clipwright.data_prep.sources.base import Record
from clipwright.pipeline.core.captions import CaptionError
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import canonical_json, staged_path, write_json
from clipwright.pipeline.core.text import shorten
from clipwright.pipeline.folders.output import WORK, publish
from clipwright.pipeline.folders.schema import (
    JSON_COLUMNS,
    REJECTS_SCHEMA,
    SIDECAR_SCHEMA,
    parquet_bytes,
    user_columns,
)
from clipwright.pipeline.pixels import PixelError

_TAR_BLOCK = 512  # bytes
MAX_DETAIL = 500  # characters of a reject's detail


def receipt_path(folder: Path, number: int) -> Path:
    return folder / WORK / f"shard-{number:06d}.json"


def rejects_path(folder: Path, number: int) -> Path:
    return folder / WORK / f"rejects-{number:06d}.parquet"


def read_receipt(folder: Path, number: int) -> dict[str, Any] | None:
    """Returns the receipt of a shard that an earlier run finished, or None if its files are missing or cut off."""
    path = receipt_path(folder, number)
    if not path.is_file():
        return None
    receipt = json.loads(path.read_text(encoding="utf-8"))
    if "tar" not in receipt:
        return receipt
    for kind in ("tar", "sidecar"):
        file = folder / receipt[kind]
        if not file.is_file() or file.stat().st_size != receipt.get(f"{kind}_bytes"):
            return None
    return receipt


def write_shard(job: Job, task: ShardTask) -> dict[str, Any]:
    """Writes one shard and returns its receipt: counts, file names, sizes and hashes.

    Files get their final names only when all of them are on disk. The receipt is written last.
    """
    shard = _ShardWriter(job, task.number)
    try:
        duplicate_rows = sorted(row for rows in task.duplicate_rows.values() for row in rows)
        # Their images are equal to the leading row's, so only the rest is kept in memory.
        duplicates = {record.row: replace(record, image=None) for record in job.source.read(duplicate_rows)}
        planned_keys = task.keys or [None] * len(task.rows)
        for record, planned_key in zip(job.source.read(task.rows.tolist()), planned_keys, strict=True):
            followers = [duplicates[row] for row in task.duplicate_rows.get(record.row, [])]
            shard.add(record, followers, planned_key, task.copies.get(record.row, 0))
        return shard.finish()
    except OSError as error:
        raise ClipwrightError(
            "E_OUTPUT",
            "a shard could not be written",
            where=shard.tar_path,
            found=str(error),
            fix="free disk space or fix the permissions, then run the same command again to resume",
        ) from error
    finally:
        with suppress(OSError, ValueError):
            shard.tar.close()  # first, because it flushes into the file
        shard.file.close()


class _ShardWriter:
    """A shard being written."""

    def __init__(self, job: Job, number: int) -> None:
        # webdataset imports torch. Only workers pay for that.
        from webdataset.writer import TarWriter  # noqa: PLC0415

        self.job = job
        self.number = number
        stem = f"{job.name}-{number:06d}"
        self.tar_path = job.folder / f"{stem}.tar"
        self.sidecar_path = job.folder / f"{stem}.parquet"
        self.file: BinaryIO = staged_path(self.tar_path).open("wb")
        self.hashing = _HashingFile(self.file)
        self.tar = TarWriter(cast(Any, self.hashing), mtime=0, user="", group="", encoder=False)
        self.rows: list[dict[str, Any]] = []
        self.columns: list[pa.RecordBatch] = []
        self.rejects: list[dict[str, Any]] = []
        self.merged = 0
        self.captions_dropped = 0
        self.blank: list[str] = []  # keys

    def add(self, record: Record, duplicates: list[Record], planned_key: str | None, copy: int) -> None:
        """Writes a leading row and accounts for its duplicates, or rejects all of them for the same reason."""
        key = record_key(record)
        if planned_key is not None and key != planned_key:
            raise ClipwrightError(
                "E_INPUT",
                "an image changed while it was being prepared",
                where=f"{record.source}, {record.source_key}",
                found=f"its key was {planned_key or 'none'} and is now {key or 'none'}",
                fix="do not modify the input during preparation, and run again with --fresh",
            )
        merge = self.job.duplicates == "merge"
        captions = list(record.captions)
        if merge:
            for duplicate in duplicates:
                captions.extend(duplicate.captions)
        try:
            if record.image is None:
                assert record.reject is not None, record.source
                raise PixelError(*record.reject)
            kept_captions, dropped = select_captions(captions) if self.job.source.captioned else ([], 0)
            stored = store_image(record.image, self.job.images)
        except (PixelError, CaptionError) as error:
            code, detail = error.args
            self._reject(record, code, detail, key)
            for duplicate in duplicates:
                self._reject(duplicate, code, f"same image as row {record.row}, which was rejected: {detail}", key)
            return
        self.captions_dropped += dropped
        if copy:
            key = f"{key}_{copy}"
        self._write(record, key, kept_captions, stored)
        reason = "merged" if merge else "duplicate"
        for duplicate in duplicates:
            self._reject(duplicate, reason, f"same image as row {record.row}", key, kept_row=record.row)
        if merge:
            self.merged += len(duplicates)

    def finish(self) -> dict[str, Any]:
        """Writes sidecar and rejects, gives all files their final names, writes and returns the receipt."""
        self.tar.close()
        receipt: dict[str, Any] = {
            "shard": self.number,
            "samples": len(self.rows),
            "merged": self.merged,
            "rejects": dict(sorted(Counter(row["reason"] for row in self.rejects).items())),
            "captions": sum(len(row["captions"]) for row in self.rows),
            "captions_dropped": self.captions_dropped,
            "blank": self.blank,
        }
        if self.rows:
            _sync_and_close(self.file)
            sidecar = self._write_sidecar()
            finals = (self.tar_path, self.sidecar_path)
            publish(*((staged_path(final), final) for final in finals), synced=True)
            receipt.update(
                tar=self.tar_path.name,
                tar_bytes=self.hashing.bytes,
                tar_sha256=self.hashing.sha256.hexdigest(),
                sidecar=self.sidecar_path.name,
                sidecar_bytes=sidecar.bytes,
                sidecar_sha256=sidecar.sha256.hexdigest(),
            )
        else:
            staged_path(self.tar_path).unlink()
        rejects = rejects_path(self.job.folder, self.number)
        _write_table(pa.Table.from_pylist(self.rejects, schema=REJECTS_SCHEMA), rejects)
        publish((staged_path(rejects), rejects), synced=True)
        write_json(receipt_path(self.job.folder, self.number), receipt)
        return receipt

    def _write(self, record: Record, key: str, captions: list[str], stored: StoredImage) -> None:
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
        metadata = {name: row[name] for name in JSON_COLUMNS}
        metadata["columns"] = json_columns(record.columns)
        members = {stored.extension: stored.data, "json": canonical_json(metadata).encode()}
        if captions:
            members["txt"] = captions[0].encode()
        # TarWriter sorts members by extension. Each has a header block and data padded to full blocks.
        offset = self.tar.tarstream.offset + _TAR_BLOCK
        for extension, data in members.items():
            if extension < stored.extension:
                offset += _TAR_BLOCK + -(-len(data) // _TAR_BLOCK) * _TAR_BLOCK
        self.tar.write({"__key__": key, **members})
        if stored.blank:
            self.blank.append(key)
        self.rows.append({**row, "offset": offset})
        self.columns.append(record.columns)

    def _reject(self, record: Record, reason: str, detail: str, key: str, kept_row: int | None = None) -> None:
        """Records a row that is not written. With `kept_row`, `key` is the key under which that row was written."""
        row: dict[str, Any] = {
            "row": record.row,
            "reason": reason,
            "detail": shorten(detail, MAX_DETAIL),
            "source": record.source,
            "key": key or None,
        }
        if kept_row is not None:
            content = {
                "captions": [_json_value(text) for text in record.captions if not isinstance(text, tuple)],
                "source_key": record.source_key,
                "columns": json_columns(record.columns),
            }
            row.update(kept_row=kept_row, kept_key=key, record=canonical_json(content))
        self.rejects.append(row)

    def _write_sidecar(self) -> _HashingFile:
        table = pa.Table.from_pylist(self.rows, schema=SIDECAR_SCHEMA)
        source_schema = self.job.source.columns
        source_table = pa.Table.from_batches(self.columns, schema=source_schema).combine_chunks()
        for field, column in zip(user_columns(source_schema), source_table.columns, strict=True):
            table = table.append_column(field, column)
        return _write_table(table, self.sidecar_path)


class _HashingFile:
    """A file that counts and hashes (SHA-256) the bytes written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _write_table(table: pa.Table, path: Path) -> _HashingFile:
    """Writes parquet to disk under the staged name of `path`; returns the closed file with its size and SHA-256."""
    with staged_path(path).open("wb") as file:
        hashing = _HashingFile(file)
        hashing.write(parquet_bytes(table))
        _sync_and_close(file)
    return hashing


def json_columns(columns: pa.RecordBatch) -> dict[str, Any]:
    """Returns one row of typed columns as values that JSON can hold."""
    values: dict[str, Any] = {}
    for field, column in zip(columns.schema, columns.columns, strict=True):
        if pa.types.is_temporal(field.type):
            column = column.cast(pa.string())  # Python datetimes have no nanoseconds
        try:
            values[field.name] = _json_value(column[0].as_py())
        except UnicodeDecodeError:
            values[field.name] = None
    return values


def _json_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _json_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)
