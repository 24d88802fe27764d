"""A static page of a dataset folder: what became of its rows, kept pairs, and rejected pairs with their reasons."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipwright.data_prep.build.output import CONFIG, REJECTS
from clipwright.data_prep.build.pack import PrepConfig
from clipwright.data_prep.build.plan import record_key
from clipwright.data_prep.inspect.dataset_files import (
    PAGE,
    DataConfig,
    claim_report,
    open_dataset,
    read_part,
    read_sidecar,
)
from clipwright.data_prep.sources.base import SOURCES, Record
from clipwright.pipeline import pixels
from clipwright.pipeline.core.config import read_yaml, resolve
from clipwright.pipeline.core.errors import CODES, ClipwrightError
from clipwright.pipeline.core.files import STATUS, atomic_write
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.page import render
from clipwright.pipeline.core.registry import configclass

SIDE = 160  # pixels of the longer side of a picture on the page
CAPTIONS, LETTERS = 5, 240  # shown of each sample, and of each caption and detail


@configclass
class ViewConfig(DataConfig):
    """Which dataset folder, how many pairs of each kind, few enough for a small page, and the seed that draws them."""

    kept: Annotated[int, Field(ge=0, le=160)] = 48
    rejected: Annotated[int, Field(ge=0, le=80)] = 24
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Shown:
    """One pair on the page. `picture` is a small JPEG, or None with `missing` saying why."""

    picture: bytes | None
    missing: str
    captions: list[str]
    more: int  # captions that are not shown
    about: str
    reason: str = ""
    detail: str = ""


@dataclass
class _Source:
    """The rejected rows as the source gives them again, and a line on why it does not."""

    records: dict[int, Record] = field(default_factory=dict)
    problem: str = ""


def view(config: ViewConfig, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Writes `view.html` into `out`; the dataset and its source are only read. Raises E_INPUT, E_MANIFEST, E_OUTPUT."""
    folder = Path(config.data)
    manifest = open_dataset(folder)
    claim_report(out)
    rejects = read_part(folder / REJECTS, ["row", "reason", "detail", "source", "key"])
    chosen = _choose_rejects(rejects, config.rejected, config.seed)
    foreign = _Source(problem="Rejected pictures stay in their tars and are not shown.")
    source = foreign if manifest.get("foreign") else _read_source(folder, [row["row"] for row in chosen])
    with Progress("view", config.kept + len(chosen), "pairs", quiet=quiet) as progress:
        kept = list(_counted(_kept(folder, manifest["shards"], config), progress))
        refused = list(_counted((_refused(row, source) for row in chosen), progress))
    page = render(
        Path(__file__).parent / PAGE,
        title=f"Dataset {folder.resolve().name}",
        lead="What became of every row, some of the pairs that were kept, and some that were not, with the reason.",
        manifest=manifest,
        meanings={reason: _meaning(reason) for reason in manifest["rejects"]},
        kept=kept,
        refused=refused,
        problem=source.problem,
    )
    atomic_write(out / PAGE, page)
    result = {"data": str(folder), "page": str(out / PAGE), "bytes": len(page.encode()), "problem": source.problem}
    return result | {"kept": len(kept), "rejected": len(refused), "fingerprint": manifest["fingerprint"]}


def _meaning(reason: str) -> str:
    if reason == "duplicate":
        return "the same image as an earlier row, which was kept"
    return CODES[reason][1] if reason in CODES else ""


def _counted(shown: Iterator[Shown], progress: Progress) -> Iterator[Shown]:
    for pair in shown:
        yield pair
        progress.add(1, pair.picture is None)


def _kept(folder: Path, shards: list[dict[str, Any]], config: ViewConfig) -> Iterator[Shown]:
    """Samples drawn one from each of `kept` equal stretches of the dataset, so that every part is seen."""
    ends = np.cumsum([shard["samples"] for shard in shards])
    total = int(ends[-1])
    edges = np.linspace(0, total, min(config.kept, total) + 1).astype(np.int64)
    draw = np.random.default_rng(config.seed)
    places = [int(draw.integers(low, high)) for low, high in pairwise(edges)]
    names = ("key", "captions", "width", "height", "offset", "size", "sha256", "source")
    for number in np.unique(owners := np.searchsorted(ends, places, side="right")):
        shard = shards[number]
        first = int(ends[number]) - shard["samples"]
        mine = [place - first for place, owner in zip(places, owners, strict=True) if owner == number]
        for row in read_sidecar(folder, shard, names).take(pa.array(mine)).to_pylist():
            picture, missing = _stored(folder / shard["tar"], row)
            about = f"{row['width']} × {row['height']} · {row['source']} · {row['key'][:12]}"
            yield Shown(picture, missing, *_cut(row["captions"]), about)


