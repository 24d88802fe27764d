"""The files of a table: found by glob, and opened by format."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipwright.data_prep.sources.encodings import check_encoding
from clipwright.data_prep.sources.tables.base import TableFile, unreadable
from clipwright.data_prep.sources.tables.delimited import DelimitedTable
from clipwright.data_prep.sources.tables.json_rows import JsonTable
from clipwright.data_prep.sources.tables.parquet import ParquetTable
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.text import shown
from clipwright.pipeline.folders.describe import describe

_DELIMITED = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")
_PARQUET = ".parquet"
_PACKED = ".gz"
_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
NO_QUOTES = "none"


@dataclass(frozen=True)
class TextOptions:
    """`source.delimiter`, `source.quote` and `source.encoding`; None for the default of the format."""

    delimiter: str | None
    quote: str | None
    encoding: str

    @staticmethod
    def read(delimiter: str | None, quote: str | None, encoding: str) -> TextOptions:
        """Checks the values of the config. Raises E_CONFIG_VALUE."""
        if delimiter is not None:
            delimiter = _NAMES.get(delimiter, delimiter)
            if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '\r\n"\0':
                raise _refused("delimiter", delimiter, "one ASCII character, or tab", "source.delimiter=tab")
        if quote is not None and quote != NO_QUOTES:
            if len(quote) != 1 or not quote.isascii() or quote.isalnum() or quote in "\r\n\0":
                raise _refused("quote", quote, "one ASCII character, or none", "source.quote=none")
            if quote == delimiter:
                raise _refused("quote", quote, "a character other than the delimiter", "source.quote=none")
        return TextOptions(delimiter, quote, check_encoding(encoding))


def find_files(path: str | list[str]) -> list[Path]:
    """Returns the files of a path, a glob or a list of both, each once; those of a glob sorted. Raises E_INPUT."""
    files: dict[Path, None] = {}
    for pattern in [path] if isinstance(path, str) else path:
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        matches = [Path(name) for name in names if Path(name).is_file()]
        if not matches:
            found = f"no file matches in {Path.cwd()}"
            fix = "check the path; quote a glob so that the shell does not expand it"
            if Path(pattern).is_dir():
                folder = describe(Path(pattern))
                found, fix = f"it is {folder.text}", folder.advice or "name a table file"
            raise ClipwrightError(
                "E_INPUT", "the input file does not exist", where=f"source.path: {shown(pattern)}", found=found, fix=fix
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


def open_files(paths: Sequence[Path], options: TextOptions, needed: Mapping[str, str]) -> list[TableFile]:
    """Opens table files. `needed` maps the columns that each must have to the config keys that name them.

    Raises E_TABLE for an unknown format or a file that cannot be read, E_CONFIG_VALUE for an option of another format.
    """
    formats = {_format(path) for path in paths}
    if not formats & _DELIMITED.keys():
        for key, value in (("delimiter", options.delimiter), ("quote", options.quote)):
            if value is not None:
                raise _other_format(key, value, paths[0], "csv and tsv files")
    if formats == {_PARQUET} and options.encoding != "utf-8":
        raise _other_format("encoding", options.encoding, paths[0], "text files")
    return [_open(path, options, needed) for path in paths]


def _format(path: Path) -> str:
    """Returns the extension that tells the format. Raises E_TABLE for an unknown one."""
    name = path.name.lower()
    extension = Path(name.removesuffix(_PACKED)).suffix
    allowed = (*_DELIMITED, *_JSON) if name.endswith(_PACKED) else (*_DELIMITED, *_JSON, _PARQUET)
    if extension not in allowed:
        reason = f"the extension is {extension or 'missing'} (allowed: {', '.join((*_DELIMITED, *_JSON, _PARQUET))}"
        raise unreadable(path, f"{reason}; all but parquet also as .gz)")
    return extension


def _open(path: Path, options: TextOptions, needed: Mapping[str, str]) -> TableFile:
    extension = _format(path)
    try:
        if extension == _PARQUET:
            return ParquetTable(path)
        if extension in _JSON:
            return JsonTable(path, encoding=options.encoding)
        delimiter = options.delimiter or _DELIMITED[extension]
        quote = options.quote or ('"' if extension == ".csv" else NO_QUOTES)
        quote = "" if quote == NO_QUOTES else quote
        return DelimitedTable(path, delimiter=delimiter, quote=quote, encoding=options.encoding, needed=needed)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from None


def _other_format(key: str, value: str, path: Path, formats: str) -> ClipwrightError:
    return ClipwrightError(
        "E_CONFIG_VALUE",
        f"the key is for {formats} only",
        where=f"source.{key}",
        found=f"{shown(value)!r} with {shown(path.name)}",
        fix=f"leave out source.{key}",
    )


def _refused(key: str, value: str, allowed: str, fix: str) -> ClipwrightError:
    return ClipwrightError(
        "E_CONFIG_VALUE",
        f"the {key} cannot be used",
        where=f"source.{key}",
        found=f"{shown(value)!r} (allowed: {allowed})",
        fix=f"set for example {fix}",
    )
