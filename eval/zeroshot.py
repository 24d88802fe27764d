"""Zero-shot classification: images against the prompts of their candidate classes.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4: the embedding of a class is the normalized mean of the
unit embeddings of its prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clipwright.eval.encode import Encoder, encode_images, encode_texts
from clipwright.eval.intervals import wilson_interval
from clipwright.eval.labeled import LabeledSet
from clipwright.eval.metrics import RankedResults, rank_candidates
from clipwright.eval.prompting import ClassNames, template_columns
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.nearest import nearest

CONFUSION_CLASSES = 200  # with more classes the confusion matrix is left out
CONFUSED_PAIRS = 10  # most frequent confusions that are reported


@dataclass(frozen=True)
class ClassificationTask:
    """The rows of a labeled set to classify, the candidate classes, and the correct class of each row.

    Classes of equal name are merged, as equal texts are one answer in retrieval. The 1000 classes of ImageNet become
    998.
    """

    rows: np.ndarray  # (N,) positions in the labeled set, ascending
    labels: np.ndarray  # (N,) int64, positions in `classes`
    classes: list[ClassNames]
    merged: int  # classes that were merged with an earlier class
    values: dict[str, list[Any]]  # for a label over several columns: column → value of each class (None: unknown)

    @property
    def names(self) -> list[str]:
        return [names[0] for names in self.classes]


def make_task(
    data: LabeledSet, classes: Sequence[ClassNames] | None, label: str | None, where: dict[str, Any]
) -> ClassificationTask:
    """Returns the task that a ZeroshotConfig's `classes`, `label` and `where` define on `data`.

    Raises E_COLUMN (a column is missing or holds no labels), E_CONFIG_VALUE (no row is selected) or E_CLASSES (labels
    and classes do not match).
    """
    fields = _label_fields(label, data.columns)
    for name in (*fields, *where):
        if name not in data.columns:
            raise _missing_column(name, data)
    name_columns = ["class_name"] if "class_name" in data.columns else []
    table = data.read(list(dict.fromkeys([*fields, *where, *name_columns])))
    rows = _select_rows(table, where, data)
    values_of_text: dict[str, tuple[Any, ...]] = {}
    if label is not None and "{" in label:
        texts = _formatted_labels(label, fields, table, values_of_text)
    else:
        texts, classes = _column_labels(table, fields[0], classes, data)
    if classes is None:
        candidates: list[ClassNames] = [(text,) for text in sorted({text for text in texts if text is not None})]
    else:
        candidates = _merge_equal_names(classes)
    position = {names[0]: i for i, names in enumerate(candidates)}
    labels: list[int] = []
    for row in rows.tolist():
        text = texts[row]
        if text is None or text not in position:
            raise _unknown_label(texts, row, candidates, data)
        labels.append(position[text])
    return ClassificationTask(
        rows=rows,
        labels=np.array(labels, np.int64),
        classes=candidates,
        merged=len(classes) - len(candidates) if classes is not None else 0,
        values=_class_values(fields, candidates, values_of_text) if len(fields) > 1 else {},
    )


def class_embeddings(
    model: Encoder, classes: Sequence[ClassNames], templates: Sequence[str], *, batch: int, quiet: bool = False
) -> Tensor:
    """Returns float32 unit embeddings (classes, E): the normalized mean over all templates and names of a class."""
    prompts = [template.replace("{}", name) for names in classes for name in names for template in templates]
    owners = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(n) * len(templates) for n in classes]))
    sums: Tensor | None = None
    start = 0
    with Progress("eval", len(prompts), "prompt", quiet=quiet) as progress:
        for embeddings in encode_texts(model, prompts, batch=batch):
            if sums is None:
                sums = torch.zeros(len(classes), embeddings.shape[1], dtype=torch.float64)
            sums.index_add_(0, owners[start : start + len(embeddings)], embeddings.double())
            start += len(embeddings)
            progress.add(len(embeddings))
    assert sums is not None, "no prompts"
    return torch.nn.functional.normalize(sums, dim=1).float()


@dataclass(frozen=True)
class ClassificationResults:
    """The ranked classes of every image of a task."""

    task: ClassificationTask
    templates: int
    keys: list[str]
    results: RankedResults
    column_ranks: dict[str, Tensor]  # column → (N,) int64: classes of a wrong value before the first of the right value

    def numbers(self) -> dict[str, Any]:
        """Returns the numbers of a report, as the benchmark's docstring lists them."""
        labels = self.task.labels
        n, classes = len(labels), len(self.task.classes)
        rank = self.results.rank.numpy()
        is_correct = rank == 0
        images_per_class = np.bincount(labels, minlength=classes)
        correct_per_class = np.bincount(labels[is_correct], minlength=classes)
        tested = images_per_class > 0
        low, high = wilson_interval(int(is_correct.sum()), n)
        numbers: dict[str, Any] = {
            "n": n,
            "classes": classes,
            "merged": self.task.merged,
            "templates": self.templates,
            "top1": float(is_correct.sum() / n),
            "top5": float((rank < 5).sum() / n),
            "chance": 1 / classes,
            "mean_per_class": float((correct_per_class[tested] / images_per_class[tested]).mean()),
            "top1_low": low,
            "top1_high": high,
        }
        for column, column_rank in self.column_ranks.items():
            numbers[f"{column}_top1"] = float((column_rank.numpy() == 0).sum() / n)
            numbers[f"{column}_chance"] = column_chance(self.task, column)
        numbers["per_class"] = [
            {"name": name, "n": int(images), "top1": float(correct / images) if images else None}
            for name, images, correct in zip(self.task.names, images_per_class, correct_per_class, strict=True)
        ]
        return numbers | self._confusion()

    def _confusion(self) -> dict[str, Any]:
        """Returns `confusion`, rows by label and columns by prediction, and `confused`, the most frequent pairs."""
        names, classes = self.task.names, len(self.task.classes)
        predicted = self.results.top[:, 0].numpy()
        pairs, counts = np.unique(self.task.labels * classes + predicted, return_counts=True)
        section: dict[str, Any] = {}
        if classes <= CONFUSION_CLASSES:
            matrix = np.zeros(classes * classes, np.int64)
            matrix[pairs] = counts
            section["confusion"] = matrix.reshape(classes, classes).tolist()
        errors = []
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            label, prediction = divmod(pair, classes)
            if label != prediction:
                errors.append((-count, label, prediction))
        section["confused"] = [
            {"label": names[label], "predicted": names[prediction], "n": -negative_count}
            for negative_count, label, prediction in sorted(errors)[:CONFUSED_PAIRS]
        ]
        return section

    def table(self) -> pa.Table:
        """One row per image: `key`, `label`, and `predicted` and `score` of the top-5 classes."""
        names = pa.array(self.task.names, pa.string())
        results = self.results
        return pa.table(
            {
                "key": pa.array(self.keys, pa.string()),
                "label": names.take(pa.array(self.task.labels)),
                "predicted": results.as_lists(names.take(pa.array(results.top.flatten().numpy()))),
                "score": results.as_lists(pa.array(results.score.flatten().numpy())),
            }
        )


