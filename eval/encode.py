"""Encodes images and captions to unit embeddings, in the given order and without leaving any out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.pixels import PixelError

PREFETCH_SHARDS = 4  # shards of a remote dataset that are fetched before they are read
PREFETCH_BATCHES = 2  # batches whose images are decoded while the model embeds


class Encoder(Protocol):
    """What evaluation needs of a model: `pipeline.model.folder.Model`, or the towers that a trainer holds."""

    def view(self, data: bytes) -> np.ndarray:
        """Returns the model's input (H, W, 3) uint8 for the bytes of an image file."""
        ...

    def embed_images(self, views: np.ndarray) -> Tensor:
        """Returns float32 unit embeddings (B, E) of views (B, H, W, 3)."""
        ...

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Returns float32 unit embeddings (B, E)."""
        ...


@dataclass(frozen=True)
class ImageSource:
    """An image that has not been read yet."""

    key: str
    where: str  # location for error messages
    fix: str  # remedy for error messages
    read: Callable[[], bytes]


def sidecar_slices(data: Dataset, start: int, stop: int) -> Iterator[tuple[int, int, pa.Table]]:
    """Yields the sidecar rows of samples [start, stop) by shard: (shard, first row within the shard, rows)."""
    shard_start = 0
    for shard, size in enumerate(data.sizes):
        first, last = max(start - shard_start, 0), min(stop - shard_start, size)
        if first < last:
            yield shard, first, data.sidecar(shard).slice(first, last - first)
        shard_start += size


def dataset_images(data: Dataset, rows: Iterable[int]) -> Iterator[ImageSource]:
    """Yields the images of a dataset's `rows`, which must ascend."""
    shard, shard_start = 0, 0
    keys_shard, keys = -1, []
    for row in rows:
        while row >= shard_start + data.sizes[shard]:
            shard_start += data.sizes[shard]
            shard += 1
        if keys_shard != shard:
            keys_shard, keys = shard, data.sidecar(shard)["key"].to_pylist()
            # Images of the previous shard may not have been read yet.
            data.prefetch(range(max(shard - 1, 0), min(shard + PREFETCH_SHARDS, len(data.sizes))))
        key = keys[row - shard_start]
        yield ImageSource(
            key=key,
            where=f"{data.tar_name(shard)}, key {key}",
            fix="remove the sample from the input and run `clipwright prep` again",
            read=partial(data.image, shard, row - shard_start),
        )
    data.prefetch(())


def encode_images(
    model: Encoder, images: Iterable[ImageSource], *, batch: int, workers: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Yields keys and float32 unit embeddings (b, E) of `images`, b at most `batch`.

    `workers` threads read and decode while the model embeds. An image that cannot be read raises its E_IMG code (or
    E_DATA_HASH) with its location: skipping it would change what a score measures.
    """

    def view(image: ImageSource) -> np.ndarray:
        try:
            return model.view(image.read())
        except PixelError as error:
            code, detail = error.args
            raise ClipwrightError(
                code, "the image cannot be read", where=image.where, found=detail, fix=image.fix
            ) from None

    def batches() -> Iterator[tuple[list[str], list[Future[np.ndarray]]]]:
        keys: list[str] = []
        views: list[Future[np.ndarray]] = []
        for image in images:
            keys.append(image.key)
            views.append(pool.submit(view, image))
            if len(keys) == batch:
                yield keys, views
                keys, views = [], []
        if keys:
            yield keys, views

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for keys, views in _prefetch(batches(), PREFETCH_BATCHES):
            embeddings = model.embed_images(np.stack([future.result() for future in views]))
            yield keys, _check_finite(embeddings, [f"image {key}" for key in keys])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encode_texts(model: Encoder, texts: list[str], *, batch: int) -> Iterator[Tensor]:
    """Yields float32 unit embeddings (b, E) of `texts`, b at most `batch`."""
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        yield _check_finite(model.embed_texts(part), [f"text {text!r}" for text in part])


def _prefetch(
    batches: Iterator[tuple[list[str], list[Future]]], count: int
) -> Iterator[tuple[list[str], list[Future]]]:
    """Yields the same batches, with the next `count` already submitted."""
    submitted: deque[tuple[list[str], list[Future]]] = deque()
    for batch in batches:
        submitted.append(batch)
        if len(submitted) > count:
            yield submitted.popleft()
    yield from submitted


def _check_finite(embeddings: Tensor, names: list[str]) -> Tensor:
    finite = torch.isfinite(embeddings).all(1)
    if not bool(finite.all()):
        raise ClipwrightError(
            "E_NONFINITE",
            "the embedding is not finite",
            where=names[int((~finite).nonzero()[0])],
            found="the model returned infinity or NaN",
            fix="use another checkpoint: the weights of this model are not usable",
        )
    return embeddings
