"""Source `folder`: images with a text or JSON file of the same stem beside each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from clipwright.data_prep.sources.base import (
    NO_CAPTIONS,
    SOURCES,
    Caption,
    PathError,
    Record,
    Source,
    SourceConfig,
    open_inside,
    read_image,
    read_inside,
)
from clipwright.data_prep.sources.encodings import check_encoding, likely_encoding
from clipwright.data_prep.sources.folder_files import check_folder, find_pairs
from clipwright.pipeline.core.files import canonical_json
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.text import printable

_COLUMN_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
_HASH_THREADS = 4
_ROWS_PER_HASH_TASK = 64


@configclass
class FolderConfig(SourceConfig):
    """A folder of images with caption files.

    For `a.jpg`, captions come from `a.txt`, one per line, or from `a.json`, an object with a caption or a list of
    captions under the key `caption` (or `captions`). If both exist, the text file's captions are used. The other keys
    of the JSON objects become columns if all their values have one plain type.
    """

    path: str
    """Folder with the images; subfolders are included."""
    caption: str = "caption"
    """JSON key with the caption or list of captions; `none`: images without captions."""
    encoding: str = "utf-8"
    """Encoding of the text and JSON files."""


class FolderSource(Source):
    """Images of a folder, ordered by name. See FolderConfig."""

    def __init__(self, config: FolderConfig) -> None:
        self.root = check_folder(config.path)
        self.caption = config.caption
        self.captioned = config.caption != NO_CAPTIONS
        self.encoding = check_encoding(config.encoding)
        self._images, self._caption_suffixes, self.notes = find_pairs(self.root, captioned=self.captioned)
        self.count = len(self._images)
        self.columns = pa.schema([])  # until it is scanned
        self._digest: str | None = None
        self._scan_stamp = ""
        self._keys: np.ndarray | None = None

    def scan(self, *, quiet: bool = False) -> None:
        """Determines the columns and hashes every file once, for the identity and for the keys of the images."""
        self._scan_stamp = self._stamp()
        self.columns, unusable = self._find_columns(quiet)
        if unusable:
            names = ", ".join(map(printable, unusable))
            note = f"JSON keys not stored as columns (nested, empty or of mixed types): {names}"
            self.notes = [*self.notes, note]
        digest = hashlib.sha256()
        keys = np.zeros(self.count, dtype="S32")
        starts = range(0, self.count, _ROWS_PER_HASH_TASK)
        tasks = [range(start, min(start + _ROWS_PER_HASH_TASK, self.count)) for start in starts]
        pool = ThreadPoolExecutor(_HASH_THREADS)  # hashing and disk reads release the interpreter lock
        try:
            with Progress("hash", self.count, "image", quiet=quiet) as progress:
                for rows, hashes in zip(tasks, pool.map(self._hash_rows, tasks), strict=True):
                    for row, files in zip(rows, hashes, strict=True):
                        digest.update(f"{canonical_json(files)}\n".encode())
                        _, image_sha256 = files[0]
                        keys[row] = image_sha256[:32]
                    progress.add(len(rows))
        finally:
            pool.shutdown(cancel_futures=True)
        self._digest = digest.hexdigest()
        self._keys = keys

    def scan_result(self) -> dict[str, Any]:
        columns = [[field.name, str(field.type)] for field in self.columns]
        return {"columns": columns, "notes": list(self.notes), "sha256": self._digest, "stamp": self._scan_stamp}

    def load_scan(self, result: dict[str, Any]) -> bool:
        if result["stamp"] != self._stamp():
            return False
        types = {str(kind): kind for kind in _COLUMN_TYPES.values()}
        self.columns = pa.schema([pa.field(name, types[kind]) for name, kind in result["columns"]])
        self.notes = result["notes"]
        self._digest = result["sha256"]
        self._scan_stamp = result["stamp"]
        return True

    def keys(self) -> np.ndarray | None:
        return self._keys

    def identity(self) -> dict[str, Any]:
        if self._digest is None:
            self.scan(quiet=True)
        return {
            "name": "folder",
            "caption": self.caption,
            "encoding": self.encoding,
            "images": self.count,
            "sha256": self._digest,
        }

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        for row in rows:
            name = self._images[row]
            image, reject = read_image(self.root, name, walked=True)
            captions, metadata = self._read_captions(row)
            columns = {field.name: _column_value(metadata.get(field.name), field.type) for field in self.columns}
            batch = pa.RecordBatch.from_pylist([columns], schema=self.columns)
            source_key = _valid_utf8(PurePosixPath(name).stem)
            yield Record(row, image, captions, batch, _valid_utf8(name), source_key, reject)

    def _stamp(self) -> str:
        """Returns a cheap hash of what a scan depends on: settings, and name, size and mtime of every file."""
        stamp = hashlib.sha256(canonical_json([self.caption, self.encoding]).encode())
        for row, image in enumerate(self._images):
            for name in (image, *self._caption_files(row)):
                size, modified = -1, -1
                try:
                    stat = os.stat(f"{self.root}/{name}")  # noqa: PTH116  a Path would cost as much as the call
                    size, modified = stat.st_size, stat.st_mtime_ns
                except OSError:
                    pass
                stamp.update(f"{_valid_utf8(name)}\0{size}\0{modified}\n".encode())
        return stamp.hexdigest()

    def _hash_rows(self, rows: range) -> list[list[tuple[str, str]]]:
        """Returns for each row its files as (name, SHA-256), image first; the hash of an unreadable file is empty."""
        return [
            [
                (_valid_utf8(name), _file_hash(self.root, name))
                for name in (self._images[row], *self._caption_files(row))
            ]
            for row in rows
        ]

    def _caption_files(self, row: int) -> list[str]:
        """Returns the caption files of a row, text before JSON."""
        stem = os.path.splitext(self._images[row])[0]  # noqa: PTH122  a Path would normalize the name
        return [stem + suffix for suffix in self._caption_suffixes[row]]

    def _read_captions(self, row: int) -> tuple[list[Caption], dict[str, Any]]:
        """Returns a row's captions, followed by the problems with its caption files, and its JSON object."""
        captions: list[Caption] = []
        metadata: dict[str, Any] = {}
        problems: list[Caption] = []
        for name in self._caption_files(row):
            try:
                if name.lower().endswith(".json"):
                    metadata = self._read_object(name)
                    if self.captioned and not captions:
                        captions = self._captions_of(metadata, name)
                else:
                    captions = [line for line in _split_lines(self._read_text(name)) if line.strip()]
            except _CaptionFileError as error:
                problems.append(error.args)
        if self.captioned and not captions and not problems:
            stem = PurePosixPath(_valid_utf8(self._images[row])).stem
            if self._caption_suffixes[row]:
                detail = f"{stem}.txt or {stem}.json has no text"
            else:
                detail = f"no {stem}.txt or {stem}.json beside the image"
            problems.append(("E_CAP_EMPTY", detail))
        return [*captions, *problems], metadata

    def _captions_of(self, metadata: dict[str, Any], name: str) -> list[Caption]:
        value = metadata.get(self.caption, metadata.get("captions"))
        values = value if isinstance(value, list) else [value]
        return [_caption(item, name) for item in values if item is not None]

    def _read_text(self, name: str) -> str:
        try:
            data = read_inside(self.root, name, walked=True)
            text = data.decode("utf-8-sig" if self.encoding == "utf-8" else self.encoding)
        except PathError as error:
            raise _CaptionFileError("E_CAP_FILE", str(error)) from None
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#04x} at position {error.start}"
            likely = likely_encoding(error.object)
            detail = f"{_valid_utf8(name)} is not {self.encoding} ({byte}); set source.encoding={likely}"
            raise _CaptionFileError("E_CAP_ENCODING", detail) from None
        if "\0" in text:  # UTF-16 without a byte order mark is valid UTF-8, with a zero byte beside every letter
            encoding = likely_encoding(data)
            name, ours = _valid_utf8(name), self.encoding
            detail = f"{name} is not text in {ours}: it has zero bytes; set source.encoding={encoding}"
            raise _CaptionFileError("E_CAP_ENCODING", detail)
        return text

    def _read_object(self, name: str) -> dict[str, Any]:
        text = self._read_text(name)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _CaptionFileError("E_CAP_FILE", f"{_valid_utf8(name)} is not JSON: {error}") from None
        if not isinstance(value, dict):
            detail = f"{_valid_utf8(name)} holds a {type(value).__name__}, expected an object"
            raise _CaptionFileError("E_CAP_FILE", detail)
        return {_valid_utf8(key): item for key, item in value.items()}

    def _find_columns(self, quiet: bool) -> tuple[pa.Schema, list[str]]:
        """Returns the columns that the JSON files define, in order of appearance, and the keys that cannot be one."""
        value_types: dict[str, set[type]] = {}
        rows = [row for row, suffixes in enumerate(self._caption_suffixes) if ".json" in map(str.lower, suffixes)]
        with Progress("columns", len(rows), "JSON file", quiet=quiet) as progress:
            for row in rows:
                try:
                    metadata = self._read_object(self._caption_files(row)[-1])
                except _CaptionFileError:
                    metadata = {}  # reported when the row is read
                for key, value in metadata.items():
                    types = value_types.setdefault(key, set())
                    if value is not None:
                        types.add(type(value))
                progress.add(1)
        fields: list[pa.Field] = []
        unusable: list[str] = []
        for key, types in value_types.items():
            if self.captioned and key in (self.caption, "captions"):
                continue
            if types == {int, float}:
                types = {float}
            column_type = _COLUMN_TYPES.get(next(iter(types))) if len(types) == 1 else None
            if column_type is None:
                unusable.append(key)
            else:
                fields.append(pa.field(key, column_type))
        return pa.schema(fields), unusable


