"""The page of a search: the hits with small images that are read from the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipwright.eval.search.versions import Index
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, write_json
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.output import INSPECTION, REPORT, REPORT_PAGE
from clipwright.pipeline.folders.records import VERSION, read_origin
from clipwright.pipeline.folders.remote import is_remote
from clipwright.pipeline.page.render import render
from clipwright.pipeline.page.thumbnail import thumbnail
from clipwright.pipeline.pixels import PixelError

SIDE = 256  # longer side of an image on the page, in pixels
NAME_DATASET = "name the dataset: data=DIR"


@dataclass(frozen=True)
class HitOnPage:
    """A hit, and its image or why there is none."""

    hit: dict[str, Any]
    name: str
    image: bytes | None
    missing: str = ""


def hit_name(hit: dict[str, Any]) -> str:
    """The name of a hit for people: of its image in the input of preparation, or else its key."""
    return hit["source_key"] or hit["source"] or hit["key"]


def check(out: Path) -> None:
    """Raises E_OUTPUT for a folder that holds something else than the report of a search."""
    output.check(out, INSPECTION)


def write(
    out: Path, result: dict[str, Any], index: Index, query_image: bytes | None, data: str | None
) -> dict[str, Any]:
    """Writes `report.json` and `report.html` into `out`; returns the report and, as `page`, where the page is.

    data: the dataset of the hits (E_INPUT, E_MANIFEST if it cannot be opened, E_FINGERPRINT if it is another one);
    None: the one recorded in the index. Images that the recorded dataset does not give are left out of the page.
    """
    images = _HitImages(index, data)
    hits = [
        HitOnPage(hit, hit["source_key"] or hit["source"] or hit["key"], *images.read(hit)) for hit in result["hits"]
    ]
    shown = sum(hit.image is not None for hit in hits)
    manifest = index.manifest
    report = {
        "format": "report",
        "version": VERSION,
        **result,
        "images": shown,
        "problem": images.problem,
        "fingerprints": {
            "model": manifest["model"],
            "data": manifest["data"],
            "index": manifest["fingerprint"],
        },
    }
    page = render(
        Path(__file__).with_name(REPORT_PAGE),
        title="Search",
        lead=f"The {len(hits)} nearest of {format_count(manifest['rows'], manifest['what'] + ' embedding')}.",
        query=result["query"],
        query_image=None if query_image is None else thumbnail(query_image, SIDE),
        hits=hits,
        problem=images.problem,
        facts={
            "Index": index.folder.parent.parent.resolve().name,
            "Version": index.folder.name,
            "Rows": f"{manifest['rows']:,}",
            "Model": manifest["model"][:16],
        },
    )
    with output.claim(out, INSPECTION):
        write_json(out / REPORT, report)
        atomic_write(out / REPORT_PAGE, page)
    return {**report, "page": str(out / REPORT_PAGE)}


class _HitImages:
    """Small images of hits, from the dataset that the index was made from. `problem`: why it gives none."""

    def __init__(self, index: Index, data: str | None) -> None:
        place = data if data is not None else read_origin(index.folder).get("data")
        self.problem = ""
        self._data: Dataset | None = None
        if place is None:
            self.problem = f"The index does not record its dataset: {NAME_DATASET}"
        elif data is None and is_remote(place):
            self.problem = f"The dataset is remote. To fetch its images: data={place}"
        else:
            self._open(place, index.manifest["data"], required=data is not None)

    def _open(self, place: str, fingerprint: str, *, required: bool) -> None:
        try:
            opened = Dataset(place)
            if opened.fingerprint != fingerprint:
                raise ClipwrightError(
                    "E_FINGERPRINT",
                    "the dataset is not the one of the index",
                    where=place,
                    found=f"{opened.fingerprint[:16]}… (the index was made from {fingerprint[:16]}…)",
                    fix=NAME_DATASET,
                )
        except ClipwrightError as error:
            if required:
                raise
            self.problem = f"The dataset of the index cannot be opened at {place}. To show images, {NAME_DATASET}"
            if error.code == "E_FINGERPRINT":
                self.problem = f"{place} is no longer the dataset of the index. To show images, {NAME_DATASET}"
            return
        self._data = opened
        self._shards = {opened.tar_name(shard): shard for shard in range(len(opened.sizes))}

    def read(self, hit: dict[str, Any]) -> tuple[bytes | None, str]:
        """Returns the small image of a hit, or None and the reason."""
        if self._data is None:
            return None, "image not available"
        shard = self._shards.get(hit["tar"])
        rows = [] if shard is None else np.flatnonzero(self._data.rows(shard).key == hit["key"].encode()).tolist()
        if shard is None or not rows:
            return None, "not in the dataset"
        try:
            return thumbnail(self._data.image(shard, rows[0]), SIDE), ""
        except (ClipwrightError, PixelError, OSError):
            return None, "image cannot be read"
