"""Zero-shot classification: images against the prompts of their possible classes.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4: a class is the mean of the unit vectors of its prompts,
renormalised.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clipwright.eval.encode import Encoder, encode_images, encode_texts
from clipwright.eval.labelled import Labelled
from clipwright.eval.metrics import Found, best, find, wilson
from clipwright.eval.prompting import Names
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.nearest import nearest

CONFUSION_LIMIT = 200  # classes beyond which the matrix of confusions is left out
COMMONEST = 10


@dataclass(frozen=True)
class Question:
    """Which rows of a labelled set are classified, into which classes, and what is right.

    Two classes of the same name are one: the same text is the same answer, as in retrieval. Of ImageNet's 1000 that
    leaves 998.
    """

    rows: np.ndarray  # (N,) positions in the set, ascending
    labels: np.ndarray  # (N,) int64, positions in `classes`
    classes: list[Names]
    merged: int  # how many classes were one with an earlier one
    values: dict[str, list[Any]]  # of a label over two or more columns: column → each class's value (None: unknown)

    @property
    def names(self) -> list[str]:
        return [names[0] for names in self.classes]


def ask(data: Labelled, classes: Sequence[Names] | None, label: str | None, where: dict[str, Any]) -> Question:
    """The question that `label` and `where` put to `data`; see ZeroshotConfig.

    E_COLUMN: a column that is missing or is no label; E_CONFIG_VALUE: nothing selected; E_CLASSES: labels and classes
    that do not fit each other.
    """
    fields = _label_fields(label, data.columns)
    for name in (*fields, *where):
        if name not in data.columns:
            raise _no_column(name, data)
    spare = ["class_name"] if "class_name" in data.columns else []
    table = data.read(list(dict.fromkeys([*fields, *where, *spare])))
    rows = _select(table, where, data)
    places: dict[str, tuple[Any, ...]] = {}
    if label is not None and "{" in label:
        texts = _filled(label, fields, table, places)
    else:
        texts, classes = _texts(table, fields[0], classes, data)
    found = sorted({text for text in texts if text is not None})
    known = [(text,) for text in found] if classes is None else _merge(classes)
    position = {names[0]: i for i, names in enumerate(known)}
    labels: list[int] = []
    for row in rows.tolist():
        text = texts[row]
        if text is None or text not in position:
            raise _unknown_label(texts, row, known, data)
        labels.append(position[text])
    return Question(
        rows=rows,
        labels=np.array(labels, np.int64),
        classes=known,
        merged=len(classes) - len(known) if classes is not None else 0,
        values=_values(fields, known, places) if len(fields) > 1 else {},
    )


def class_vectors(
    model: Encoder, classes: Sequence[Names], templates: Sequence[str], *, batch: int, quiet: bool = False
) -> Tensor:
    """One float32 unit row a class: the mean of the unit vectors of every template with every of its names."""
    prompts = [template.replace("{}", name) for names in classes for name in names for template in templates]
    owners = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(n) * len(templates) for n in classes]))
    sums: Tensor | None = None
    start = 0
    with Progress("eval", len(prompts), "prompts", quiet=quiet) as progress:
        for rows in encode_texts(model, prompts, batch=batch):
            sums = torch.zeros(len(classes), rows.shape[1], dtype=torch.float64) if sums is None else sums
            sums.index_add_(0, owners[start : start + len(rows)], rows.double())
            start += len(rows)
            progress.add(len(rows))
    assert sums is not None, "no prompts"
    return torch.nn.functional.normalize(sums, dim=1).float()


@dataclass(frozen=True)
class Answers:
    """What a model said to a question: for each image its key, its nearest classes, and how each column fared."""

    question: Question
    templates: int
    keys: list[str]
    found: Found
    columns: dict[str, Tensor]  # column → (N,) int64: classes of a wrong value before the best of the right one

    def numbers(self) -> dict[str, Any]:
        """The numbers of a report; see the benchmark's docstring."""
        names, labels = self.question.names, self.question.labels
        first, n, classes = self.found.rank.numpy() == 0, len(labels), len(names)
        size = np.bincount(labels, minlength=classes)
        right = np.bincount(labels[first], minlength=classes)
        low, high = wilson(int(first.sum()), n)
        predicted = self.found.top[:, 0].numpy()
        numbers: dict[str, Any] = {
            **{"n": n, "classes": classes, "merged": self.question.merged, "templates": self.templates},
            **{"top1": first.sum() / n, "top5": (self.found.rank.numpy() < 5).sum() / n, "chance": 1 / classes},
            **{"mean_per_class": (right[size > 0] / size[size > 0]).mean(), "top1_low": low, "top1_high": high},
        }
        for column, rank in self.columns.items():
            numbers[f"{column}_top1"] = (rank.numpy() == 0).sum() / n
            numbers[f"{column}_chance"] = column_chance(self.question, column)
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in numbers.items()}
        numbers["per_class"] = [
            {"name": name, "n": int(of), "top1": float(hits / of) if of else None}
            for name, of, hits in zip(names, size, right, strict=True)
        ]
        pairs, counts = np.unique(labels * classes + predicted, return_counts=True)
        if classes <= CONFUSION_LIMIT:
            matrix = np.zeros(classes * classes, np.int64)
            matrix[pairs] = counts
            numbers["confusion"] = matrix.reshape(classes, classes).tolist()
        wrong = [(-int(c), *divmod(int(p), classes)) for p, c in zip(pairs, counts, strict=True)]
        wrong = sorted(entry for entry in wrong if entry[1] != entry[2])[:COMMONEST]
        numbers["confused"] = [{"label": names[a], "predicted": names[b], "n": -n} for n, a, b in wrong]
        return numbers

    def table(self) -> pa.Table:
        """One row an image: `key`, `label`, and of the nearest five classes `predicted` and `score`."""
        names, found = pa.array(self.question.names, pa.string()), self.found
        return pa.table(
            {
                "key": pa.array(self.keys, pa.string()),
                "label": names.take(pa.array(self.question.labels)),
                "predicted": best(names.take(pa.array(found.top.flatten().numpy())), found),
                "score": best(pa.array(found.score.flatten().numpy()), found),
            }
        )


