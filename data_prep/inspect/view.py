"""A static page about a dataset folder: row counts, kept pairs, and rejected pairs with their reasons."""

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

from clipwright.data_prep.build.pack import PrepConfig
from clipwright.data_prep.build.plan import record_key
from clipwright.data_prep.inspect.argument import DatasetArgument
from clipwright.data_prep.sources.base import SOURCES, Record
from clipwright.pipeline import pixels
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.errors import CODES, ClipwrightError
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.status import STATUS
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.dataset import read_dataset_manifest, read_sidecar, read_table
from clipwright.pipeline.folders.output import CONFIG, PAGE, REJECTS
from clipwright.pipeline.page.render import render
from clipwright.pipeline.page.thumbnail import thumbnail

THUMBNAIL_SIDE = 160  # pixels, longer side
MAX_CAPTIONS = 5  # shown per sample
MAX_CHARACTERS = 240  # shown of each caption and detail
_NOT_SHOWN = "so rejected images are not shown"


@configclass
class ViewConfig(DatasetArgument):
    """What the page shows. The limits keep it small."""

    kept: Annotated[int, Field(ge=0, le=2000)] = 144
    """Number of kept pairs on the page."""
    rejected: Annotated[int, Field(ge=0, le=1000)] = 40
    """Number of rejected pairs on the page."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random choice of pairs."""


@dataclass(frozen=True)
class PairOnPage:
    """One pair on the page. `thumbnail` is a small JPEG, or None, with the reason in `missing`."""

    thumbnail: bytes | None
    missing: str
    captions: list[str]
    more_captions: int  # not shown
    origin: str
    source: str
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""


@dataclass
class _RejectedRows:
    """The rejected rows as the source gives them now, or the problem why it cannot be read."""

    records: dict[int, Record] = field(default_factory=dict)
    problem: str = ""


