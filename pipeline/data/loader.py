"""Batches at a position: threads decode ahead, the order decides what."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.augment import AugmentConfig, draw_colour, recolour, training_view
from clipwright.pipeline.data.order import Draw, Order, caption_index
from clipwright.pipeline.data.reader import Dataset
from clipwright.pipeline.model import trim
from clipwright.pipeline.pixels import PixelError
from clipwright.pipeline.tokenizers.base import Tokenizer
from clipwright.pipeline.towers.base import TextTowerConfig


@configclass
class DataConfig:
    """What is trained on, in which order. `captions`: how many captions of an image stand in a batch."""

    train: str
    captions: Annotated[int, Field(ge=1)] = 1
    streams: Annotated[int, Field(ge=1)] = 64
    window: Annotated[int, Field(ge=1)] = 4096
    augment: AugmentConfig = AugmentConfig()


@dataclass
class Batch:
    """One rank's part of a global batch.

    views uint8 (b, S, S, 3); tokens (u, n), each different caption once; text_row (b·K): the row of caption k of image
    i stands at iK + k. Class-name captions repeat, and a text tower that reads each once costs a fraction. image_id (b)
    and caption_id (b, K): equal numbers mean equal image bytes, equal captions. colour: brightness, contrast,
    saturation and hue (`augment.recolour`), if colours change. `waited`: seconds the step waited.
    """

    views: UInt8[Tensor, "b s s 3"]
    tokens: Int[Tensor, "u n"]
    text_row: Int[Tensor, " t"]
    image_id: Int[Tensor, " b"]
    caption_id: Int[Tensor, "b k"]
    colour: Float[Tensor, "b 4"] | None = None
    waited: float = 0.0

    def images(self, device: torch.device) -> UInt8[Tensor, "b s s 3"]:
        """The views on the device, with the colours that were drawn for them."""
        views = self.views.to(device)
        return views if self.colour is None else recolour(views, self.colour.to(device))


@dataclass(frozen=True)
class Share:
    """Which part of each global batch a rank takes: the indices ≡ rank (mod world)."""

    rank: int
    world: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.global_batch % self.world:
            raise ClipwrightError(
                "E_BATCH",
                "a global batch the ranks cannot share evenly",
                where=f"schedule.global_batch={self.global_batch}",
                found=f"{self.world} ranks do not divide it",
                fix=f"take a multiple of {self.world}",
            )


class Loader:
    """The batches of one rank from any position on; nothing in it depends on where another run stopped."""

    def __init__(
        self,
        config: DataConfig,
        share: Share,
        *,
        tokenizer: Tokenizer,
        text: TextTowerConfig,
        image_size: int,
        seed: int,
        workers: int,
    ) -> None:
        self.config, self.share, self.tokenizer, self.text = config, share, tokenizer, text
        self.image_size, self.seed, self.workers = image_size, seed, workers
        self.dataset = Dataset(Path(config.train))
        if self.dataset.samples < share.global_batch:
            raise ClipwrightError(
                "E_DATA_SMALL",
                "a dataset with fewer samples than a batch",
                where=config.train,
                found=f"{self.dataset.samples} samples, schedule.global_batch is {share.global_batch}",
                fix="lower schedule.global_batch or prepare more data",
            )
        self.order = Order(
            self.dataset.sizes,
            fingerprint=self.dataset.fingerprint,
            seed=seed,
            streams=config.streams,
            window=config.window,
        )

    def batches(self, position: int) -> Generator[Batch, None, None]:
        """Endless batches from global position `position` on, two decoded ahead of the one in use."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            ahead: deque[list[Future[Sample]]] = deque()
            try:
                while True:
                    while len(ahead) < 3:
                        ahead.append(self._submit(pool, position))
                        position += self.share.global_batch
                    started = time.perf_counter()
                    samples = [future.result() for future in ahead.popleft()]
                    batch = self._collate(samples)
                    batch.waited = time.perf_counter() - started
                    yield batch
            finally:
                for future in (f for futures in ahead for f in futures):
                    future.cancel()

    def _submit(self, pool: ThreadPoolExecutor, position: int) -> list[Future[Sample]]:
        mine = np.arange(position + self.share.rank, position + self.share.global_batch, self.share.world)
        place = self.order.locate(mine)
        columns = zip(place.epoch.tolist(), place.shard.tolist(), place.row.tolist(), strict=True)
        return [pool.submit(self._sample, epoch, shard, row) for epoch, shard, row in columns]

    def _sample(self, epoch: int, shard: int, row: int) -> Sample:
        record = self.dataset.record(shard, row)
        key = record["key"][:32]
        data = self.dataset.image(shard, row)
        augment = self.config.augment
        turn = epoch if augment.views is None else epoch % augment.views
        draws = (Draw(self.seed, self.dataset.fingerprint, turn, record["key"], use) for use in ("view", "colour"))
        try:
            view = training_view(data, self.image_size, augment, next(draws))
        except PixelError as error:
            raise ClipwrightError(
                error.args[0],
                "a stored image that cannot be decoded",
                where=f"{self.dataset.tar_path(shard)} sample {record['key']}",
                found=error.args[1],
                fix="run `clipwright prep` again with --fresh",
            ) from None
        captions, count = record["captions"], self.config.captions
        picks = [
            caption_index(len(captions), seed=self.seed, epoch=epoch * count + turn, key=key) for turn in range(count)
        ]
        colour = draw_colour(augment, next(draws))
        return Sample(view, colour, [captions[pick] for pick in picks], int(key[:16], 16) - 2**63)

    def _collate(self, samples: list[Sample]) -> Batch:
        texts = [text for sample in samples for text in sample.captions]
        row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens = self.tokenizer.encode(list(row), self.text.context)
        tokens = trim(tokens, self.tokenizer.eot_id, self.text.pad)
        return Batch(
            views=torch.from_numpy(np.stack([sample.view for sample in samples])).permute(0, 2, 3, 1),
            colour=torch.tensor([sample.colour for sample in samples]) if self.config.augment.colours else None,
            tokens=torch.from_numpy(tokens).long(),
            text_row=torch.tensor([row[text] for text in texts]),
            image_id=torch.tensor([sample.image_id for sample in samples]),
            caption_id=torch.tensor([_text_id(text) for text in texts]).view(len(samples), -1),
        )


@dataclass(frozen=True)
class Sample:
    """One decoded sample: view (3, S, S), its colours, its chosen captions, its image's key as a 64-bit integer."""

    view: np.ndarray
    colour: tuple[float, float, float, float]
    captions: list[str]
    image_id: int


def _text_id(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
