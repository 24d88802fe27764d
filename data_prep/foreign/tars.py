"""The members of a tar that somebody else made, read once from front to back; nothing in it is trusted or unpacked.

The headers are read here and not by tarfile, which takes a broken header for the end of the archive, reads extended
headers of any size into memory and follows sparse maps. POSIX.1-2001 (pax) and GNU long names are understood.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBER = 64 << 20  # bytes of an image, text or JSON
MAX_MEMBERS = 1_000_000
MAX_NAME = 1024  # characters
_MAX_EXTENDED = 1 << 20  # bytes of an extended header
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX, _LONG_NAME = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.GNUTYPE_LONGNAME
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)  # have no data
_PASSED = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)  # extended headers that decide neither name nor size
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class TarError(ValueError):
    """A tar that cannot be read on, or a group of it that is no sample; `args`: code, detail, after the end mark."""

    def __init__(self, code: str, detail: str, ended: bool = False) -> None:
        super().__init__(code, detail, ended)


class HashingReader:
    """A file read once from start to end, which knows its place and the SHA-256 of what was read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.sha256, self.place = file, size, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.size - self.place))  # a header may claim any size
        self.sha256.update(data)
        self.place += len(data)
        return data

    def pass_over(self, size: int) -> int:
        """Reads and forgets; how many bytes there were."""
        left = size
        while left > 0 and (data := self.read(min(left, 1 << 20))):
            left -= len(data)
        return size - left


@dataclass(frozen=True)
class Member:
    """A file in a tar: name, place of its header and of its data; `refused` says why it is no plain, safe file."""

    name: str
    header: int
    offset: int
    size: int
    refused: str = ""


def members(reader: HashingReader) -> Iterator[tuple[Member, bytes]]:
    """Files, links and devices of a tar, no folders, with their data; of a refused one it is not kept.

    Reads to the end of the file. Raises TarError at the first place where it cannot go on.
    """
    name, size, sparse = "", None, False
    for _ in range(MAX_MEMBERS):
        header = reader.place
        info = _header(reader, header)
        if info is None:
            return
        if info.type in _PAX:
            records = _records(_extended(reader, info, header), header)
            name, size = records.get("path", name), _number(records.get("size"), header)
            sparse = any(key.startswith("GNU.sparse") for key in records)
            continue
        if info.type in (_LONG_NAME, *_PASSED):
            data = _extended(reader, info, header)
            if info.type == _LONG_NAME:
                name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            continue
        found, length = name or info.name, info.size if size is None else size
        kind = _KINDS.get(info.type, "" if info.type in _FILES else "a member of an odd type")
        kind = "a sparse file" if sparse else kind
        name, size, sparse = "", None, False
        if info.type == tarfile.DIRTYPE or (info.type in _FILES and found.endswith("/")):
            continue
        offset, length = reader.place, 0 if info.type in _EMPTY else length
        refused = kind or _unsafe(found, length)
        data = b"" if refused else reader.read(length)
        got = reader.pass_over(length) if refused else len(data)
        if got != length:
            raise TarError("E_TAR_TRUNCATED", f"the file ends after {got} of {length} bytes of {shown(found)}")
        reader.pass_over(-length % BLOCK)
        yield Member(found, header, offset, length, refused), data
    raise TarError("E_TAR", f"more than {MAX_MEMBERS} headers")


def shown(name: str) -> str:
    """A member's name for a message: whatever is odd in it is escaped, and it is short."""
    text = ascii(name)[1:-1]
    return text if len(text) <= 200 else text[:199] + "…"


def _header(reader: HashingReader, start: int) -> tarfile.TarInfo | None:
    """The next header; None at the end of the archive, behind which nothing but zeros may stand."""
    block = reader.read(BLOCK)
    if not block:
        return None
    if len(block) < BLOCK:
        raise TarError("E_TAR_TRUNCATED", f"the file ends inside a header at offset {start}")
    if not block.strip(b"\0"):
        while rest := reader.read(1 << 20):
            if rest.strip(b"\0"):
                raise TarError("E_TAR", f"something stands behind its end mark at offset {start}", ended=True)
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarError("E_TAR", f"no tar header at offset {start}: {error}") from None
    if info.size < 0:
        raise TarError("E_TAR", f"a member of a negative size at offset {start}")
    return info


def _extended(reader: HashingReader, info: tarfile.TarInfo, start: int) -> bytes:
    if info.size > _MAX_EXTENDED:
        raise TarError("E_TAR", f"an extended header of {info.size} bytes at offset {start}, {_MAX_EXTENDED} allowed")
    data = reader.read(info.size)
    if len(data) != info.size:
        raise TarError("E_TAR_TRUNCATED", f"the file ends inside an extended header at offset {start}")
    reader.pass_over(-info.size % BLOCK)
    return data


def _records(data: bytes, start: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    found: dict[str, str] = {}
    while data.strip(b"\0"):
        length, _, _ = data[:20].partition(b" ")
        size = int(length) if length.isdigit() else 0
        key, equals, value = data[len(length) + 1 : size].partition(b"=")
        if not len(length) + 3 < size <= len(data) or not equals:
            raise TarError("E_TAR", f"a broken extended header at offset {start}")
        found[key.decode("utf-8", "replace")] = value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        data = data[size:]
    return found


def _number(text: str | None, start: int) -> int | None:
    if text is None or (text.isascii() and text.isdigit() and len(text) < 20):
        return None if text is None else int(text)
    raise TarError("E_TAR", f"an extended header with a size of {shown(text)} at offset {start}")


def _unsafe(name: str, size: int) -> str:
    """Why a file is refused, by its name and size; the data is not looked at."""
    if name.startswith("/") or ".." in name.split("/"):
        return "a name that leads out of a folder"
    if len(name) > MAX_NAME:
        return f"a name of {len(name)} characters, {MAX_NAME} allowed"
    if not name.isprintable():  # lone surrogates, which stand for bytes that are not UTF-8, are not
        return "a name that is not printable text"
    return f"{size} bytes, {MAX_MEMBER} allowed" if size > MAX_MEMBER else ""
