"""Scores of a held-out dataset while training goes on.

How to score comes from the front door: evaluation is built on the pipeline, which does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from clipwright.pipeline.distributed.group import World, broadcast_object, run_on_rank0
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.model.folder import Model
from clipwright.pipeline.model.two_tower import build_model
from clipwright.pipeline.tokenizers.base import Tokenizer
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.supervision.progress import heartbeat

# (model, data, batch=, workers=, quiet=) → {i2t, t2i: {r1, r5, r10, …}}, as eval.benchmarks.retrieval.score
Score = Callable[..., dict[str, Any]]
BATCH = 64


class Validation:
    """Retrieval on `runtime.validation` by the first rank, on towers of its own, while the other ranks wait.

    The weights are those of a checkpoint of that step, in float32.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, world: World, score: Score) -> None:
        self.config, self.tokenizer, self.world, self.score = config, tokenizer, world, score
        self._data: Dataset | None = None
        run_on_rank0(self._open)

    def _open(self) -> None:
        runtime = self.config.runtime
        self._data = Dataset(runtime.validation, cache=runtime.cache)

    def due(self, step: int, end: int) -> bool:
        return step == end or step % self.config.runtime.validate_every == 0

    def run(self, engine: Engine, told_to_stop: Callable[[], bool]) -> dict[str, float]:
        """`{val_i2t_r1, …, val_t2i_r10}` in [0, 1], nothing when told to stop meanwhile; every rank must call."""
        weights = engine.weights()
        found: dict[str, float] = {}
        run_on_rank0(lambda: found.update(self._scores(weights, told_to_stop)))
        told: Any = broadcast_object(found)
        return told

    def _scores(self, weights: dict[str, Tensor], told_to_stop: Callable[[], bool]) -> dict[str, float]:
        towers = build_model(self.config, self.tokenizer).to(self.world.device)
        towers.load_state_dict(weights)
        model = _Stoppable(Model(self.config, towers, self.tokenizer, ""), told_to_stop)
        try:
            ways = self.score(model, self._data, batch=BATCH, workers=self.config.runtime.workers, quiet=True)
        except _Stopped:
            return {}
        return {f"val_{way}_r{k}": float(ways[way][f"r{k}"]) for way in ("i2t", "t2i") for k in (1, 5, 10)}


class _Stopped(Exception):
    """Raised out of a score that takes too long for a run that is to stop."""


class _Stoppable:
    """A model that stops between batches, and says that it is alive."""

    def __init__(self, model: Model, told_to_stop: Callable[[], bool]) -> None:
        self.model, self.told_to_stop = model, told_to_stop

    def view(self, data: bytes) -> np.ndarray:
        return self.model.view(data)

    def embed_images(self, views: np.ndarray) -> Tensor:
        self._look()
        return self.model.embed_images(views)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self._look()
        return self.model.embed_texts(texts)

    def _look(self) -> None:
        heartbeat()
        if self.told_to_stop():
            raise _Stopped
