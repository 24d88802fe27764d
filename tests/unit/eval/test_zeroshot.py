"""Zero-shot classification against a slow reference, models whose answers are known, and errors."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipwright.eval import zeroshot
from clipwright.eval.benchmarks.zeroshot import scores as score_list
from clipwright.eval.encode import ImageSource
from clipwright.eval.intervals import wilson_interval
from clipwright.eval.labeled import open_labeled
from clipwright.eval.metrics import TIE
from clipwright.eval.prompting import list_prompt_sets, load_classes, load_templates, shipped_sets
from clipwright.pipeline.core.tables import align, display_width

COLORS, SHAPES = ("red", "blue", "green", "분홍색"), ("star", "heart", "cross")


class Rows:
    """A labeled set in memory; the image of row i is the byte i."""

    name, fingerprint = "rows", "0" * 64

    def __init__(self, **columns: list[Any]) -> None:
        self.table = pa.table(columns)
        self.samples, self.columns = self.table.num_rows, self.table.column_names

    def read(self, columns: list[str]) -> pa.Table:
        return self.table.select(columns)

    def images(self, rows: np.ndarray) -> Any:
        for row in rows.tolist():
            yield ImageSource(str(row), f"row {row}", "fix it", lambda row=row: bytes([row]))


class LookupModel:
    """A model that looks up the embedding of an image by its byte and of a text by its words."""

    def __init__(self, images: torch.Tensor, texts: dict[str, torch.Tensor]) -> None:
        self.images, self.texts = images, texts

    def view(self, data: bytes) -> np.ndarray:
        return np.full((1, 1, 3), data[0], np.uint8)

    def embed_images(self, views: np.ndarray) -> torch.Tensor:
        return self.images[torch.from_numpy(views[:, 0, 0, 0].astype(np.int64))]

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.texts[text] for text in texts])


def units(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def grid(count: int) -> Rows:
    """Rows of all pairs of color and shape, unevenly often."""
    pairs = [(c, s) for c in COLORS for s in SHAPES]
    shown = [pairs[(i * i) % len(pairs)] for i in range(count - len(pairs))] + pairs
    return Rows(
        colour=[c for c, _ in shown],
        shape=[s for _, s in shown],
        split=["test" if i % 3 else "train" for i in range(count)],
    )


def run(
    model: Any, data: Rows, templates: list[str], batch: int = 7, *, label: str, where: dict[str, Any] | None = None
) -> zeroshot.ClassificationResults:
    task = zeroshot.make_task(data, None, label, where or {})
    return zeroshot.classify(model, data, task, templates, batch=batch, workers=2, quiet=True)


def mean_embedding(texts: dict[str, torch.Tensor], prompts: list[str]) -> list[float]:
    """Loops in float64: the normalized mean of unit embeddings."""
    vectors = [[float(x) for x in texts[prompt]] for prompt in prompts]
    vectors = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v in vectors]
    mean = [sum(v[d] for v in vectors) / len(vectors) for d in range(len(vectors[0]))]
    length = math.sqrt(sum(x * x for x in mean))
    return [x / length for x in mean]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_numbers_equal_loops_in_float64(batch: int) -> None:
    data, templates = grid(60), ["a {}", "one {} here", "{}!"]
    names = sorted(f"{c} {s}" for c in COLORS for s in SHAPES)
    texts = {t.format(name): v for t in templates for name, v in zip(names, units(12, 6, len(t)), strict=True)}
    images = units(60, 6, 1)
    result = run(LookupModel(images, texts), data, templates, batch, label="{colour} {shape}", where={"split": "test"})
    z = result.numbers()

    classes = [mean_embedding(texts, [t.format(name) for t in templates]) for name in names]
    rows = data.table.to_pylist()
    chosen = [i for i, row in enumerate(rows) if row["split"] == "test"]
    hits, confusion, columns = {1: 0, 5: 0}, Counter(), Counter()
    own: dict[str, list[bool]] = {name: [] for name in names}
    for i in chosen:
        label = f"{rows[i]['colour']} {rows[i]['shape']}"
        scores = [sum(float(a) * b for a, b in zip(images[i], vector, strict=True)) for vector in classes]
        order = sorted(range(12), key=lambda c: (-scores[c], names[c] == label))
        for k in hits:
            hits[k] += label in [names[c] for c in order[:k]]
        predicted = names[order[0]]
        confusion[label, predicted] += 1
        own[label].append(predicted == label)
        columns["colour"] += predicted.split()[0] == rows[i]["colour"]
        columns["shape"] += predicted.split()[1] == rows[i]["shape"]

    assert (z["n"], z["classes"], z["templates"], z["merged"]) == (len(chosen), 12, 3, 0)
    assert z["top1"] == pytest.approx(hits[1] / len(chosen)) and z["top5"] == pytest.approx(hits[5] / len(chosen))
    assert (z["top1_low"], z["top1_high"]) == wilson_interval(hits[1], len(chosen))
    interval = wilson_interval(hits[5], len(chosen))
    assert [(score.name, score.low, score.high, score.chance) for score in score_list(z)[:3]] == [
        ("top1", z["top1_low"], z["top1_high"], 1 / 12),
        ("top5", *interval, 5 / 12),
        ("mean_per_class", None, None, 1 / 12),
    ]
    assert [(score.name, score.value, score.chance) for score in score_list(z)[3:]] == [
        (f"{column}_top1", z[f"{column}_top1"], z[f"{column}_chance"]) for column in ("colour", "shape")
    ]
    assert z["chance"] == 1 / 12
    means = [sum(hits) / len(hits) if hits else None for hits in own.values()]
    present = [mean for mean in means if mean is not None]
    assert len(present) < 12  # one is in no test row
    assert z["mean_per_class"] == pytest.approx(sum(present) / len(present))
    assert [c["name"] for c in z["per_class"]] == names
    assert [c["n"] for c in z["per_class"]] == [len(own[name]) for name in names]
    assert [c["top1"] for c in z["per_class"]] == [None if m is None else pytest.approx(m) for m in means]
    assert z["confusion"] == [[confusion[a, b] for b in names] for a in names]
    wrong = sorted(((-n, a, b) for (a, b), n in confusion.items() if a != b))[:10]
    assert z["confused"] == [{"label": a, "predicted": b, "n": -n} for n, a, b in wrong]
    for column, values in (("colour", 4), ("shape", 3)):
        assert z[f"{column}_top1"] == pytest.approx(columns[column] / len(chosen))
        assert z[f"{column}_chance"] == pytest.approx(1 / values)
    table = result.table().to_pylist()
    assert [row["key"] for row in table] == [str(i) for i in chosen]
    assert sum(row["predicted"][0] == row["label"] for row in table) == hits[1]
    assert sum(row["label"] in row["predicted"] for row in table) == hits[5]
    assert all(row["score"] == sorted(row["score"], reverse=True) for row in table)


def test_prompts_are_averaged_as_unit_embeddings() -> None:
    texts = dict(zip(["a x", "the x", "a y", "the y", "a z", "the z"], units(6, 5, 3), strict=True))
    made = zeroshot.class_embeddings(
        LookupModel(units(1, 5, 0), texts), [("x", "y"), ("z",)], ["a {}", "the {}"], batch=4
    )
    for vector, names in zip(made.tolist(), (("x", "y"), ("z",)), strict=True):
        wanted = mean_embedding(texts, [f"{start} {name}" for name in names for start in ("a", "the")])
        assert vector == pytest.approx(wanted, abs=1e-6)


def one_hot_classes() -> tuple[list[str], dict[str, torch.Tensor]]:
    """The 12 class names, each with a unit vector of its own."""
    names = sorted(f"{c} {s}" for c in COLORS for s in SHAPES)
    return names, dict(zip(names, torch.eye(12), strict=True))


def test_perfect_model_and_model_that_sees_only_colors() -> None:
    data = grid(40)
    names, texts = one_hot_classes()
    labels = [
        f"{c} {s}" for c, s in zip(data.table["colour"].to_pylist(), data.table["shape"].to_pylist(), strict=True)
    ]
    images = torch.stack([texts[label] for label in labels])
    z = run(LookupModel(images, texts), data, ["{}"], label="{colour} {shape}").numbers()
    assert all(z[name] == 1.0 for name in ("top1", "top5", "mean_per_class", "colour_top1", "shape_top1"))
    assert z["confused"] == []
    # All shapes of a color tie: no shape is correct, every color is.
    colors = {c: torch.eye(4)[i] for i, c in enumerate(COLORS)}
    blind = LookupModel(
        torch.stack([colors[label.split()[0]] for label in labels]), {n: colors[n.split()[0]] for n in names}
    )
    z = run(blind, data, ["{}"], label="{colour} {shape}").numbers()
    assert (z["top1"], z["colour_top1"], z["shape_top1"]) == (0.0, 1.0, 0.0)
    assert z["top5"] == 1.0 and sum(row[i] for i, row in enumerate(z["confusion"])) == 0


@pytest.mark.parametrize("jitter", [0.0, TIE / 4])
def test_constant_model_has_zero_accuracy(jitter: float) -> None:
    data = grid(40)
    names, _ = one_hot_classes()
    vector = units(1, 8, 5)[0]
    texts = {
        name: torch.nn.functional.normalize(vector + jitter * units(1, 8, i)[0], dim=0) for i, name in enumerate(names)
    }
    result = run(LookupModel(vector.repeat(40, 1), texts), data, ["{}"], label="{colour} {shape}")
    z = result.numbers()
    assert z["top1"] == z["top5"] == z["mean_per_class"] == z["colour_top1"] == z["shape_top1"] == z["top1_low"] == 0.0
    assert all(row["label"] not in row["predicted"] for row in result.table().to_pylist())


@pytest.mark.parametrize("classes", [3, 200, 201])
def test_confusion_matrix_is_left_out_for_many_classes(classes: int) -> None:
    names = [f"{i:03d}" for i in range(classes)]
    model = LookupModel(torch.eye(classes), dict(zip(names, torch.eye(classes), strict=True)))
    numbers = run(model, Rows(label=names[:250]), ["{}"], batch=64, label="label").numbers()
    assert numbers["top1"] == 1.0 and ("confusion" in numbers) == (classes <= 200)
    assert score_list(numbers)[1].chance == min(5, classes) / classes


def test_chance_level_of_a_column_with_missing_pairs() -> None:
    """Red has two shapes, blue has one: given the color, a shape is guessed with probability 1/2 or 1."""
    data = Rows(colour=["red", "red", "red", "blue"], shape=["star", "heart", "star", "star"])
    task = zeroshot.make_task(data, None, "{colour} {shape}", {})
    assert zeroshot.column_chance(task, "shape") == pytest.approx((3 * 1 / 2 + 1) / 4)


def test_classes_of_equal_name_are_merged() -> None:
    data = Rows(label=[0, 1, 2, 2, 3])
    classes = [("missile",), ("cat",), ("missile", "rocket"), ("dog",)]
    task = zeroshot.make_task(data, classes, None, {})
    assert task.classes == [("missile", "rocket"), ("cat",), ("dog",)] and task.merged == 1
    assert task.labels.tolist() == [0, 1, 0, 0, 2]
    imagenet = zeroshot.make_task(Rows(label=list(range(1000))), load_classes("imagenet"), None, {})
    assert (len(imagenet.classes), imagenet.merged) == (998, 2)


def test_labels_may_be_numbers_names_or_a_format() -> None:
    data = Rows(class_name=["dog", "cat", "cat"], label=[7, 2, 2], kind=["a", "b", "b"])
    assert zeroshot.make_task(data, None, None, {}).names == ["cat", "dog"]
    assert zeroshot.make_task(data, None, "label", {}).names == ["cat", "dog"]
    assert zeroshot.make_task(data, None, "label", {}).labels.tolist() == [1, 0, 0]
    some = zeroshot.make_task(data, None, "{class_name}", {"kind": "b"})
    assert (some.names, some.rows.tolist(), some.labels.tolist(), some.values) == (["cat", "dog"], [1, 2], [0, 0], {})
    given = zeroshot.make_task(data, load_classes(["bird", "dog", "cat"]), None, {})
    assert given.labels.tolist() == [1, 2, 2]


def test_shipped_prompts() -> None:
    rows = {row["name"]: row for row in list_prompt_sets()}
    assert len(rows) == len(list_prompt_sets())
    assert (rows["imagenet"]["classes"], rows["imagenet"]["templates"]) == (1000, 80)
    assert (rows["imagenet_simple"]["classes"], rows["imagenet_simple"]["templates"]) == (None, 7)
    assert (rows["cifar10"]["classes"], rows["cifar10"]["templates"]) == (10, 18)
    assert ("happy", "smiling") in load_classes("facial_emotion_recognition_2013")
    for name in shipped_sets("classes"):
        assert len(load_classes(name)) == rows[name]["classes"]
    for name in shipped_sets("templates"):
        assert len(load_templates(name)) == rows[name]["templates"] and "{c}" not in "".join(load_templates(name))


def test_prompts_from_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeff빨간 별\n\n the cat \n", encoding="utf-8")
    assert load_classes(str(tmp_path / "names.txt")) == [("빨간 별",), ("the cat",)]
    (tmp_path / "set.json").write_text(json.dumps({"classes": ["a", ["b", "c"]], "templates": ["a {c}."]}))
    assert load_classes(str(tmp_path / "set.json")) == [("a",), ("b", "c")]
    assert load_templates(str(tmp_path / "set.json")) == ["a {}."]


def test_wide_letters_are_aligned_as_two_cells() -> None:
    assert [display_width(text) for text in ("ab", "분홍색", "e\u0301", "")] == [2, 6, 1, 0]
    lines = align([["class", "n"], ["분홍색 별", "7"], ["red star", "12"]]).splitlines()
    assert len({display_width(line) for line in lines}) == 1 and lines[1].endswith(" 7")


def jpeg(i: int, color: tuple[int, int, int] = (200, 40, 40)) -> bytes:
    noise = np.random.default_rng(i).integers(-30, 30, (40, 48, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    """Two files of three rows each. The images are bytes in both, as all files of a set need equal types."""
    for part in range(2):
        rows = [
            {
                "image": jpeg(3 * part + i),
                "class_name": ("별", "heart")[i % 2],
                "label": i % 2,
                "split": ("a", "b")[part],
            }
            for i in range(3)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"set-{part}.parquet", row_group_size=2)
    return tmp_path


def test_table_images_are_read_by_row_and_have_the_key_of_their_bytes(labeled: Path, tmp_path: Path) -> None:
    data = open_labeled(str(labeled / "set-*.parquet"))
    assert (data.samples, data.columns) == (6, ["class_name", "label", "split"])
    images = list(data.images(np.array([1, 2, 5])))
    assert [image.read() for image in images] == [jpeg(1), jpeg(2), jpeg(5)]
    assert images[2].where.endswith("set-1.parquet, row 2")
    for part, first in enumerate((6, 7), 2):  # a third and a fourth file, of one row each
        row = {"image": jpeg(first), "class_name": "heart", "label": 1, "split": "c"}
        pq.write_table(pa.Table.from_pylist([row]), labeled / f"set-{part}.parquet")
    more = open_labeled(str(labeled / "set-*.parquet"))
    assert [image.read() for image in more.images(np.array([5, 6, 7]))] == [jpeg(5), jpeg(6), jpeg(7)]
    (labeled / "set-2.parquet").rename(labeled / "set-4.parquet")  # the same files in another order
    assert open_labeled(str(labeled / "set-*.parquet")).fingerprint != more.fingerprint
    structs = pa.array([{"bytes": jpeg(i), "path": None} for i in range(2)])
    pq.write_table(pa.table({"image": structs, "label": [0, 1]}), tmp_path / "structs.parquet")
    again = list(open_labeled(tmp_path / "structs.parquet").images(np.array([1])))
    assert again[0].key == images[0].key and again[0].read() == jpeg(1)


def test_zeroshot_through_the_command(cli, model, small, labeled: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ("eval", "zeroshot", f"model={model}", f"data={labeled / 'set-*.parquet'}", "-o", out)
    done = cli(*arguments, "benchmark.where.split=b", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    z = report["zeroshot"]
    assert (z["n"], z["classes"], [c["n"] for c in z["per_class"]]) == (3, 2, [1, 2])
    assert {"model", "data", "classes", "templates"} == report["fingerprints"].keys()
    # A column of another name, as in Hugging Face's cifar10.
    names = ["img", "class_name", "label", "split"]
    pq.write_table(pq.read_table(labeled / "set-1.parquet").rename_columns(names), tmp_path / "hf.parquet")
    renamed = ("eval", "zeroshot", f"model={model}", f"data={tmp_path / 'hf.parquet'}", "--json")
    done = cli(*renamed)
    assert done.returncode == 3 and "E_COLUMN" in done.stderr
    assert "hf.parquet: image — the table has the columns img, class_name, label, split" in done.stderr
    assert done.stderr.rstrip().endswith("— set benchmark.image=img")
    done = cli(*renamed, "benchmark.image=img")
    assert json.loads(done.stdout)["zeroshot"]["per_class"] == z["per_class"], done.stderr
    table = pq.read_table(out / "predictions.parquet")
    kinds = {
        "key": pa.string(),
        "label": pa.string(),
        "predicted": pa.list_(pa.string()),
        "score": pa.list_(pa.float32()),
    }
    assert {field.name: field.type for field in table.schema} == kinds
    rows = table.to_pylist()
    assert sum(row["predicted"][0] == row["label"] for row in rows) == round(3 * z["top1"])
    assert [row["label"] for row in rows] == ["별", "heart", "별"]
    low, high = wilson_interval(round(3 * z["top1"]), 3)
    assert (z["top1_low"], z["top1_high"]) == (low, high)
    expected = {"value": z["top1"], "low": low, "high": high, "n": 3, "higher_is_better": True, "chance": 1 / 2}
    assert report["scores"][0] == {"name": "top1", **expected}
    assert [score["name"] for score in report["scores"]] == ["top1", "top5", "mean_per_class"]
    assert [score["value"] for score in report["scores"]] == [z["top1"], z["top5"], z["mean_per_class"]]
    # A dataset folder, a label format over two columns, and the text for a terminal.
    arguments = (
        "eval",
        "zeroshot",
        f"model={model}",
        f"data={small}",
        "benchmark.label={colour} {id}",
        "-o",
        out,
        "--fresh",
    )
    done = cli(*arguments, "benchmark.where.held_out=true", 'benchmark.templates=["a {}", "the {}"]')
    assert done.returncode == 0, done.stderr
    assert "colour_top1" in done.stdout and "worst classes" in done.stdout and "2 templates" in done.stdout
    assert pq.read_table(out / "predictions.parquet").num_rows == 5
    done = cli("eval", "retrieval", f"model={model}", f"data={small}", "-o", out, "--fresh", "--json")
    assert done.returncode == 0, done.stderr
    assert not (out / "predictions.parquet").exists()
    check_queries(pq.read_table(out / "queries.parquet"), json.loads(done.stdout)["retrieval"], small)


def check_queries(table: pa.Table, numbers: dict[str, Any], data: Path) -> None:
    texts, keys = pa.list_(pa.string()), pa.string()
    kinds = {"way": keys, "query": keys, "key": keys, "rank": pa.int64(), "top": texts}
    kinds |= {"right": pa.list_(pa.bool_()), "score": pa.list_(pa.float32())}
    assert {field.name: field.type for field in table.schema} == kinds
    sidecar = pq.ParquetDataset(sorted(data.glob("*.parquet"))).read().to_pylist()
    captions = {row["key"]: row["captions"] for row in sidecar}
    for direction in ("i2t", "t2i"):
        rows = [row for row in table.to_pylist() if row["way"] == direction]
        assert len(rows) == numbers[direction]["n"]
        for k in (1, 5):
            assert sum(row["rank"] < k for row in rows) / len(rows) == pytest.approx(numbers[direction][f"r{k}"])
        for row in rows:
            assert len(row["top"]) == len(row["right"]) == len(row["score"]) == 5
            first = row["right"].index(True) if any(row["right"]) else 5
            assert first == min(row["rank"], 5)
            if direction == "i2t":
                assert row["query"] == row["key"]
                assert row["right"] == [text in captions[row["key"]] for text in row["top"]]
            else:
                assert row["query"] in captions[row["key"]]
                assert row["right"] == [row["query"] in captions[key] for key in row["top"]]


def test_unusable_inputs_are_errors(quick_cli, refused, model, labeled: Path, tmp_path: Path) -> None:
    table = labeled / "set-0.parquet"

    def wrong(code: str, exit_code: int, *named: object, data: object = table, arguments: tuple[str, ...] = ()) -> None:
        refused(quick_cli("eval", "zeroshot", f"model={model}", f"data={data}", *arguments), code, exit_code, *named)

    listed = """benchmark.templates='["a photo of a {}"]'"""
    wrong("E_CONFIG_VALUE", 2, "the text 'a photo of a {}'", listed, arguments=("benchmark.templates=a photo of a {}",))
    wrong("E_CONFIG_VALUE", 2, "a photo", "{}", arguments=('benchmark.templates=["a {}", "a photo"]',))
    wrong("E_CONFIG_CHOICE", 2, "imagenets", "'imagenet'", arguments=("benchmark.classes=imagenets",))
    names = ("benchmark.label=label", 'benchmark.classes=["a", "b", "c"]')
    wrong("E_CLASSES", 3, "3 classes", "2 classes", "benchmark.classes", arguments=names)
    wrong("E_CLASSES", 3, "1 class,", "2 different", "별", arguments=('benchmark.classes=["heart"]',))
    wrong("E_COLUMN", 3, "clas_name", "'class_name'", arguments=("benchmark.label=clas_name",))
    wrong("E_CONFIG_VALUE", 2, "benchmark.where", "'a'", arguments=("benchmark.where.split=test",))
    wrong("E_INPUT", 3, "nowhere.parquet", data=tmp_path / "nowhere.parquet")
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(table).slice(0, 0), empty)
    wrong("E_DATA_SMALL", 3, empty, data=empty)
    broken = tmp_path / "broken.parquet"
    rows = pq.read_table(table).to_pylist()
    rows[2]["image"] = rows[2]["image"][:200]
    pq.write_table(pa.Table.from_pylist(rows), broken)
    out = tmp_path / "never"
    wrong("E_IMG_TRUNCATED", 3, "broken.parquet, row 2", data=broken, arguments=("-o", str(out)))
    assert [path.name for path in out.iterdir()] == ["status.json"]


def test_unusable_labels_and_prompts_are_errors(tmp_path: Path) -> None:
    def code(call: Any) -> str:
        with pytest.raises(Exception) as error:
            call()
        return error.value.code  # pyright: ignore

    numbers = Rows(label=[0, 1, -1])
    assert code(lambda: zeroshot.make_task(numbers, [("a",), ("b",)], None, {})) == "E_CLASSES"
    assert code(lambda: zeroshot.make_task(Rows(label=[0, 1]), None, None, {})) == "E_CLASSES"
    assert code(lambda: zeroshot.make_task(Rows(label=["a", None]), None, None, {})) == "E_CLASSES"
    assert code(lambda: zeroshot.make_task(Rows(label=[0, 0], class_name=["a", "b"]), None, "label", {})) == "E_CLASSES"
    assert code(lambda: zeroshot.make_task(Rows(a=["x y", "x"], b=["z", "y z"]), None, "{a} {b}", {})) == "E_CLASSES"
    assert code(lambda: zeroshot.make_task(Rows(label=[0.5]), None, None, {})) == "E_COLUMN"
    assert code(lambda: zeroshot.make_task(Rows(label=["a"]), None, "{label", {})) == "E_CONFIG_VALUE"
    assert code(lambda: zeroshot.make_task(Rows(label=["a"]), None, "{label:>3}", {})) == "E_CONFIG_VALUE"
    pq.write_table(pa.table({"image": ["a.jpg"], "label": [0]}), tmp_path / "paths.parquet")
    assert code(lambda: open_labeled(tmp_path / "paths.parquet")) == "E_COLUMN"
    (tmp_path / "set.csv").write_text("image,label\n")
    assert code(lambda: open_labeled(tmp_path / "set.csv")) == "E_TABLE"
    (tmp_path / "truncated.json").write_text("[")
    assert code(lambda: load_classes(str(tmp_path / "truncated.json"))) == "E_INPUT"
    assert code(lambda: load_classes([])) == code(lambda: load_classes([["a"], [3]])) == "E_CONFIG_VALUE"
    assert code(lambda: load_templates(["{} and {}"])) == "E_CONFIG_VALUE"
