"""Searches an index by a text or an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from clipwright.eval.search.versions import Index, open_version
from clipwright.pipeline.core.captions import CaptionError, normalize
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.tables import align
from clipwright.pipeline.folders.records import read_origin
from clipwright.pipeline.model.folder import Model, load_model
from clipwright.pipeline.pixels import PixelError


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
    k: Annotated[int, Field(ge=1)] = 10
    """Hits to return."""


class Searcher:
    """An open index together with the model that made it."""

    def __init__(self, index: Index, model: Model) -> None:
        self.index, self.model = index, model

    def search(self, *, text: str | None = None, image: str | Path | None = None, k: int = 10) -> list[dict[str, Any]]:
        """Returns the top-k hits for a text or an image file, best first; fewer if the index has fewer rows.

        A hit is `{rank, score, id, key, caption, captions, tar, offset, size, width, height, source, metadata}`;
        score is the cosine. Raises E_USAGE, E_INPUT, and the E_IMG or E_CAP code of an unreadable query.
        """
        _check_one_query(text, image)
        query = self.embed_text(text) if text is not None else self.embed_image(Path(image or ""))
        return self.nearest(query, k)[0]

    def embed_text(self, text: str) -> np.ndarray:
        """Returns the float32 unit embedding (1, E) of a text, normalized like a caption."""
        try:
            return self.model.embed_texts([normalize(text)]).numpy()
        except CaptionError as error:
            code, detail = error.args
            raise ClipwrightError(
                code, "the text query cannot be used", where="text", found=detail, fix="change the text"
            ) from None

    def embed_image(self, path: Path) -> np.ndarray:
        """Returns the float32 unit embedding (1, E) of an image file."""
        try:
            return self.model.embed_images(self.model.view(path.read_bytes())[None]).numpy()
        except OSError as error:
            found = error.strerror or str(error)
            raise ClipwrightError(
                "E_INPUT", "the query image cannot be opened", where=path, found=found, fix="check the path"
            ) from None
        except PixelError as error:
            code, detail = error.args
            raise ClipwrightError(
                code, "the query image cannot be read", where=path, found=detail, fix="choose another image"
            ) from None

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


def _check_one_query(text: object, image: object) -> None:
    if (text is None) == (image is None):
        raise ClipwrightError(
            "E_USAGE",
            "search needs exactly one query",
            where="text, image",
            found="neither is given" if text is None else "both are given",
            fix='give text="..." or image=FILE',
        )


def open_index(folder: str | Path, model: str | Path | None = None) -> Searcher:
    """Opens an index folder and its model: `model`, or the path recorded when the index was built.

    Raises what `open_version` and `load_model` raise, and E_MODEL_DIM or E_FINGERPRINT for another model.
    """
    index = open_version(Path(folder))
    place = model if model is not None else read_origin(index.folder).get("model")
    if place is None or not Path(place).is_dir():
        raise ClipwrightError(
            "E_INPUT",
            "the model of the index is not where it was",
            where=place or folder,
            found="no such folder",
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
    return Searcher(index, opened)


def run(config: SearchConfig) -> dict[str, Any]:
    """Runs one search; returns `{query, k, hits}`."""
    _check_one_query(config.text, config.image)  # before anything is loaded
    hits = open_index(config.index, config.model).search(text=config.text, image=config.image, k=config.k)
    query = {"text": config.text} if config.text is not None else {"image": config.image}
    return {"query": query, "k": config.k, "hits": hits}


def table(result: dict[str, Any]) -> str:
    """The hits as a table for a terminal."""
    rows = [["rank", " score", "key", "source", "caption"]]
    for hit in result["hits"]:
        caption = " ".join(hit["caption"].split())
        rows.append([f"{hit['rank']:>4}", f"{hit['score']:6.3f}", hit["key"][:12], str(hit["source"]), caption])
    return align(rows, left=5)
