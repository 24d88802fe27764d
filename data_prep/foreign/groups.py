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
from clipwright.data_prep.foreign.tars import HashingReader, Member, TarError, members
from clipwright.data_prep.sources import json_columns
from clipwright.data_prep.sources.base import Caption
from clipwright.data_prep.sources.caption_files import CaptionFileError, CaptionRules, without_language
from clipwright.data_prep.sources.folder_files import DECODED_SUFFIXES, OTHER_IMAGE_SUFFIXES
from clipwright.pipeline import pixels
from clipwright.pipeline.core.captions import CaptionError
from clipwright.pipeline.core.files import atomic_write, write_json
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import shown
from clipwright.pipeline.folders.output import WORK
from clipwright.pipeline.folders.schema import REJECTS_SCHEMA, SIDECAR_SCHEMA, parquet_bytes

# The samples of one tar while a run is unfinished: a sidecar's columns and the JSON member's object as text.
TAR_ROWS = pa.schema([*SIDECAR_SCHEMA, ("metadata", pa.string()), ("blank", pa.bool_())])
_IMAGES = frozenset((*DECODED_SUFFIXES, *OTHER_IMAGE_SUFFIXES))
LABEL = "cls"  # extension of a member that holds a class number or name
_MAX_LABEL_CHARACTERS = 200
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

    def add(self, extension: str, member: Member, data: bytes, *, needed: bool) -> None:
        if member.refused:
            self.report("E_TAR_MEMBER", f"{shown(member.name)}: {member.refused}")
        elif extension in self.files:
            self.report("E_PAIR_DUPLICATE", f"{shown(member.name)} occurs twice")
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


@dataclass(frozen=True)
class TarJob:
    """What the scans of all tars share. It is sent to each worker once."""

    folder: Path
    rules: CaptionRules


def scan_tar(job: TarJob, task: tuple[int, str]) -> dict[str, Any]:
    """Reads tar (number, name) of a folder; writes its rows and rejects and, last, its receipt, which it returns."""
    number, name = task
    folder = job.folder
    path = folder / name
    stat = tar_stat(path)
    size = stat[0]
    scan = _TarScan(name, job.rules)
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
        "labels": scan.labels,
    }
    write_json(receipt_path(folder, number), receipt)
    return receipt


