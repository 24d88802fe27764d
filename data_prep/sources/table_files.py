"""Files of tables: found by glob, opened as parquet whatever they are written in."""

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


@dataclass(frozen=True)
class TableFile:
    """One file of a table. `converted` is a text file's content as parquet, so that rows can be read anywhere."""

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
        # Buffered: a row group of photos is read page by page, not whole.
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)


def find_files(path: str | list[str]) -> list[Path]:
    """The files that a path, a glob or a list of them names; a glob's in sorted order, each once. Raises E_INPUT."""
    found: dict[Path, None] = {}
    for pattern in [path] if isinstance(path, str) else path:
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise ClipwrightError(
                "E_INPUT",
                "no input file",
                where=f"source.path: {pattern}",
                found=f"no file matches, seen from {Path.cwd()}",
                fix="check the path, and quote a glob so that the shell leaves it alone",
            )
        found |= dict.fromkeys(files)
    if not found:
        raise ClipwrightError(
            "E_INPUT", "no input file", where="source.path", found="an empty list", fix="name a file or a glob"
        )
    return list(found)


def open_file(path: Path, *, as_text: Sequence[str] = (), as_bytes: Sequence[str] = ()) -> TableFile:
    """Opens one file; csv columns in `as_text`, `as_bytes` get that type, others what they look like.

    Raises E_TABLE for a file of another kind or one that cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in EXTENSIONS:
        raise _unreadable(path, f"its name ends in {kind or 'nothing'}; {', '.join(EXTENSIONS)} are read")
    try:
        digest = file_sha256(path)
        if kind == ".parquet":
            with pq.ParquetFile(path) as file:
                return TableFile(path, digest, _plain(file.schema_arrow), file.metadata.num_rows)
        types = dict.fromkeys(as_text, pa.string()) | dict.fromkeys(as_bytes, pa.binary())
        table = _read_jsonl(path) if kind == ".jsonl" else _read_csv(path, "\t" if kind == ".tsv" else ",", types)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, str(error)) from None
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=4096)
    return TableFile(path, digest, _plain(table.schema), table.num_rows, sink.getvalue().to_pybytes())


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema without what other tools noted in it (pandas, datasets)."""
    return pa.schema([pa.field(f.name, f.type) for f in schema])


def _read_csv(path: Path, delimiter: str, types: dict[str, Any]) -> pa.Table:
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=1 << 24),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=types),
    )


def _read_jsonl(path: Path) -> pa.Table:
    # A row must fit in a block.
    return json.read_json(path, read_options=json.ReadOptions(block_size=1 << 26))


def _unreadable(path: Path, reason: str) -> ClipwrightError:
    return ClipwrightError(
        "E_TABLE",
        "a table that cannot be read",
        where=path,
        found=reason,
        fix="check the file; write it again as csv, tsv, jsonl or parquet",
    )