def _stored(path: Path, row: dict[str, Any]) -> tuple[bytes | None, str]:
    """A kept picture made small, or why it cannot be shown."""
    try:
        with path.open("rb") as file:
            file.seek(row["offset"])
            data = file.read(row["size"])
    except OSError as error:
        return None, f"{path.name}: {error.strerror}"
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return None, f"its bytes in {path.name} have changed: run clipwright data verify"
    return _small(data)


def _small(image: bytes | np.ndarray) -> tuple[bytes | None, str]:
    try:
        shown = pixels.decode(image, min_side=SIDE) if isinstance(image, bytes) else image
    except pixels.PixelError as error:
        return None, "too large to decode" if error.args[0] == "E_IMG_PIXELS" else "it does not decode"
    height, width = shown.shape[:2]
    if max(height, width) > SIDE:
        scale = SIDE / max(height, width)
        shown = pixels.resize(shown, max(1, round(width * scale)), max(1, round(height * scale)))
    return pixels.encode(shown, "jpeg", 80), ""


def _choose_rejects(rejects: pa.Table, wanted: int, seed: int) -> list[dict[str, Any]]:
    """Rejected rows, drawn by `seed`, one of each reason in turn; merged rows are not among them."""
    reasons = np.array(rejects["reason"].to_pylist(), dtype=object)
    draw = np.random.default_rng(seed)
    names = sorted({*reasons} - {"merged"})
    piles = [draw.permutation(np.flatnonzero(reasons == name))[:wanted].tolist() for name in names]
    turns = [place for place in chain.from_iterable(zip_longest(*piles)) if place is not None][:wanted]
    found = rejects.take(pa.array(turns, pa.int64())).to_pylist()
    return sorted(found, key=lambda row: (row["reason"], row["row"]))


def _read_source(folder: Path, rows: list[int]) -> _Source:
    """Reads rows of the source again, as the folder's config names it, seen from where it was prepared."""
    found = _Source()
    if not rows:
        return found
    try:
        tree = read_yaml(folder / CONFIG)
        if "plugins" in tree:
            # A dataset may come from anyone: what its config names is not run.
            found.problem = "The source is a plugin's, which is not run for a look: rejected pictures are not shown."
            return found
        with contextlib.chdir(_prepared_in(folder)):
            source = SOURCES.build(resolve(PrepConfig, base=tree).value.source)
            inside = sorted(row for row in rows if row < source.count)
            found.records = {record.row: record for record in source.read(inside)}
    except ClipwrightError as error:
        why = f"{error.what} — {error.where} — {error.found}"
        found.problem = f"The source cannot be read again, so rejected pictures are not shown: {why}"
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        found.problem = f"The source cannot be read again, so rejected pictures are not shown: {error}"
    return found


def _prepared_in(folder: Path) -> Path:
    """The folder in which `prep` ran, which relative paths of its config mean; this one where that is gone."""
    try:
        place = Path(json.loads((folder / STATUS).read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path()
    return place if place.is_dir() and os.access(place, os.X_OK) else Path()


def _refused(row: dict[str, Any], source: _Source) -> Shown:
    """A rejected row beside what the source holds for it now."""
    record = source.records.get(row["row"])
    picture, captions = None, []
    if record is None:
        missing = "the source was not read"
    elif record.source != row["source"] or (record_key(record) or None) != row["key"]:
        missing = "the source has changed"
    else:
        captions = [_text(caption) for caption in record.captions if isinstance(caption, (str, bytes))]
        picture, missing = (None, "no image") if record.image is None else _small(record.image)
    reason, detail = row["reason"], _shorten(row["detail"])
    return Shown(picture, missing, *_cut(captions), f"{row['source']} · row {row['row']}", reason, detail)


def _text(caption: str | bytes) -> str:
    data = caption if isinstance(caption, bytes) else caption.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def _cut(captions: list[str]) -> tuple[list[str], int]:
    """The first captions, shortened, and how many more there are."""
    return [_shorten(text) for text in captions[:CAPTIONS]], max(0, len(captions) - CAPTIONS)


def _shorten(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
