"""Source `folder`: images with text or JSON files of the same stem beside each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from clipwright.data_prep.sources.base import (
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
from clipwright.data_prep.sources.caption_files import (
    JSON_SUFFIX,
    CaptionFileError,
    CaptionFilesConfig,
    CaptionRules,
)
from clipwright.data_prep.sources.folder_files import check_folder, find_files
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.files import canonical_json
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.text import printable, valid_utf8

_COLUMN_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
_HASH_THREADS = 4
_ROWS_PER_HASH_TASK = 64


@configclass
class FolderConfig(CaptionFilesConfig, SourceConfig):
    """A folder of images with caption files.

    For `a.jpg`, captions come from text files, one per line, and from a JSON object. A list of captions in the JSON is
    used first, then the text, then a single caption in the JSON. The other keys of the JSON objects become columns if
    all their values have one plain type.
    """

    path: str
    """Folder with the images; subfolders are included."""


class FolderSource(Source):
    """Images of a folder, ordered by name. See FolderConfig."""

    def __init__(self, config: FolderConfig) -> None:
        self.root = check_folder(config.path)
        self.rules = CaptionRules.of(config, "source.")
        self.captioned = self.rules.captioned
        files = find_files(self.root, self.rules)
        self._images, self._caption_files, self.notes = files.images, files.caption_files, files.notes
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
        return {"name": "folder", **self.rules.identity(), "images": self.count, "sha256": self._digest}

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        for row in rows:
            name = self._images[row]
            image, reject = read_image(self.root, name, walked=True)
            captions, metadata = self._read_captions(row)
            columns = {field.name: _column_value(metadata.get(field.name), field.type) for field in self.columns}
            batch = pa.RecordBatch.from_pylist([columns], schema=self.columns)
            source = valid_utf8(name)
            yield Record(row, image, captions, batch, source, source, reject)

    def _stamp(self) -> str:
        """Returns a cheap hash of what a scan depends on: settings, and name, size and mtime of every file."""
        stamp = hashlib.sha256(canonical_json(self.rules.identity()).encode())
        for row, image in enumerate(self._images):
            for name in (image, *self._caption_files[row]):
                size, modified = -1, -1
                try:
                    stat = os.stat(f"{self.root}/{name}")  # noqa: PTH116  a Path would cost as much as the call
                    size, modified = stat.st_size, stat.st_mtime_ns
                except OSError:
                    pass
                stamp.update(f"{valid_utf8(name)}\0{size}\0{modified}\n".encode())
        return stamp.hexdigest()

    def _hash_rows(self, rows: range) -> list[list[tuple[str, str]]]:
        """Returns for each row its files as (name, SHA-256), image first; the hash of an unreadable file is empty."""
        return [
            [(valid_utf8(name), _file_hash(self.root, name)) for name in (self._images[row], *self._caption_files[row])]
            for row in rows
        ]

    def _read_captions(self, row: int) -> tuple[list[Caption], dict[str, Any]]:
        """Returns a row's captions, followed by the problems with its caption files, and its metadata."""
        texts: list[Caption] = []
        problems: list[Caption] = []
        for name in self._caption_files[row]:
            if not _is_json(name):
                try:
                    texts += self.rules.texts(self._read_file(name), valid_utf8(name))
                except CaptionFileError as error:
                    problems.append(error.args)
        metadata, json_problems = self._read_metadata(row)
        captions = self.rules.choose(texts, metadata, valid_utf8(self._caption_files[row][-1]) if metadata else "")
        problems += json_problems
        metadata.pop(self.rules.caption_key(metadata), None)
        if self.captioned and not captions and not problems:
            stem = PurePosixPath(valid_utf8(self._images[row])).stem
            files = [valid_utf8(PurePosixPath(name).name) for name in self._caption_files[row]]
            if files:
                detail = f"{' and '.join(files)} {'has' if len(files) == 1 else 'have'} no caption"
            else:
                detail = f"no {stem}.txt or {stem}.json beside the image"
            problems.append(("E_CAP_EMPTY", detail))
        return [*captions, *problems], metadata

    def _read_metadata(self, row: int) -> tuple[dict[str, Any], list[Caption]]:
        """Returns the keys of a row's JSON files, those of the first file first, and the problems with them."""
        metadata: dict[str, Any] = {}
        problems: list[Caption] = []
        for name in filter(_is_json, self._caption_files[row]):
            try:
                metadata = {**self._read_object(name), **metadata}
            except CaptionFileError as error:
                problems.append(error.args)
        return metadata, problems

    def _read_file(self, name: str) -> bytes:
        try:
            return read_inside(self.root, name, walked=True)
        except PathError as error:
            raise CaptionFileError("E_CAP_FILE", str(error)) from None

    def _read_object(self, name: str) -> dict[str, Any]:
        value = self.rules.read_object(self._read_file(name), valid_utf8(name))
        return {valid_utf8(key): item for key, item in value.items()}

    def _find_columns(self, quiet: bool) -> tuple[pa.Schema, list[str]]:
        """Returns the columns that the JSON files define, in order of appearance, and the keys that cannot be one."""
        value_types: dict[str, set[type]] = {}
        rows = [row for row, names in enumerate(self._caption_files) if any(map(_is_json, names))]
        with Progress("columns", len(rows), "JSON file", quiet=quiet) as progress:
            for row in rows:
                metadata, _ = self._read_metadata(row)  # problems are reported when the row is read
                metadata.pop(self.rules.caption_key(metadata), None)
                for key, value in metadata.items():
                    types = value_types.setdefault(key, set())
                    if value is not None:
                        types.add(type(value))
                progress.add(1)
        fields: list[pa.Field] = []
        unusable: list[str] = []
        for key, types in value_types.items():
            if types == {int, float}:
                types = {float}
            column_type = _COLUMN_TYPES.get(next(iter(types))) if len(types) == 1 else None
            if column_type is None:
                unusable.append(key)
            else:
                fields.append(pa.field(key, column_type))
        return pa.schema(fields), unusable


def _is_json(name: str) -> bool:
    return name.lower().endswith(JSON_SUFFIX)


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


def _column_value(value: Any, kind: pa.DataType) -> Any:
    """Returns the value as its column stores it, or None if it does not fit: the file changed, or an int is too big."""
    if pa.types.is_string(kind):
        return valid_utf8(value) if isinstance(value, str) else None
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if pa.types.is_floating(kind) and isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return kind.to_pandas_dtype()(value)
    return None


SOURCES.add(FolderConfig, FolderSource, {"folder": {}})
