"""The files of an image folder: its images, and the text and JSON files of the same stem beside each."""

from __future__ import annotations

import os
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import printable

# Formats that pixels.py decodes, and others: a file of these is a row too, so that it appears among the rejects.
DECODED_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "webp", "gif", "bmp", "dib", "tif", "tiff")
OTHER_IMAGE_SUFFIXES = (
    "avif",
    "heic",
    "heif",
    "jp2",
    "j2k",
    "jxl",
    "ico",
    "pbm",
    "pgm",
    "pnm",
    "ppm",
    "psd",
    "qoi",
    "svg",
    "tga",
)
_IMAGES = frozenset(f".{suffix}" for suffix in (*DECODED_SUFFIXES, *OTHER_IMAGE_SUFFIXES))
_TEXT, _JSON = ".txt", ".json"


def check_folder(path: str) -> Path:
    """Returns the resolved path of the input folder. Raises E_INPUT if there is no such folder."""
    root = Path(path)
    if not root.is_dir():
        is_file = root.exists()
        raise ClipwrightError(
            "E_INPUT",
            "the input folder does not exist",
            where=f"source.path: {path}",
            found="it is a file" if is_file else f"no such folder in {Path.cwd()}",
            fix="for a table, run `clipwright prep table`" if is_file else "check the path",
        )
    return root.resolve()


def find_pairs(root: Path, *, captioned: bool = True) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
    """Returns the names of all images under `root`, sorted, the suffixes of their caption files, and notes.

    Hidden and partial files are ignored. Linked folders are not followed: they may lead out of `root`, or in circles.
    captioned: False leaves out text files, which hold nothing but captions. Raises E_PREP_EMPTY if there is no image
    or, with `captioned`, no image with a caption file.
    """
    kinds = (_TEXT, _JSON) if captioned else (_JSON,)
    text_files = 0
    pairs: list[tuple[str, tuple[str, ...]]] = []
    orphans: list[str] = []
    links: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links += [prefix + name for name in subfolders if os.path.islink(f"{folder}/{name}")]  # noqa: PTH114
        images, caption_files = _sort_files(files)
        text_files += sum(_TEXT in suffixes for suffixes in caption_files.values())
        for stem, suffix in images:
            suffixes = caption_files.get(stem, {})
            found = tuple(suffixes[kind] for kind in kinds if kind in suffixes)
            pairs.append((f"{prefix}{stem}{suffix}", found))
        for stem in caption_files.keys() - {stem for stem, _ in images}:
            orphans += [f"{prefix}{stem}{suffix}" for kind, suffix in caption_files[stem].items() if kind in kinds]
    if not pairs or (captioned and not any(suffixes for _, suffixes in pairs)):
        raise _no_pairs(root, len(pairs), len(orphans))
    pairs.sort()
    notes: list[str] = []
    if text_files and not captioned:
        notes.append(f"text files that were not read, because source.caption=none: {text_files}")
    if orphans:
        notes.append(f"caption files without an image: {len(orphans)}, the first is {printable(min(orphans))}")
    if links:
        notes.append(f"linked folders that were not followed: {len(links)}, the first is {printable(min(links))}")
    return [name for name, _ in pairs], [suffixes for _, suffixes in pairs], notes


def _sort_files(files: list[str]) -> tuple[list[tuple[str, str]], dict[str, dict[str, str]]]:
    """Returns a folder's images as (stem, suffix), and its caption files as stem → kind → suffix as written."""
    images: list[tuple[str, str]] = []
    caption_files: dict[str, dict[str, str]] = {}
    for name in sorted(files):
        if name.startswith("."):
            continue
        stem, suffix = os.path.splitext(name)  # noqa: PTH122  a Path would normalize the name
        kind = suffix.lower()
        if kind in _IMAGES:
            images.append((stem, suffix))
        elif kind in (_TEXT, _JSON):
            caption_files.setdefault(stem, {})[kind] = suffix
    return images, caption_files


def _raise(error: OSError) -> None:
    raise error


def _no_pairs(root: Path, images: int, orphans: int) -> ClipwrightError:
    if not images:
        return ClipwrightError(
            "E_PREP_EMPTY",
            "the folder has no images",
            where=root,
            found=f"no file in it or its subfolders ends in {', '.join(f'.{suffix}' for suffix in DECODED_SUFFIXES)}",
            fix="check source.path; for a table of images, run `clipwright prep table`",
        )
    found = f"{format_count(images, 'image')}, and no .txt or .json file with the same stem beside any of them"
    if orphans:
        found += f"; {format_count(orphans, 'caption file')} without an image"
    return ClipwrightError(
        "E_PREP_EMPTY",
        "the images have no captions",
        where=root,
        found=found,
        fix="to prepare the images without captions, add source.caption=none; else put a.txt (one caption per line) or "
        "a.json beside a.jpg, or list images and captions in a table and run `clipwright prep table`",
    )
