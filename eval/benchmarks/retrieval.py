"""Image-text retrieval on a dataset: every image against every caption, in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import torch

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, BenchmarkContext, BenchmarkResult, Score
from clipwright.eval.encode import Encoder, dataset_images, encode_images, encode_texts, sidecar_slices
from clipwright.eval.metrics import RankedResults, RetrievalResults, rank_both_directions
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.dataset import Dataset


@configclass
class RetrievalConfig(BenchmarkConfig):
    """Recall@1, @5 and @10 in both directions. Needs `model` and `data`."""


@dataclass(frozen=True)
class Retrieval:
    """Numbers: `{i2t, t2i: {r1, r5, r10, chance_r1, chance_r5, chance_r10, n}}`."""

    files: ClassVar[tuple[str, ...]] = ("queries.parquet",)
    config: RetrievalConfig

    def run(self, context: BenchmarkContext) -> BenchmarkResult:
        runtime = context.runtime
        data = Dataset(context.data, cache=runtime.cache)
        model = context.model
        retrieval = retrieve(model, data, batch=runtime.batch, workers=runtime.workers, quiet=context.quiet)
        numbers = retrieval.results.numbers()
        return BenchmarkResult(
            scores=scores(numbers),
            numbers=numbers,
            fingerprints={"model": model.fingerprint, "data": data.fingerprint},
            tables={"queries.parquet": retrieval.table()},
        )


@dataclass(frozen=True)
class DatasetRetrieval:
    """All images and captions of a dataset, and the results of each as a query."""

    keys: list[str]
    captions: list[str]
    owners: list[int]  # caption → position of the image it belongs to
    results: RetrievalResults

    def table(self) -> pa.Table:
        """One row per query: `way` (i2t or t2i), `query` (key or caption), `key` (of its image), `rank` (irrelevant
        candidates before the first relevant one), and `top`, `right` and `score` of the top-5 candidates."""
        keys, captions = pa.array(self.keys, pa.string()), pa.array(self.captions, pa.string())
        caption_keys = keys.take(pa.array(self.owners, pa.int64()))
        i2t = _query_rows("i2t", keys, keys, self.results.i2t, captions)
        t2i = _query_rows("t2i", captions, caption_keys, self.results.t2i, keys)
        return pa.concat_tables([i2t, t2i])


def _query_rows(
    direction: str, queries: pa.Array, keys: pa.Array, results: RankedResults, candidates: pa.Array
) -> pa.Table:
    return pa.table(
        {
            "way": pa.array([direction] * len(queries), pa.string()),
            "query": queries,
            "key": keys,
            "rank": pa.array(results.rank.numpy()),
            "top": results.as_lists(candidates.take(pa.array(results.top.flatten().numpy()))),
            "right": results.as_lists(pa.array(results.relevant.flatten().numpy())),
            "score": results.as_lists(pa.array(results.score.flatten().numpy())),
        }
    )


def retrieve(model: Encoder, data: Dataset, *, batch: int, workers: int, quiet: bool = False) -> DatasetRetrieval:
    """Uses every image and every caption of `data` as a query. An image that cannot be read is an error.

    Raises E_DATA_SMALL for an empty dataset and E_CAP_EMPTY if an image has no caption.
    """
    if data.samples == 0:
        raise ClipwrightError(
            "E_DATA_SMALL",
            "the dataset is empty",
            where=data.folder,
            found="0 samples",
            fix="choose a dataset that has samples",
        )
    data.require_captions("retrieval")
    captions_of = _captions_of(data)
    keys: list[str] = []
    images: list[torch.Tensor] = []
    with Progress("eval", data.samples, "image", quiet=quiet) as progress:
        sources = dataset_images(data, range(data.samples))
        for batch_keys, embeddings in encode_images(model, sources, batch=batch, workers=workers):
            keys += batch_keys
            images.append(embeddings)
            progress.add(len(batch_keys))
    owners = [image for image, captions in enumerate(captions_of) for _ in captions]
    captions = [caption for captions in captions_of for caption in captions]
    texts: list[torch.Tensor] = []
    with Progress("eval", len(captions), "caption", quiet=quiet) as progress:
        for embeddings in encode_texts(model, captions, batch=batch):
            texts.append(embeddings)
            progress.add(len(embeddings))
    assert len(keys) == data.samples == len(captions_of), (len(keys), data.samples, len(captions_of))
    results = rank_both_directions(torch.cat(images), torch.cat(texts), keys, captions, owners)
    return DatasetRetrieval(keys, captions, owners, results)


def _captions_of(data: Dataset) -> list[list[str]]:
    """Returns the captions of every image."""
    captions_of: list[list[str]] = []
    keys: list[str] = []
    for _, _, rows in sidecar_slices(data, 0, data.samples):
        captions_of += [captions or [] for captions in rows["captions"].to_pylist()]
        keys += rows["key"].to_pylist()
    without = [key for key, captions in zip(keys, captions_of, strict=True) if not captions]
    if without:
        raise ClipwrightError(
            "E_CAP_EMPTY",
            "images of the dataset have no caption",
            where=data.place,
            found=f"{len(without):,} of {format_count(data.samples, 'image')}, such as key {without[0]}",
            fix="evaluate retrieval on a dataset in which every image has a caption",
        )
    return captions_of


def score(model: Encoder, data: Dataset, *, batch: int, workers: int, quiet: bool = False) -> dict[str, Any]:
    """Returns `{i2t, t2i: {r1, r5, r10, chance_r1 …, n}}` over every image and every caption of `data`.

    The trainer's validation calls this too, with the towers in training.
    """
    return retrieve(model, data, batch=batch, workers=workers, quiet=quiet).results.numbers()


def scores(numbers: dict[str, Any]) -> list[Score]:
    """Recall@k in both directions. Captions of one image are not independent: only images have an interval."""
    made = []
    for direction, make_score in (("i2t", Score.of_proportion), ("t2i", Score.without_interval)):
        section = numbers[direction]
        for k in (1, 5, 10):
            name = f"{direction}_recall@{k}"
            made.append(make_score(name, section[f"r{k}"], section["n"], section[f"chance_r{k}"]))
    return made


BENCHMARKS.add(
    RetrievalConfig,
    Retrieval,
    {"retrieval": {}},
    source="Karpathy and Fei-Fei 2015 (arXiv 1412.2306), section 4.2: recall@k in both directions over all captions",
)