class _TarScan:
    """The groups of one tar as rows and rejects. Rows are numbered from 0 in each tar."""

    def __init__(self, tar: str, rules: CaptionRules) -> None:
        self.tar = tar
        self.rules = rules
        self.rows: dict[int, dict[str, Any]] = {}
        self.rejects: dict[int, dict[str, Any]] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}  # key → (row, header offset) of each group that has it
        self.groups = 0
        self.captions_dropped = 0
        self.ignored = 0  # members that belong to no sample
        self.labels: list[int] = []  # smallest and largest class number

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
                last = extension.rpartition(".")[2]
                needed = last in _IMAGES or extension == LABEL or self.rules.split_name(f".{last}") is not None
                group.add(extension, member, data, needed=needed)
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
        image_extension = self._image_extension(group)
        member, data = group.files[image_extension]
        header = pixels.probe(data)
        metadata, captions = self._captions(group, image_extension)
        label = _label(group)
        if not self.rules.captioned or (label and not captions):
            captions, dropped = [], 0
        else:
            captions, dropped = select_captions(captions)
        decoded = pixels.decode(data, min_side=DHASH_MIN_SIDE)  # proves that the image is intact
        self.captions_dropped += dropped
        # A key `label` or `class_name` in the JSON stays what it is.
        for name, value in label.items():
            metadata[LABEL if name in metadata else name] = value
        if isinstance(label.get("label"), int):
            self.labels = [min([*self.labels, label["label"]]), max([*self.labels, label["label"]])]
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
            "blank": pixels.is_blank(decoded),
        }

    def _image_extension(self, group: _Group) -> str:
        """Returns the extension of a group's only image. Raises TarError if there is none, or more than one."""
        images = [extension for extension in group.files if extension in _IMAGES]
        _check_dots(group, self.rules, has_image=bool(images))
        if list(group.files) == [""]:
            length = format_count(len(group.key), "character")
            detail = f"a name of {length} without extension: it is truncated"
            raise TarError("E_PAIR_KEY", detail)
        if len(images) != 1:
            listed = ", ".join(f".{extension}" for extension in list(group.files)[:6])
            count = format_count(len(images), "image") if images else "no image"
            raise TarError("E_PAIR_IMAGE", f"{count} in the group, its members are {shown(listed)}")
        return images[0]

    def _captions(self, group: _Group, image_extension: str) -> tuple[dict[str, Any], list[Caption]]:
        """Returns a group's metadata, and its captions followed by the problems with its caption members."""
        files: list[tuple[int, int, str]] = []
        stems = ("k", f"k.{image_extension}")
        for extension in group.files:
            split = self.rules.split_name(f"k.{extension}")
            if split is not None and split[0] in stems:
                files.append((split[1], 0, extension))
            elif split is not None and without_language(split[0]) in stems:
                files.append((split[1], 1, extension))
        texts: list[Caption] = []
        problems: list[Caption] = []
        metadata: dict[str, Any] = {}
        json_name = ""
        for rank, _, extension in sorted(files):
            member, data = group.files[extension]
            name = shown(member.name)
            try:
                if self.rules.is_json(rank):
                    metadata = {**self._read_object(data, name), **metadata}
                    json_name = json_name or name
                else:
                    texts += self.rules.texts(data, name)
            except CaptionFileError as error:
                problems.append(error.args)
        captions = self.rules.choose(texts, metadata, json_name)
        metadata.pop(self.rules.caption_key(metadata), None)
        return metadata, [*captions, *problems]

    def _read_object(self, data: bytes, name: str) -> dict[str, Any]:
        value = self.rules.read_object(data, name)
        try:
            json_columns.metadata_text(value)  # fails if it is nested too deeply to be written again
        except (ValueError, RecursionError) as error:
            raise CaptionFileError("E_CAP_FILE", f"{name} cannot be read: {str(error)[:200]}") from None
        return value


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


def _label(group: _Group) -> dict[str, Any]:
    """Returns the class of a group with a `.cls` member: `label`, a number, or else `class_name`. Raises TarError."""
    if LABEL not in group.files:
        return {}
    data = group.files[LABEL][1]
    text = data.decode("utf-8", "replace").strip()
    if text.isascii() and text.removeprefix("-").isdigit() and len(text) < 18:
        return {"label": int(text)}
    if not text or len(text) > _MAX_LABEL_CHARACTERS or not text.isprintable() or "\ufffd" in text:
        raise TarError("E_PAIR_LABEL", f"the .{LABEL} member holds {shown(text) or 'nothing'}, not a class")
    return {"class_name": text}


def _check_dots(group: _Group, rules: CaptionRules, *, has_image: bool) -> None:
    """Raises TarError if the members show a dot in the key: it ends at the first dot, so samples would be mixed up.

    The sign is an image and a caption whose extensions share a prefix (`a.b.jpg` and `a.b.txt`), or such an image
    alone in a group that has no other. `mask.png` beside `jpg` is a valid extension.
    """
    dotted: dict[str, set[str]] = {}
    for extension in group.files:
        stem, dot, last = extension.rpartition(".")
        if dot and last in _IMAGES:
            dotted.setdefault(stem, set()).add("image")
        elif dot and rules.split_name(f".{last}") is not None:
            dotted.setdefault(stem, set()).add("caption")
    pairs = [stem for stem, kinds in dotted.items() if len(kinds) == 2]
    image_only = not has_image and any("image" in kinds for kinds in dotted.values())
    if pairs or image_only:
        key = shown(f"{group.key}.{next(iter(pairs or dotted))}")
        raise TarError(
            "E_PAIR_KEY", f"the key {key} contains a dot, and WebDataset's readers end a key at its first dot"
        )
