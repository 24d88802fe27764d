"""Samples of a foreign tar: groups of adjacent members with one key, or the reason why a group is not a sample."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipwright.data_prep.build.captions import select_captions
from clipwright.data_prep.build.images import DHASH_MIN_SIDE
from clipwright.data_prep.build.shards import receipt_path, rejects_path
from clipwright.data_prep.foreign import json_columns
from clipwright.data_prep.foreign.tars import HashingReader, Member, TarError, members
from clipwright.data_prep.sources.base import Caption
from clipwright.data_prep.sources.folder_files import DECODED_SUFFIXES, OTHER_IMAGE_SUFFIXES
from clipwright.pipeline import pixels
from clipwright.pipeline.core.captions import CaptionError
from clipwright.pipeline.core.files import atomic_write, write_json
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import shown
from clipwright.pipeline.folders.output import WORK
from clipwright.pipeline.folders.schema import REJECTS_SCHEMA, SIDECAR_SCHEMA, parquet_bytes

# The samples of one tar while a run is unfinished: a sidecar's columns and the JSON member's object as text.
TAR_ROWS = SIDECAR_SCHEMA.append(pa.field("metadata", pa.string()))
_IMAGES = frozenset((*DECODED_SUFFIXES, *OTHER_IMAGE_SUFFIXES))
_CAPTIONS = ("txt", "json")
_OLD_NAME_LIMIT = 100  # bytes; a tar without extended headers cuts longer names off
# WebDataset's rule: the key ends at the first dot of the base name. Hidden files have no key.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclass
class _Group:
    """Adjacent members with one key, by extension, with the data of image and caption files.

    `header` is the offset of the first member's header, `problem` the first problem as (code, detail).
    """

    key: str
    header: int
    files: dict[str, tuple[Member, bytes]] = field(default_factory=dict)
    problem: tuple[str, str] | None = None

    def add(self, extension: str, member: Member, data: bytes) -> None:
        if member.refused:
            self.report("E_TAR_MEMBER", f"{shown(member.name)}: {member.refused}")
        elif extension in self.files:
            self.report("E_PAIR_DUPLICATE", f"{shown(member.name)} occurs twice")
        needed = extension in _IMAGES or extension in _CAPTIONS
        self.files.setdefault(extension, (member, data if needed else b""))

    def report(self, code: str, detail: str) -> None:
        """Records a problem, unless there is an earlier one."""
        if self.problem is None:
            self.problem = (code, detail)


def tar_stat(path: Path) -> list[int]:
    """Returns size and modification time, by which an unchanged tar is recognized when a run resumes."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def tar_rows_path(folder: Path, number: int) -> Path:
    return folder / WORK / f"rows-{number:06d}.parquet"


def scan_tar(folder: Path, task: tuple[int, str]) -> dict[str, Any]:
    """Reads tar (number, name) of `folder`; writes its rows and rejects and, last, its receipt, which it returns."""
    number, name = task
    path = folder / name
    stat = tar_stat(path)
    size = stat[0]
    scan = _TarScan(name)
    with path.open("rb") as file:
        reader = HashingReader(file, size)
        scan.read(reader)
        reader.skip(size)  # hash the rest of a tar that could not be read to its end
    rows, rejects = scan.finish()
    atomic_write(tar_rows_path(folder, number), parquet_bytes(pa.Table.from_pylist(rows, schema=TAR_ROWS)))
    atomic_write(rejects_path(folder, number), parquet_bytes(pa.Table.from_pylist(rejects, schema=REJECTS_SCHEMA)))
    receipt = {
        "number": number,
        "tar": name,
        "stat": stat,
        "tar_bytes": reader.position,
        "tar_sha256": reader.sha256.hexdigest(),
        "groups": scan.groups,
        "samples": len(rows),
        "captions_dropped": scan.captions_dropped,
        "columns": json_columns.kinds_of(row["metadata"] for row in rows),
        "ignored": scan.ignored,
    }
    write_json(receipt_path(folder, number), receipt)
    return receipt


