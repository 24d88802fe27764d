"""Images of a table's rows: bytes, base64 text, data URLs, and paths of files."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, unquote_to_bytes

import pyarrow as pa

from clipwright.data_prep.sources.base import read_image
from clipwright.data_prep.sources.tables.base import TableFile, is_bytes, is_text
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import shown, valid_utf8

MAX_IMAGE_BYTES = 64 << 20  # of an image in text
_MAX_PATH = 4096  # characters
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DATA_URL = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# How base64 of an image begins: JPEG, PNG, GIF, WebP, BMP, TIFF, and AVIF or HEIC (a box of 16 to 255 bytes).
_BASE64_IMAGE = re.compile(
    r"/9j/|_9j_|iVBORw0KGgo|R0lGOD[dl]|UklGR|Qk[0-9A-Za-z+/_-]{6}|SUkqA|TU0AK|AAAA[A-P][GHJKLM]Z0eXB"
)
_BASE64_TEXT = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_MIN_BASE64 = 32  # characters; the smallest images have more
Reject = tuple[str, str] | None
Cell = tuple[bytes | None, str | None, Reject]  # image, source_key and reject of a Record


def check_image_type(kind: pa.DataType, file: TableFile, name: str) -> None:
    """Raises E_COLUMN if a column of this type cannot hold images."""
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        readable = bool(names & {"bytes", "path"})
    else:
        readable = is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)
    if not readable:
        raise ClipwrightError(
            "E_COLUMN",
            "the column does not hold images",
            where=f"{file.path}: {name}",
            found=f"its type is {shown(str(kind), 120)} (allowed: bytes, a path, or a struct of bytes and path)",
            fix="set source.image to the column with the images",
        )


def is_url(value: object) -> bool:
    """Whether a cell is the address of a file that would have to be downloaded."""
    return isinstance(value, str) and bool(_URL.match(value)) and not value.lower().startswith("file://")


def read_cell(value: object, root: Path, *, is_text_file: bool) -> Cell:
    """Returns `image`, `source_key` and `reject` of a Record for a cell of the image column."""
    key: str | None = None
    if isinstance(value, dict):
        path = value.get("path")
        key = valid_utf8(path) if isinstance(path, str) else None
        data = value.get("bytes")
        value = path if data is None else data
    if isinstance(value, bytes) and is_text_file:
        value = os.fsdecode(value)  # a file name that is not UTF-8
    if isinstance(value, bytes):
        image, reject = _from_bytes(value)
        return image, key, reject
    if value is None or value == "":
        return None, key, ("E_IMG_PATH" if is_text_file or value == "" else "E_IMG_EMPTY", "no image in this row")
    text = str(value)
    embedded = _embedded(text)
    if embedded is not None:
        image, reject = embedded
        return image, key, reject
    image, reject = _from_path(text, root)
    return image, valid_utf8(text) if len(text) <= _MAX_PATH else None, reject


def _from_bytes(data: bytes) -> tuple[bytes | None, Reject]:
    if not data:
        return None, ("E_IMG_EMPTY", "0 bytes")
    if data[:64].isascii() and _BASE64_IMAGE.match(data[:64].decode()):
        embedded = _embedded(data.decode("ascii", "replace"))
        if embedded is not None:
            return embedded
    return data, None


def _embedded(text: str) -> tuple[bytes | None, Reject] | None:
    """Returns the image that a text holds, and the reject if it is damaged; None if the text is a path."""
    is_data_url = _DATA_URL.match(text)
    if is_data_url:
        header, content = text[: is_data_url.end()], text[is_data_url.end() :]
        if not header.lower().endswith(";base64,"):
            return _limited(unquote_to_bytes(content))
        content = unquote(content) if "%" in content else content
    elif len(text) >= _MIN_BASE64 and _BASE64_IMAGE.match(text):
        content = text
    else:
        return None
    if len(content) > MAX_IMAGE_BYTES // 3 * 4 + 4:
        return _limited(b"", len(content) // 4 * 3)
    packed = "".join(content.split())
    if not _BASE64_TEXT.fullmatch(packed):
        # A path may begin like base64, but it has a dot.
        return (None, ("E_IMG_FORMAT", "a data URL with characters that are not base64")) if is_data_url else None
    padded = packed.rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        return _limited(base64.b64decode(padded + "=" * (-len(padded) % 4), validate=True))
    except binascii.Error as error:
        return None, ("E_IMG_TRUNCATED", f"the base64 text is damaged: {error}")


def _limited(data: bytes, size: int = 0) -> tuple[bytes | None, Reject]:
    size = size or len(data)
    if size > MAX_IMAGE_BYTES:
        return None, ("E_IMG_FORMAT", f"{format_count(size, 'byte')} in one cell ({MAX_IMAGE_BYTES >> 20} MiB allowed)")
    return (data, None) if data else (None, ("E_IMG_EMPTY", "0 bytes"))


def _from_path(text: str, root: Path) -> tuple[bytes | None, Reject]:
    if is_url(text):
        return None, ("E_IMG_PATH", f"{shown(text)} is a URL; URLs are not downloaded yet, give files or bytes")
    if len(text) > _MAX_PATH:
        kind = "neither a path nor base64 of an image"
        return None, ("E_IMG_PATH", f"a text of {format_count(len(text), 'character')}, {kind}: {shown(text, 80)}")
    if text.lower().startswith("file:"):
        host, slash, path = (
            text[5:].removeprefix("//").partition("/") if text[5:].startswith("//") else ("", "/", text[6:])
        )
        if host not in ("", "localhost") or not slash:
            return None, (
                "E_IMG_PATH",
                f"{shown(text)} names another computer; write the path, relative to source.root",
            )
        text = "/" + unquote(path)
    elif _WINDOWS.match(text):
        advice = "write it relative to source.root with / between folders"
        return None, ("E_IMG_PATH", f"{shown(text)} is a path of Windows; {advice}")
    image, reject = read_image(root, text)
    if reject and reject[0] == "E_IMG_PATH" and "\\" in text:
        return read_image(root, PureWindowsPath(text).as_posix())
    return image, reject
