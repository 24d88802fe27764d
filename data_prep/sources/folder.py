"""Source `folder`: images with a text or JSON file of the same stem beside each."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
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
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import canonical_json
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.registry import configclass

# The formats that pixels.py decodes, then those it does not: such a file is a row too, so that its refusal is told.
READ = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "webp", "gif", "bmp", "dib", "tif", "tiff")
UNREAD = ("avif", "heic", "heif", "jp2", "j2k", "jxl", "ico", "pbm", "pgm", "pnm", "ppm", "psd", "qoi", "svg", "tga")
_IMAGES = frozenset(f".{suffix}" for suffix in (*READ, *UNREAD))
_CAPTIONS = (".txt", ".json")
_KINDS = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


@configclass
class FolderConfig(SourceConfig):
    """Where the images are and how the files beside them are read.

    `path`: a folder, walked with its subfolders. Beside `a.jpg` stands `a.txt`, a caption a line, or `a.json`, an
    object with a caption or a list of them under the key `caption` (or `captions`); its other keys of one plain type
    become columns. Where both stand, the text file's captions are taken. `encoding`: of the text and JSON files.
    """

    path: str
    caption: str = "caption"
    encoding: str = "utf-8"


class FolderSource(Source):
    """Images of a folder in the order of their names; see FolderConfig."""

    def __init__(self, config: FolderConfig) -> None:
        self.root, self.caption, self.encoding = _root(config.path), config.caption, _encoding(config.encoding)
        self._images, self._beside, notes = _find_pairs(self.root)
        self.count, self.notes = len(self._images), notes
        self.columns = pa.schema([])  # until it is scanned
        self._digest: str | None = None
        self._stamped = ""
        self._keys: np.ndarray | None = None

    def scan(self, *, quiet: bool = False) -> None:
        """Finds the columns, and hashes every file once: for identity, and the images' keys for the plan."""
        self._stamped = self._stamp()
        self.columns, left_out = self._find_columns(quiet)
        if left_out:
            named = ", ".join(map(_printable, left_out))
            note = f"keys that are no columns, being nested, empty or of mixed types: {named}"
            self.notes = [*self.notes, note]
        whole, keys = hashlib.sha256(), np.zeros(self.count, dtype="S32")
        chunks = [range(start, min(start + 64, self.count)) for start in range(0, self.count, 64)]
        pool = ThreadPoolExecutor(4)  # hashing and waiting for the disk release the interpreter
        try:
            with Progress("hash", self.count, "images", quiet=quiet) as progress:
                for rows, hashes in zip(chunks, pool.map(self._hash_rows, chunks), strict=True):
                    for row, files in zip(rows, hashes, strict=True):
                        whole.update(f"{canonical_json(files)}\n".encode())
                        keys[row] = files[0][1][:32]
                    progress.add(len(rows))
        finally:
            pool.shutdown(cancel_futures=True)
        self._digest, self._keys = whole.hexdigest(), keys

    def scanned(self) -> dict[str, Any]:
        columns = [[field.name, str(field.type)] for field in self.columns]
        return {"columns": columns, "notes": list(self.notes), "sha256": self._digest, "stamp": self._stamped}

    def recall(self, found: dict[str, Any]) -> bool:
        if found["stamp"] != self._stamp():
            return False
        kinds = {str(kind): kind for kind in _KINDS.values()}
        self.columns = pa.schema([pa.field(name, kinds[kind]) for name, kind in found["columns"]])
        self.notes, self._digest, self._stamped = found["notes"], found["sha256"], found["stamp"]
        return True

    def _stamp(self) -> str:
        """The settings, and every file's name, size and time of change: what a scan's result depends on, cheaply."""
        made = hashlib.sha256(canonical_json([self.caption, self.encoding]).encode())
        for row, image in enumerate(self._images):
            for name in (image, *self._files(row)):
                try:
                    about = os.stat(f"{self.root}/{name}")  # noqa: PTH116  as above
                except OSError:
                    about = None
                size, changed = (about.st_size, about.st_mtime_ns) if about else (-1, -1)
                made.update(f"{_plain(name)}\0{size}\0{changed}\n".encode())
        return made.hexdigest()

    def keys(self) -> np.ndarray | None:
        return self._keys

    def identity(self) -> dict[str, Any]:
        if self._digest is None:
            self.scan(quiet=True)
        settings = {"name": "folder", "caption": self.caption, "encoding": self.encoding}
        return {**settings, "images": self.count, "sha256": self._digest}

    def read(self, rows: Sequence[int]) -> Iterator[Record]:
        for row in rows:
            name = self._images[row]
            image, reject = read_image(self.root, name, walked=True)
            captions, about = self._captions(row)
            columns = {field.name: _fit(about.get(field.name), field.type) for field in self.columns}
            batch = pa.RecordBatch.from_pylist([columns], schema=self.columns)
            yield Record(row, image, captions, batch, _plain(name), _plain(PurePosixPath(name).stem), reject)

    def _hash_rows(self, rows: range) -> list[list[tuple[str, str]]]:
        """For each row its files as (name, SHA-256, empty where there is nothing to read), the image first."""
        return [
            [(_plain(name), _sha256(self.root, name)) for name in (self._images[row], *self._files(row))]
            for row in rows
        ]

    def _files(self, row: int) -> list[str]:
        """The caption files of a row, text before JSON."""
        stem = os.path.splitext(self._images[row])[0]  # noqa: PTH122  Path loses what os.walk gave
        return [stem + suffix for suffix in self._beside[row]]

    def _captions(self, row: int) -> tuple[list[Caption], dict[str, Any]]:
        """A row's captions, or why there are none, and what its JSON holds beside them."""
        found: list[Caption] = []
        about: dict[str, Any] = {}
        problem: list[Caption] = []
        for name in self._files(row):
            try:
                if name.lower().endswith(".json"):
                    about = self._object(name)
                    found = found or self._told(about, name)
                else:
                    found = [line for line in _lines(self._text(name)) if line.strip()]
            except _Unreadable as error:
                problem.append(error.args)
        if not found and not problem:
            stem = PurePosixPath(_plain(self._images[row])).stem
            looked = "no words in it" if self._beside[row] else "no such file"
            problem.append(("E_CAP_EMPTY", f"{stem}.txt or {stem}.json beside the image: {looked}"))
        return [*found, *problem], about  # what is amiss beside good captions is counted

    def _told(self, about: dict[str, Any], name: str) -> list[Caption]:
        value = about.get(self.caption, about.get("captions"))
        values = value if isinstance(value, list) else [value]
        return [_words(item, name) for item in values if item is not None]

    def _text(self, name: str) -> str:
        try:
            data = read_inside(self.root, name, walked=True)
            text = data.decode("utf-8-sig" if self.encoding == "utf-8" else self.encoding)
        except PathError as error:
            raise _Unreadable("E_CAP_FILE", str(error)) from None
        except UnicodeDecodeError as error:
            where = f"byte {error.object[error.start]:#04x} at {error.start}"
            wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            other = "utf-16" if wide else "cp949, latin-1 or whichever it is"
            detail = f"{_plain(name)} is not {self.encoding}, first at {where}; set source.encoding={other}"
            raise _Unreadable("E_CAP_ENCODING", detail) from None
        if "\0" in text:  # UTF-16 without its mark is valid UTF-8: a zero beside every letter
            other = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
            detail = f"{_plain(name)} is not text in {self.encoding}: it holds zero bytes; set source.encoding={other}"
            raise _Unreadable("E_CAP_ENCODING", detail)
        return text

    def _object(self, name: str) -> dict[str, Any]:
        text = self._text(name)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Unreadable("E_CAP_FILE", f"{_plain(name)} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise _Unreadable("E_CAP_FILE", f"{_plain(name)} holds a {type(value).__name__}, an object is read")
        return {_plain(key): item for key, item in value.items()}

    def _find_columns(self, quiet: bool) -> tuple[pa.Schema, list[str]]:
        """The columns that the JSON files make, in the order they are met, and the keys that cannot be one."""
        kinds: dict[str, set[type]] = {}
        rows = [row for row, beside in enumerate(self._beside) if ".json" in map(str.lower, beside)]
        with Progress("columns", len(rows), "JSON files", quiet=quiet) as progress:
            for row in rows:
                try:
                    about = self._object(self._files(row)[-1])
                except _Unreadable:
                    about = {}  # its row says so
                for key, value in about.items():
                    met = kinds.setdefault(key, set())
                    if value is not None:
                        met.add(type(value))
                progress.add(1)
        fields: list[pa.Field] = []
        left_out: list[str] = []
        for key in (key for key in kinds if key not in (self.caption, "captions")):
            met = {float} if kinds[key] == {int, float} else kinds[key]
            kind = _KINDS.get(next(iter(met))) if len(met) == 1 else None
            if kind is None:
                left_out.append(key)
            else:
                fields.append(pa.field(key, kind))
        return pa.schema(fields), left_out


class _Unreadable(ValueError):
    """A caption file that gives no captions; `args` are E_CAP code and detail."""


def _root(path: str) -> Path:
    root = Path(path)
    if not root.is_dir():
        is_file = root.exists()
        raise ClipwrightError(
            "E_INPUT",
            "no input folder",
            where=f"source.path: {path}",
            found="it is a file" if is_file else f"there is no such folder, seen from {Path.cwd()}",
            fix="for a table, run `clipwright prep table`" if is_file else "check the path",
        )
    return root.resolve()


def _encoding(name: str) -> str:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=name)  # refuses codecs that are not of text
        return codecs.lookup(name).name
    except (LookupError, ValueError) as error:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "an encoding that is not known",
            where=f"source.encoding: {name}",
            found=str(error),
            fix="name one that Python knows, such as utf-8, cp949, latin-1, shift_jis or utf-16",
        ) from None


