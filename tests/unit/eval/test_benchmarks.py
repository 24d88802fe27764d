"""Benchmarks: correct numbers for models whose answers are known, and errors through the command."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from clipwright.eval.benchmarks import retrieval
from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkContext, EvalRuntime, Score, score_table
from clipwright.eval.intervals import wilson_interval
from clipwright.eval.search.query import Searcher
from clipwright.eval.search.versions import open_version
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.dataset import Dataset


class CountingModel:
    """A stand-in model: embeds the i-th image that it gets, and every text with the number i, as unit vector i."""

    embed_dim, fingerprint = 64, "f" * 64

    def __init__(self, wrong: int = 0) -> None:
        self.wrong, self.seen = wrong, 0

    def view(self, data: bytes) -> np.ndarray:
        return np.zeros((2, 2, 3), np.uint8)

    def embed_images(self, views: np.ndarray) -> torch.Tensor:
        numbers = torch.arange(self.seen, self.seen + len(views))
        self.seen += len(views)
        return torch.eye(64)[torch.where(numbers < self.wrong, 63, numbers)]

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(64)[[int(re.findall(r"\d+", text)[0]) for text in texts]]


@pytest.mark.parametrize(("wrong", "recall"), [(0, 1.0), (5, 18 / 23)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_retrieval_numbers_of_a_model_with_known_answers(make_dataset, batch, wrong, recall, tmp_path):
    data = Dataset(make_dataset(tmp_path / "data", 23, shard=5))
    numbers = retrieval.score(CountingModel(wrong), data, batch=batch, workers=2)
    assert (numbers["i2t"]["n"], numbers["t2i"]["n"]) == (23, 46)
    assert all(numbers[direction][f"r{k}"] == pytest.approx(recall) for direction in ("i2t", "t2i") for k in (1, 5, 10))
    assert numbers["t2i"]["chance_r10"] == pytest.approx(10 / 23)


class ColorModel(CountingModel):
    """Embeds a text as the first row of the index that has the text's color."""

    def __init__(self, index) -> None:
        self.index = index

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        metadata = self.index.rows["metadata"].to_pylist()
        first = [next(i for i, row in enumerate(metadata) if row["colour"] in text) for text in texts]
        return torch.from_numpy(np.stack([self.index.faiss.reconstruct(int(self.index.ids[i])) for i in first]))


def test_search_counts_hits_with_equal_columns(indexed):
    index = open_version(indexed)
    searcher = Searcher(index, ColorModel(index))
    config = BENCHMARKS.preset("search", template="a {colour} one", where={"held_out": True}, k=3, seed=1)
    context = BenchmarkContext("search", open_index=lambda: searcher, runtime=EvalRuntime())
    outcome = BENCHMARKS.build(config).run(context)
    numbers = outcome.numbers
    assert [q["query"] for q in numbers["queries"]] == ["a green one", "a red one"]  # blue is not held out
    assert [q["relevant"] for q in numbers["queries"]] == [2, 3]
    rows = outcome.tables["hits.parquet"].to_pylist()
    for query, colour, row in zip(numbers["queries"], ("green", "red"), rows, strict=True):
        hits = searcher.search(text=colour, k=3)
        assert query["hits_right"] == sum(hit["metadata"]["colour"] == colour for hit in hits) >= 1
        assert (row["query"], row["top"]) == (query["query"], [hit["key"] for hit in hits])
        assert row["right"] == [hit["metadata"]["colour"] == colour for hit in hits]
        assert row["score"] == pytest.approx([hit["score"] for hit in hits])
    relevant_hits = [q["hits_right"] for q in numbers["queries"]]
    precision = numbers["mean_precision_at_3"]
    assert precision == pytest.approx(sum(relevant_hits) / 6)
    assert outcome.scores == [Score("mean_precision@3", precision, None, None, 2, chance=numbers["chance"])]
    assert (numbers["n"], numbers["k"], numbers["chance"]) == (2, 3, pytest.approx(2.5 / 7))
    shown = [BENCHMARKS.build(replace(config, seed=seed)).run(context).numbers["query"] for seed in (*range(9), 0)]
    assert set(shown) == {"a green one", "a red one"} and shown[0] == shown[-1]


def test_score_of_a_proportion_has_the_interval_of_its_count() -> None:
    score = Score.of_proportion("top1", 29 / 100, 100)  # 29 / 100 * 100 is 28.999999999999996
    assert (score.low, score.high) == wilson_interval(29, 100) == pytest.approx((0.2101, 0.3853), abs=1e-4)


def test_score_table_leaves_out_empty_columns() -> None:
    scores = [Score.of_proportion("top1", 0.25, 1000, chance=0.1), Score.without_interval("mean_per_class", 0.5, 1000)]
    assert score_table(scores).splitlines() == [
        "score            value    95 % interval  chance      n",
        "top1            0.2500  0.2242 … 0.2778  0.1000  1,000",
        "mean_per_class  0.5000                           1,000",
    ]
    assert score_table([Score("loss", 2.0, None, None, 7, higher_is_better=False)]).splitlines() == [
        "score   value  n",
        "loss   2.0000  7",
    ]


def test_context_opens_an_input_once_and_names_a_missing_one() -> None:
    opened = []
    context = BenchmarkContext(
        "retrieval", open_model=lambda: opened.append("model") or CountingModel(), runtime=EvalRuntime()
    )
    assert opened == [] and context.model is context.model and opened == ["model"]
    for read, name in ((lambda: context.data, "data"), (lambda: context.index, "index")):
        with pytest.raises(ClipwrightError, match="E_CONFIG_VALUE") as error:
            read()
        assert error.value.fix == f"add {name}=DIR" and "retrieval" in error.value.where


