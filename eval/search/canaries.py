"""Proof, with the model itself, that the embeddings of an index belong to its rows."""

from __future__ import annotations

import numpy as np

from clipwright.eval.search.versions import Index
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.embeddings import EMBED_AGAIN
from clipwright.pipeline.model.folder import Model
from clipwright.pipeline.pixels import PixelError

# Distance of unit embeddings. Rounding to float16, another batch and another device stay below 0.005.
MAX_DISTANCE = 0.02


def check_canaries(index: Index, model: Model) -> None:
    """Embeds the images or captions of the canaries again and compares them with the stored embeddings.

    Raises E_INDEX_ROWS for the first that differs: its embedding is that of another row or of another model.
    """
    canaries = index.canaries.to_pylist()
    if index.manifest["what"] == "image":
        embeddings = model.embed_images(np.stack([_view(index, model, canary["image"]) for canary in canaries]))
    else:
        embeddings = model.embed_texts([canary["caption"] for canary in canaries])
    stored = np.array([canary["embedding"] for canary in canaries], np.float32)
    distances = np.linalg.norm(embeddings.numpy() - stored, axis=1)
    for canary, distance in zip(canaries, distances.tolist(), strict=True):
        if not distance <= MAX_DISTANCE:
            embedded = "image" if index.manifest["what"] == "image" else "caption"
            raise ClipwrightError(
                "E_INDEX_ROWS",
                f"the embedding of a row is not what the model makes of its {embedded}",
                where=f"{index.folder}, id {canary['id']}, key {canary['key']}",
                found=f"distance {distance:.3f} (at most {MAX_DISTANCE}): it belongs to another row or another model",
                fix=f"{EMBED_AGAIN}, then build the index again",
            )


def _view(index: Index, model: Model, data: bytes) -> np.ndarray:
    try:
        return model.view(data)
    except PixelError as error:
        raise ClipwrightError(
            "E_INDEX_ROWS",
            "an image of the index cannot be read",
            where=index.folder,
            found=error.args[1],
            fix="build the index again with --fresh",
        ) from None