def classify(
    model: Encoder,
    data: LabeledSet,
    task: ClassificationTask,
    templates: Sequence[str],
    *,
    batch: int,
    workers: int,
    quiet: bool = False,
) -> ClassificationResults:
    """Classifies the images of a task, `batch` at a time. An image that cannot be read is an error.

    In a tie, a wrong class ranks before the correct class, and for a column of the label, a wrong value before the
    correct value.
    """
    candidates = class_embeddings(model, task.classes, templates, batch=batch, quiet=quiet)
    # Column → for each class, the classes that have the same value in the column.
    same_value = {
        column: [np.flatnonzero([other == value for other in values]) for value in values]
        for column, values in task.values.items()
    }
    keys: list[str] = []
    parts: list[RankedResults] = []
    column_ranks: dict[str, list[Tensor]] = {column: [] for column in same_value}
    with Progress("eval", len(task.rows), "image", quiet=quiet) as progress:
        for batch_keys, embeddings in encode_images(model, data.images(task.rows), batch=batch, workers=workers):
            labels = task.labels[len(keys) : len(keys) + len(batch_keys)]
            parts.append(rank_candidates(embeddings, candidates, [labels[i : i + 1] for i in range(len(labels))]))
            for column, groups in same_value.items():
                results = rank_candidates(embeddings, candidates, [groups[label] for label in labels])
                column_ranks[column].append(results.rank)
            keys += batch_keys
            progress.add(len(batch_keys))
    assert len(keys) == len(task.rows), (len(keys), len(task.rows))
    return ClassificationResults(
        task=task,
        templates=len(templates),
        keys=keys,
        results=RankedResults.concatenate(parts),
        column_ranks={column: torch.cat(ranks) for column, ranks in column_ranks.items()},
    )


def column_chance(task: ClassificationTask, column: str) -> float:
    """Chance level of a column: its value is guessed among the classes that agree in all other columns."""
    others = [values for name, values in task.values.items() if name != column]
    rest = list(zip(*others, strict=True))
    remaining = np.array([sum(other == values for other in rest) for values in rest])
    return float((1 / remaining[task.labels]).mean())


def _label_fields(label: str | None, columns: Sequence[str]) -> list[str]:
    """Returns the columns that the label is made of."""
    if label is None:
        return ["class_name" if "class_name" in columns else "label"]
    if "{" not in label:
        return [label]
    try:
        return template_columns(label)
    except ValueError as error:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the label format is not valid",
            where="benchmark.label",
            found=f"{label!r}: {error}",
            fix="name a column, or write {column} for each of several",
        ) from None


