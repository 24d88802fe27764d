"""Image-text retrieval on a dataset: every image against every caption, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import torch

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, Context, Outcome
from clipwright.eval.encode import Encoder, encode_images, encode_texts, pictures, pieces
from clipwright.eval.metrics import Found, Retrieved, best, retrieval
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.tables import align
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.model.folder import load_model


@configclass
class RetrievalConfig(BenchmarkConfig):
    """Recall at 1, 5 and 10; needs `model` and `data`."""


@dataclass(frozen=True)
class Retrieval:
    files: ClassVar[tuple[str, ...]] = ("queries.parquet",)
    config: RetrievalConfig

    def run(self, context: Context) -> Outcome:
        runtime, place = context.runtime, context.place("data")
        model = load_model(context.folder("model"))
        data = Dataset(place, cache=runtime.cache)
        answers = answer(model, data, batch=runtime.batch, workers=runtime.workers, quiet=context.quiet)
        numbers = answers.found.numbers()
        fingerprints = {"model": model.fingerprint, "data": data.fingerprint}
        return Outcome(numbers, fingerprints, table(numbers), {"queries.parquet": answers.table()})


@dataclass(frozen=True)
class Answers:
    """Every image and caption of a dataset, and what each found."""

    keys: list[str]
    captions: list[str]
    owners: list[int]  # the image that each caption was written for
    found: Retrieved

    def table(self) -> pa.Table:
        """One row a query: `way` (i2t, t2i), `query` (key or caption), `key` (of the image it belongs to), `rank`
        (wrong candidates before the best right one), and of the best five `top`, `right`, `score`."""
        keys, captions = pa.array(self.keys, pa.string()), pa.array(self.captions, pa.string())
        owners = keys.take(pa.array(self.owners, pa.int64()))
        found = self.found
        return pa.concat_tables(
            [_queries("i2t", keys, keys, found.i2t, captions), _queries("t2i", captions, owners, found.t2i, keys)]
        )


def _queries(way: str, queries: pa.Array, keys: pa.Array, found: Found, candidates: pa.Array) -> pa.Table:
    return pa.table(
        {
            "way": pa.array([way] * len(queries), pa.string()),
            "query": queries,
            "key": keys,
            "rank": pa.array(found.rank.numpy()),
            "top": best(candidates.take(pa.array(found.top.flatten().numpy())), found),
            "right": best(pa.array(found.right.flatten().numpy()), found),
            "score": best(pa.array(found.score.flatten().numpy()), found),
        }
    )


def answer(model: Encoder, data: Dataset, *, batch: int, workers: int, quiet: bool = False) -> Answers:
    """What every image and every caption of `data` finds. An image that cannot be read is an error."""
    if data.samples == 0:
        raise ClipwrightError(
            "E_DATA_SMALL", "an empty dataset", where=data.folder, found="0 samples", fix="give one that has samples"
        )
    keys: list[str] = []
    images: list[torch.Tensor] = []
    with Progress("eval", data.samples, "images", quiet=quiet) as progress:
        for names, rows in encode_images(model, pictures(data, range(data.samples)), batch=batch, workers=workers):
            keys += names
            images.append(rows)
            progress.add(len(names))
    captions = [texts for _, _, table in pieces(data, 0, data.samples) for texts in table["captions"].to_pylist()]
    owners = [image for image, texts in enumerate(captions) for _ in texts]
    flat = [text for texts in captions for text in texts]
    texts: list[torch.Tensor] = []
    with Progress("eval", len(flat), "captions", quiet=quiet) as progress:
        for rows in encode_texts(model, flat, batch=batch):
            texts.append(rows)
            progress.add(len(rows))
    assert len(keys) == data.samples == len(captions), (len(keys), data.samples, len(captions))
    return Answers(keys, flat, owners, retrieval(torch.cat(images), torch.cat(texts), keys, flat, owners))


def score(model: Encoder, data: Dataset, *, batch: int, workers: int, quiet: bool = False) -> dict[str, Any]:
    """`{i2t, t2i: {r1, r5, r10, chance_r1 …, n}}` over every image and every caption of `data`.

    The trainer's evaluation calls this as well, with the towers it holds.
    """
    return answer(model, data, batch=batch, workers=workers, quiet=quiet).found.numbers()


def table(numbers: dict[str, Any]) -> str:
    """The numbers for a person, in percent, chance in brackets."""
    rows = [["retrieval", "R@1 (chance)", "R@5 (chance)", "R@10 (chance)", "queries"]]
    for way, label in (("i2t", "image → text"), ("t2i", "text → image")):
        cells = [f"{numbers[way][f'r{k}']:.1%} ({numbers[way][f'chance_r{k}']:.1%})" for k in (1, 5, 10)]
        rows.append([label, *cells, str(numbers[way]["n"])])
    return align(rows)


BENCHMARKS.add(
    RetrievalConfig,
    Retrieval,
    {"retrieval": {}},
    source="Karpathy and Fei-Fei 2015 (arXiv 1412.2306), section 4.2: recall at K both ways over all captions",
)