def answer(
    model: Encoder,
    data: Labelled,
    question: Question,
    templates: Sequence[str],
    *,
    batch: int,
    workers: int,
    quiet: bool = False,
) -> Answers:
    """Classifies the question's images, `batch` at a time. An image that cannot be read is an error.

    A wrong class that ties with the right one stands before it, and so does one of a wrong value with the right value
    of its column.
    """
    vectors = class_vectors(model, question.classes, templates, batch=batch, quiet=quiet)
    alike = {
        name: [np.flatnonzero([v == w for w in values]) for v in values] for name, values in question.values.items()
    }
    keys: list[str] = []
    parts: list[Found] = []
    columns: dict[str, list[Tensor]] = {name: [] for name in alike}
    with Progress("eval", len(question.rows), "images", quiet=quiet) as progress:
        images = data.pictures(question.rows)
        for names, rows in encode_images(model, images, batch=batch, workers=workers):
            labels = question.labels[len(keys) : len(keys) + len(names)]
            parts.append(find(rows, vectors, [labels[i : i + 1] for i in range(len(labels))]))
            for name, groups in alike.items():
                columns[name].append(find(rows, vectors, [groups[label] for label in labels]).rank)
            keys += names
            progress.add(len(names))
    assert len(keys) == len(question.rows), (len(keys), len(question.rows))
    ranks = {name: torch.cat(found) for name, found in columns.items()}
    return Answers(question, len(templates), keys, Found.concatenate(parts), ranks)


def column_chance(question: Question, column: str) -> float:
    """What one gets who knows all other columns and guesses this one among the classes that are left."""
    others = [values for name, values in question.values.items() if name != column]
    rest = list(zip(*others, strict=True))
    left = np.array([sum(rest[i] == other for other in rest) for i in range(len(rest))])
    return float((1 / left[question.labels]).mean())


def _label_fields(label: str | None, columns: Sequence[str]) -> list[str]:
    """The columns that the label is made of."""
    if label is None:
        return ["class_name" if "class_name" in columns else "label"]
    if "{" not in label:
        return [label]
    try:
        parts = [part for part in string.Formatter().parse(label) if part[1] is not None]
        odd = next((part for part in parts if not part[1] or part[2] or part[3]), None)
        reason = "" if odd is None else f"{odd[1]!r} is not a plain column"
    except ValueError as error:
        parts, reason = [], str(error)
    if reason or not parts:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "a label that cannot be read",
            where="benchmark.label",
            found=f"{label!r}: {reason or 'it names no column'}",
            fix="name a column, or write {column} for each of several",
        )
    return list(dict.fromkeys(str(part[1]) for part in parts))


