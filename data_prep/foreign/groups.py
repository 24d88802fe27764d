"""The samples of a tar that others made: groups of adjacent members of one key, or why a group is no sample."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.build.captions import choose
from clipwright.data_prep.build.shards import REJECTS, SIDECAR, WORK, receipt_path, rejects_path
from clipwright.data_prep.foreign import json_columns
from clipwright.data_prep.foreign.tars import HashingReader, Member, TarError, members, shown
from clipwright.data_prep.sources.base import Caption
from clipwright.data_prep.sources.folder import READ, UNREAD
from clipwright.pipeline import pixels
from clipwright.pipeline.core.captions import CaptionError
from clipwright.pipeline.core.files import atomic_write, write_json

PART = SIDECAR.append(pa.field("about", pa.string()))  # what a tar's samples are, with the objects of JSON members
_IMAGES = frozenset((*READ, *UNREAD))
_CAPTIONS = ("txt", "json")
_CUT_AT = 100  # bytes of a name in a tar without extended headers
# WebDataset's rule: the key ends at the first dot of the base name. Hidden files have no key.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclass
class _Group:
    """Adjacent members of one key; the data of image and caption files only, and the first thing wrong with it."""

    key: str
    header: int
    parts: dict[str, tuple[Member, bytes]] = field(default_factory=dict)
    problem: tuple[str, str] | None = None

    def add(self, extension: str, member: Member, data: bytes) -> None:
        if member.refused:
            self.problem = self.problem or ("E_TAR_MEMBER", f"{shown(member.name)}: {member.refused}")
        elif extension in self.parts:
            self.problem = self.problem or ("E_PAIR_DUPLICATE", f"{shown(member.name)} stands in it twice")
        wanted = extension in _IMAGES or extension in _CAPTIONS
        self.parts.setdefault(extension, (member, data if wanted else b""))


def tar_stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def part_path(folder: Path, number: int) -> Path:
    return folder / WORK / f"part-{number:06d}.parquet"


def scan_tar(folder: Path, task: tuple[int, str]) -> dict[str, Any]:
    """Reads one tar; leaves its rows, its rejects and, last, a receipt in the work folder, and returns that."""
    number, name = task
    path = folder / name
    stat = tar_stat(path)
    scan = _Scan(name)
    with path.open("rb") as file:
        reader = HashingReader(file, stat[0])
        scan.read(reader)
        reader.pass_over(stat[0])  # whatever stands behind the place where it could not go on
    rows, rejects = scan.close()
    atomic_write(part_path(folder, number), parquet_bytes(rows, PART))
    atomic_write(rejects_path(folder, number), parquet_bytes(rejects, REJECTS))
    receipt = {
        "number": number,
        "tar": name,
        "stat": stat,
        "tar_bytes": reader.place,
        "tar_sha256": reader.sha256.hexdigest(),
        "groups": scan.count,
        "samples": len(rows),
        "captions_dropped": scan.dropped,
        "columns": json_columns.kinds_of(row["about"] for row in rows),
        "ignored": scan.ignored,
    }
    write_json(receipt_path(folder, number), receipt)
    return receipt


def parquet_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    table = pa.Table.from_pylist(rows, schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


class _Scan:
    """The groups of one tar as rows and rejects; `row` counts from 0 in each tar."""

    def __init__(self, tar: str) -> None:
        self.tar = tar
        self.rows: dict[int, dict[str, Any]] = {}
        self.rejects: dict[int, dict[str, Any]] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}  # of each key: number and header of its groups
        self.count = self.dropped = self.ignored = 0

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
                        self._group(group)
                    group = _Group(key, member.header)
                group.add(extension, member, data)
        except TarError as error:
            code, detail, ended = error.args
            if ended and group is not None:
                self._group(group)
                group = None
            # Without an end mark the last group may lack members that were to come.
            group = group or _Group("", reader.place)
            group.problem = group.problem or (code, detail)
        if group is not None:
            self._group(group)

    def close(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows and rejects, once a key is known to stand in one place only."""
        for places in self.places.values():
            if len(places) > 1:
                spots = ", ".join(str(header) for _, header in places[:4])
                for row, _ in places:
                    self.rows.pop(row, None)
                    detail = f"members of this key stand apart, or it is used again: at offsets {spots}"
                    self.rejects[row] = {**self.rejects.get(row, {}), "reason": "E_PAIR_DUPLICATE", "detail": detail}
                    self.rejects[row] |= {"row": row, "source": self.tar}
        return [self.rows[row] for row in sorted(self.rows)], [self.rejects[row] for row in sorted(self.rejects)]

    def _group(self, group: _Group) -> None:
        row, self.count = self.count, self.count + 1
        if group.key:
            self.places.setdefault(group.key, []).append((row, group.header))
        try:
            if group.problem is not None:
                raise TarError(*group.problem)
            self.rows[row] = {"row": row, **self._sample(group)}
        except (TarError, pixels.PixelError, CaptionError) as error:
            code, detail = error.args[:2]
            place = f"group {shown(group.key)} at offset {group.header}" if group.key else f"offset {group.header}"
            self.rejects[row] = {"row": row, "reason": code, "detail": f"{place}: {detail}", "source": self.tar}

    def _sample(self, group: _Group) -> dict[str, Any]:
        """A group as a row of the sidecar. Raises TarError, PixelError, CaptionError for one that is no sample."""
        member, data = _image(group)
        header = pixels.probe(data)
        about, problem = _about(group)
        captions, dropped = choose(_captions(group, about, problem))
        sha256 = hashlib.sha256(data).hexdigest()
        made = {
            "key": pixels.bytes_key(data),
            "captions": captions,
            "width": header.width,
            "height": header.height,
            "offset": member.offset,
            "size": member.size,
            "sha256": sha256,
            "dhash": pixels.dhash(pixels.decode(data, min_side=64)),  # decoded, to know that it is whole
            "source": self.tar,
            "source_key": group.key,
            "about": json_columns.text_of(about),
        }
        self.dropped += dropped
        return made


