"""Table files csv and tsv. Cells stay text as written; a column of the dataset is a number only if nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from clipwright.data_prep.sources.tables.base import (
    Batch,
    ColumnPath,
    TableFile,
    compute,
    find_column,
    repeated_names,
    unique_names,
    unreadable,
)
from clipwright.data_prep.sources.tables.rows import Dialect, find_rows, split_fields
from clipwright.data_prep.sources.tables.text import (
    BLOCK_BYTES,
    MAX_ROW_BYTES,
    EncodingCheck,
    TextBlocks,
    TextReader,
    count_lines,
    last_line_end,
    line_too_long,
    wrong_encoding,
)
from clipwright.data_prep.sources.tables.types import MISSING_NUMBERS, TypeGuess
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import listed, shown

DELIMITERS = {",": "','", "\t": "tab", ";": "';'", "|": "'|'"}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class DelimitedTable(TableFile):
    """A csv or tsv file. `needed` are columns that the file must have, and the config key that names each."""

    def __init__(self, path: Path, *, delimiter: str, quote: str, encoding: str, needed: Mapping[str, str]) -> None:
        self.path = path
        self._dialect = Dialect(delimiter.encode(), quote.encode(), 0)
        self._check = EncodingCheck(path, encoding)
        self._multi_line_rows = 0
        self._lines = 0
        with TextReader(path, encoding) as reader:
            self._blocks = TextBlocks(path, plain=reader.plain)
            self._read(reader, needed)
        self.rows = self._blocks.rows
        self.types = {name: guess.type for name, guess in zip(self.names, self._guesses, strict=True)}
        self._numbers = {name for name, kind in self.types.items() if not pa.types.is_string(kind)}
        self._large = {name for name, guess in zip(self.names, self._guesses, strict=True) if not guess.fits_float}
        self.notes = [*self._check.finish(), *self._reconcile(), *self._quoted_cells()]
        del self._guesses, self._check

    def fits_float(self, name: str) -> bool:
        return name not in self._large

    def batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        for block, positions in self._blocks.split(rows):
            table = self._parse(self._blocks.read(block))
            taken = table.take(pa.array(positions))
            yield self._blocks.start(block) + positions, DelimitedBatch(taken, self._numbers)

    def column(self, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        chunks = [
            DelimitedBatch(self._parse(self._blocks.read(block), [name]), self._numbers).column(name, kind)
            for block in range(len(self._blocks))
        ]
        return pa.chunked_array(chunks, kind)

    def _read(self, reader: TextReader, needed: Mapping[str, str]) -> None:
        """Reads the file once: header, blocks of rows, types of columns."""
        buffer = reader.read(BLOCK_BYTES)
        while buffer and not last_line_end(buffer) and len(buffer) <= MAX_ROW_BYTES and (more := reader.read(1 << 20)):
            buffer += more
        header_end = self._read_header(buffer, needed)
        offset = reader.offset + header_end
        buffer = buffer[header_end:]
        line = self._lines + 1
        final = False
        while not final or buffer:
            more = reader.read(BLOCK_BYTES)
            final = not more
            buffer += more
            complete = buffer if final else buffer[: last_line_end(buffer)]
            if complete:
                used = self._add_block(complete, offset, line, final)
                line += count_lines(complete[:used]) if used else 0
                offset += used
                buffer = buffer[used:]
            elif final:
                break
            if len(buffer) > MAX_ROW_BYTES:
                raise line_too_long(self.path, line)
        self._lines = line - 1

    def _read_header(self, data: bytes, needed: Mapping[str, str]) -> int:
        """Sets the column names; returns where the header ends."""
        if not data.strip():
            raise unreadable(self.path, "the file is empty", "check the file")
        row = next(find_rows(data, self._dialect, self.path, 1, final=True), None)
        assert row is not None
        text = data[row.start : row.stop].rstrip(b"\r\n")
        self._check.update(text, 1)
        if self._check.invalid:
            sample = data[: last_line_end(data)] or data
            raise wrong_encoding(self.path, self._check.encoding, sample, "in its first line")
        header = [name.decode().strip() for name in split_fields(text, self._dialect)]
        self._check_delimiter(header, needed, text.decode())
        self.names = unique_names(header)
        self.repeated = repeated_names(header)
        for name, key in needed.items():
            find_column(name, self, key)  # before the rows are read
        self._dialect = Dialect(self._dialect.delimiter, self._dialect.quote, len(header))
        self._guesses = [TypeGuess() for _ in self.names]
        self._lines = count_lines(data[: row.stop])
        self._header_lines = self._lines
        return row.stop

    def _check_delimiter(self, header: list[str], needed: Mapping[str, str], line: str) -> None:
        """Raises E_TABLE if a column is missing because of the delimiter or for want of a header."""
        missing = [name for name in needed if name not in header and name.split(".")[0] not in header]
        if not missing:
            return
        ours = self._dialect.describe()
        if line.lower().startswith("sep="):
            what = "the first line is a note of Excel, not a header"
            fix = f"delete that line, and set {_override(line[4:5])}"
            raise unreadable(f"{self.path}, line 1", f"it holds {shown(line)}", fix, what)
        for delimiter, described in DELIMITERS.items():
            other = Dialect(delimiter.encode(), b'"', 0)
            names = [name.decode("utf-8", "replace").strip() for name in split_fields(line.encode(), other)]
            if described != ours and len(names) > max(1, len(header) - 1) and all(name in names for name in missing):
                raise self._wrong_delimiter(delimiter, described, header, ours)
        if len(header) == 1:
            counts = {delimiter: line.count(delimiter) for delimiter in DELIMITERS}
            best = max(counts, key=lambda delimiter: counts[delimiter])
            if counts[best]:
                raise self._wrong_delimiter(best, DELIMITERS[best], header, ours)
        if any(name.lower().endswith(_IMAGE_SUFFIXES) or "://" in name for name in header):
            raise unreadable(
                f"{self.path}, line 1",
                f"it holds {listed(header)}",
                "put a first line with the names of the columns, for example image,caption",
                "the file has no header",
            )

    def _wrong_delimiter(self, delimiter: str, described: str, header: list[str], ours: str) -> ClipwrightError:
        columns = format_count(len(header), "column")
        return unreadable(
            f"{self.path}, line 1",
            f"with {ours} between fields the header has {columns}: {listed(header)}; it looks like {described}",
            f"set {_override(delimiter)}",
            "the fields are separated by another character",
        )

    def _add_block(self, data: bytes, offset: int, line: int, final: bool) -> int:
        """Adds the rows of complete lines; returns the number of bytes used, which is less if a row is still open."""
        table = self._try_parse(data)
        rows = count_lines(data)
        used = len(data)
        # One row per line, and no quoted field open at the end: the usual case, for which counting is enough.
        if table is None or table.num_rows != rows or not self._ends_closed(data):
            found = list(find_rows(data, self._dialect, self.path, line, final=final))
            used = found[-1].stop if found else 0
            if final or not self._dialect.quote:
                used = len(data)  # with blank lines at the end
            rows = len(found)
            self._multi_line_rows += sum(row.lines > 1 for row in found)
            table = self._parse(data[:used])
            if table.num_rows != rows:
                last = line + count_lines(data[:used]) - 1
                where = f"{self.path}, lines {line} to {last}"
                raise unreadable(where, f"they hold {format_count(rows, 'row')}, but {table.num_rows} were read")
        self._check.update(data[:used], line)
        for guess, cells in zip(self._guesses, table.columns, strict=True):
            for chunk in cells.chunks:
                guess.update(chunk)
        self._blocks.add(data[:used], rows, offset, line)
        return used

    def _ends_closed(self, data: bytes) -> bool:
        """Whether the last line is a complete row."""
        if not self._dialect.quote:
            return True
        stripped = data.rstrip(b"\r\n")
        last = stripped[max(stripped.rfind(b"\n"), stripped.rfind(b"\r")) + 1 :]
        try:
            return len(list(find_rows(last, self._dialect, self.path, 1, final=True))) == 1
        except ClipwrightError:
            return False

    def _try_parse(self, data: bytes) -> pa.Table | None:
        try:
            return self._parse(data)
        except pa.ArrowInvalid:
            return None

    def _parse(self, data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
        """Parses complete rows into columns of bytes."""
        if not data.strip(b"\r\n"):
            return pa.table({name: pa.array([], pa.binary()) for name in columns or self.names})
        return csv.read_csv(
            pa.BufferReader(data),
            read_options=csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=self.names),
            parse_options=csv.ParseOptions(
                delimiter=self._dialect.delimiter.decode(),
                quote_char=self._dialect.quote.decode() or False,
                newlines_in_values=True,
            ),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(self.names, pa.binary()), include_columns=list(columns or [])
            ),
        )

    def _quoted_cells(self) -> list[str]:
        """Returns a note if a file that is read without quoting seems to have some; its first rows are judged."""
        if self._dialect.quote or not self.rows:
            return []
        quoted = 0
        for cells in self._parse(self._blocks.read(0)).columns:
            matches = compute.match_substring_regex(cells, '^".*"$')
            quoted += compute.sum(matches).as_py() or 0
        if not quoted:
            return []
        found = f"quotes around {format_count(quoted, 'field')} of the first rows are kept as text"
        return [f"{shown(self.name)}: {found}; if they are quoting, set 'source.quote=\"'"]

    def _reconcile(self) -> list[str]:
        """Returns a note if the file has more lines than rows."""
        extra = self._lines - self._header_lines - self.rows
        if not extra:
            return []
        parts = [format_count(self.rows, "row")]
        if self._multi_line_rows:
            several = "spans several lines in quotes" if self._multi_line_rows == 1 else "span several lines in quotes"
            parts.append(f"{self._multi_line_rows:,} of them {several}")
        else:
            parts.append(format_count(extra, "blank line"))
        lines = format_count(self._lines - self._header_lines, "line")
        return [f"{shown(self.name)}: {lines} after the header hold {', '.join(parts)}"]


class DelimitedBatch(Batch):
    """Rows as columns of bytes. In a column of numbers, `nan` is a missing value."""

    def __init__(self, table: pa.Table, numbers: set[str]) -> None:
        self._table = table
        self._numbers = numbers

    def values(self, path: ColumnPath) -> list[Any]:
        missing = {b"", *(text.encode() for text in MISSING_NUMBERS)} if path[0] in self._numbers else {b""}
        cells = self._table[path[0]].to_pylist()
        return [None if cell in missing else _decoded(cell) for cell in cells]

    def column(self, name: str, kind: pa.DataType) -> pa.Array:
        if name not in self._table.column_names or pa.types.is_null(kind):
            return pa.nulls(self._table.num_rows, kind)
        cells = self._table[name].combine_chunks()
        if isinstance(cells, pa.ChunkedArray):
            cells = pa.concat_arrays(cells.chunks) if cells.num_chunks else pa.array([], pa.binary())
        missing = ["", *MISSING_NUMBERS] if name in self._numbers and not pa.types.is_string(kind) else [""]
        is_missing = compute.is_in(cells, value_set=pa.array(missing).cast(pa.binary()))
        cells = compute.if_else(is_missing, pa.scalar(None, pa.binary()), cells)
        try:
            text = cells.cast(pa.string())
        except pa.ArrowInvalid:
            values = [None if cell is None else _decoded(cell) for cell in cells.to_pylist()]
            text = pa.array([value if isinstance(value, str) else None for value in values], pa.string())
        return text.cast(kind)


def _override(delimiter: str) -> str:
    """Returns the override that sets a delimiter, as it is typed in a shell."""
    if delimiter == "\t":
        return "source.delimiter=tab"
    return "source.delimiter=," if delimiter == "," else f"'source.delimiter={delimiter}'"


def _decoded(cell: bytes) -> str | bytes:
    try:
        return cell.decode()
    except UnicodeDecodeError:
        return cell
