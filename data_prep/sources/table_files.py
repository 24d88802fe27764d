"""Table files: found by glob and opened as parquet, whatever their format."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, json

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".parquet")
_CSV_BLOCK_BYTES = 1 << 24
_JSON_BLOCK_BYTES = 1 << 26  # a row must fit in a block
_PARQUET_BUFFER_BYTES = 1 << 20
_ROW_GROUP_ROWS = 4096  # of converted text files


@dataclass(frozen=True)
class TableFile:
    """One file of a table. `converted` is a text file's content as parquet, for random access to its rows."""

    path: Path
    sha256: str
    schema: pa.Schema
    rows: int
    converted: bytes | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent

    def open(self) -> AbstractContextManager[pq.ParquetFile]:
        if self.converted is not None:
            return pq.ParquetFile(pa.BufferReader(self.converted))
        # Buffered: pages are read one by one, so that a row group of photos need not fit in memory.
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES)


def find_files(path: str | list[str]) -> list[Path]:
    """Returns the files of a path, a glob or a list of both, each once; those of a glob sorted. Raises E_INPUT."""
    files: dict[Path, None] = {}
    for pattern in [path] if isinstance(path, str) else path:
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        matches = [Path(name) for name in names if Path(name).is_file()]
        if not matches:
            raise ClipwrightError(
                "E_INPUT",
                "the input file does not exist",
                where=f"source.path: {pattern}",
                found=f"no file matches in {Path.cwd()}",
                fix="check the path; quote a glob so that the shell does not expand it",
            )
        files.update(dict.fromkeys(matches))
    if not files:
        raise ClipwrightError(
            "E_INPUT",
            "no input file is given",
            where="source.path",
            found="an empty list",
            fix="set source.path to a file or a glob",
        )
    return list(files)


def open_file(path: Path, *, as_text: Sequence[str] = (), as_bytes: Sequence[str] = ()) -> TableFile:
    """Opens one table file. CSV columns in `as_text` and `as_bytes` get that type; other types are inferred.

    Raises E_TABLE for an unknown format or a file that cannot be read.
    """
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise _unreadable(path, f"the extension is {extension or 'missing'} (allowed: {', '.join(EXTENSIONS)})")
    try:
        digest = file_sha256(path)
        if extension == ".parquet":
            with pq.ParquetFile(path) as file:
                return TableFile(path, digest, _without_metadata(file.schema_arrow), file.metadata.num_rows)
        if extension == ".jsonl":
            table = json.read_json(path, read_options=json.ReadOptions(block_size=_JSON_BLOCK_BYTES))
        else:
            types = {name: pa.string() for name in as_text}
            types.update({name: pa.binary() for name in as_bytes})
            table = _read_csv(path, "\t" if extension == ".tsv" else ",", types)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, str(error)) from None
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    return TableFile(path, digest, _without_metadata(table.schema), table.num_rows, sink.getvalue().to_pybytes())


def _without_metadata(schema: pa.Schema) -> pa.Schema:
    """Removes the metadata that other tools (pandas, datasets) store in a schema."""
    return pa.schema([pa.field(field.name, field.type) for field in schema])


def _read_csv(path: Path, delimiter: str, types: dict[str, Any]) -> pa.Table:
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=types),
    )


def _unreadable(path: Path, reason: str) -> ClipwrightError:
    return ClipwrightError(
        "E_TABLE",
        "the table cannot be read",
        where=path,
        found=reason,
        fix="check the file, or write it again as csv, tsv, jsonl or parquet",
    )
