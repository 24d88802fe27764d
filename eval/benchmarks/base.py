"""The contract of a benchmark: a model folder and what it is tried on, to a dict of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import pyarrow as pa
from pydantic import Field

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.folders.cache import CachedRuntime


@configclass
class BenchmarkConfig:
    """What every benchmark's config has."""

    name: str


@configclass
class EvalRuntime(CachedRuntime):
    """How evaluation is spread over the machine; not part of a report's identity."""

    batch: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=1)] = 2  # threads that read and decode


@dataclass(frozen=True)
class Context:
    """The folders a benchmark may ask for, as given, and how to run."""

    benchmark: str
    model: str | None
    data: str | None
    index: str | None
    runtime: EvalRuntime
    quiet: bool = False

    def folder(self, name: str) -> Path:
        """The folder `name` (model, data or index), which this benchmark cannot do without (E_CONFIG_VALUE)."""
        return Path(self.place(name))

    def place(self, name: str) -> str:
        """The same as given: data may also be an address."""
        place = getattr(self, name)
        if place is None:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                f"a benchmark without its {name} folder",
                where=f"benchmark {self.benchmark}",
                found=f"{name} is not set",
                fix=f"add {name}=DIR",
            )
        return place


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found: plain numbers (each set with its n), and the fingerprint of each folder it read."""

    numbers: dict[str, Any]
    fingerprints: dict[str, str]
    text: str  # the numbers for a person
    tables: dict[str, pa.Table] = field(default_factory=dict)  # file name → one row a query, kept beside the report


class Benchmark(Protocol):
    files: ClassVar[tuple[str, ...]]  # the names of its tables

    def run(self, context: Context) -> Outcome: ...


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "clipwright.eval.benchmarks")
