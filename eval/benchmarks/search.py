"""Precision of text queries against an index whose metadata states what each row shows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, BenchmarkContext, BenchmarkResult, Score
from clipwright.eval.prompting import template_columns
from clipwright.eval.search.query import Searcher
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.tables import align


@configclass
class SearchBenchmarkConfig(BenchmarkConfig):
    """Mean precision at k. Needs `index`, and `model` if the model moved after the index was built.

    There is one query for each combination of values that the columns of `template` have in the rows selected by
    `where`. Hits come from the complete index; a hit is relevant if it has the query's values in these columns.
    """

    template: str
    """Query text with metadata columns as placeholders, such as `a {colour} {shape}`."""
    where: dict[str, Any] = field(default_factory=dict)
    """Column → value that selects the rows from which the queries are made."""
    k: Annotated[int, Field(ge=1)] = 10
    """Hits per query."""
    seed: int = 0
    """Seed that draws the query shown in the report."""


_HITS_SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("top", pa.list_(pa.string())),  # keys of the hits, best first
        ("right", pa.list_(pa.bool_())),  # which of them are relevant
        ("score", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class SearchBenchmark:
    """Numbers: `n` (queries), `k, mean_precision_at_K, chance, queries`, and `query, hits_right` of the query that
    `seed` draws."""

    files: ClassVar[tuple[str, ...]] = ("hits.parquet",)
    config: SearchBenchmarkConfig

    def run(self, context: BenchmarkContext) -> BenchmarkResult:
        searcher = context.index
        rows = searcher.index.rows
        metadata = rows["metadata"].to_pylist() if "metadata" in rows.column_names else [{}] * len(rows)
        columns = self._template_columns(list(metadata[0]))
        combinations = sorted(self._combinations(metadata, columns), key=repr)
        k = min(self.config.k, len(rows))
        row_values = [tuple(row[column] for column in columns) for row in metadata]
        queries, hits = [], []
        with Progress("eval", len(combinations), "query", plural="queries", quiet=context.quiet) as progress:
            for values in combinations:
                result = self._search(searcher, dict(zip(columns, values, strict=True)), k)
                hits.append(result)
                queries.append(
                    {
                        "query": result["query"],
                        "hits_right": sum(result["right"]),
                        "relevant": row_values.count(values),
                    }
                )
                progress.add(1)
        numbers = self._numbers(queries, k, len(rows))
        precision = numbers[f"mean_precision_at_{k}"]
        return BenchmarkResult(
            scores=[Score.without_interval(f"mean_precision@{k}", precision, len(queries), numbers["chance"])],
            numbers=numbers,
            fingerprints={"model": searcher.model.fingerprint, "index": searcher.index.manifest["fingerprint"]},
            details=details(numbers),
            tables={"hits.parquet": pa.Table.from_pylist(hits, _HITS_SCHEMA)},
        )

    def _numbers(self, queries: list[dict[str, Any]], k: int, rows: int) -> dict[str, Any]:
        drawn = random.Random(self.config.seed).choice(queries)
        return {
            "n": len(queries),
            "k": k,
            f"mean_precision_at_{k}": float(np.mean([query["hits_right"] / k for query in queries])),
            "chance": float(np.mean([query["relevant"] / rows for query in queries])),
            "query": drawn["query"],
            "hits_right": drawn["hits_right"],
            "queries": queries,
        }

    def _template_columns(self, available: list[str]) -> list[str]:
        """Returns the columns that the template names. Raises E_CONFIG_VALUE if it names none, E_COLUMN."""
        template = self.config.template
        try:
            named = template_columns(template)
        except ValueError as error:
            fix = "write {column} for each metadata column that it names, such as {colour}"
            raise self._no_queries("template", f"{template!r}: {error}", fix) from None
        for name in (*named, *self.config.where):
            if name not in available:
                raise ClipwrightError(
                    "E_COLUMN",
                    "the index has no such metadata column",
                    where=name,
                    found=f"its columns are {', '.join(available) or 'none'}",
                    fix=nearest(name, available) or "name one of its columns",
                )
        return named

    def _combinations(self, metadata: list[dict[str, Any]], columns: list[str]) -> set[tuple[Any, ...]]:
        """Returns the combinations of values in the selected rows, without those in which a value is missing."""
        where = self.config.where
        combinations = set()
        for row in metadata:
            values = tuple(row[column] for column in columns)
            if None not in values and all(row[column] == value for column, value in where.items()):
                combinations.add(values)
        if not combinations:
            raise self._no_queries("where", f"no row of the index has {where}", "change it")
        return combinations

    def _search(self, searcher: Searcher, values: dict[str, Any], k: int) -> dict[str, Any]:
        """Runs one query and returns its row of `hits.parquet`."""
        text = self.config.template.format(**values)
        hits = searcher.search(text=text, k=k)
        return {
            "query": text,
            "top": [hit["key"] for hit in hits],
            "right": [all(hit["metadata"][column] == value for column, value in values.items()) for hit in hits],
            "score": [hit["score"] for hit in hits],
        }

    def _no_queries(self, key: str, found: str, fix: str) -> ClipwrightError:
        return ClipwrightError(
            "E_CONFIG_VALUE", "the benchmark has no queries", where=f"benchmark.{key}", found=found, fix=fix
        )


def details(numbers: dict[str, Any]) -> str:
    """The relevant hits of every query, for a terminal."""
    rows = [["query", f"relevant in top {numbers['k']}", "relevant in the index"]]
    for query in numbers["queries"]:
        rows.append([query["query"], f"{query['hits_right']:,}", f"{query['relevant']:,}"])
    return align(rows)


# The preset's template fits the rendered scenes of the demo.
BENCHMARKS.add(SearchBenchmarkConfig, SearchBenchmark, {"search": {"template": "a {colour} {shape}"}})