def test_report_is_what_json_prints(cli, refused, model, small, indexed, tmp_path):
    out = tmp_path / "report"
    done = cli("eval", "retrieval", f"model={model}", f"data={small}", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert report["fingerprints"]["data"] == Dataset(small).fingerprint
    assert report["config"]["data"] == {"name": small.name, "fingerprint": Dataset(small).fingerprint}
    assert {"r1", "r5", "r10", "n"} <= report["retrieval"]["i2t"].keys() & report["retrieval"]["t2i"].keys()
    directions = [(direction, k) for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    assert [score["name"] for score in report["scores"]] == [f"{direction}_recall@{k}" for direction, k in directions]
    for (direction, k), score in zip(directions, report["scores"], strict=True):
        section = report["retrieval"][direction]
        assert (score["value"], score["chance"]) == (section[f"r{k}"], section[f"chance_r{k}"])
        assert (score["n"], score["higher_is_better"]) == (section["n"], True)
        if direction == "i2t":
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1 and score["low"] < score["high"]
        else:  # captions of one image are not independent
            assert score["low"] is score["high"] is None
    again = cli("eval", "retrieval", f"model={model}", f"data={small}", "runtime.batch=2", "-o", out)
    assert again.returncode == 0 and "t2i_recall@10" in again.stdout
    other = cli("eval", "search", f"index={indexed}", "benchmark.template={colour}", "-o", out)
    refused(other, "E_OUTPUT", 2, out, "--fresh")


def test_search_benchmark_through_the_command(cli, indexed):
    done = cli("eval", "search", f"index={indexed}", "benchmark.template={colour}", "benchmark.k=5", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)["search"]
    done = cli("eval", "search", f"index={indexed}", "benchmark.template={colour}", "benchmark.k=50", "--json")
    complete = json.loads(done.stdout)["search"]  # the index has seven rows
    assert complete["k"] == 7 and all(q["hits_right"] == q["relevant"] for q in complete["queries"])
    assert [q["query"] for q in numbers["queries"]] == ["blue", "green", "red"]
    assert numbers["mean_precision_at_5"] == pytest.approx(np.mean([q["hits_right"] for q in numbers["queries"]]) / 5)


def test_unusable_inputs_are_errors(quick_cli, refused, make_model, make_dataset, model, small, indexed, tmp_path):
    broken = make_dataset(tmp_path / "broken", 7, shard=3, broken=4)
    key = Dataset(broken).sidecar(1)["key"][1].as_py()
    refused(
        quick_cli("eval", "retrieval", f"model={model}", f"data={broken}"), "E_IMG_FORMAT", 3, key, "set-000001.tar"
    )
    empty = make_dataset(tmp_path / "empty", 0)
    refused(quick_cli("eval", "retrieval", f"model={model}", f"data={empty}"), "E_DATA_SMALL", 3, empty)
    refused(quick_cli("eval", "retrieval", f"model={model}"), "E_CONFIG_VALUE", 2, "retrieval", "data=DIR")
    refused(
        quick_cli("eval", "search", f"index={indexed}", "benchmark.template={color}"),
        "E_COLUMN",
        3,
        "color",
        "'colour'",
    )
    never = quick_cli(
        "eval", "search", f"index={indexed}", "benchmark.template={colour}", "benchmark.where.colour=pink"
    )
    refused(never, "E_CONFIG_VALUE", 2, "benchmark.where", "pink")
    for template in ("{", "{id:d}", "no column"):
        done = quick_cli("eval", "search", f"index={indexed}", f"benchmark.template={template}")
        refused(done, "E_CONFIG_VALUE", 2, "benchmark.template", repr(template), "{column}")
    overflow = make_model(tmp_path / "overflow", scale=3e38)
    refused(quick_cli("eval", "retrieval", f"model={overflow}", f"data={small}"), "E_NONFINITE", 1, "image ")


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from clipwright.eval.benchmarks.base import BENCHMARKS, BenchmarkConfig, BenchmarkResult, Score
from clipwright.pipeline.core.registry import configclass

@configclass
class ConstantConfig(BenchmarkConfig):
    value: float = 0.5

@dataclass(frozen=True)
class Constant:
    files: ClassVar[tuple[str, ...]] = ()
    config: ConstantConfig

    def run(self, context):
        return BenchmarkResult([Score("constant", self.config.value, None, None, 1)], {}, {})

BENCHMARKS.add(ConstantConfig, Constant, {"constant_test": {}})
"""


def test_report_of_a_plugin_is_replaced_only_if_the_plugin_is_the_same(cli, refused, tmp_path):
    """The benchmark opens no model, so that none is needed."""
    plugin, out = tmp_path / "constant.py", tmp_path / "report"
    plugin.write_text(PLUGIN)
    arguments = ("eval", f"plugins={plugin}", "benchmark.name=constant_test", "-o", out)
    for _ in range(2):
        done = cli(*arguments)
        assert done.returncode == 0 and "constant  0.5000  1" in done.stdout, done.stderr
    refused(cli(*arguments, "benchmark.value=0.25"), "E_OUTPUT", 2, out, "benchmark.value: 0.5 → 0.25")
    plugin.write_text(f"{PLUGIN}# changed\n")
    refused(cli(*arguments), "E_OUTPUT", 2, out, "plugins")
