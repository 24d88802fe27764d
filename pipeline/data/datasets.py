"""What a run trains on: one dataset or a weighted mixture, with consecutively numbered shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.data.augment import AugmentConfig
from clipwright.pipeline.data.mixture import Mixture, WeightStep
from clipwright.pipeline.data.order import Order
from clipwright.pipeline.folders.cache import CacheConfig
from clipwright.pipeline.folders.dataset import Dataset

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@configclass
class DatasetEntry:
    """A dataset of a mixture."""

    path: str
    """Dataset folder or URL."""
    weight: Weight = 1.0
    """Fraction of samples drawn from it, relative to the weights of the other datasets."""


@configclass
class WeightChange:
    """A change of a mixture's weights during the run."""

    at: Annotated[int, Field(ge=1)]
    """First sample of the run that the new weights apply to; a multiple of data.streams."""
    weights: tuple[Weight, ...]
    """The new weights, one per dataset."""


@configclass
class DataConfig:
    """What is trained on, in which order, with which augmentation."""

    train: str | list[DatasetEntry]
    """Dataset folder or URL, or a mixture: a list of {path, weight}. Each dataset of a mixture has its own epochs."""
    reweight: tuple[WeightChange, ...] = ()
    """Changes of the mixture's weights: a list of {at, weights} in ascending order."""
    captions: Annotated[int, Field(ge=1)] = 1
    """Number of captions per image in a batch."""
    negatives: str | None = None
    """Column of hard negatives, a text or a list of texts per sample; null: none."""
    negative_count: Annotated[int, Field(ge=1)] = 1
    """Largest number of hard negatives per image in a batch."""
    streams: Annotated[int, Field(ge=1)] = 64
    """Number of parallel streams of shards that a batch is drawn from."""
    window: Annotated[int, Field(ge=1)] = 4096
    """Number of samples of a stream that are shuffled together."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""


class Datasets:
    """The datasets of a config; their shards are numbered consecutively."""

    def __init__(self, config: DataConfig, cache: CacheConfig | None = None) -> None:
        self.config = config
        entries = [DatasetEntry(path=config.train)] if isinstance(config.train, str) else config.train
        self.weight_steps = _weight_steps(config, entries)
        self.datasets = [Dataset(entry.path, negatives=config.negatives, cache=cache) for entry in entries]
        for dataset in self.datasets:
            if not dataset.samples:
                raise ClipwrightError(
                    "E_DATA_SMALL",
                    "the dataset has no samples",
                    where=dataset.folder,
                    found="0 samples",
                    fix="prepare more data",
                )
            dataset.require_captions("training")
        self.sizes = [size for dataset in self.datasets for size in dataset.sizes]
        self.samples = sum(self.sizes)
        self._starts = np.concatenate([[0], np.cumsum([len(dataset.sizes) for dataset in self.datasets])])

    @property
    def fingerprint(self) -> str:
        """The dataset's own fingerprint, or, for a mixture or with hard negatives, one that covers all of them."""
        fingerprints = [dataset.fingerprint for dataset in self.datasets]
        if len(fingerprints) == 1 and self.config.negatives is None:
            return fingerprints[0]
        # A dataset's fingerprint does not cover its hard negatives, but the hashes of its sidecars do.
        sidecars = [
            [shard["sidecar_sha256"] for shard in dataset.manifest["shards"]]
            for dataset in self.datasets
            if dataset.negatives is not None
        ]
        return digest([fingerprints, [list(step.weights) for step in self.weight_steps[:1]], sidecars])

    def order(self, seed: int) -> Mixture:
        """Returns the order of the run. Its locations number the shards within each dataset."""
        orders = [
            Order(
                dataset.sizes,
                fingerprint=dataset.fingerprint,
                seed=seed,
                streams=self.config.streams,
                window=self.config.window,
            )
            for dataset in self.datasets
        ]
        return Mixture(orders, self.weight_steps)

    def largest_fractions(self) -> np.ndarray:
        """Returns the largest fraction of a batch that each dataset ever has."""
        return self._fractions().max(axis=0)

    def check_batch(self, global_batch: int) -> None:
        """Raises E_DATA_SMALL if a batch would contain a sample twice."""
        for dataset, needed in zip(self.datasets, self.largest_fractions() * global_batch, strict=True):
            if dataset.samples < needed:
                raise ClipwrightError(
                    "E_DATA_SMALL",
                    "the dataset has fewer samples than a batch draws from it",
                    where=dataset.folder,
                    found=f"{format_count(dataset.samples, 'sample')}; schedule.global_batch={global_batch} "
                    f"needs {needed:.6g}",
                    fix="lower schedule.global_batch or prepare more data",
                )

    def epochs(self, samples: int) -> list[float]:
        """Returns the number of epochs of each dataset in the first `samples` of a run."""
        starts = np.minimum([*(step.at for step in self.weight_steps), samples], samples)
        drawn = np.diff(starts) @ self._fractions()
        return (drawn / [dataset.samples for dataset in self.datasets]).tolist()

    def sidecar(self, shard: int) -> pa.Table:
        dataset, own_shard = self._dataset_of(shard)
        return dataset.sidecar(own_shard)

    def captions(self, shard: int) -> pa.Array:
        dataset, own_shard = self._dataset_of(shard)
        return dataset.captions(own_shard)

    def image(self, shard: int, row: int) -> bytes:
        dataset, own_shard = self._dataset_of(shard)
        return dataset.image(own_shard, row)

    def tar_name(self, shard: int) -> str:
        dataset, own_shard = self._dataset_of(shard)
        return dataset.tar_name(own_shard)

    def shard_name(self, dataset: int, shard: int) -> str:
        """Returns `DATASET/TAR` of the shard with number `shard` of that dataset."""
        return f"{self.datasets[dataset].folder.name}/{self.datasets[dataset].tar_name(shard)}"

    def _fractions(self) -> np.ndarray:
        """Fractions of the samples (weight steps, datasets)."""
        weights = np.array([step.weights for step in self.weight_steps], np.float64)
        return weights / weights.sum(axis=1, keepdims=True)

    def _dataset_of(self, shard: int) -> tuple[Dataset, int]:
        number = int(np.searchsorted(self._starts, shard, side="right")) - 1
        return self.datasets[number], int(shard - self._starts[number])


