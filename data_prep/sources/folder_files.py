"""The files of an image folder: its images, and the caption files of each."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clipwright.data_prep.sources.caption_files import JSON_SUFFIX, CaptionRules, without_language
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import printable, valid_utf8
from clipwright.pipeline.folders.describe import describe

# Formats that pipeline/pixels decodes, HEIC with an extra.
DECODED_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif"),
    *("heic", "heif", "hif", "gif", "bmp", "dib", "tif", "tiff"),
)
# A file of another format is a row too, so that it appears among the rejects.
OTHER_IMAGE_SUFFIXES = (
    *("jp2", "j2k", "jpx", "jxl", "jxr", "ico", "pbm", "pgm", "pnm", "ppm", "psd", "qoi", "svg", "tga"),
)
_IMAGES = frozenset(f".{suffix}" for suffix in (*DECODED_SUFFIXES, *OTHER_IMAGE_SUFFIXES))
# Folders that an operating system makes. Their files are not the user's.
_SYSTEM_FOLDERS = frozenset(("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir"))


@dataclass
class FolderFiles:
    """The images under a folder, sorted by name, the caption files of each (text before JSON), and notes."""

    images: list[str] = field(default_factory=list)
    caption_files: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_folder(path: str) -> Path:
    """Returns the resolved path of the input folder. Raises E_INPUT if there is no such folder."""
    root = Path(path)
    if not root.is_dir():
        found, fix = f"no such folder in {Path.cwd()}", "check the path"
        if root.exists():
            found, fix = f"it is {describe(root).text}", describe(root).advice or "name a folder"
        raise ClipwrightError(
            "E_INPUT", "the input folder does not exist", where=f"source.path: {path}", found=found, fix=fix
        )
    return root.resolve()


def find_files(root: Path, rules: CaptionRules) -> FolderFiles:
    """Finds the images under `root` and their caption files.

    Hidden files, partial files and folders of the operating system are ignored. Linked folders are not followed: they
    may lead out of `root`, or in circles. Raises E_INPUT for a folder that cannot be read, and E_PREP_EMPTY if there is
    no image or, unless `rules` wants none, no image with a caption file.
    """
    pairs: list[tuple[str, tuple[str, ...]]] = []
    orphans: list[str] = []
    unread_texts: list[str] = []
    links: list[str] = []
    hidden: list[str] = []
    shared: list[str] = []
    for prefix, files, linked in _walk(root):
        links += linked
        images, texts = _sort_files(files, rules)
        hidden += [prefix + name for name in files if name.startswith(".") and _is_image(name)]
        pairs_here, orphans_here, shared_here = _match(images, texts, rules)
        pairs += [(prefix + image, tuple(prefix + name for name in names)) for image, names in pairs_here.items()]
        orphans += [prefix + name for name in orphans_here]
        shared += [prefix + name for name in shared_here]
        if not rules.captioned:
            unread_texts += [prefix + name for name, _, rank in texts if not rules.is_json(rank)]
    if not pairs or (rules.captioned and not any(names for _, names in pairs)):
        raise _no_pairs(root, len(pairs), len(orphans), rules)
    pairs.sort()
    notes = [
        ("caption files without an image", orphans),
        ("images that share their caption files with another image of the same stem", shared),
        ("text files that were not read, because source.caption=none", unread_texts),
        ("linked folders that were not followed", links),
        ("hidden images that were ignored", hidden),
    ]
    return FolderFiles(
        [name for name, _ in pairs],
        [names for _, names in pairs],
        [f"{what}: {len(names):,}, the first is {printable(min(names))}" for what, names in notes if names],
    )


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields for each folder its path relative to `root` (with a slash), its files, and the links to folders in it.

    Not os.walk, which calls itself for every level of a deep tree.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        files: list[str] = []
        linked: list[str] = []
        try:
            with os.scandir(f"{root}/{prefix}") as entries:
                for entry in entries:
                    if not _leads_to_a_folder(entry):
                        files.append(entry.name)
                    elif entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
                        continue
                    elif entry.is_symlink():
                        linked.append(prefix + entry.name)
                    else:
                        waiting.append(f"{prefix}{entry.name}/")
        except OSError as error:
            raise ClipwrightError(
                "E_INPUT",
                "a folder of the input cannot be read",
                where=printable(valid_utf8(f"{root}/{prefix}"[:1000])),
                found=error.strerror or str(error),
                fix="make the folder readable, or move it out of source.path",
            ) from None
        yield prefix, sorted(files), linked


def _leads_to_a_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it reports the reason
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name.lower())[1] in _IMAGES  # noqa: PTH122  a Path would normalize the name


def _sort_files(files: list[str], rules: CaptionRules) -> tuple[list[str], list[tuple[str, str, int]]]:
    """Returns a folder's images, and its caption files as (name, name without ending, rank of the ending)."""
    images: list[str] = []
    texts: list[tuple[str, str, int]] = []
    for name in files:
        if name.startswith("."):
            continue
        if _is_image(name):
            images.append(name)
        elif (split := rules.split_name(name)) is not None:
            texts.append((name, *split))
    return images, texts


def _match(
    images: list[str], texts: list[tuple[str, str, int]], rules: CaptionRules
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Returns image → caption files in the order they are read, caption files of no image, and images of one stem.

    `a.jpg` has the caption files a.txt and a.jpg.txt, and a.en.txt unless there is an image of the stem `a.en`. Names
    that differ only in their Unicode normal form are equal, as macOS and Linux write them differently.
    """
    owners: defaultdict[str, list[str]] = defaultdict(list)  # stem, or whole name, as written and in NFC → images
    stems: Counter[str] = Counter()
    for image in images:
        stem = os.path.splitext(image)[0]  # noqa: PTH122
        stems[stem] += 1
        for name in dict.fromkeys((stem, image, _nfc(stem), _nfc(image))):
            owners[name].append(image)
    found: dict[str, list[tuple[int, int, str]]] = {image: [] for image in images}
    orphans: list[str] = []
    for name, stem, rank in texts:
        if not rules.captioned and not rules.is_json(rank):
            continue
        spoken = without_language(stem)
        places = ((0, stem), (0, _nfc(stem)), (1, spoken), (1, None if spoken is None else _nfc(spoken)))
        place, owned = next(((p, owners[key]) for p, key in places if key in owners), (0, []))
        for image in owned:
            found[image].append((rank, place, name))
        if not owned:
            orphans.append(name)
    named = {image: [name for _, _, name in sorted(files)] for image, files in found.items()}
    shared = [image for image in images if stems[os.path.splitext(image)[0]] > 1 and named[image]]  # noqa: PTH122
    return named, orphans, shared


def _nfc(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _no_pairs(root: Path, images: int, orphans: int, rules: CaptionRules) -> ClipwrightError:
    if not images:
        return ClipwrightError(
            "E_PREP_EMPTY",
            "the folder has no images",
            where=root,
            found=f"no file in it or its subfolders ends in {', '.join(f'.{suffix}' for suffix in DECODED_SUFFIXES)}",
            fix="check source.path; for a table of images, run `clipwright prep table`",
        )
    endings = " or ".join((*rules.text_suffixes, JSON_SUFFIX))
    found = f"{format_count(images, 'image')}, and no {endings} file with the same stem beside any of them"
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