def _select_rows(table: pa.Table, where: dict[str, Any], data: LabeledSet) -> np.ndarray:
    keep = np.ones(table.num_rows, bool)
    for column, wanted in where.items():
        values = table[column].to_pylist()
        keep &= np.array([value == wanted for value in values], bool)
        if not keep.any():
            examples = ", ".join(sorted({repr(value) for value in values})[:8])
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "no row is selected",
                where="benchmark.where",
                found=f"no row of {data.name} has {where}; values of {column}: {examples}",
                fix="select a value that the column has",
            )
    return np.flatnonzero(keep)


def _formatted_labels(
    label: str, fields: list[str], table: pa.Table, values_of_text: dict[str, tuple[Any, ...]]
) -> list[str | None]:
    """Returns the label of each row, None where a column is missing. Fills `values_of_text`: label → its values."""
    texts: list[str | None] = []
    for values in zip(*(table[name].to_pylist() for name in fields), strict=True):
        if None in values:
            texts.append(None)
            continue
        text = label.format(**dict(zip(fields, values, strict=True)))
        texts.append(text)
        if values_of_text.setdefault(text, values) != values:
            found = f"{values_of_text[text]} and {values} both read {text!r}"
            raise _class_mismatch(found, "separate the columns of the format by some text")
    return texts


def _column_labels(
    table: pa.Table, column: str, classes: Sequence[ClassNames] | None, data: LabeledSet
) -> tuple[list[str | None], Sequence[ClassNames] | None]:
    """Returns the class name of each row, and the classes in label order if they are known."""
    kind = table.schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    values: list[Any] = table[column].to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values, classes
    if not pa.types.is_integer(kind):
        raise ClipwrightError(
            "E_COLUMN",
            "the column does not hold labels",
            where=f"{data.name}: {column}",
            found=f"its type is {kind}",
            allowed="allowed: text or integers",
            fix="set benchmark.label to the column with the labels, or to a format such as '{colour} {shape}'",
        )
    numbers = {value for value in values if value is not None}
    if classes is None:
        names = _names_of_numbers(table, numbers, values)
        return [names.get(value) for value in values], [(names[number],) for number in sorted(numbers)]
    low, count = min(numbers, default=0), max(numbers, default=-1) + 1
    if low < 0 or count != len(classes):
        found = (
            f"{format_count(len(classes), 'class', 'classes')}, and labels from {low} to {count - 1}, "
            f"in all {format_count(count - low, 'class', 'classes')}"
        )
        raise _class_mismatch(found, "give benchmark.classes one name for each label, in order")
    return [None if value is None else classes[value][0] for value in values], classes


def _names_of_numbers(table: pa.Table, numbers: set[int], values: list[Any]) -> dict[int, str]:
    """Returns the name of each label number, taken from the column `class_name`."""
    fix = "set benchmark.classes to the names in the order of the numbers"
    if "class_name" not in table.column_names:
        found = f"0 classes, {format_count(len(numbers), 'different number')} as labels, and no column class_name"
        raise _class_mismatch(found, fix)
    names: dict[int, str] = {}
    for number, name in zip(values, table["class_name"].to_pylist(), strict=True):
        if number is not None and (name is None or names.setdefault(number, name) != name):
            found = f"label {number} is {names.get(number)!r} in one row and {name!r} in another"
            raise _class_mismatch(found, fix)
    return names


def _merge_equal_names(classes: Sequence[ClassNames]) -> list[ClassNames]:
    """Merges classes of equal first name into one that has all their names."""
    merged: dict[str, dict[str, None]] = {}
    for names in classes:
        merged.setdefault(names[0], {}).update(dict.fromkeys(names))
    return [tuple(names) for names in merged.values()]


def _class_values(
    fields: list[str], classes: list[ClassNames], values_of_text: dict[str, tuple[Any, ...]]
) -> dict[str, list[Any]]:
    """Returns, by column, the value of each class; None for a class that no row has."""
    unknown = (None,) * len(fields)
    return {field: [values_of_text.get(names[0], unknown)[i] for names in classes] for i, field in enumerate(fields)}


def _unknown_label(texts: list[str | None], row: int, classes: list[ClassNames], data: LabeledSet) -> ClipwrightError:
    text = texts[row]
    if text is None:
        found = f"row {row} of {data.name} has no label"
        return _class_mismatch(found, "select the rows that have a label with benchmark.where")
    labels = len({text for text in texts if text is not None})
    found = (
        f"{format_count(len(classes), 'class', 'classes')}, {format_count(labels, 'different label')}; "
        f"row {row} has {text!r}, which is not a class"
    )
    return _class_mismatch(
        found, "name every label in benchmark.classes, or leave it out to take the labels as classes"
    )


def _class_mismatch(found: str, fix: str) -> ClipwrightError:
    what = "the classes and the labels do not match"
    return ClipwrightError("E_CLASSES", what, where="benchmark.classes", found=found, fix=fix)


def _missing_column(name: str, data: LabeledSet) -> ClipwrightError:
    return ClipwrightError(
        "E_COLUMN",
        "the labeled set has no such column",
        where=f"{data.name}: {name}",
        found=f"its columns are {', '.join(data.columns)}",
        fix=nearest(name, data.columns) or "set benchmark.label and benchmark.where to columns that it has",
    )
