"""Retrieval scores on a held-out dataset during training.

The front door passes in how to score: evaluation is built on the pipeline, which does not import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from clipwright.pipeline.core.activity import during
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.system_errors import system_error
from clipwright.pipeline.distributed.group import World, broadcast_object, run_on_rank0
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.model.folder import Model
from clipwright.pipeline.model.two_tower import build_model
from clipwright.pipeline.tokenizers.base import Tokenizer
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.supervision.progress import heartbeat
from clipwright.pipeline.train.techniques.base import Technique

# (model, data, batch=, workers=, quiet=) → {i2t, t2i: {r1, r5, r10, …}}, as eval.benchmarks.retrieval.score
Score = Callable[..., dict[str, Any]]
BATCH_SIZE = 64


class Validation:
    """Retrieval on `runtime.validation` by rank 0, on towers of its own, while the other ranks wait.

    The weights are those of a model exported from a checkpoint of that step, in float32.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, world: World, score: Score) -> None:
        self.config, self.tokenizer, self.world, self.score = config, tokenizer, world, score
        self._data: Dataset | None = None
        run_on_rank0(self._open)

    def _open(self) -> None:
        runtime = self.config.runtime
        assert runtime.validation is not None
        self._data = Dataset(runtime.validation, cache=runtime.cache)
        self._data.require_captions("validation")

    def due(self, step: int, end: int) -> bool:
        return step == end or step % self.config.runtime.validate_every == 0

    def run(
        self, engine: Engine, techniques: Technique, should_stop: Callable[[], bool], step: int
    ) -> dict[str, float]:
        """Returns `{val_i2t_r1, …, val_t2i_r10}` in [0, 1], or nothing if it was stopped; every rank must call it.

        step: that of the weights, whose checkpoint is complete. An image that cannot be read is an error.
        """
        weights = engine.weights()
        scores: dict[str, float] = {}
        try:
            with during(f"validation at step {step}"):
                run_on_rank0(lambda: scores.update(self._scores(techniques.export(weights), should_stop)))
        except ClipwrightError as error:
            raise ClipwrightError(
                error.code,
                f"the validation failed: {error.what}",
                where=error.where,
                found=f"{error.found}; step {step} is saved" if error.found else f"step {step} is saved",
                fix=f"{error.fix}; or run the same command with runtime.validation=null to train on without it",
            ) from None
        on_all_ranks: Any = broadcast_object(scores)
        return on_all_ranks

    def _scores(self, weights: dict[str, Tensor], should_stop: Callable[[], bool]) -> dict[str, float]:
        towers = build_model(self.config, self.tokenizer).to(self.world.device)
        towers.load_state_dict(weights)
        model = _StoppableModel(Model(self.config, towers, self.tokenizer, ""), should_stop)
        assert self._data is not None
        try:
            result = self.score(model, self._data, batch=BATCH_SIZE, workers=self.config.runtime.workers, quiet=True)
        except _Stopped:
            return {}
        except OSError as error:
            error.filename = error.filename or self._data.folder
            raise system_error(error, self.world.rank) from None
        return {
            f"val_{direction}_r{k}": float(result[direction][f"r{k}"])
            for direction in ("i2t", "t2i")
            for k in (1, 5, 10)
        }


class _Stopped(Exception):
    """Ends the scoring of a run that should stop."""


class _StoppableModel:
    """A model that checks between batches whether to stop, and sends heartbeats."""

    def __init__(self, model: Model, should_stop: Callable[[], bool]) -> None:
        self.model, self.should_stop = model, should_stop

    def view(self, data: bytes) -> np.ndarray:
        return self.model.view(data)

    def embed_images(self, views: np.ndarray) -> Tensor:
        self._check()
        return self.model.embed_images(views)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self._check()
        return self.model.embed_texts(texts)

    def _check(self) -> None:
        heartbeat()
        if self.should_stop():
            raise _Stopped
