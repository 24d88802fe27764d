"""Zero-shot classification of a labeled set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, BenchmarkContext, BenchmarkResult, Score
from clipwright.eval.labeled import IMAGE_COLUMN, open_labeled
from clipwright.eval.prompting import load_classes, load_templates
from clipwright.eval.zeroshot import classify, make_task
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.tables import align

WORST_CLASSES = 10  # classes that are printed


@configclass
class ZeroshotConfig(BenchmarkConfig):
    """Accuracy of images classified by the prompts of their classes.

    Needs `model`, and `data`: a dataset folder or parquet files. In a list of classes, an entry that is itself a list
    holds the names of one class, whose prompts are averaged.
    """

    classes: str | list[str | list[str]] | None = None
    """Shipped set (`clipwright list prompts`), .json or .txt file, or list; null: the distinct labels, sorted."""
    templates: str | list[str] = field(default_factory=lambda: ["a photo of a {}"])
    """Prompt templates with one `{}` for the class name: shipped set, .json or .txt file, or list."""
    image: str = IMAGE_COLUMN
    """Column of parquet files with the images: bytes, or structs with bytes."""
    label: str | None = None
    """Column of class names or numbers, or a format such as `{colour} {shape}`; null: `class_name`, else `label`."""
    where: dict[str, Any] = field(default_factory=dict)
    """Column → value that selects the rows to classify; classes are taken from all rows."""


@dataclass(frozen=True)
class Zeroshot:
    """Numbers: `n, classes, merged, templates, top1, top5, mean_per_class, chance, top1_low, top1_high` (95 %
    confidence interval), `per_class, confusion, confused`, and for a label over several columns `COLUMN_top1` and
    `COLUMN_chance` of each."""

    files: ClassVar[tuple[str, ...]] = ("predictions.parquet",)
    config: ZeroshotConfig

    def run(self, context: BenchmarkContext) -> BenchmarkResult:
        config, runtime = self.config, context.runtime
        templates = load_templates(config.templates)
        classes = None if config.classes is None else load_classes(config.classes)
        data = open_labeled(context.data, runtime.cache, config.image)
        task = make_task(data, classes, config.label, config.where)
        model = context.model
        result = classify(
            model, data, task, templates, batch=runtime.batch, workers=runtime.workers, quiet=context.quiet
        )
        numbers = result.numbers()
        return BenchmarkResult(
            scores=scores(numbers),
            numbers=numbers,
            fingerprints={
                "model": model.fingerprint,
                "data": data.fingerprint,
                "classes": digest(task.classes),
                "templates": digest(templates),
            },
            details=details(numbers),
            tables={"predictions.parquet": result.table()},
        )


def scores(numbers: dict[str, Any]) -> list[Score]:
    """Top-1, top-5 and mean-per-class accuracy, and the top-1 accuracy of each column of the label."""
    n, classes = numbers["n"], numbers["classes"]
    top5_chance = min(5, classes) / classes
    made = [
        Score.of_proportion("top1", numbers["top1"], n, numbers["chance"]),
        Score.of_proportion("top5", numbers["top5"], n, top5_chance),
        Score.without_interval("mean_per_class", numbers["mean_per_class"], n, numbers["chance"]),
    ]
    for name in numbers:
        if name.endswith("_top1"):
            column = name.removesuffix("_top1")
            made.append(Score.of_proportion(name, numbers[name], n, numbers[f"{column}_chance"]))
    return made


def details(numbers: dict[str, Any]) -> str:
    """Counts, the worst classes and the most frequent confusions, for a terminal."""
    counts = f"{format_count(numbers['classes'], 'class', 'classes')}, {format_count(numbers['templates'], 'template')}"
    if numbers["merged"]:
        counts += (
            f"; {format_count(numbers['merged'], 'class', 'classes')} with the name of another class merged with it"
        )
    sections = [counts]
    tested = [row for row in numbers["per_class"] if row["n"]]
    worst = [["worst classes", "top1", "n"]]
    for row in sorted(tested, key=lambda row: row["top1"])[:WORST_CLASSES]:
        worst.append([row["name"], f"{row['top1']:.4f}", f"{row['n']:,}"])
    sections.append(align(worst))
    if numbers["confused"]:
        confusions = [["most frequent confusions", "predicted", "n"]]
        for pair in numbers["confused"]:
            confusions.append([pair["label"], pair["predicted"], f"{pair['n']:,}"])
        sections.append(align(confusions, left=2))
    return "\n\n".join(sections)


BENCHMARKS.add(
    ZeroshotConfig,
    Zeroshot,
    {"zeroshot": {}},
    source="Radford et al. 2021 (arXiv 2103.00020), sections 3.1.2 to 3.1.4",
)
