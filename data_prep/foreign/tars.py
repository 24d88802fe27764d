"""Members of a tar that another tool wrote, read once from start to end. Nothing in it is trusted or unpacked.

The headers are parsed here and not by tarfile, which takes a malformed header for the end of the archive, reads
extended headers of any size into memory and follows sparse maps. POSIX.1-2001 (pax) and GNU long names are supported.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import shown

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBER_BYTES = 64 << 20  # of an image, text or JSON
MAX_MEMBERS = 1_000_000
MAX_NAME_CHARACTERS = 1024
_MAX_EXTENDED_BYTES = 1 << 20  # of an extended header
_READ_BYTES = 1 << 20
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAME = tarfile.GNUTYPE_LONGNAME
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_MAX_OCTAL_SIZE = 0o77777777777  # a larger size does not fit the header's own field, so that only the pax record has it
_REFUSED_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class TarError(ValueError):
    """A tar that cannot be read further, or a group of its members that is not a valid sample.

    `args` are code, detail, and whether the error is after the end-of-archive mark.
    """

    def __init__(self, code: str, detail: str, after_end: bool = False) -> None:
        super().__init__(code, detail, after_end)


class HashingReader:
    """A file read once from start to end. Keeps its `position` and the SHA-256 of the bytes read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.size - self.position))  # a header may claim any size
        self.sha256.update(data)
        self.position += len(data)
        return data

    def skip(self, size: int) -> int:
        """Reads and discards up to `size` bytes; returns how many there were."""
        left = size
        while left > 0:
            data = self.read(min(left, _READ_BYTES))
            if not data:
                break
            left -= len(data)
        return size - left


@dataclass(frozen=True)
class Member:
    """A file in a tar: name, positions of header and data, size. `refused` is why it is not a plain, safe file."""

    name: str
    header: int
    offset: int
    size: int
    refused: str = ""


def members(reader: HashingReader) -> Iterator[tuple[Member, bytes]]:
    """Yields files, links and devices of a tar with their data (empty for a refused member). Folders are left out.

    Reads to the end of the file. Raises TarError where it cannot read further.
    """
    long_name = ""
    long_size: int | None = None
    sparse = False
    for _ in range(MAX_MEMBERS):
        header = reader.position
        info = _read_header(reader, header)
        if info is None:
            return
        if info.type in _PAX:
            records = _pax_records(_read_extended(reader, info, header), header)
            if long_size is not None and "size" in records:
                raise TarError(
                    "E_TAR", f"two extended headers, the second at offset {header}, state the size of one member"
                )
            long_name = records.get("path", long_name)
            long_size = _pax_size(records["size"], header) if "size" in records else long_size
            sparse = any(key.startswith("GNU.sparse") for key in records)
            continue
        if info.type == _LONG_NAME:
            data = _read_extended(reader, info, header)
            long_name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            continue
        if info.type == tarfile.GNUTYPE_LONGLINK:
            _read_extended(reader, info, header)
            continue
        if info.type == tarfile.XGLTYPE:
            _check_global(_pax_records(_read_extended(reader, info, header), header), header)
            continue
        name = long_name or info.name
        size = info.size if long_size is None else long_size
        if size != info.size and size <= _MAX_OCTAL_SIZE:
            raise _contradiction(
                name, header, f"its own header states {format_count(info.size, 'byte')}, the pax header {size}"
            )
        kind = "a sparse file" if sparse else _refused_kind(info.type)
        long_name, long_size, sparse = "", None, False
        is_folder = info.type == tarfile.DIRTYPE or (info.type in _FILES and name.endswith("/"))
        if is_folder and size:
            raise _contradiction(name, header, f"it is a folder of {format_count(size, 'byte')}")
        if is_folder:
            continue
        if info.type in _WITHOUT_DATA:
            size = 0
        yield _read_member(reader, name, header, size, kind)
    raise TarError("E_TAR", f"more than {format_count(MAX_MEMBERS, 'header')}")


def _contradiction(name: str, header: int, found: str) -> TarError:
    """Returns the error for headers that readers of tars understand differently, so that they find other members."""
    return TarError("E_TAR", f"the headers of {shown(name)} at offset {header} contradict each other: {found}")


