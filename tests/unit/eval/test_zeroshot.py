"""Zero-shot classification against a slow reference, models whose answers are known, and refusals."""

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
from clipwright.eval.encode import Picture
from clipwright.eval.labelled import open_labelled
from clipwright.eval.metrics import TIE
from clipwright.eval.prompting import listing, load_classes, load_templates, shipped_sets
from clipwright.pipeline.core.tables import align, display_width

COLOURS, SHAPES = ("red", "blue", "green", "분홍색"), ("star", "heart", "cross")


class Rows:
    """A labelled set in memory; the picture of row i is the byte i."""

    name, fingerprint = "rows", "0" * 64

    def __init__(self, **columns: list[Any]) -> None:
        self.table = pa.table(columns)
        self.samples, self.columns = self.table.num_rows, self.table.column_names

    def read(self, columns: list[str]) -> pa.Table:
        return self.table.select(columns)

    def pictures(self, rows: np.ndarray) -> Any:
        for row in rows.tolist():
            yield Picture(str(row), f"row {row}", "mend it", lambda row=row: bytes([row]))


class Vectors:
    """A model that is two lookups: image by its byte, text by its words."""

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
    """Rows of all pairs of colour and shape, unevenly often."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    shown = [pairs[(i * i) % len(pairs)] for i in range(count - len(pairs))] + pairs
    return Rows(
        colour=[c for c, _ in shown],
        shape=[s for _, s in shown],
        split=["test" if i % 3 else "train" for i in range(count)],
    )


def run(model: Any, data: Rows, templates: list[str], batch: int = 7, **question: Any) -> zeroshot.Answers:
    asked = zeroshot.ask(data, **{"classes": None, "label": None, "where": {}, **question})
    return zeroshot.answer(model, data, asked, templates, batch=batch, workers=2, quiet=True)


def mean_vector(texts: dict[str, torch.Tensor], prompts: list[str]) -> list[float]:
    """Loops in float64: the mean of unit vectors, renormalised."""
    vectors = [[float(x) for x in texts[prompt]] for prompt in prompts]
    vectors = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v in vectors]
    mean = [sum(v[d] for v in vectors) / len(vectors) for d in range(len(vectors[0]))]
    length = math.sqrt(sum(x * x for x in mean))
    return [x / length for x in mean]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_numbers_equal_loops_in_float64(batch: int) -> None:
    data, templates = grid(60), ["a {}", "one {} here", "{}!"]
    names = sorted(f"{c} {s}" for c in COLOURS for s in SHAPES)
    texts = {t.format(name): v for t in templates for name, v in zip(names, units(12, 6, len(t)), strict=True)}
    images = units(60, 6, 1)
    answers = run(Vectors(images, texts), data, templates, batch, label="{colour} {shape}", where={"split": "test"})
    z = answers.numbers()

    classes = [mean_vector(texts, [t.format(name) for t in templates]) for name in names]
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
    assert 0 < z["top1_low"] < z["top1"] < z["top1_high"] < z["top5"]
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
    table = answers.table().to_pylist()
    assert [row["key"] for row in table] == [str(i) for i in chosen]
    assert sum(row["predicted"][0] == row["label"] for row in table) == hits[1]
    assert sum(row["label"] in row["predicted"] for row in table) == hits[5]
    assert all(row["score"] == sorted(row["score"], reverse=True) for row in table)


def test_prompts_are_averaged_as_unit_vectors() -> None:
    texts = dict(zip(["a x", "the x", "a y", "the y", "a z", "the z"], units(6, 5, 3), strict=True))
    made = zeroshot.class_vectors(Vectors(units(1, 5, 0), texts), [("x", "y"), ("z",)], ["a {}", "the {}"], batch=4)
    for vector, names in zip(made.tolist(), (("x", "y"), ("z",)), strict=True):
        wanted = mean_vector(texts, [f"{start} {name}" for name in names for start in ("a", "the")])
        assert vector == pytest.approx(wanted, abs=1e-6)


def models(data: Rows, seed: int = 0) -> tuple[list[str], dict[str, torch.Tensor]]:
    names = sorted(f"{c} {s}" for c in COLOURS for s in SHAPES)
    return names, dict(zip(names, torch.eye(12), strict=True))


def test_a_perfect_model_and_one_that_sees_colours_only() -> None:
    data = grid(40)
    names, texts = models(data)
    labels = [
        f"{c} {s}" for c, s in zip(data.table["colour"].to_pylist(), data.table["shape"].to_pylist(), strict=True)
    ]
    images = torch.stack([texts[label] for label in labels])
    z = run(Vectors(images, texts), data, ["{}"], label="{colour} {shape}").numbers()
    assert all(z[name] == 1.0 for name in ("top1", "top5", "mean_per_class", "colour_top1", "shape_top1"))
    assert z["confused"] == []
    # Every shape of a colour ties: no shape is right, every colour is.
    colours = {c: torch.eye(4)[i] for i, c in enumerate(COLOURS)}
    blind = Vectors(
        torch.stack([colours[label.split()[0]] for label in labels]), {n: colours[n.split()[0]] for n in names}
    )
    z = run(blind, data, ["{}"], label="{colour} {shape}").numbers()
    assert (z["top1"], z["colour_top1"], z["shape_top1"]) == (0.0, 1.0, 0.0)
    assert z["top5"] == 1.0 and sum(row[i] for i, row in enumerate(z["confusion"])) == 0


@pytest.mark.parametrize("jitter", [0.0, TIE / 4])
def test_a_constant_model_is_never_right(jitter: float) -> None:
    data = grid(40)
    names, _ = models(data)
    vector = units(1, 8, 5)[0]
    texts = {
        name: torch.nn.functional.normalize(vector + jitter * units(1, 8, i)[0], dim=0) for i, name in enumerate(names)
    }
    answers = run(Vectors(vector.repeat(40, 1), texts), data, ["{}"], label="{colour} {shape}")
    z = answers.numbers()
    assert z["top1"] == z["top5"] == z["mean_per_class"] == z["colour_top1"] == z["shape_top1"] == z["top1_low"] == 0.0
    assert all(row["label"] not in row["predicted"] for row in answers.table().to_pylist())


def test_chance_of_a_column_where_pairs_are_missing() -> None:
    """Red has two shapes, blue one: who knows the colour guesses a shape with 1/2 or 1."""
    data = Rows(colour=["red", "red", "red", "blue"], shape=["star", "heart", "star", "star"])
    asked = zeroshot.ask(data, None, "{colour} {shape}", {})
    assert zeroshot.column_chance(asked, "shape") == pytest.approx((3 * 1 / 2 + 1) / 4)


def test_classes_of_one_name_are_one() -> None:
    data = Rows(label=[0, 1, 2, 2, 3])
    classes = [("missile",), ("cat",), ("missile", "rocket"), ("dog",)]
    asked = zeroshot.ask(data, classes, None, {})
    assert asked.classes == [("missile", "rocket"), ("cat",), ("dog",)] and asked.merged == 1
    assert asked.labels.tolist() == [0, 1, 0, 0, 2]
    imagenet = zeroshot.ask(Rows(label=list(range(1000))), load_classes("imagenet"), None, {})
    assert (len(imagenet.classes), imagenet.merged) == (998, 2)


def test_labels_may_be_numbers_names_or_a_format() -> None:
    data = Rows(class_name=["dog", "cat", "cat"], label=[7, 2, 2], kind=["a", "b", "b"])
    assert zeroshot.ask(data, None, None, {}).names == ["cat", "dog"]
    assert zeroshot.ask(data, None, "label", {}).names == ["cat", "dog"]
    assert zeroshot.ask(data, None, "label", {}).labels.tolist() == [1, 0, 0]
    some = zeroshot.ask(data, None, "{class_name}", {"kind": "b"})
    assert (some.names, some.rows.tolist(), some.labels.tolist(), some.values) == (["cat", "dog"], [1, 2], [0, 0], {})
    given = zeroshot.ask(data, load_classes(["bird", "dog", "cat"]), None, {})
    assert given.labels.tolist() == [1, 2, 2]


def test_shipped_prompts() -> None:
    rows = {row["name"]: row for row in listing()}
    assert len(rows) == len(listing())
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


def test_wide_letters_take_two_cells() -> None:
    assert [display_width(text) for text in ("ab", "분홍색", "e\u0301", "")] == [2, 6, 1, 0]
    lines = align([["class", "n"], ["분홍색 별", "7"], ["red star", "12"]]).splitlines()
    assert len({display_width(line) for line in lines}) == 1 and lines[1].endswith(" 7")


def jpeg(i: int, colour: tuple[int, int, int] = (200, 40, 40)) -> bytes:
    noise = np.random.default_rng(i).integers(-30, 30, (40, 48, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two files of three rows, one with bytes, one with structs would differ in type: both hold bytes here."""
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


