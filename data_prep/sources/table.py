"""Source `table`: csv, tsv, JSON or parquet files with captions, and images as bytes, base64 or paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipwright.data_prep.sources.base import NO_CAPTIONS, SOURCES, Record, Source, SourceConfig
from clipwright.data_prep.sources.tables.base import (
    Batch,
    TableFile,
    compute,
    find_column,
    is_text,
    nearest_column,
    type_at,
)
from clipwright.data_prep.sources.tables.captions import CaptionReader, list_notes
from clipwright.data_prep.sources.tables.files import TextOptions, find_files, open_files
from clipwright.data_prep.sources.tables.images import check_image_type, is_url, read_cell
from clipwright.data_prep.sources.tables.types import common_type
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.text import listed, shown

_SAMPLE_ROWS = 64  # of which the kind of the images is judged


@configclass
class TableConfig(SourceConfig):
    """A table of pairs. All columns besides image and caption are kept with their types.

    Formats: csv, tsv, jsonl, parquet, and JSON files that hold an array of objects or COCO annotations; the text
    formats also as .gz. Text stays as it is written; a csv column is stored as a number only if nothing is lost.
    """

    path: str | list[str]
    """Table file, glob, or list of both: csv, tsv, jsonl, json, parquet."""
    image: str = "image"
    """Column with the images: bytes, base64, structs {bytes, path}, or paths."""
    caption: str = "caption"
    """Column of texts or lists of texts, a field of objects (`sentences.raw`), or a template; `none`: no captions."""
    root: str | None = None
    """Folder that image paths are relative to and may not leave; null uses the table's folder."""
    where: dict[str, Any] = field(default_factory=dict)
    """Row filter: column → required value, or list of allowed values."""
    delimiter: str | None = None
    """Character between the fields of a csv or tsv file, or `tab`; null: a comma in csv, a tab in tsv."""
    quote: str | None = None
    """Character around quoted fields of a csv or tsv file, or `none`; null: `"` in csv, none in tsv."""
    encoding: str = "utf-8"
    """Encoding of text files; a byte order mark in a file takes precedence."""