def _select(table: pa.Table, where: dict[str, Any], data: Labelled) -> np.ndarray:
    keep = np.ones(table.num_rows, bool)
    for column, wanted in where.items():
        values = table[column].to_pylist()
        keep &= np.array([value == wanted for value in values], bool)
        if not keep.any():
            shown = ", ".join(sorted({repr(value) for value in values})[:8])
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a benchmark that asks nothing",
                where="benchmark.where",
                found=f"no row of {data.name} has {where}; {column} holds {shown}",
                fix="ask for a value that the column holds",
            )
    return np.flatnonzero(keep)


def _filled(label: str, fields: list[str], table: pa.Table, places: dict[str, tuple[Any, ...]]) -> list[str | None]:
    """Each row's label from its columns (None where one is missing); `places` takes the values behind each label."""
    texts: list[str | None] = []
    for values in zip(*(table[name].to_pylist() for name in fields), strict=True):
        text = None if None in values else label.format(**dict(zip(fields, values, strict=True)))
        texts.append(text)
        if text is not None and places.setdefault(text, values) != values:
            raise _misfit(f"{places[text]} and {values} both read {text!r}", "write something between the columns")
    return texts


def _texts(
    table: pa.Table, column: str, classes: Sequence[Names] | None, data: Labelled
) -> tuple[list[str | None], Sequence[Names] | None]:
    """Each row's label as its class's name, and the classes in order if they are known."""
    kind = table.schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    values: list[Any] = table[column].to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values, classes
    if not pa.types.is_integer(kind):
        raise ClipwrightError(
            "E_COLUMN",
            "a column that holds no labels",
            where=f"{data.name}: {column}",
            found=f"its type is {kind}; text or whole numbers are read",
            fix="set benchmark.label to the column with the labels, or to a format such as '{colour} {shape}'",
        )
    numbers = {value for value in values if value is not None}
    if classes is None:
        names = _named(table, numbers, values)
        return [names.get(value) for value in values], [(names[number],) for number in sorted(numbers)]
    low, count = min(numbers, default=0), max(numbers, default=-1) + 1
    if low < 0 or count != len(classes):
        found = f"{len(classes)} classes, and labels from {low} to {count - 1}, which are {count - low} classes"
        raise _misfit(found, "give benchmark.classes one name for each label, in order")
    return [None if value is None else classes[value][0] for value in values], classes


def _named(table: pa.Table, numbers: set[int], values: list[Any]) -> dict[int, str]:
    """The name of each number, as the column `class_name` gives it."""
    if "class_name" not in table.column_names:
        raise _misfit(
            f"0 classes, {len(numbers)} different numbers as labels and no column class_name",
            "set benchmark.classes to the names in the order of the numbers",
        )
    names: dict[int, str] = {}
    for number, name in zip(values, table["class_name"].to_pylist(), strict=True):
        if number is not None and (name is None or names.setdefault(number, name) != name):
            found = f"label {number} is {names.get(number)!r} in one row and {name!r} in another"
            raise _misfit(found, "set benchmark.classes to the names in the order of the numbers")
    return names


def _merge(classes: Sequence[Names]) -> list[Names]:
    """Classes whose name is the same as one; it has all their names."""
    together: dict[str, dict[str, None]] = {}
    for names in classes:
        together.setdefault(names[0], {}).update(dict.fromkeys(names))
    return [tuple(names) for names in together.values()]


def _values(fields: list[str], known: list[Names], places: dict[str, tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Column → the value that each class has in it; None for a class that no row bears."""
    none = (None,) * len(fields)
    return {field: [places.get(names[0], none)[i] for names in known] for i, field in enumerate(fields)}


def _unknown_label(texts: list[str | None], row: int, known: list[Names], data: Labelled) -> ClipwrightError:
    text, names = texts[row], [names[0] for names in known]
    if text is None:
        return _misfit(f"row {row} of {data.name} has no label", "select the rows that have one with benchmark.where")
    labels = len({t for t in texts if t is not None})
    found = f"{len(names)} classes, {labels} different labels; row {row} is {text!r}, which is no class"
    return _misfit(found, "name every label in benchmark.classes, or leave it out to take the labels as classes")


def _misfit(found: str, fix: str) -> ClipwrightError:
    what = "classes and labels that do not fit each other"
    return ClipwrightError("E_CLASSES", what, where="benchmark.classes", found=found, fix=fix)


def _no_column(name: str, data: Labelled) -> ClipwrightError:
    return ClipwrightError(
        "E_COLUMN",
        "a column that the labelled set does not have",
        where=f"{data.name}: {name}",
        found=f"its columns are {', '.join(data.columns)}",
        fix=nearest(name, data.columns) or "set benchmark.label and benchmark.where to columns it has",
    )
