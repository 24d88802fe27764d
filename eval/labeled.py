"""Labeled images: a dataset folder or parquet files, as a table of labels and images by row."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.eval.encode import ImageSource, dataset_images
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, file_sha256
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.folders.cache import CacheConfig
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.remote import is_remote
from clipwright.pipeline.pixels import bytes_key

IMAGE_COLUMN = "image"  # by default, the column of a parquet table with image files: bytes, or structs with bytes

READ_ROWS = 64  # rows of images that are read at a time


class LabeledSet(Protocol):
    """A set of images with further columns that hold their labels."""

    name: str
    fingerprint: str
    samples: int
    columns: list[str]

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Returns the values of `columns` for every row."""
        ...

    def images(self, rows: np.ndarray) -> Iterator[ImageSource]:
        """Yields the images of `rows`, which must ascend."""
        ...


def open_labeled(place: str | Path, cache: CacheConfig | None = None, image_column: str = IMAGE_COLUMN) -> LabeledSet:
    """Opens a dataset folder, local or remote, or the parquet files that a path or glob names.

    image_column: column of the parquet files with the images. Raises E_CONFIG_VALUE if it is set for a dataset folder,
    E_INPUT, E_TABLE, E_COLUMN, E_DATA_SMALL, and E_REMOTE for a remote dataset.
    """
    is_dataset = is_remote(str(place)) or Path(place).is_dir()
    if is_dataset and image_column != IMAGE_COLUMN:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the image column applies to parquet files only",
            where=f"benchmark.image: {image_column}",
            found=f"{place} is a dataset folder, which has its images in tars",
            fix="leave out benchmark.image",
        )
    data = LabeledDataset(place, cache) if is_dataset else LabeledTable(_find_files(str(place)), image_column)
    if data.samples == 0:
        raise ClipwrightError(
            "E_DATA_SMALL",
            "the labeled set is empty",
            where=place,
            found="0 rows",
            fix="choose a labeled set that has rows",
        )
    return data


class LabeledDataset:
    """The rows of a dataset folder. The columns are those of its sidecars."""

    def __init__(self, place: str | Path, cache: CacheConfig | None) -> None:
        self.data = Dataset(place, cache=cache)
        self.name = Path(place).name
        self.fingerprint, self.samples = self.data.fingerprint, self.data.samples
        self.columns = list(self.data.sidecar(0).column_names) if self.data.sizes else []

    def read(self, columns: Sequence[str]) -> pa.Table:
        shards = range(len(self.data.sizes))
        return pa.concat_tables([self.data.sidecar(shard).select(list(columns)) for shard in shards])

    def images(self, rows: np.ndarray) -> Iterator[ImageSource]:
        return dataset_images(self.data, rows.tolist())


class LabeledTable:
    """The rows of parquet files in order. The key of an image is computed from its bytes."""

    def __init__(self, files: list[Path], image_column: str) -> None:
        self.files, self.image_column = files, image_column
        self.schemas = [_read_schema(path) for path in files]
        self.name = files[0].name
        self.columns = [name for name in self.schemas[0].names if name != image_column]
        for path, schema in zip(files, self.schemas, strict=True):
            if image_column not in schema.names:
                raise _missing_images(image_column, path, schema)
            for name in self.columns:
                if name not in schema.names:
                    raise _missing_column(name, path, schema)
            _check_image_column(path, schema.field(image_column))
        self.sizes = [pq.read_metadata(path).num_rows for path in files]
        self.samples = sum(self.sizes)
        self.fingerprint = digest([file_sha256(path) for path in files])

    def read(self, columns: Sequence[str]) -> pa.Table:
        parts: list[pa.Table] = []
        for path in self.files:
            try:
                parts.append(pq.read_table(path, columns=list(columns)).select(list(columns)).replace_schema_metadata())
            except (OSError, pa.ArrowException) as error:
                raise _unreadable_table(path, str(error)) from None
            schema, first_schema = parts[-1].schema, parts[0].schema
            if not schema.equals(first_schema):
                types = "; ".join(
                    f"{field.name} {field.type}" for field in schema if not field.equals(first_schema.field(field.name))
                )
                raise _unreadable_table(path, f"its columns have other types than those of {self.name}: {types}")
        return pa.concat_tables(parts)

    def images(self, rows: np.ndarray) -> Iterator[ImageSource]:
        file_start = 0
        for path, size in zip(self.files, self.sizes, strict=True):
            file_rows = rows[(rows >= file_start) & (rows < file_start + size)] - file_start
            try:
                yield from _table_images(path, file_rows, self.image_column)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable_table(path, str(error)) from None
            file_start += size


def _table_images(path: Path, rows: np.ndarray, column: str) -> Iterator[ImageSource]:
    # With a buffer, a row group of photos is read page by page, not at once.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        group_start = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            group_rows = rows[(rows >= group_start) & (rows < group_start + size)]
            if len(group_rows):
                wanted = set(group_rows.tolist())
                row = group_start
                for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        if row in wanted:
                            yield _table_image(path, row, value.as_py())
                        row += 1
            group_start += size


def _table_image(path: Path, row: int, value: Any) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("bytes")
    data: bytes = value or b""
    return ImageSource(
        key=bytes_key(data), where=f"{path}, row {row}", fix="fix the image or remove the row", read=lambda: data
    )


def _find_files(pattern: str) -> list[Path]:
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        raise ClipwrightError(
            "E_INPUT",
            "the labeled set does not exist",
            where=pattern,
            found=f"neither a dataset folder nor a file, relative to {Path.cwd()}",
            fix="check the path, and quote a glob so that the shell does not expand it",
        )
    return files


def _read_schema(path: Path) -> pa.Schema:
    if path.suffix.lower() != ".parquet":
        suffix = path.suffix or "missing"
        raise _unreadable_table(path, f"the file suffix is {suffix} (allowed: .parquet, or a dataset folder)")
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable_table(path, str(error)) from None


def _holds_bytes(column: pa.Field) -> bool:
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_image_column(path: Path, column: pa.Field) -> None:
    if not _holds_bytes(column):
        raise ClipwrightError(
            "E_COLUMN",
            "the column does not hold images",
            where=f"{path}: {column.name}",
            found=f"its type is {column.type} (allowed: bytes, or a struct with bytes)",
            fix="store the image files in it, or make a dataset folder with `clipwright prep`",
        )


def _missing_images(name: str, path: Path, schema: pa.Schema) -> ClipwrightError:
    candidates = [column.name for column in schema if _holds_bytes(column)]
    return ClipwrightError(
        "E_COLUMN",
        "the table has no column with images of this name",
        where=f"{path}: {name}",
        found=f"the table has the columns {', '.join(schema.names)}",
        fix=f"set benchmark.image={candidates[0]}" if candidates else "set benchmark.image to the column with images",
    )


def _missing_column(name: str, path: Path, schema: pa.Schema) -> ClipwrightError:
    return ClipwrightError(
        "E_COLUMN",
        "the column does not exist",
        where=f"{path}: {name}",
        found=f"the table has the columns {', '.join(schema.names)}",
        fix=nearest(name, schema.names) or "give files that all have the same columns",
    )


def _unreadable_table(path: Path, reason: str) -> ClipwrightError:
    return ClipwrightError(
        "E_TABLE",
        "the table cannot be read",
        where=path,
        found=reason,
        fix="write the labeled set as parquet files that all have the same columns",
    )
