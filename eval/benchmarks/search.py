"""Precision of text queries on an index whose rows say what they show."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, Context, Outcome
from clipwright.eval.search.query import Searcher, open_index
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.tables import align


@configclass
class SearchBenchmarkConfig(BenchmarkConfig):
    """Mean precision at k; needs `index`, and `model` if it moved since the index was built.

    `template` names metadata columns, as in `a {colour} {shape}`: one query for each combination of their values
    found in the rows that `where` selects. Hits come from the whole index; one is right when its columns equal the
    query's.
    """

    template: str
    where: dict[str, Any] = field(default_factory=dict)
    k: Annotated[int, Field(ge=1)] = 10
    seed: int = 0  # which query is shown


# One row a query: the keys of its hits, best first, which of them are right, and their cosines.
_HITS = pa.schema(
    [
        ("query", pa.string()),
        ("top", pa.list_(pa.string())),
        ("right", pa.list_(pa.bool_())),
        ("score", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class SearchBenchmark:
    files: ClassVar[tuple[str, ...]] = ("hits.parquet",)
    config: SearchBenchmarkConfig

    def run(self, context: Context) -> Outcome:
        config = self.config
        searcher = open_index(context.folder("index"), context.model)
        rows = searcher.index.rows
        own = rows["metadata"].to_pylist() if "metadata" in rows.column_names else [{}] * len(rows)
        columns = self._columns(own)
        asked = sorted(self._combinations(own, columns), key=repr)
        shown = [tuple(row[c] for c in columns) for row in own]
        k = min(config.k, len(rows))
        queries: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        with Progress("eval", len(asked), "queries", quiet=context.quiet) as progress:
            for values in asked:
                hits = self._hits(searcher, dict(zip(columns, values, strict=True)), k)
                found.append(hits)
                right = sum(hits["right"])
                queries.append({"query": hits["query"], "hits_right": right, "relevant": shown.count(values)})
                progress.add(1)
        drawn = random.Random(config.seed).choice(queries)
        numbers = {
            "n": len(queries),
            "k": k,
            f"mean_precision_at_{k}": float(np.mean([q["hits_right"] / k for q in queries])),
            "chance": float(np.mean([q["relevant"] / len(rows) for q in queries])),
            "query": drawn["query"],
            "hits_right": drawn["hits_right"],
            "queries": queries,
        }
        fingerprints = {"model": searcher.model.fingerprint, "index": searcher.index.manifest["fingerprint"]}
        return Outcome(numbers, fingerprints, table(numbers), {"hits.parquet": pa.Table.from_pylist(found, _HITS)})

    def _columns(self, own: list[dict[str, Any]]) -> list[str]:
        """The columns that the template names; E_CONFIG_VALUE if it is none, E_COLUMN if the rows lack one."""
        try:
            named = [name for _, name, _, _ in string.Formatter().parse(self.config.template) if name is not None]
        except ValueError as error:
            raise self._bad("template", f"{self.config.template!r}: {error}", "close its braces") from None
        if not named:
            raise self._bad("template", f"{self.config.template!r} names no column", "write one, such as {colour}")
        have = list(own[0])
        for name in (*named, *self.config.where):
            if name not in have:
                raise ClipwrightError(
                    "E_COLUMN",
                    "a metadata column that the index does not have",
                    where=name,
                    found=f"its columns are {', '.join(have) or 'none'}",
                    fix=nearest(name, have) or "name one of its columns",
                )
        return list(dict.fromkeys(named))

    def _combinations(self, own: list[dict[str, Any]], columns: list[str]) -> set[tuple[Any, ...]]:
        where = self.config.where
        found = {tuple(row[c] for c in columns) for row in own if all(row[c] == v for c, v in where.items())}
        found = {values for values in found if None not in values}
        if not found:
            raise self._bad("where", f"no row of the index has {where}", "change it")
        return found

    def _hits(self, searcher: Searcher, values: dict[str, Any], k: int) -> dict[str, Any]:
        """One query and its hits, a row of `hits.parquet`."""
        text = self.config.template.format(**values)
        hits = searcher.search(text=text, k=k)
        right = [all(hit["metadata"][c] == v for c, v in values.items()) for hit in hits]
        keys, scores = [hit["key"] for hit in hits], [hit["score"] for hit in hits]
        return {"query": text, "top": keys, "right": right, "score": scores}

    def _bad(self, key: str, found: str, fix: str) -> ClipwrightError:
        return ClipwrightError(
            "E_CONFIG_VALUE", "a benchmark that asks nothing", where=f"benchmark.{key}", found=found, fix=fix
        )


def table(numbers: dict[str, Any]) -> str:
    """The numbers for a person."""
    k = numbers["k"]
    rows = [[q["query"], str(q["hits_right"]), str(q["relevant"])] for q in numbers["queries"]]
    mean, chance = numbers[f"mean_precision_at_{k}"], numbers["chance"]
    return (
        align([["query", f"right of {k}", "in index"], *rows])
        + f"\nmean precision@{k} {mean:.3f} over {numbers['n']} queries (chance {chance:.3f})"
    )


# The preset asks for what the rendered scenes of the demo show.
BENCHMARKS.add(SearchBenchmarkConfig, SearchBenchmark, {"search": {"template": "a {colour} {shape}"}})