def test_tables_are_read_by_row_with_the_key_of_the_bytes(labelled: Path, tmp_path: Path, picture) -> None:
    data = open_labelled(str(labelled / "set-*.parquet"))
    assert (data.samples, data.columns) == (6, ["class_name", "label", "split"])
    found = list(data.pictures(np.array([1, 2, 5])))
    assert [p.read() for p in found] == [jpeg(1), jpeg(2), jpeg(5)]
    assert found[2].where.endswith("set-1.parquet, row 2")
    structs = pa.array([{"bytes": jpeg(i), "path": None} for i in range(2)])
    pq.write_table(pa.table({"image": structs, "label": [0, 1]}), tmp_path / "structs.parquet")
    again = list(open_labelled(tmp_path / "structs.parquet").pictures(np.array([1])))
    assert again[0].key == found[0].key and again[0].read() == jpeg(1)


def test_through_the_command(cli, model, small, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    words = ("eval", "zeroshot", f"model={model}", f"data={labelled / 'set-*.parquet'}", "-o", out)
    done = cli(*words, "benchmark.where.split=b", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    z = report["zeroshot"]
    assert (z["n"], z["classes"], [c["n"] for c in z["per_class"]]) == (3, 2, [1, 2])
    assert {"model", "data", "classes", "templates"} == report["fingerprints"].keys()
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
    # The same set as a dataset folder, its label a format over two columns, in words for a person.
    words = (
        "eval",
        "zeroshot",
        f"model={model}",
        f"data={small}",
        "benchmark.label={colour} {id}",
        "-o",
        out,
        "--fresh",
    )
    done = cli(*words, "benchmark.where.held_out=true", 'benchmark.templates=["a {}", "the {}"]')
    assert done.returncode == 0, done.stderr
    assert "colour" in done.stdout and "worst classes" in done.stdout
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
    for way in ("i2t", "t2i"):
        rows = [row for row in table.to_pylist() if row["way"] == way]
        assert len(rows) == numbers[way]["n"]
        for k in (1, 5):
            assert sum(row["rank"] < k for row in rows) / len(rows) == pytest.approx(numbers[way][f"r{k}"])
        for row in rows:
            assert len(row["top"]) == len(row["right"]) == len(row["score"]) == 5
            first = row["right"].index(True) if any(row["right"]) else 5
            assert first == min(row["rank"], 5)
            if way == "i2t":
                assert row["query"] == row["key"]
                assert row["right"] == [text in captions[row["key"]] for text in row["top"]]
            else:
                assert row["query"] in captions[row["key"]]
                assert row["right"] == [row["query"] in captions[key] for key in row["top"]]


def test_bad_input(quick_cli, refused, model, labelled: Path, tmp_path: Path) -> None:
    table = labelled / "set-0.parquet"

    def wrong(code: str, exit_code: int, *named: object, data: object = table, words: tuple[str, ...] = ()) -> None:
        refused(quick_cli("eval", "zeroshot", f"model={model}", f"data={data}", *words), code, exit_code, *named)

    listed = """benchmark.templates='["a photo of a {}"]'"""
    wrong("E_CONFIG_VALUE", 2, "the text 'a photo of a {}'", listed, words=("benchmark.templates=a photo of a {}",))
    wrong("E_CONFIG_VALUE", 2, "a photo", "{}", words=('benchmark.templates=["a {}", "a photo"]',))
    wrong("E_CONFIG_CHOICE", 2, "imagenets", "'imagenet'", words=("benchmark.classes=imagenets",))
    names = ("benchmark.label=label", 'benchmark.classes=["a", "b", "c"]')
    wrong("E_CLASSES", 3, "3 classes", "2 classes", "benchmark.classes", words=names)
    wrong("E_CLASSES", 3, "1 classes", "2 different", "별", words=('benchmark.classes=["heart"]',))
    wrong("E_COLUMN", 3, "clas_name", "'class_name'", words=("benchmark.label=clas_name",))
    wrong("E_CONFIG_VALUE", 2, "benchmark.where", "'a'", words=("benchmark.where.split=test",))
    wrong("E_INPUT", 3, "nowhere.parquet", data=tmp_path / "nowhere.parquet")
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(table).slice(0, 0), empty)
    wrong("E_DATA_SMALL", 3, empty, data=empty)
    broken = tmp_path / "broken.parquet"
    rows = pq.read_table(table).to_pylist()
    rows[2]["image"] = rows[2]["image"][:200]
    pq.write_table(pa.Table.from_pylist(rows), broken)
    out = tmp_path / "never"
    wrong("E_IMG_TRUNCATED", 3, "broken.parquet, row 2", data=broken, words=("-o", str(out)))
    assert [path.name for path in out.iterdir()] == ["status.json"]


def test_more_bad_input_in_process(tmp_path: Path) -> None:
    def code(call: Any) -> str:
        with pytest.raises(Exception) as error:
            call()
        return error.value.code  # pyright: ignore

    numbers = Rows(label=[0, 1, -1])
    assert code(lambda: zeroshot.ask(numbers, [("a",), ("b",)], None, {})) == "E_CLASSES"
    assert code(lambda: zeroshot.ask(Rows(label=[0, 1]), None, None, {})) == "E_CLASSES"
    assert code(lambda: zeroshot.ask(Rows(label=["a", None]), None, None, {})) == "E_CLASSES"
    assert code(lambda: zeroshot.ask(Rows(label=[0, 0], class_name=["a", "b"]), None, "label", {})) == "E_CLASSES"
    assert code(lambda: zeroshot.ask(Rows(a=["x y", "x"], b=["z", "y z"]), None, "{a} {b}", {})) == "E_CLASSES"
    assert code(lambda: zeroshot.ask(Rows(label=[0.5]), None, None, {})) == "E_COLUMN"
    assert code(lambda: zeroshot.ask(Rows(label=["a"]), None, "{label", {})) == "E_CONFIG_VALUE"
    assert code(lambda: zeroshot.ask(Rows(label=["a"]), None, "{label:>3}", {})) == "E_CONFIG_VALUE"
    pq.write_table(pa.table({"image": ["a.jpg"], "label": [0]}), tmp_path / "paths.parquet")
    assert code(lambda: open_labelled(tmp_path / "paths.parquet")) == "E_COLUMN"
    (tmp_path / "set.csv").write_text("image,label\n")
    assert code(lambda: open_labelled(tmp_path / "set.csv")) == "E_TABLE"
    (tmp_path / "torn.json").write_text("[")
    assert code(lambda: load_classes(str(tmp_path / "torn.json"))) == "E_INPUT"
    assert code(lambda: load_classes([])) == code(lambda: load_classes([["a"], [3]])) == "E_CONFIG_VALUE"
    assert code(lambda: load_templates(["{} and {}"])) == "E_CONFIG_VALUE"
