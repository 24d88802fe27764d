"""Searches an index by a text or an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from clipwright.eval.search import page
from clipwright.eval.search.canaries import check_canaries
from clipwright.eval.search.versions import Index, open_version
from clipwright.pipeline.core.captions import CaptionError, normalize
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.tables import align, display_width
from clipwright.pipeline.folders.records import read_origin
from clipwright.pipeline.folders.remote import is_remote
from clipwright.pipeline.model.folder import Model, load_model
from clipwright.pipeline.pixels import PixelError, decode

LINE, NAME = 80, 36  # width of a printed line, and of the column of names, in terminal cells


@configclass
class SearchConfig:
    """One query against an index: `text` or `image`."""

    index: str
    """Index folder."""
    text: str | None = None
    """Text query."""
    image: str | None = None
    """Image file to use as the query."""
    model: str | None = None
    """Model folder; null: the path recorded when the index was built."""
    data: str | None = None
    """Dataset with the images of the page that -o writes; null: the path recorded when the index was built."""
    k: Annotated[int, Field(ge=1)] = 10
    """Hits to return."""


@dataclass(frozen=True)
class Query:
    """A query that can be embedded: a normalized text, or the bytes of an image file that was decoded once."""

    text: str | None = None
    image: bytes | None = None


def read_query(text: str | None, image: str | Path | None) -> Query:
    """Returns the query of a text or an image file; needs no model.

    Raises E_USAGE unless exactly one is given, E_INPUT for a file that cannot be opened, and the E_CAP or E_IMG code
    of a query that cannot be used.
    """
    if (text is None) == (image is None):
        raise ClipwrightError(
            "E_USAGE",
            "search needs exactly one query",
            where="text, image",
            found="neither is given" if text is None else "both are given",
            fix='give text="..." or image=FILE',
        )
    return Query(text=_read_text(text)) if text is not None else Query(image=_read_image(image or ""))


def _read_text(text: str) -> str:
    try:
        return normalize(text)
    except CaptionError as error:
        code, detail = error.args
        raise ClipwrightError(
            code, "the text query cannot be used", where="text", found=detail, fix="change the text"
        ) from None


def _read_image(image: str | Path) -> bytes:
    try:
        data = Path(image).read_bytes()
        decode(data)
    except OSError as error:
        found, fix = error.strerror or str(error), "check the path"
        if is_remote(str(image)):
            found, fix = "it is an address", "download the image and give its path"
        raise ClipwrightError(
            "E_INPUT", "the query image cannot be opened", where=image, found=found, fix=fix
        ) from None
    except PixelError as error:
        code, detail = error.args
        raise ClipwrightError(
            code, "the query image cannot be read", where=image, found=detail, fix="choose another image"
        ) from None
    return data


class Searcher:
    """An open index together with the model that made it."""

    def __init__(self, index: Index, model: Model) -> None:
        self.index, self.model = index, model

    def search(self, *, text: str | None = None, image: str | Path | None = None, k: int = 10) -> list[dict[str, Any]]:
        """Returns the top-k hits for a text or an image file, best first; fewer if the index has fewer rows.

        A hit is `{rank, score, id, key, caption, captions, tar, offset, size, width, height, source, source_key,
        metadata}`; score is the cosine, source_key the image's name in the input of preparation, caption None for an
        image without captions. Raises what `read_query` raises.
        """
        return self.nearest(self.embed(read_query(text, image)), k)[0]

    def embed(self, query: Query) -> np.ndarray:
        """Returns the float32 unit embedding (1, E) of a query."""
        if query.image is not None:
            return self.model.embed_images(self.model.view(query.image)[None]).numpy()
        assert query.text is not None
        return self.model.embed_texts([query.text]).numpy()

    def nearest(self, queries: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
        """Returns the top-k hits of each float32 unit embedding in `queries` (Q, E); ties are in order of id."""
        if k < 1:
            raise ClipwrightError("E_CONFIG_VALUE", "k is too small", where="k", found=str(k), fix="set k=1 or more")
        scores, ids = self.index.search(queries, k)
        return [self._hits(query_scores, query_ids) for query_scores, query_ids in zip(scores, ids, strict=True)]

    def _hits(self, scores: np.ndarray, ids: np.ndarray) -> list[dict[str, Any]]:
        order = np.lexsort((ids, -scores))
        rows = self.index.rows.take(np.searchsorted(self.index.ids, ids[order])).to_pylist()
        return [
            {"rank": rank, "score": float(score), **row}
            for rank, (score, row) in enumerate(zip(scores[order], rows, strict=True), 1)
        ]


def open_index(folder: str | Path, model: str | Path | None = None) -> Searcher:
    """Opens an index folder and its model: `model`, or the path recorded when the index was built.

    Raises what `open_version` and `load_model` raise, E_MODEL_DIM or E_FINGERPRINT for another model, and E_INDEX_ROWS
    if the model embeds an image or caption of the index differently from what the index has for it.
    """
    index = open_version(Path(folder))
    place = model if model is not None else read_origin(index.folder).get("model")
    if place is None or (model is None and not Path(place).is_dir()):
        raise ClipwrightError(
            "E_INPUT",
            "the model of the index is not where it was when the index was built",
            where=folder if place is None else place,
            found="no path was recorded" if place is None else "no such folder",
            fix="name the model folder: model=DIR",
        )
    opened = load_model(Path(place))
    dimension, fingerprint = index.manifest["dimension"], index.manifest["model"]
    fix = "use the model that the index was built with, or build the index again with this model"
    if opened.embed_dim != dimension:
        raise ClipwrightError(
            "E_MODEL_DIM",
            "the model and the index differ in embedding dimension",
            where=place,
            found=f"the model has dimension {opened.embed_dim}, the index {folder} has {dimension}",
            fix=fix,
        )
    if opened.fingerprint != fingerprint:
        raise ClipwrightError(
            "E_FINGERPRINT",
            "the index was built with another model",
            where=place,
            found=f"the model is {opened.fingerprint[:16]}…, the index {folder} was built with {fingerprint[:16]}…",
            fix=fix,
        )
    check_canaries(index, opened)
    return Searcher(index, opened)


def run(config: SearchConfig, out: Path | None = None) -> dict[str, Any]:
    """Runs one search; returns `{query, k, hits}`, and with `out` also what `page.write` adds."""
    query = read_query(config.text, config.image)  # before anything is loaded
    if out is not None:
        page.check(out)
    searcher = open_index(config.index, config.model)
    result: dict[str, Any] = {
        "query": {"text": config.text} if config.text is not None else {"image": config.image},
        "k": config.k,
        "hits": searcher.nearest(searcher.embed(query), config.k)[0],
    }
    if out is None:
        return result
    return page.write(out, result, searcher.index, query.image, config.data)


def table(result: dict[str, Any]) -> str:
    """The hits as a table for a terminal of 80 columns: name, score and caption."""
    rows = [["image", " score", "caption"]]
    for hit in result["hits"]:
        name = _cut(page.hit_name(hit), NAME, keep_end=True)
        rows.append([name, f"{hit['score']:6.3f}", " ".join((hit["caption"] or "").split())])
    width = LINE - max(display_width(row[0]) for row in rows) - max(len(row[1]) for row in rows) - 4
    return align([[name, score, _cut(caption, width)] for name, score, caption in rows], left=3)


def _cut(text: str, width: int, *, keep_end: bool = False) -> str:
    """Returns a text that takes at most `width` terminal cells: its start, or its end, which tells paths apart."""
    if display_width(text) <= width:
        return text
    letters = text[::-1] if keep_end else text
    while display_width(letters) > width - 1:
        letters = letters[:-1]
    return f"…{letters[::-1]}" if keep_end else f"{letters}…"