def view(config: ViewConfig, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Writes `view.html` into `out`. Dataset and source are only read.

    Raises E_INPUT, E_MANIFEST, E_OUTPUT, E_LOCKED.
    """
    with output.claim(out, output.INSPECTION):
        return _write_page(config, out, quiet=quiet)


def _write_page(config: ViewConfig, out: Path, *, quiet: bool) -> dict[str, Any]:
    folder = Path(config.data)
    manifest = read_dataset_manifest(folder, totals=True)
    rejects = read_table(folder / REJECTS, ["row", "reason", "detail", "source", "key"])
    chosen = _choose_rejects(rejects, config.rejected, config.seed)
    if manifest.get("foreign"):
        rejected_rows = _RejectedRows(problem="Rejected images stay in their tars and are not shown.")
    else:
        rejected_rows = _read_source(folder, [row["row"] for row in chosen])
    with Progress("view", config.kept + len(chosen), "pair", quiet=quiet) as progress:
        kept = list(_with_progress(_kept_pairs(folder, manifest["shards"], config), progress))
        rejected = list(_with_progress((_rejected_pair(row, rejected_rows) for row in chosen), progress))
    page = render(
        Path(__file__).parent / PAGE,
        title=f"Dataset {folder.resolve().name}",
        lead="Row counts, and samples of the kept pairs and of the rejected pairs with their reasons.",
        sections=[("rows", "Rows"), ("kept", "Kept"), ("rejected", "Rejected")],
        manifest=manifest,
        shown_reasons=sorted({pair.reason for pair in rejected}),
        meanings={reason: _meaning(reason) for reason in manifest["rejects"]},
        kept=kept,
        rejected=rejected,
        problem=rejected_rows.problem,
    )
    atomic_write(out / PAGE, page)
    return {
        "data": str(folder),
        "page": str(out / PAGE),
        "bytes": len(page.encode()),
        "problem": rejected_rows.problem,
        "kept": len(kept),
        "rejected": len(rejected),
        "fingerprint": manifest["fingerprint"],
    }


def _meaning(reason: str) -> str:
    if reason == "duplicate":
        return "the image is equal to that of an earlier row, which was kept"
    return CODES[reason][1] if reason in CODES else ""


def _with_progress(pairs: Iterator[PairOnPage], progress: Progress) -> Iterator[PairOnPage]:
    for pair in pairs:
        yield pair
        progress.add(1, pair.thumbnail is None)


def _kept_pairs(folder: Path, shards: list[dict[str, Any]], config: ViewConfig) -> Iterator[PairOnPage]:
    """Yields samples, one drawn from each of `kept` equal ranges of the dataset, so that they cover all of it."""
    ends = np.cumsum([shard["samples"] for shard in shards])
    total = int(ends[-1])
    edges = np.linspace(0, total, min(config.kept, total) + 1).astype(np.int64)
    draw = np.random.default_rng(config.seed)
    positions = np.array([draw.integers(low, high) for low, high in pairwise(edges)], dtype=np.int64)
    shard_numbers = np.searchsorted(ends, positions, side="right")
    names = ("key", "captions", "width", "height", "offset", "size", "sha256", "source")
    for number in np.unique(shard_numbers):
        shard = shards[number]
        start = int(ends[number]) - shard["samples"]
        rows = positions[shard_numbers == number] - start
        for row in read_sidecar(folder / shard["sidecar"], shard, names).take(pa.array(rows)).to_pylist():
            thumbnail, missing = _stored_thumbnail(folder / shard["tar"], row)
            captions, more = _shorten_captions(row["captions"])
            origin = f"{row['width']} × {row['height']} · {row['source']} · {row['key'][:12]}"
            yield PairOnPage(thumbnail, missing, captions, more, origin, row["source"], row["width"], row["height"])


def _stored_thumbnail(path: Path, row: dict[str, Any]) -> tuple[bytes | None, str]:
    """Returns a thumbnail of a kept image, or None and the reason."""
    try:
        with path.open("rb") as file:
            file.seek(row["offset"])
            data = file.read(row["size"])
    except OSError as error:
        return None, f"{path.name}: {error.strerror}"
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return None, f"the image in {path.name} has changed; run clipwright data verify"
    return _thumbnail(data)


def _thumbnail(image: bytes | np.ndarray) -> tuple[bytes | None, str]:
    try:
        return thumbnail(image, THUMBNAIL_SIDE), ""
    except pixels.PixelError as error:
        code = error.args[0]
        return None, "the image is too large to decode" if code == "E_IMG_PIXELS" else "the image cannot be decoded"


def _choose_rejects(rejects: pa.Table, wanted: int, seed: int) -> list[dict[str, Any]]:
    """Returns rejected rows, drawn by `seed`, one of each reason in turn. Merged rows are left out."""
    reasons = np.array(rejects["reason"].to_pylist(), dtype=object)
    draw = np.random.default_rng(seed)
    per_reason: list[list[int]] = []
    for reason in sorted({*reasons} - {"merged"}):
        per_reason.append(draw.permutation(np.flatnonzero(reasons == reason))[:wanted].tolist())
    in_turn = chain.from_iterable(zip_longest(*per_reason))
    positions = [position for position in in_turn if position is not None][:wanted]
    rows = rejects.take(pa.array(positions, pa.int64())).to_pylist()
    return sorted(rows, key=lambda row: (row["reason"], row["row"]))


def _read_source(folder: Path, rows: list[int]) -> _RejectedRows:
    """Reads rows of the source again. The dataset's config names it, relative to where `prep` was run."""
    result = _RejectedRows()
    if not rows:
        return result
    try:
        tree = read_yaml(folder / CONFIG)
        if "plugins" in tree:
            # A dataset may come from anyone, so code that its config names is not run.
            result.problem = f"The source is a plugin, which this command does not run, {_NOT_SHOWN}."
            return result
        with contextlib.chdir(_prep_folder(folder)):
            source = SOURCES.build(resolve(PrepConfig, base=tree).value.source)
            available = sorted(row for row in rows if row < source.count)
            result.records = {record.row: record for record in source.read(available)}
    except ClipwrightError as error:
        reason = " — ".join(part for part in (error.what, error.where, error.found) if part)
        result.problem = f"The source cannot be read again, {_NOT_SHOWN}: {reason}"
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        result.problem = f"The source cannot be read again, {_NOT_SHOWN}: {error}"
    return result


def _prep_folder(folder: Path) -> Path:
    """Returns the folder in which `prep` was run, which its config paths are relative to; if gone, the current one."""
    try:
        place = Path(json.loads((folder / STATUS).read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path()
    return place if place.is_dir() and os.access(place, os.X_OK) else Path()


def _rejected_pair(row: dict[str, Any], rejected_rows: _RejectedRows) -> PairOnPage:
    """Returns a rejected row with image and captions as the source has them now."""
    record = rejected_rows.records.get(row["row"])
    thumbnail: bytes | None = None
    texts: list[str] = []
    if record is None:
        missing = "the source was not read"
    elif record.source != row["source"] or (record_key(record) or None) != row["key"]:
        missing = "the source has changed"
    else:
        texts = [_text(caption) for caption in record.captions if isinstance(caption, (str, bytes))]
        thumbnail, missing = (None, "no image") if record.image is None else _thumbnail(record.image)
    captions, more = _shorten_captions(texts)
    origin = f"{row['source']} · row {row['row']}"
    return PairOnPage(
        thumbnail, missing, captions, more, origin, row["source"], reason=row["reason"], detail=_shorten(row["detail"])
    )


def _text(caption: str | bytes) -> str:
    data = caption if isinstance(caption, bytes) else caption.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def _shorten_captions(captions: list[str]) -> tuple[list[str], int]:
    """Returns the first captions, shortened, and how many more there are."""
    return [_shorten(text) for text in captions[:MAX_CAPTIONS]], max(0, len(captions) - MAX_CAPTIONS)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
