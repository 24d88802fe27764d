"""Labelled images: a dataset folder or parquet files, as columns of labels and pictures by row."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.eval.encode import Picture, pictures
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, file_sha256
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.folders.cache import CacheConfig
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.remote import is_remote
from clipwright.pipeline.pixels import bytes_key

IMAGE = "image"  # the column of a table that holds the files, as bytes or as a struct with bytes

BATCH = 64  # rows of images read at a time


class Labelled(Protocol):
    """A set of images whose other columns say what they show."""

    name: str
    fingerprint: str
    samples: int
    columns: list[str]

    def read(self, columns: Sequence[str]) -> pa.Table:
        """The values of `columns`, every row."""
        ...

    def pictures(self, rows: np.ndarray) -> Iterator[Picture]:
        """The images of `rows`, which ascend."""
        ...


def open_labelled(place: str | Path, cache: CacheConfig | None = None) -> Labelled:
    """A dataset folder or a bucket's, or the parquet files that a path or glob names.

    Raises E_INPUT, E_TABLE, E_COLUMN, E_DATA_SMALL, and of a remote one E_REMOTE.
    """
    dataset = is_remote(str(place)) or Path(place).is_dir()
    data = LabelledDataset(place, cache) if dataset else LabelledTable(_files(str(place)))
    if data.samples == 0:
        raise ClipwrightError(
            "E_DATA_SMALL", "a labelled set without images", where=place, found="0 rows", fix="give one that has rows"
        )
    return data


class LabelledDataset:
    """The rows of a dataset folder: its sidecars' columns."""

    def __init__(self, place: str | Path, cache: CacheConfig | None) -> None:
        self.data = Dataset(place, cache=cache)
        self.name, self.fingerprint, self.samples = Path(place).name, self.data.fingerprint, self.data.samples
        self.columns = list(self.data.sidecar(0).column_names) if self.data.sizes else []

    def read(self, columns: Sequence[str]) -> pa.Table:
        shards = range(len(self.data.sizes))
        return pa.concat_tables([self.data.sidecar(shard).select(list(columns)) for shard in shards])

    def pictures(self, rows: np.ndarray) -> Iterator[Picture]:
        return pictures(self.data, rows.tolist())


class LabelledTable:
    """The rows of parquet files, one after another; an image's key is that of its bytes."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.schemas = [_schema(path) for path in files]
        self.name = files[0].name
        self.columns = [name for name in self.schemas[0].names if name != IMAGE]
        for path, schema in zip(files, self.schemas, strict=True):
            for name in (IMAGE, *self.columns):
                if name not in schema.names:
                    raise _no_column(name, path, schema)
            _check_image(path, schema.field(IMAGE))
        self.sizes = [pq.read_metadata(path).num_rows for path in files]
        self.samples = sum(self.sizes)
        self.fingerprint = digest([file_sha256(path) for path in files])

    def read(self, columns: Sequence[str]) -> pa.Table:
        parts: list[pa.Table] = []
        for path in self.files:
            try:
                parts.append(pq.read_table(path, columns=list(columns)).select(list(columns)).replace_schema_metadata())
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(path, str(error)) from None
            mine, first = parts[-1].schema, parts[0].schema
            if not mine.equals(first):
                kinds = "; ".join(
                    f"{field.name} {field.type}" for field in mine if not field.equals(first.field(field.name))
                )
                raise _unreadable(path, f"its columns are not of the types that {self.name} has: {kinds}")
        return pa.concat_tables(parts)

    def pictures(self, rows: np.ndarray) -> Iterator[Picture]:
        begin = 0
        for path, size in zip(self.files, self.sizes, strict=True):
            inside = rows[(rows >= begin) & (rows < begin + size)] - begin
            try:
                yield from _table_pictures(path, inside)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(path, str(error)) from None
            begin += size


def _table_pictures(path: Path, rows: np.ndarray) -> Iterator[Picture]:
    # Buffered: a row group of photos is read page by page, not whole.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        begin = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            left = rows[(rows >= begin) & (rows < begin + size)]
            if len(left):
                wanted, at = set(left.tolist()), begin
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=[IMAGE]):
                    column = batch.column(0)
                    for i in range(batch.num_rows):
                        if at + i in wanted:
                            yield _picture(path, at + i, column[i].as_py())
                    at += batch.num_rows
            begin += size


def _picture(path: Path, row: int, value: Any) -> Picture:
    data: bytes = (value.get("bytes") if isinstance(value, dict) else value) or b""
    return Picture(
        key=bytes_key(data), where=f"{path}, row {row}", fix="mend the image or remove the row", read=lambda: data
    )


def _files(pattern: str) -> list[Path]:
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        raise ClipwrightError(
            "E_INPUT",
            "no labelled set",
            where=pattern,
            found=f"neither a dataset folder nor a file, seen from {Path.cwd()}",
            fix="check the path, and quote a glob so that the shell leaves it alone",
        )
    return files


def _schema(path: Path) -> pa.Schema:
    if path.suffix.lower() != ".parquet":
        raise _unreadable(path, f"its name ends in {path.suffix or 'nothing'}; dataset folders and .parquet are read")
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, str(error)) from None


def _check_image(path: Path, column: pa.Field) -> None:
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ClipwrightError(
            "E_COLUMN",
            "a column that holds no images",
            where=f"{path}: {IMAGE}",
            found=f"its type is {column.type}; bytes, or a struct with bytes, is read",
            fix="put the image files themselves into it, or make a dataset folder with clipwright prep",
        )


def _no_column(name: str, path: Path, schema: pa.Schema) -> ClipwrightError:
    return ClipwrightError(
        "E_COLUMN",
        "no such column",
        where=f"{path}: {name}",
        found=f"it has the columns {', '.join(schema.names)}",
        fix=nearest(name, schema.names) or "give a labelled table: image, and a column with the label",
    )


def _unreadable(path: Path, reason: str) -> ClipwrightError:
    return ClipwrightError(
        "E_TABLE",
        "a table that cannot be read",
        where=path,
        found=reason,
        fix="write the set as parquet, all files with the same columns",
    )