def _find_pairs(root: Path) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
    """Names of images under `root`, sorted; the suffixes of each one's caption files; lines about the rest.

    Hidden and partial files are passed over. Folders that are links are not followed: they may lead out, or round.
    """
    found: list[tuple[str, tuple[str, ...]]] = []
    orphans: list[str] = []
    linked: list[str] = []
    for folder, folders, files in os.walk(root, onerror=_refuse):
        place = "" if (place := os.path.relpath(folder, root)) == "." else f"{place}/"
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked += [place + name for name in folders if os.path.islink(f"{folder}/{name}")]  # noqa: PTH114
        beside: dict[str, dict[str, str]] = {}
        images: list[tuple[str, str]] = []
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122  as above
            kind = suffix.lower()
            if name.startswith("."):
                continue
            if kind in _IMAGES:
                images.append((stem, suffix))
            elif kind in _CAPTIONS:
                beside.setdefault(stem, {})[kind] = suffix
        for stem, suffix in images:
            captions = beside.get(stem, {})
            found.append((f"{place}{stem}{suffix}", tuple(captions[kind] for kind in _CAPTIONS if kind in captions)))
        lone = beside.keys() - {stem for stem, _ in images}
        orphans += [f"{place}{stem}{suffix}" for stem in lone for suffix in beside[stem].values()]
    if not found or not any(captions for _, captions in found):
        raise _nothing(root, len(found), len(orphans))
    found.sort()
    said = ((orphans, "caption files without an image"), (linked, "linked folders that were not followed"))
    notes = [f"{what}: {len(names)}, the first {_printable(min(names))}" for names, what in said if names]
    return [name for name, _ in found], [captions for _, captions in found], notes


