"""The contract of a benchmark: it measures an open model or index and returns scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import pyarrow as pa
from pydantic import Field

from clipwright.eval.intervals import wilson_interval
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.core.tables import align
from clipwright.pipeline.folders.cache import CachedRuntime
from clipwright.pipeline.model.folder import Model

if TYPE_CHECKING:  # the trainer imports a benchmark, and needs no faiss
    from clipwright.eval.search.query import Searcher


@configclass
class BenchmarkConfig:
    """The field that every benchmark's config has."""

    name: str
    """Name of the benchmark."""


@configclass
class EvalRuntime(CachedRuntime):
    """How evaluation uses the machine. Not part of a report's identity."""

    batch: Annotated[int, Field(ge=1)] = 64
    """Images or texts per batch."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Threads that read and decode images."""


@dataclass(frozen=True)
class Score:
    """One figure of a benchmark. `low` and `high` bound its 95 % confidence interval; None if there is none yet."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int  # trials: images, captions or queries
    higher_is_better: bool = True
    chance: float | None = None  # the value of random answers, where it is known

    @classmethod
    def of_proportion(cls, name: str, value: float, n: int, chance: float | None = None) -> Score:
        """A proportion of `n` independent trials, with its Wilson interval."""
        low, high = wilson_interval(round(value * n), n)
        return cls(name=name, value=value, low=low, high=high, n=n, chance=chance)

    @classmethod
    def without_interval(cls, name: str, value: float, n: int, chance: float | None = None) -> Score:
        return cls(name=name, value=value, low=None, high=None, n=n, chance=chance)


class BenchmarkContext:
    """What a benchmark may use. Model and index are opened on first access, once, and stay open."""

    def __init__(
        self,
        benchmark: str,
        *,
        open_model: Callable[[], Model] | None = None,
        open_index: Callable[[], Searcher] | None = None,
        data: str | None = None,
        runtime: EvalRuntime,
        quiet: bool = False,
    ) -> None:
        self.benchmark, self.runtime, self.quiet = benchmark, runtime, quiet
        self._open_model, self._open_index, self._data = open_model, open_index, data

    @cached_property
    def model(self) -> Model:
        """The open model. Raises E_CONFIG_VALUE if the config names none."""
        if self._open_model is None:
            raise self._missing("model")
        return self._open_model()

    @cached_property
    def index(self) -> Searcher:
        """The open index, with the model that made it. Raises E_CONFIG_VALUE if the config names none."""
        if self._open_index is None:
            raise self._missing("index")
        return self._open_index()

    @property
    def data(self) -> str:
        """Path or address of the data. Raises E_CONFIG_VALUE if the config names none."""
        if self._data is None:
            raise self._missing("data")
        return self._data

    def _missing(self, name: str) -> ClipwrightError:
        return ClipwrightError(
            "E_CONFIG_VALUE",
            f"the benchmark needs the key {name}",
            where=f"benchmark {self.benchmark}",
            found=f"{name} is not set",
            fix=f"add {name}=DIR",
        )


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of a benchmark."""

    scores: list[Score]
    numbers: dict[str, Any]  # the benchmark's own section of the report
    fingerprints: dict[str, str]  # input → fingerprint
    details: str = ""  # printed after the table of scores
    tables: dict[str, pa.Table] = field(default_factory=dict)  # file name → one row per query, written with the report


class Benchmark(Protocol):
    files: ClassVar[tuple[str, ...]]  # the file names of its tables

    def run(self, context: BenchmarkContext) -> BenchmarkResult: ...


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "clipwright.eval.benchmarks")


def score_table(scores: Sequence[Score]) -> str:
    """The scores as a table for a terminal. A column that would be empty is left out."""
    columns = [["score", *(score.name for score in scores)], ["value", *(f"{score.value:.4f}" for score in scores)]]
    if any(score.low is not None for score in scores):
        columns.append(["95 % interval", *(_interval(score) for score in scores)])
    if any(score.chance is not None for score in scores):
        columns.append(["chance", *("" if score.chance is None else f"{score.chance:.4f}" for score in scores)])
    columns.append(["n", *(f"{score.n:,}" for score in scores)])
    return align(list(zip(*columns, strict=True)))


def _interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return ""
    return f"{score.low:.4f} … {score.high:.4f}"
