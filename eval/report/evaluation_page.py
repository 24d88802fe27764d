"""The page of a benchmark's report: its scores with chance levels and intervals, its classes, and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.output import CONFIG, REPORT
from clipwright.pipeline.page import plots
from clipwright.pipeline.page.render import percent, render

TEMPLATE = Path(__file__).with_name("evaluation.html")
MATRIX_CLASSES = 10  # a confusion matrix of more classes is too small to read
_SCORE_KEYS = {"name", "value", "n", "low", "high", "chance", "higher_is_better"}


def read_report(folder: Path) -> dict[str, Any]:
    """Returns the report.json of `clipwright eval -o FOLDER`. Raises E_INPUT."""
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _malformed(path, str(error)) from None
    if not isinstance(report, dict) or report.get("format") != "report" or not isinstance(report.get("scores"), list):
        raise _malformed(path, "it is no report of `clipwright eval`")
    for score in report["scores"]:
        if not isinstance(score, dict) or not score.keys() >= _SCORE_KEYS:
            raise _malformed(path, f"a score without {', '.join(sorted(_SCORE_KEYS - set(score)))}")
    return report


def _malformed(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT", "the report cannot be read", where=path, found=found, fix="run the `clipwright eval` command again"
    )


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers that the command prints with --json."""
    return {"benchmark": report["benchmark"], "scores": {score["name"]: score["value"] for score in report["scores"]}}


def make_page(folder: Path, report: dict[str, Any]) -> str:
    """Returns the page of a report."""
    scores, numbers = report["scores"], report.get(report["benchmark"]) or {}
    shares = [score for score in scores if score["higher_is_better"] and 0 <= score["value"] <= 1]
    rows = [(score["name"], score["value"], score["chance"], "chance") for score in shares]
    config = report.get("config") or {}
    inputs = {name: config[name] for name in ("model", "data", "index") if isinstance(config.get(name), dict)}
    per_class = sorted(numbers.get("per_class") or [], key=lambda row: (row["top1"] is None, row["top1"], row["name"]))
    sections = [("scores", "Scores")]
    if per_class:
        sections.append(("classes", "Classes"))
    if numbers.get("queries"):
        sections.append(("queries", "Queries"))
    text = "; ".join(f"{score['name']} {percent(score['value'])}" for score in shares)
    return render(
        TEMPLATE,
        title=f"Evaluation {folder.resolve().name}",
        lead=f"The benchmark {report['benchmark']}.",
        sections=[*sections, ("config", "Config")],
        facts={name.capitalize(): f"{entry.get('name')}" for name, entry in inputs.items()},
        scores=scores,
        bars=plots.bars(f"Scores. {text}", rows) if rows else None,
        per_class=per_class,
        matrix=_matrix(numbers),
        confused=numbers.get("confused") or [],
        queries=numbers.get("queries") or [],
        fingerprints=report.get("fingerprints") or {},
        config=(folder / CONFIG).read_text(encoding="utf-8")
        if (folder / CONFIG).is_file()
        else json.dumps(config, indent=1),
    )


def _matrix(numbers: dict[str, Any]) -> Any:
    """The confusion matrix as a figure, if it is small enough to read."""
    names = [row["name"] for row in numbers.get("per_class") or []]
    confusion = numbers.get("confusion") or []
    if not 2 <= len(names) <= MATRIX_CLASSES or len(confusion) != len(names):
        return None
    rows = [(name, [n / sum(row) for n in row]) for name, row in zip(names, confusion, strict=True) if sum(row)]
    return plots.matrix("Confusion. Predictions for each row, in percent.", names, rows)