def _refuse(error: OSError) -> None:
    raise error


def _nothing(root: Path, images: int, orphans: int) -> ClipwrightError:
    if not images:
        return ClipwrightError(
            "E_PREP_EMPTY",
            "a folder without images",
            where=root,
            found=f"no file in it or its subfolders ends in {', '.join(f'.{suffix}' for suffix in READ)}",
            fix="check source.path; for a table of images, run `clipwright prep table`",
        )
    others = f", and {orphans} caption files whose stem no image has" if orphans else ""
    return ClipwrightError(
        "E_PREP_EMPTY",
        "an image folder without a single caption",
        where=root,
        found=f"{images} images and no .txt or .json of the same stem beside any{others}",
        fix="put a.txt (a caption a line) or a.json beside a.jpg, or list images and captions in a table and run "
        "`clipwright prep table`",
    )


def _sha256(root: Path, name: str) -> str:
    made = hashlib.sha256()
    try:
        with open_inside(root, name, walked=True) as file:
            while block := file.read(1 << 20):
                made.update(block)
            return made.hexdigest() if file.tell() else ""
    except (PathError, OSError):
        return ""  # as the row will say when it is read


def _lines(text: str) -> list[str]:
    # Not splitlines, which also cuts at rarer separators that stand inside a caption.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _plain(name: str) -> str:
    """Text that UTF-8 can hold: lone surrogates, in JSON or for odd bytes in file names, are shown escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _printable(name: str) -> str:
    """A name for a line on a terminal: a newline or an escape sequence in it is shown, not obeyed."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def _words(item: Any, name: str) -> Caption:
    """A caption as a JSON file holds it; an object or a list in its place is no text."""
    if isinstance(item, str):
        return item
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return str(item)
    kind = type(item).__name__
    return "E_CAP_FILE", f"{_plain(name)} holds a {kind} for a caption; text or a list of texts is read"


def _fit(value: Any, kind: pa.DataType) -> Any:
    """The value as its column holds it, or None where a file has changed or a number is beyond 64 bits."""
    if pa.types.is_string(kind):
        return _plain(value) if isinstance(value, str) else None
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if pa.types.is_floating(kind) and isinstance(value, float):
        return value
    fits = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return kind.to_pandas_dtype()(value) if fits else None


SOURCES.add(FolderConfig, FolderSource, {"folder": {}})