class _TarScan:
    """The groups of one tar as rows and rejects. Rows are numbered from 0 in each tar."""

    def __init__(self, tar: str) -> None:
        self.tar = tar
        self.rows: dict[int, dict[str, Any]] = {}
        self.rejects: dict[int, dict[str, Any]] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}  # key → (row, header offset) of each group that has it
        self.groups = 0
        self.captions_dropped = 0
        self.ignored = 0  # members that belong to no sample

    def read(self, reader: HashingReader) -> None:
        group: _Group | None = None
        try:
            for member, data in members(reader):
                key, extension = _split(member)
                if not key:
                    self.ignored += 1
                    continue
                if group is None or group.key != key:
                    if group is not None:
                        self._close(group)
                    group = _Group(key, member.header)
                group.add(extension, member, data)
        except TarError as error:
            code, detail, after_end = error.args
            if after_end and group is not None:
                self._close(group)
                group = None
            # Without an end-of-archive mark, members of the last group may be missing, so it is rejected.
            if group is None:
                group = _Group("", reader.position)
            group.report(code, detail)
        if group is not None:
            self._close(group)

    def finish(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns rows and rejects. Rejects every group whose key occurs in another group of the tar."""
        for places in self.places.values():
            if len(places) == 1:
                continue
            offsets = ", ".join(str(header) for _, header in places[:4])
            for row, _ in places:
                self.rows.pop(row, None)
                detail = f"the members of this key are not adjacent, or the key is used again (offsets {offsets})"
                self._reject(row, "E_PAIR_DUPLICATE", detail)
        rows = [self.rows[row] for row in sorted(self.rows)]
        rejects = [self.rejects[row] for row in sorted(self.rejects)]
        return rows, rejects

    def _reject(self, row: int, code: str, detail: str) -> None:
        self.rejects[row] = {"row": row, "reason": code, "detail": detail, "source": self.tar}

    def _close(self, group: _Group) -> None:
        """Turns a complete group into a row or a reject."""
        row = self.groups
        self.groups += 1
        if group.key:
            self.places.setdefault(group.key, []).append((row, group.header))
        try:
            if group.problem is not None:
                raise TarError(*group.problem)
            self.rows[row] = {"row": row, **self._sample(group)}
        except (TarError, pixels.PixelError, CaptionError) as error:
            code, detail = error.args[:2]
            place = f"group {shown(group.key)} at offset {group.header}" if group.key else f"offset {group.header}"
            self._reject(row, code, f"{place}: {detail}")

    def _sample(self, group: _Group) -> dict[str, Any]:
        """Returns a group as a row of TAR_ROWS. Raises TarError, PixelError or CaptionError if it is not a sample."""
        member, data = _image(group)
        header = pixels.probe(data)
        metadata, problem = _metadata(group)
        captions, dropped = select_captions(_captions(group, metadata, problem))
        decoded = pixels.decode(data, min_side=DHASH_MIN_SIDE)  # proves that the image is intact
        self.captions_dropped += dropped
        return {
            "key": pixels.bytes_key(data),
            "captions": captions,
            "width": header.width,
            "height": header.height,
            "offset": member.offset,
            "size": member.size,
            "sha256": hashlib.sha256(data).hexdigest(),
            "dhash": pixels.dhash(decoded),
            "source": self.tar,
            "source_key": group.key,
            "metadata": json_columns.metadata_text(metadata),
        }


def _split(member: Member) -> tuple[str, str]:
    """Returns a member's key and extension; the key is empty for a member that belongs to no sample."""
    name = member.name.removeprefix("./")
    match = _NAME.fullmatch(name)
    if match is not None:
        return match[1], match[2].lower()
    # A link or device is always reported, and so is a name that was cut off before its extension.
    cut_off = "." not in name and len(name.encode("utf-8", "surrogateescape")) >= _OLD_NAME_LIMIT
    if member.refused or cut_off:
        return name or "/", ""
    return "", ""


def _image(group: _Group) -> tuple[Member, bytes]:
    """Returns the only image of a group. Raises TarError if there is none, or more than one."""
    images = [extension for extension in group.files if extension in _IMAGES]
    _check_dots(group, has_image=bool(images))
    if list(group.files) == [""]:
        raise TarError(
            "E_PAIR_KEY", f"a name of {format_count(len(group.key), 'character')} without extension: it is truncated"
        )
    if len(images) != 1:
        listed = ", ".join(f".{extension}" for extension in list(group.files)[:6])
        count = format_count(len(images), "image") if images else "no image"
        raise TarError("E_PAIR_IMAGE", f"{count} in the group, its members are {shown(listed)}")
    return group.files[images[0]]


def _check_dots(group: _Group, *, has_image: bool) -> None:
    """Raises TarError if the members show a dot in the key: it ends at the first dot, so samples would be mixed up.

    The sign is an image and a caption whose extensions share a prefix (`a.b.jpg` and `a.b.txt`), or such an image
    alone in a group that has no other. `mask.png` beside `jpg` is a valid extension.
    """
    dotted: dict[str, set[str]] = {}
    for extension in group.files:
        stem, dot, last = extension.rpartition(".")
        if dot and last in _IMAGES:
            dotted.setdefault(stem, set()).add("image")
        elif dot and last in _CAPTIONS:
            dotted.setdefault(stem, set()).add("caption")
    pairs = [stem for stem, kinds in dotted.items() if len(kinds) == 2]
    image_only = not has_image and any("image" in kinds for kinds in dotted.values())
    if pairs or image_only:
        key = shown(f"{group.key}.{next(iter(pairs or dotted))}")
        raise TarError(
            "E_PAIR_KEY", f"the key {key} contains a dot, and WebDataset's readers end a key at its first dot"
        )


def _metadata(group: _Group) -> tuple[dict[str, Any], str]:
    """Returns the object of the JSON member, empty if there is none, and the problem with it, if any."""
    if "json" not in group.files:
        return {}, ""
    try:
        value = json_columns.parse(group.files["json"][1])
        metadata = value if isinstance(value, dict) else {}
        json_columns.metadata_text(metadata)  # fails if it is nested too deeply to be written again
    except (ValueError, RecursionError) as error:
        return {}, f"the JSON member cannot be read: {str(error)[:200]}"
    return metadata, ""


def _captions(group: _Group, metadata: dict[str, Any], problem: str) -> list[Caption]:
    """Returns the JSON member's list `captions` if it has one, else the text member, else the JSON's `caption`."""
    captions = metadata.get("captions")
    if isinstance(captions, list):
        return [_text(caption, "captions") for caption in captions]
    if "txt" in group.files:
        return [group.files["txt"][1]]
    caption = metadata.get("caption")
    if isinstance(caption, list):
        return [_text(item, "caption") for item in caption]
    if problem:
        return [("E_CAP_FILE", problem)]
    if caption is None or isinstance(caption, str):
        return [caption]
    return [("E_CAP_FILE", "`caption` in the JSON member is not text")]


def _text(value: Any, name: str) -> Caption:
    return value if isinstance(value, str) else ("E_CAP_FILE", f"an item of `{name}` in the JSON member is not text")