class _CaptionFileError(ValueError):
    """A caption file that cannot be used; `args` are E_CAP code and detail."""


def _file_hash(root: Path, name: str) -> str:
    """Returns the SHA-256 of a file, or an empty string if it is empty or unreadable; reading the row reports that."""
    digest = hashlib.sha256()
    try:
        with open_inside(root, name, walked=True) as file:
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest() if file.tell() else ""
    except (PathError, OSError):
        return ""


def _split_lines(text: str) -> list[str]:
    # Not splitlines, which also splits at rare separators that may occur inside a caption.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _valid_utf8(text: str) -> str:
    """Escapes lone surrogates, which JSON may contain and which represent invalid bytes in file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def _caption(item: Any, name: str) -> Caption:
    """Returns a caption from a JSON file; an object or a list in its place is an error."""
    if isinstance(item, str):
        return item
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return str(item)
    kind = type(item).__name__
    return "E_CAP_FILE", f"{_valid_utf8(name)} has a {kind} as caption, expected text or a list of texts"


def _column_value(value: Any, kind: pa.DataType) -> Any:
    """Returns the value as its column stores it, or None if it does not fit: the file changed, or an int is too big."""
    if pa.types.is_string(kind):
        return _valid_utf8(value) if isinstance(value, str) else None
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if pa.types.is_floating(kind) and isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return kind.to_pandas_dtype()(value)
    return None


SOURCES.add(FolderConfig, FolderSource, {"folder": {}})
