"""Images and captions as unit vectors, in the order given, none left out."""

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

AHEAD = 4  # shards of a remote dataset that are fetched before they are read


class Encoder(Protocol):
    """What evaluation needs of a model; `pipeline.model.Model` is one, a trainer may hand in another."""

    def view(self, data: bytes) -> np.ndarray: ...
    def embed_images(self, views: np.ndarray) -> Tensor: ...
    def embed_texts(self, texts: list[str]) -> Tensor: ...


def pieces(data: Dataset, start: int, stop: int) -> Iterator[tuple[int, int, pa.Table]]:
    """Shard by shard, the sidecar rows of samples [start, stop): (shard, first row within it, rows)."""
    begin = 0
    for shard, size in enumerate(data.sizes):
        first, last = max(start - begin, 0), min(stop - begin, size)
        if first < last:
            yield shard, first, data.sidecar(shard).slice(first, last - first)
        begin += size


@dataclass(frozen=True)
class Picture:
    """An image that is to be read: its key, where it stands for an error's sake, and how to get its bytes."""

    key: str
    where: str
    fix: str
    read: Callable[[], bytes]


def pictures(data: Dataset, rows: Iterable[int]) -> Iterator[Picture]:
    """The images of a dataset's `rows`, which ascend."""
    shard, begin, loaded, keys = 0, 0, -1, []
    for row in rows:
        while row >= begin + data.sizes[shard]:
            begin, shard = begin + data.sizes[shard], shard + 1
        if loaded != shard:
            loaded, keys = shard, data.sidecar(shard)["key"].to_pylist()
            # Pictures of the shard before may still wait to be read.
            data.expect(range(max(shard - 1, 0), min(shard + AHEAD, len(data.sizes))))
        key = keys[row - begin]
        yield Picture(
            key=key,
            where=f"{data.tar_name(shard)}, key {key}",
            fix="remove the sample from the input and run `clipwright prep` again",
            read=partial(data.image, shard, row - begin),
        )
    data.expect(())


def encode_images(
    model: Encoder, images: Iterable[Picture], *, batch: int, workers: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Keys and float32 unit rows of `images`, at most `batch` at a time.

    `workers` threads read and decode while the model embeds; a few batches are held. An image that cannot be read
    raises its E_IMG code (or E_DATA_HASH) with its place: a number over fewer images than asked for would be another
    number.
    """

    def view(image: Picture) -> np.ndarray:
        try:
            return model.view(image.read())
        except PixelError as error:
            code, detail = error.args
            raise ClipwrightError(
                code, "an image that cannot be read", where=image.where, found=detail, fix=image.fix
            ) from None

    def groups() -> Iterator[tuple[list[str], list[Future[np.ndarray]]]]:
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
        for keys, views in _ahead(groups(), 2):
            rows = model.embed_images(np.stack([future.result() for future in views]))
            yield keys, _finite(rows, lambda i, keys=keys: f"image {keys[i]}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encode_texts(model: Encoder, texts: list[str], *, batch: int) -> Iterator[Tensor]:
    """float32 unit rows of `texts`, at most `batch` at a time."""
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        yield _finite(model.embed_texts(part), lambda i, part=part: f"text {part[i]!r}")


def _ahead(groups: Iterator[tuple[list[str], list[Future]]], count: int) -> Iterator[tuple[list[str], list[Future]]]:
    """The same, with `count` groups begun before they are needed."""
    begun: deque[tuple[list[str], list[Future]]] = deque()
    for group in groups:
        begun.append(group)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


def _finite(rows: Tensor, name: Callable[[int], str]) -> Tensor:
    good = torch.isfinite(rows).all(1)
    if not bool(good.all()):
        raise ClipwrightError(
            "E_NONFINITE",
            "an embedding that is not finite",
            where=name(int((~good).nonzero()[0])),
            found="infinite or not a number, wanted a unit vector",
            fix="use another checkpoint: this model's weights are broken",
        )
    return rows