def _check_global(records: dict[str, str], header: int) -> None:
    """Raises TarError if a global header sets the name or size of members, which not all readers heed."""
    for key in ("size", "path", "GNU.sparse.size", "GNU.sparse.name"):
        if key in records:
            raise TarError("E_TAR", f"a global header at offset {header} sets the {key} of all members")


def _read_member(reader: HashingReader, name: str, header: int, size: int, kind: str) -> tuple[Member, bytes]:
    offset = reader.position
    refused = kind or _unsafe(name, size)
    if refused:
        data = b""
        available = reader.skip(size)
    else:
        data = reader.read(size)
        available = len(data)
    if available != size:
        raise TarError(
            "E_TAR_TRUNCATED", f"the file ends after {available} of {format_count(size, 'byte')} of {shown(name)}"
        )
    reader.skip(-size % BLOCK)
    return Member(name, header, offset, size, refused), data


def _refused_kind(kind: bytes) -> str:
    """Returns what a member is if it is not a plain file, else an empty string."""
    if kind in _REFUSED_KINDS:
        return _REFUSED_KINDS[kind]
    return "" if kind in (*_FILES, tarfile.DIRTYPE) else "a member of an unsupported type"


def _read_header(reader: HashingReader, start: int) -> tarfile.TarInfo | None:
    """Returns the next header, or None at the end of the archive, after which only zero bytes may follow."""
    block = reader.read(BLOCK)
    if not block:
        return None
    if len(block) < BLOCK:
        raise TarError("E_TAR_TRUNCATED", f"the file ends inside a header at offset {start}")
    if not block.strip(b"\0"):
        _check_end(reader, start)
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarError("E_TAR", f"the tar header at offset {start} is malformed: {error}") from None
    if info.size < 0:
        raise TarError("E_TAR", f"a member with a negative size at offset {start}")
    return info


def _check_end(reader: HashingReader, start: int) -> None:
    while rest := reader.read(_READ_BYTES):
        if rest.strip(b"\0"):
            raise TarError("E_TAR", f"data follows the end-of-archive mark at offset {start}", after_end=True)


def _read_extended(reader: HashingReader, info: tarfile.TarInfo, start: int) -> bytes:
    if info.size > _MAX_EXTENDED_BYTES:
        detail = (
            f"an extended header of {format_count(info.size, 'byte')} at offset {start} (limit {_MAX_EXTENDED_BYTES})"
        )
        raise TarError("E_TAR", detail)
    data = reader.read(info.size)
    if len(data) != info.size:
        raise TarError("E_TAR_TRUNCATED", f"the file ends inside an extended header at offset {start}")
    reader.skip(-info.size % BLOCK)
    return data


def _pax_records(data: bytes, start: int) -> dict[str, str]:
    """Parses the records `LENGTH KEY=VALUE\\n` of a pax header."""
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        digits, _, _ = data[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not len(digits) + 3 < length <= len(data) or not equals:
            raise TarError("E_TAR", f"the extended header at offset {start} is malformed")
        name, text = key.decode("utf-8", "replace"), value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        if records.setdefault(name, text) != text:
            detail = (
                f"the extended header at offset {start} states the {shown(name)} twice: {shown(records[name])} and "
            )
            raise TarError("E_TAR", detail + shown(text))
        data = data[length:]
    return records


def _pax_size(text: str, start: int) -> int:
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise TarError("E_TAR", f"an extended header with a size of {shown(text)} at offset {start}")


def _unsafe(name: str, size: int) -> str:
    """Returns why a file is refused by its name or size; its data is not inspected."""
    if name.startswith("/") or ".." in name.split("/"):
        return "a path that leaves its folder"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"a name of {format_count(len(name), 'character')} (limit {MAX_NAME_CHARACTERS})"
    if not name.isprintable():  # also refuses lone surrogates, which represent bytes that are not UTF-8
        return "a name that is not printable text"
    return f"{format_count(size, 'byte')} (limit {MAX_MEMBER_BYTES})" if size > MAX_MEMBER_BYTES else ""