def _weight_steps(config: DataConfig, entries: Sequence[DatasetEntry]) -> list[WeightStep]:
    if not entries:
        raise _invalid_mixture(
            "data.train", "an empty list", "name a dataset folder, or several as {path: DIR, weight: NUMBER}"
        )
    steps = [WeightStep(0, [entry.weight for entry in entries])]
    steps += [WeightStep(change.at, change.weights) for change in config.reweight]
    for number, step in enumerate(steps):
        where = "data.train" if number == 0 else f"data.reweight.{number - 1}"
        if len(step.weights) != len(entries) or not any(step.weights):
            positive = sum(weight > 0 for weight in step.weights)
            found = (
                f"{format_count(len(step.weights), 'weight')}, {positive} above 0, for "
                f"{format_count(len(entries), 'dataset')}"
            )
            raise _invalid_mixture(where, found, "give each dataset a weight, at least one of them above 0")
        if step.at % config.streams:
            found = f"at={step.at} is not a multiple of data.streams={config.streams}"
            raise _invalid_mixture(where, found, f"use {-(-step.at // config.streams) * config.streams}")
        if number and step.at <= steps[number - 1].at:
            found = f"at={step.at} follows at={steps[number - 1].at}"
            raise _invalid_mixture(where, found, "list the changes in ascending order of `at`")
    return steps


def _invalid_mixture(where: str, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError(
        "E_CONFIG_VALUE", "the weights of the mixture are invalid", where=where, found=found, fix=fix
    )
