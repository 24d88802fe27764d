"""Runs one benchmark and writes its report."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, BenchmarkContext, EvalRuntime, score_table
from clipwright.eval.search.query import open_index
from clipwright.pipeline.core.config import Choice, Resolved
from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.files import atomic_write, write_json
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.output import CONFIG, EVALUATION, REPORT
from clipwright.pipeline.folders.records import VERSION
from clipwright.pipeline.folders.schema import parquet_bytes
from clipwright.pipeline.model.folder import load_model


@configclass
class EvalConfig:
    """A benchmark and the folders it measures. Each benchmark states which of them it needs."""

    benchmark: Annotated[BenchmarkConfig, Choice(BENCHMARKS)]
    """The benchmark; `clipwright list benchmarks` shows all."""
    model: str | None = None
    """Model folder."""
    data: str | None = None
    """Dataset folder, local or remote, or parquet files."""
    index: str | None = None
    """Index folder."""
    runtime: EvalRuntime = EvalRuntime()
    """How evaluation uses the machine. Not part of the report's identity."""


def run(resolved: Resolved[EvalConfig], out: Path | None, *, quiet: bool, fresh: bool) -> tuple[dict[str, Any], str]:
    """Runs the benchmark; returns the report and its text for a terminal.

    If `out` is given, writes the benchmark's tables and then report.json into it. An existing report is replaced if
    it was made with the same config, else refused (E_OUTPUT). The report holds the scores, the benchmark's numbers
    under its name, the fingerprints of all inputs, and the config's identity with folders by name and fingerprint.
    """
    if out is None:
        report, _, text = _measure(resolved, quiet=quiet)
        return report, text
    with output.claim(out, EVALUATION, _table_files()):
        if (out / REPORT).exists() and not fresh:
            what = "the folder holds the report of another evaluation"
            output.require_same(out, what, _stored_identity(out), resolved.identity())
        report, tables, text = _measure(resolved, quiet=quiet)
        _write(out, resolved.yaml(), report, tables)
    return report, text


def _measure(resolved: Resolved[EvalConfig], *, quiet: bool) -> tuple[dict[str, Any], dict[str, pa.Table], str]:
    """Runs the benchmark; returns its report, its tables and its text."""
    config = resolved.value
    result = BENCHMARKS.build(config.benchmark).run(make_context(config, quiet=quiet))
    folders = {}
    for name in ("model", "data", "index"):
        place = getattr(config, name)
        if place is not None:
            folders[name] = {"name": Path(place).name, "fingerprint": result.fingerprints.get(name)}
    report = {
        "format": "report",
        "version": VERSION,
        "benchmark": config.benchmark.name,
        "scores": [dataclasses.asdict(score) for score in result.scores],
        config.benchmark.name: result.numbers,
        "fingerprints": result.fingerprints,
        "config": {**resolved.identity(), **folders},
    }
    text = score_table(result.scores)
    if result.details:
        text += f"\n\n{result.details}"
    return report, result.tables, text


def make_context(config: EvalConfig, *, quiet: bool) -> BenchmarkContext:
    """The context of a benchmark that opens its model or index when it needs it."""
    return BenchmarkContext(
        config.benchmark.name,
        open_model=None if config.model is None else partial(load_model, config.model),
        open_index=None if config.index is None else partial(open_index, config.index, config.model),
        data=config.data,
        runtime=config.runtime,
        quiet=quiet,
    )


def _table_files() -> set[str]:
    """Returns the file names of the tables that any benchmark may write."""
    return {name for entry in BENCHMARKS.families for name in getattr(entry.build, "files", ())}


def _write(out: Path, config: str, report: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    # The folder never holds a report together with tables of another report.
    for name in (REPORT, *_table_files()):
        (out / name).unlink(missing_ok=True)
    for name, table in tables.items():
        atomic_write(out / name, parquet_bytes(table))
    atomic_write(out / CONFIG, config)
    write_json(out / REPORT, report)


def _stored_identity(out: Path) -> dict[str, Any]:
    """The identity of the config that the folder's report was made with; empty without a config."""
    path = out / CONFIG
    if not path.exists():
        return {}
    identity = {name: value for name, value in read_yaml(path).items() if name not in ("runtime", "plugins")}
    # The config has the paths of plugins, an identity their content: only the report recorded that.
    plugins = json.loads((out / REPORT).read_text(encoding="utf-8"))["config"].get("plugins")
    return {**identity, "plugins": plugins} if plugins else identity
