"""A text or an image against an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from clipwright.eval.folders import read_origin
from clipwright.eval.search.versions import Index, open_version
from clipwright.pipeline.core.captions import CaptionError, normalise
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.model.folder import Model, load_model
from clipwright.pipeline.pixels import PixelError


@configclass
class SearchConfig:
    """One query: `text` or `image` (a file). `model` is found where it lay when the index was built."""

    index: str
    text: str | None = None
    image: str | None = None
    model: str | None = None
    k: Annotated[int, Field(ge=1)] = 10


class Searcher:
    """An index with the model that made it."""

    def __init__(self, index: Index, model: Model) -> None:
        self.index, self.model = index, model

    def search(self, *, text: str | None = None, image: str | Path | None = None, k: int = 10) -> list[dict[str, Any]]:
        """The k nearest rows to a text or an image file, best first (fewer if the index has fewer).

        A hit is `{rank, score, id, key, caption, captions, tar, offset, size, width, height, source, metadata}`;
        score is the cosine. Raises E_USAGE, E_INPUT, and the E_IMG or E_CAP code of a query that cannot be read.
        """
        _one_query(text, image)
        query = self.embed_text(text) if text is not None else self.embed_image(Path(image or ""))
        return self.nearest(query, k)[0]

    def embed_text(self, text: str) -> np.ndarray:
        """float32 (1, E). The text is brought into the normal form that captions have."""
        try:
            return self.model.embed_texts([normalise(text)]).numpy()
        except CaptionError as error:
            code, detail = error.args
            raise ClipwrightError(
                code, "a query that cannot be read", where="text", found=detail, fix="change the text"
            ) from None

    def embed_image(self, path: Path) -> np.ndarray:
        """float32 (1, E) of an image file."""
        try:
            return self.model.embed_images(self.model.view(path.read_bytes())[None]).numpy()
        except OSError as error:
            raise ClipwrightError(
                "E_INPUT", "no image", where=path, found=error.strerror or str(error), fix="check the path"
            ) from None
        except PixelError as error:
            code, detail = error.args
            raise ClipwrightError(
                code, "an image that cannot be read", where=path, found=detail, fix="give another image"
            ) from None

    def nearest(self, queries: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
        """The hits of each float32 unit row of `queries` (Q, E); equal scores stand in order of id."""
        if k < 1:
            raise ClipwrightError("E_CONFIG_VALUE", "no hits asked for", where="k", found=str(k), fix="k=1 or more")
        scores, ids = self.index.search(queries, k)
        return [self._hits(s, i) for s, i in zip(scores, ids, strict=True)]

    def _hits(self, scores: np.ndarray, ids: np.ndarray) -> list[dict[str, Any]]:
        order = np.lexsort((ids, -scores))
        rows = self.index.rows.take(np.searchsorted(self.index.ids, ids[order])).to_pylist()
        return [
            {"rank": rank, "score": float(score), **row}
            for rank, (score, row) in enumerate(zip(scores[order], rows, strict=True), 1)
        ]


def _one_query(text: object, image: object) -> None:
    if (text is None) == (image is None):
        raise ClipwrightError(
            "E_USAGE",
            "not one query",
            where="text, image",
            found="neither is given" if text is None else "both are given",
            fix='give text="..." or image=FILE',
        )


def open_index(folder: str | Path, model: str | Path | None = None) -> Searcher:
    """Opens an index folder with its model: the folder given, or the place recorded when the index was built.

    Raises what `open_version` and `load_model` raise, E_MODEL_DIM and E_FINGERPRINT if the model is another one.
    """
    index = open_version(Path(folder))
    place = model if model is not None else read_origin(index.folder).get("model")
    if place is None or not Path(place).is_dir():
        raise ClipwrightError(
            "E_INPUT",
            "no model for this index",
            where=place or folder,
            found="there is no such folder",
            fix="say where the model lies now: model=DIR",
        )
    opened = load_model(Path(place))
    if opened.embed_dim != index.manifest["dimension"]:
        raise ClipwrightError(
            "E_MODEL_DIM",
            "a model of another dimension than the index",
            where=place,
            found=f"the model gives {opened.embed_dim} numbers, the index {folder} holds {index.manifest['dimension']}",
            fix="give the model that the index was built with, or build the index again",
        )
    if opened.fingerprint != index.manifest["model"]:
        raise ClipwrightError(
            "E_FINGERPRINT",
            "another model than the index's",
            where=place,
            found=f"model {opened.fingerprint[:16]}…, the index {folder} was made with {index.manifest['model'][:16]}…",
            fix="give the model that the index was built with, or build the index again",
        )
    return Searcher(index, opened)


def run(config: SearchConfig) -> dict[str, Any]:
    """`{query, k, hits}` of one search."""
    _one_query(config.text, config.image)  # before anything is loaded
    hits = open_index(config.index, config.model).search(text=config.text, image=config.image, k=config.k)
    query = {"text": config.text} if config.text is not None else {"image": config.image}
    return {"query": query, "k": config.k, "hits": hits}


def table(result: dict[str, Any]) -> str:
    """The hits for a person: rank, score, key, caption, source."""
    lines = [f"{'rank':>4}  {'score':>6}  {'key':<12}  caption"]
    for hit in result["hits"]:
        lines.append(f"{hit['rank']:>4}  {hit['score']:6.3f}  {hit['key'][:12]}  {hit['caption']}  ({hit['source']})")
    return "\n".join(lines)
