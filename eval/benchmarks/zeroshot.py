"""Zero-shot classification of a labelled set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, Context, Outcome
from clipwright.eval.labelled import open_labelled
from clipwright.eval.prompting import load_classes, load_templates
from clipwright.eval.zeroshot import answer, ask
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.tables import align
from clipwright.pipeline.model.folder import load_model

WORST = 10


@configclass
class ZeroshotConfig(BenchmarkConfig):
    """Accuracy of images against the prompts of their classes; needs `model`, and `data`: a dataset folder or parquet.

    `classes`: the name of a shipped set (`clipwright list prompts`), a .json or .txt file, or a list; by default the
    different labels of all rows, sorted. A class that is itself a list is one class of several names. `templates`:
    likewise, each with one `{}` for the class name. `label`: the column that says what a row shows, as text or as a
    number into `classes`, or a format over columns, `{colour} {shape}`; by default `class_name`, else `label`.
    `where`: column → value that a row must have to be classified; classes come from all rows nevertheless.
    """

    classes: str | list[str | list[str]] | None = None
    templates: str | list[str] = field(default_factory=lambda: ["a photo of a {}"])
    label: str | None = None
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Zeroshot:
    """`n, classes, merged, templates, top1, top5, mean_per_class, chance, top1_low, top1_high` (95 %), `per_class`,
    `confusion`, `confused`, and for each column of a label over several `COLUMN_top1`, `COLUMN_chance`."""

    files: ClassVar[tuple[str, ...]] = ("predictions.parquet",)
    config: ZeroshotConfig

    def run(self, context: Context) -> Outcome:
        config, runtime = self.config, context.runtime
        templates = load_templates(config.templates)
        classes = None if config.classes is None else load_classes(config.classes)
        data = open_labelled(context.place("data"), runtime.cache)
        question = ask(data, classes, config.label, config.where)
        model = load_model(context.folder("model"))
        answers = answer(
            model, data, question, templates, batch=runtime.batch, workers=runtime.workers, quiet=context.quiet
        )
        numbers = answers.numbers()
        prompts = {"classes": digest(question.classes), "templates": digest(templates)}
        fingerprints = {"model": model.fingerprint, "data": data.fingerprint, **prompts}
        return Outcome(numbers, fingerprints, table(numbers), {"predictions.parquet": answers.table()})


def table(numbers: dict[str, Any]) -> str:
    """The numbers for a person, in percent."""
    z = numbers
    head = ["zero-shot", "top-1 (95 %)", "top-5", "mean per class", "chance", "images", "classes", "templates"]
    top1 = f"{z['top1']:.1%} ({z['top1_low']:.1%} … {z['top1_high']:.1%})"
    shares = [f"{z[name]:.1%}" for name in ("top5", "mean_per_class", "chance")]
    rows = [head, ["all", top1, *shares, *(str(z[name]) for name in ("n", "classes", "templates"))]]
    for name in (name.removesuffix("_top1") for name in z if name.endswith("_top1")):
        rows.append([name, f"{z[f'{name}_top1']:.1%}", "", "", f"{z[f'{name}_chance']:.1%}", "", "", ""])
    parts = [align(rows)]
    if z["merged"]:
        parts.append(f"{z['merged']} of the classes given have the name of another and are one with it")
    shown = sorted((c for c in z["per_class"] if c["n"]), key=lambda c: c["top1"])[:WORST]
    worst = [["worst classes", "top-1", "images"], *([c["name"], f"{c['top1']:.1%}", str(c["n"])] for c in shown)]
    parts.append(align(worst))
    if z["confused"]:
        commonest = [[c["label"], c["predicted"], str(c["n"])] for c in z["confused"]]
        parts.append(align([["commonest confusions", "taken for", "images"], *commonest], left=2))
    return "\n\n".join(parts)


BENCHMARKS.add(
    ZeroshotConfig,
    Zeroshot,
    {"zeroshot": {}},
    source="Radford et al. 2021 (arXiv 2103.00020), sections 3.1.2 to 3.1.4",
)