class TableSource(Source):
    """Rows of one or more tables. See TableConfig."""

    def __init__(self, config: TableConfig) -> None:
        self.image = config.image
        self.caption = config.caption
        self.captioned = config.caption != NO_CAPTIONS
        self.where = dict(config.where)
        self.root = None if config.root is None else _folder(config.root)
        self.options = TextOptions.read(config.delimiter, config.quote, config.encoding)
        self._captions = CaptionReader(config.caption) if self.captioned else None
        needed = {self.image: "source.image", **dict.fromkeys(self.where, "source.where")}
        if self._captions is not None:
            needed.update(dict.fromkeys(self._captions.names, "source.caption"))
        self.files = open_files(find_files(config.path), self.options, needed)
        self._check_columns()
        first = self.files[0]
        dropped = {self.image}
        if self._captions is not None and not self._captions.is_template:
            dropped.add(self.caption)
        names = list({name: None for file in self.files for name in file.types if name not in dropped})
        self.columns = pa.schema([(name, common_type(name, self.files)) for name in names])
        for file in self.files:
            file.leave_out(dropped)
        notes = [note for file in self.files for note in file.notes]
        self._selected = [self._select_rows(file) for file in self.files]
        counts = [
            file.rows if rows is None else len(rows) for file, rows in zip(self.files, self._selected, strict=True)
        ]
        self._starts = np.cumsum([0, *counts])
        self.count = int(self._starts[-1])
        if self.where and not self.count and any(file.rows for file in self.files):
            raise self._nothing_selected(first)
        self.notes = [*notes, *self._check_sample()]
        self._hashes: list[str] = []
        self._stamp: list[list[int]] = []

    def scan(self, *, quiet: bool = False) -> None:
        """Hashes the files, for the identity."""
        self._stamp = self._file_stamps()
        self._hashes = []
        with Progress("hash", len(self.files), "files", quiet=quiet) as progress:
            for file in self.files:
                self._hashes.append(file_sha256(file.path))
                progress.add(1)

    def scan_result(self) -> dict[str, Any]:
        return {"sha256": self._hashes, "stamp": self._stamp}

    def load_scan(self, result: dict[str, Any]) -> bool:
        if result["stamp"] != self._file_stamps():
            return False
        self._hashes, self._stamp = result["sha256"], result["stamp"]
        return True

    def identity(self) -> dict[str, Any]:
        if not self._hashes:
            self.scan(quiet=True)
        return {
            "name": "table",
            "image": self.image,
            "caption": self.caption,
            "where": self.where,
            "root": None if self.root is None else self.root.name,
            "delimiter": self.options.delimiter,
            "quote": self.options.quote,
            "encoding": self.options.encoding,
            "files": [
                {"name": file.name, "sha256": digest} for file, digest in zip(self.files, self._hashes, strict=True)
            ],
        }

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        plan_rows = np.asarray(rows, dtype=np.int64)
        file_numbers = np.searchsorted(self._starts, plan_rows, side="right") - 1
        for number in np.unique(file_numbers):
            file, start = self.files[number], self._starts[number]
            rows_in_file = plan_rows[file_numbers == number] - start
            selected = self._selected[number]
            file_rows = rows_in_file if selected is None else selected[rows_in_file]
            plan_row = dict(zip(file_rows.tolist(), (rows_in_file + start).tolist(), strict=True))
            for batch_rows, batch in file.batches(file_rows):
                yield from self._records(file, batch, batch_rows.tolist(), plan_row)

    def _records(
        self, file: TableFile, batch: Batch, file_rows: list[int], plan_row: dict[int, int]
    ) -> Iterator[Record]:
        arrays = [batch.column(column.name, column.type) for column in self.columns]
        columns = pa.RecordBatch.from_arrays(arrays, schema=self.columns)
        images = batch.values(find_column(self.image, file, "source.image"))
        captions = [[] for _ in file_rows]
        if self._captions is not None:
            captions = self._captions.read(batch, self._captions.paths(file))
        root = self.root or file.folder
        for i, file_row in enumerate(file_rows):
            image, source_key, reject = read_cell(images[i], root, is_text_file=file.is_text)
            images[i] = None  # only one decoded image in memory
            source = f"{file.name}#{file_row}"
            yield Record(plan_row[file_row], image, captions[i], columns.slice(i, 1), source, source_key, reject)

    def _check_columns(self) -> None:
        """Raises E_COLUMN unless every file has the columns that are needed, with types that can be used."""
        for file in self.files:
            path = find_column(self.image, file, "source.image")
            kind = type_at(file, path, "source.image")
            if not file.is_text or pa.types.is_nested(kind):
                check_image_type(kind, file, self.image)
            if self._captions is not None:
                self._captions.check(file)
            for name in self.where:
                if name not in file.types:
                    raise ClipwrightError(
                        "E_COLUMN",
                        "the table has no such column",
                        where=f"{file.path}: {shown(name)}",
                        found=f"its columns are {listed(list(file.types))}",
                        fix=nearest_column(name, list(file.types)) or "set source.where to columns of the table",
                    )

    def _select_rows(self, file: TableFile) -> np.ndarray | None:
        """Returns the numbers of the file's rows that match `where`; None for all rows."""
        if not self.where:
            return None
        keep = np.ones(file.rows, dtype=bool)
        for name, wanted in self.where.items():
            kind = common_type(name, self.files)
            values = wanted if isinstance(wanted, list) else [wanted]
            try:
                allowed = pa.array(values).cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                raise ClipwrightError(
                    "E_CONFIG_VALUE",
                    "the value does not fit the column's type",
                    where=f"source.where.{name}",
                    found=f"{shown(wanted)} for a column of type {kind}: {error}",
                    fix="give a value, or a list of values, of that type",
                ) from None
            keep &= compute.is_in(file.column(name, kind), value_set=allowed).to_numpy()
        return np.flatnonzero(keep)

    def _nothing_selected(self, file: TableFile) -> ClipwrightError:
        found: list[str] = []
        for name in self.where:
            values = compute.unique(file.column(name, common_type(name, self.files))).slice(0, 21).to_pylist()
            found.append(f"{name} is {listed([str(value) for value in values], 10)}")
        wanted = ", ".join(f"{name}={shown(value)}" for name, value in self.where.items())
        return ClipwrightError(
            "E_PREP_EMPTY",
            "no row of the table matches the filter",
            where=f"source.where: {wanted}",
            found=f"in {format_count(file.rows, 'row')} of {shown(file.name)}, {'; '.join(found)}",
            fix="set source.where to values that occur",
        )

    def _check_sample(self) -> list[str]:
        """Returns notes about the first rows. Raises E_COLUMN if the images are URLs, before all rows are read."""
        notes: list[str] = []
        for file, selected in zip(self.files, self._selected, strict=True):
            path = find_column(self.image, file, "source.image")
            rows = np.arange(min(file.rows, _SAMPLE_ROWS)) if selected is None else selected[:_SAMPLE_ROWS]
            if not len(rows) or not (file.is_text or is_text(type_at(file, path, "source.image"))):
                continue
            _, batch = next(file.batches(rows))
            values = [value for value in batch.values(path) if value is not None]
            if values and all(map(is_url, values)):
                raise ClipwrightError(
                    "E_COLUMN",
                    "the image column holds URLs, which are not downloaded yet",
                    where=f"{file.path}: {self.image}",
                    found=shown(values[0]),
                    fix="download the images first, for example with img2dataset, whose tars `clipwright data index` "
                    "reads; or set source.image to a column with paths of files",
                )
            if self._captions is not None and not notes:
                captions = self._captions.read(batch, self._captions.paths(file))
                notes += list_notes(file, [text for texts in captions for text in texts if isinstance(text, str)])
        return notes

    def _file_stamps(self) -> list[list[int]]:
        stats = [file.path.stat() for file in self.files]
        return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise ClipwrightError(
            "E_INPUT",
            "the folder of the images does not exist",
            where=f"source.root: {shown(path)}",
            found="it is a file" if Path(path).exists() else f"no such folder in {Path.cwd()}",
            fix="check the path",
        )
    return Path(path).resolve()


SOURCES.add(TableConfig, TableSource, {"table": {}})