def _split(member: Member) -> tuple[str, str]:
    """A member's key and extension; no key for one that is no part of a sample."""
    name = member.name.removeprefix("./")
    if (match := _NAME.fullmatch(name)) is not None:
        return match[1], match[2].lower()
    # A link or device is never passed over, nor a name that was cut off before its extension.
    cut = "." not in name and len(name.encode("utf-8", "surrogateescape")) >= _CUT_AT
    return (name or "/", "") if member.refused or cut else ("", "")


def _image(group: _Group) -> tuple[Member, bytes]:
    """The one image of a group. Raises TarError where there is none, or more than one."""
    found = [extension for extension in group.parts if extension in _IMAGES]
    dotted: dict[str, set[str]] = {}
    for extension in group.parts:
        stem, dot, last = extension.rpartition(".")
        if dot and (last in _IMAGES or last in _CAPTIONS):
            dotted.setdefault(stem, set()).add("image" if last in _IMAGES else "caption")
    pairs = [stem for stem, kinds in dotted.items() if len(kinds) == 2]
    if pairs or (not found and any("image" in kinds for kinds in dotted.values())):
        name = shown(f"{group.key}.{next(iter(pairs or dotted))}")
        raise TarError("E_PAIR_KEY", f"a dot in the key {name}, which WebDataset's readers end at the first one")
    if list(group.parts) == [""]:
        raise TarError("E_PAIR_KEY", f"a name of {len(group.key)} characters without extension, which was cut off")
    if len(found) != 1:
        named = ", ".join(f".{extension}" for extension in list(group.parts)[:6])
        many = f"{len(found)} images" if found else "no image"
        raise TarError("E_PAIR_IMAGE", f"{many} among its members {shown(named)}")
    return group.parts[found[0]]


def _about(group: _Group) -> tuple[dict[str, Any], str]:
    """The object of the JSON member, empty where there is none, and what is wrong with it."""
    if "json" not in group.parts:
        return {}, ""
    try:
        about = json_columns.parse(group.parts["json"][1])
        json_columns.text_of(about if isinstance(about, dict) else {})  # may be too deep to be written again
    except (ValueError, RecursionError) as error:
        return {}, f"the JSON member cannot be read: {str(error)[:200]}"
    return about if isinstance(about, dict) else {}, ""


def _captions(group: _Group, about: dict[str, Any], problem: str) -> list[Caption]:
    """The list `captions` of the JSON member if it has one, else the text member, else `caption` of the JSON."""
    if isinstance(several := about.get("captions"), list):
        return [text if isinstance(text, str) else ("E_CAP_FILE", "`captions` holds no texts") for text in several]
    if "txt" in group.parts:
        return [group.parts["txt"][1]]
    one = about.get("caption")
    if isinstance(one, list):
        return [text if isinstance(text, str) else ("E_CAP_FILE", "`caption` holds no texts") for text in one]
    if problem or not isinstance(one, (str, type(None))):
        return [("E_CAP_FILE", problem or "`caption` of the JSON member is no text")]
    return [one]
