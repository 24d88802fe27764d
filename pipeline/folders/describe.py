"""What a folder or file is, in words: for errors about a path of the wrong kind, which then name the right command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from clipwright.pipeline.core.errors import ClipwrightError

MAX_NAMES = 2000  # of a folder, that are looked at
MAX_JSON_BYTES = 1 << 24
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
INDEX_FILES = ("current", "versions")
TRANSFORMERS = "transformers"
RUN_AGAIN = "run the command that writes it again"


class Description(NamedTuple):
    """What a path is and which command reads it, if either is known."""

    kind: str
    """A format such as dataset or model, or run, table, images and so on; empty if nothing was recognized."""
    text: str
    """In words, such as `an embedding folder`."""
    advice: str
    """What to do with it, such as `index build reads it`."""


# Format of a manifest → what it is, and what reads it.
_FORMATS = {
    "dataset": ("a dataset folder", "train, embed and eval read it as a dataset"),
    "model": ("a model folder", "eval and embed read it as model=DIR"),
    "embedding": ("an embedding folder", "index build reads it as embeddings=DIR"),
    "index": ("one version of an index folder", "name the index folder above it"),
    "checkpoint": ("a checkpoint of a run", "name its run folder, and use `clipwright export RUN -o MODEL`"),
}


def describe(path: Path) -> Description:
    """Returns what an existing folder or file is, as far as its names show."""
    if path.is_file():
        return _describe_file(path)
    names, quoted = set(_names(path)), shlex.quote(str(path))
    manifest = _read_json(path / "manifest.json") if "manifest.json" in names else {}
    kind = str(manifest.get("format"))
    if kind in _FORMATS:
        return Description(kind, *_FORMATS[kind])
    if set(INDEX_FILES) & names:
        return Description("index", "an index folder", "search reads it as its first argument")
    if {"ledger.jsonl", "checkpoints", "latest"} & names or {"config.yaml", "identity.json"} <= names:
        return Description("run", "a run folder", f"make a model folder of it: clipwright export {quoted} -o MODEL")
    if "report.json" in names:
        return Description("report", "a report folder", "name the folder that the report is about")
    if ".prep" in names:
        return Description("", "an unfinished dataset folder", RUN_AGAIN)
    if ".embed" in names or any(re.fullmatch(r"part-\d+\.(npy|parquet)", name) for name in names):
        return Description("", "an unfinished embedding folder", RUN_AGAIN)
    foreign = _foreign_model(path, names)
    if foreign is not None:
        return foreign
    return _describe_content(path, names)


def wrong_kind(path: Path, kind: str) -> ClipwrightError:
    """Returns the error about a path that is no `kind` folder: E_INPUT for a file or nothing, else E_MANIFEST."""
    if not path.exists():
        return ClipwrightError(
            "E_INPUT",
            f"the {kind} folder does not exist",
            where=path,
            found=f"no such folder in {path.absolute().parent}",
            fix="check the path",
        )
    description = describe(path)
    advice = description.advice
    if description.kind in (TRANSFORMERS, "open_clip", "sentence-transformers") and kind != "model":
        advice = f"name {_with_article(kind)} folder"
    return ClipwrightError(
        "E_MANIFEST" if path.is_dir() and kind != "run" else "E_INPUT",  # a run has no manifest
        f"this is not {_with_article(kind)} folder",
        where=path,
        found=f"it is {description.text}",
        fix=advice or f"name {_with_article(kind)} folder",
    )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _describe_file(path: Path) -> Description:
    suffix, quoted, folder = path.suffix.lower(), shlex.quote(str(path)), shlex.quote(str(path.parent))
    if suffix in TABLE_SUFFIXES:
        advice = f"make a dataset folder of it: clipwright prep table source.path={quoted} -o DATASET"
        return Description("table", f"a table file ({suffix})", advice)
    if suffix == ".tar":
        return Description("tar", "a tar file", f"name its folder; `clipwright data index {folder}` adds a manifest")
    if suffix in IMAGE_SUFFIXES:
        advice = f"make a dataset folder: clipwright prep folder source.path={folder} -o DATASET"
        return Description("image", "an image file", advice)
    if suffix in (".safetensors", ".bin", ".pt", ".pth"):
        return Description("weights", "a file of weights", "name its folder")
    return Description("", "a file", "name a folder")


def _foreign_model(path: Path, names: set[str]) -> Description | None:
    """Recognizes model folders of transformers, open_clip and sentence-transformers."""
    how = f"make a model folder of it: clipwright import {shlex.quote(str(path))} -o MODEL"
    if "open_clip_config.json" in names:
        advice = "open_clip's format cannot be imported yet: use the transformers folder of the same model"
        return Description("open_clip", "a model folder of open_clip", advice)
    if "config.json" in names and "model_type" in _read_json(path / "config.json"):
        return Description(TRANSFORMERS, "a model folder of transformers", how)
    if "modules.json" in names:
        inner = [name for name in sorted(names) if "model_type" in _read_json(path / name / "config.json")]
        if inner:
            how = f"its model is in a subfolder: clipwright import {shlex.quote(str(path / inner[0]))} -o MODEL"
        return Description("sentence-transformers", "a model folder of sentence-transformers", how)
    return None


def _describe_content(path: Path, names: set[str]) -> Description:
    """Describes a folder that no tool of ours wrote by the suffixes of its files."""
    if not names:
        return Description("", "an empty folder", "check the path")
    quoted = shlex.quote(str(path))
    suffixes = {Path(name).suffix.lower() for name in names} or {""}
    if ".tar" in suffixes:
        return Description("tars", "a folder of tars without a manifest", f"run clipwright data index {quoted}")
    tables = suffixes & set(TABLE_SUFFIXES)
    if tables:
        suffix = sorted(tables)[0]
        glob = shlex.quote(f"{path}/*{suffix}")
        advice = f"make a dataset folder of them: clipwright prep table source.path={glob} -o DATASET"
        return Description("tables", f"a folder of table files ({suffix})", advice)
    if _has_images(path):
        advice = f"make a dataset folder of it: clipwright prep folder source.path={quoted} -o DATASET"
        return Description("images", "a folder of images", advice)
    inner = sorted(name for name in names if (path / name / "manifest.json").is_file())
    if inner:
        return Description("", f"a folder without a manifest that holds {inner[0]}/", f"name {path / inner[0]}")
    return Description("", "a folder without a manifest", f"check the path, or {RUN_AGAIN}")


def _has_images(path: Path) -> bool:
    """Whether one of the first files of a folder or of its subfolders is an image."""
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in islice(path.rglob("*"), MAX_NAMES))


def _names(path: Path) -> Iterator[str]:
    yield from (entry.name for entry in islice(path.iterdir(), MAX_NAMES))


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
