"""One benchmark, run and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, Context, EvalRuntime
from clipwright.eval.folders import CONFIG, claim
from clipwright.pipeline.core.config import Choice, Resolved, read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, write_json
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.records import VERSION

REPORT = "report.json"


@configclass
class EvalConfig:
    """Which benchmark, on which folders; each benchmark says which of them it needs."""

    benchmark: Annotated[BenchmarkConfig, Choice(BENCHMARKS)]
    model: str | None = None
    data: str | None = None
    index: str | None = None
    runtime: EvalRuntime = EvalRuntime()


def run(resolved: Resolved[EvalConfig], out: Path | None, *, quiet: bool, fresh: bool) -> tuple[dict[str, Any], str]:
    """Runs the benchmark; returns the report and its text for a person, and writes `out`: its tables, then report.json.

    The report holds the numbers under the benchmark's name, the fingerprints of what was read, and the config's
    identity, folders by name and fingerprint. A report of another config is refused (E_OUTPUT), of the same replaced.
    """
    config = resolved.value
    if out is not None:
        claim(out, (REPORT, *_table_files()))
        if (out / REPORT).exists() and not fresh and _without_runtime(out / CONFIG) != resolved.identity():
            raise ClipwrightError(
                "E_OUTPUT",
                "a report of another evaluation",
                where=out,
                found=f"it holds a {REPORT} made with another config",
                fix="name a new folder, or add --fresh to replace it",
            )
    benchmark = BENCHMARKS.build(config.benchmark)
    given = {name: getattr(config, name) for name in ("model", "data", "index")}
    outcome = benchmark.run(Context(config.benchmark.name, **given, runtime=config.runtime, quiet=quiet))
    folders = {
        name: {"name": Path(place).name, "fingerprint": outcome.fingerprints.get(name)}
        for name, place in given.items()
        if place is not None
    }
    report = {
        "format": "report",
        "version": VERSION,
        "benchmark": config.benchmark.name,
        config.benchmark.name: outcome.numbers,
        "fingerprints": outcome.fingerprints,
        "config": {**resolved.identity(), **folders},
    }
    if out is not None:
        _write(out, resolved.yaml(), report, outcome.tables)
    return report, outcome.text


def _table_files() -> set[str]:
    """The names of the tables that any benchmark may leave beside its report."""
    return {name for entry in BENCHMARKS.families for name in getattr(entry.build, "files", ())}


def _write(out: Path, config: str, report: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    # A report stands beside its own tables or not at all.
    for old in (REPORT, *_table_files()):
        (out / old).unlink(missing_ok=True)
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        atomic_write(out / name, sink.getvalue().to_pybytes())
    atomic_write(out / CONFIG, config)
    write_json(out / REPORT, report)


def _without_runtime(path: Path) -> dict[str, Any] | None:
    tree = read_yaml(path) if path.exists() else None
    return tree if tree is None else {name: value for name, value in tree.items() if name != "runtime"}
