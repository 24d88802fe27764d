"""What a run trains on: one dataset, or several in a weighted mixture, their shards numbered one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.augment import AugmentConfig
from clipwright.pipeline.data.mixture import Mixture, WeightStep
from clipwright.pipeline.data.order import Order
from clipwright.pipeline.folders.cache import CacheConfig
from clipwright.pipeline.folders.dataset import Dataset

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@configclass
class PartConfig:
    """A dataset of a mixture: its folder, and the share of samples drawn from it in proportion to the others'."""

    path: str
    weight: Weight = 1.0


@configclass
class WeightsConfig:
    """From sample `at` of the run on, a mixture's weights; `at` is a multiple of `data.streams`."""

    at: Annotated[int, Field(ge=1)]
    weights: tuple[Weight, ...]


@configclass
class DataConfig:
    """What is trained on, in which order. `captions`: how many captions of an image stand in a batch.

    train: a dataset folder, or a mixture of several, each with its own epochs; reweight: how its weights change.
    negatives: a column of wrong captions (a text or a list of texts a sample), of which each image brings up to
    `negative_count` into its batch.
    """

    train: str | list[PartConfig]
    reweight: tuple[WeightsConfig, ...] = ()
    captions: Annotated[int, Field(ge=1)] = 1
    negatives: str | None = None
    negative_count: Annotated[int, Field(ge=1)] = 1
    streams: Annotated[int, Field(ge=1)] = 64
    window: Annotated[int, Field(ge=1)] = 4096
    augment: AugmentConfig = AugmentConfig()


class Datasets:
    """The datasets of a config behind one numbering of shards."""

    def __init__(self, config: DataConfig, cache: CacheConfig | None = None) -> None:
        self.config = config
        parts = [PartConfig(path=config.train)] if isinstance(config.train, str) else config.train
        self.steps = _weight_steps(config, parts)
        self.parts = [Dataset(part.path, negatives=config.negatives, cache=cache) for part in parts]
        for part in self.parts:
            if not part.samples:
                raise ClipwrightError(
                    "E_DATA_SMALL",
                    "a dataset without samples",
                    where=part.folder,
                    found="0 samples",
                    fix="prepare more data",
                )
        self.sizes = [size for part in self.parts for size in part.sizes]
        self.samples = sum(self.sizes)
        self._starts = np.concatenate([[0], np.cumsum([len(part.sizes) for part in self.parts])])

    @property
    def fingerprint(self) -> str:
        """That of the one dataset; of several, and of one with negatives, of all that is read of them."""
        known = [part.fingerprint for part in self.parts]
        if len(known) == 1 and self.config.negatives is None:
            return known[0]
        # The negatives are no part of a dataset's own fingerprint, but of its sidecars' hashes.
        sidecars = [[s["sidecar_sha256"] for s in p.manifest["shards"]] for p in self.parts if p.negatives is not None]
        return digest([known, [list(step.weights) for step in self.steps[:1]], sidecars])

    def order(self, seed: int) -> Mixture:
        """The order of the run; the shard of a place is its dataset's own number of it."""
        config = self.config
        orders = [
            Order(
                part.sizes,
                fingerprint=part.fingerprint,
                seed=seed,
                streams=config.streams,
                window=config.window,
            )
            for part in self.parts
        ]
        return Mixture(orders, self.steps)

    def shares(self) -> np.ndarray:
        """The largest share of a batch that each dataset ever has."""
        weights = np.array([step.weights for step in self.steps], np.float64)
        return (weights / weights.sum(axis=1, keepdims=True)).max(axis=0)

    def check_batch(self, global_batch: int) -> None:
        """E_DATA_SMALL where a batch would hold a sample twice."""
        for part, most in zip(self.parts, self.shares() * global_batch, strict=True):
            if part.samples < most:
                raise ClipwrightError(
                    "E_DATA_SMALL",
                    "a dataset with fewer samples than a batch takes of it",
                    where=part.folder,
                    found=f"{part.samples} samples; of schedule.global_batch={global_batch} it has {most:.6g}",
                    fix="lower schedule.global_batch or prepare more data",
                )

    def epochs(self, samples: int) -> list[float]:
        """How often each dataset is seen in the first `samples` of a run."""
        starts = np.minimum([*(step.at for step in self.steps), samples], samples)
        weights = np.array([step.weights for step in self.steps], np.float64)
        drawn = np.diff(starts) @ (weights / weights.sum(axis=1, keepdims=True))
        return (drawn / [part.samples for part in self.parts]).tolist()

    def sidecar(self, shard: int) -> pa.Table:
        part, own = self._at(shard)
        return part.sidecar(own)

    def captions(self, shard: int) -> pa.Array:
        part, own = self._at(shard)
        return part.captions(own)

    def image(self, shard: int, row: int) -> bytes:
        part, own = self._at(shard)
        return part.image(own, row)

    def tar_name(self, shard: int) -> str:
        part, own = self._at(shard)
        return part.tar_name(own)

    def shard_name(self, part: int, shard: int) -> str:
        """A shard of a dataset, both by their names."""
        return f"{self.parts[part].folder.name}/{self.parts[part].tar_name(shard)}"

    def _at(self, shard: int) -> tuple[Dataset, int]:
        part = int(np.searchsorted(self._starts, shard, side="right")) - 1
        return self.parts[part], int(shard - self._starts[part])


def _weight_steps(config: DataConfig, parts: Sequence[PartConfig]) -> list[WeightStep]:
    if not parts:
        raise _bad("data.train", "an empty list", "name a dataset folder, or several as {path: DIR, weight: NUMBER}")
    steps = [WeightStep(0, [part.weight for part in parts])]
    steps += [WeightStep(step.at, step.weights) for step in config.reweight]
    for number, step in enumerate(steps):
        where = "data.train" if number == 0 else f"data.reweight.{number - 1}"
        if len(step.weights) != len(parts) or not any(step.weights):
            above = sum(weight > 0 for weight in step.weights)
            found = f"{len(step.weights)} weights, {above} above 0, for {len(parts)} datasets"
            raise _bad(where, found, "give each dataset a weight, one of them above 0")
        if step.at % config.streams:
            found = f"at={step.at}, no multiple of data.streams={config.streams}"
            raise _bad(where, found, f"take {-(-step.at // config.streams) * config.streams}")
        if number and step.at <= steps[number - 1].at:
            raise _bad(where, f"at={step.at} behind at={steps[number - 1].at}", "put the steps in ascending order")
    return steps


def _bad(where: str, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_CONFIG_VALUE", "weights that make no mixture", where=where, found=found, fix=fix)
