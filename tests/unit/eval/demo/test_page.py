"""The demo page: its statements, that it needs nothing but a browser, and the folders that it refuses."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipwright.eval.demo import page as demo_page
from clipwright.eval.demo.results import Demo
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import write_manifest
from clipwright.pipeline.page import plots

COLORS, SHAPES = ("빨간", "R&B"), ("<b>원</b>", "star", "$heart$")
TESTED = [(color, shape) for color in COLORS for shape in SHAPES]
NAMES = [f"{color} {shape}" for color, shape in TESTED]
# Training shows every color and every shape, but none of the tested combinations.
TRAINED = [*((color, "square") for color in COLORS), *(("blue", shape) for shape in SHAPES), ("blue", "square")]
HOSTILE = "<script>document.title='owned'</script> & 빨간 별"
MODEL = "m" * 64


def make_image(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write_table(path: Path, first: int, count: int, combinations: list[tuple[str, str]]) -> None:
    rows = [
        {
            "image": make_image(first + i),
            "captions": [f"image {first + i} of {' '.join(combinations[i % 6])}", f"{HOSTILE} {first + i}"],
            "colour": combinations[i % 6][0],
            "shape": combinations[i % 6][1],
            "count": 1 + i % 2,
            "held_out": True,
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_report(folder: Path, benchmark: str, numbers: dict[str, Any], **fingerprints: str) -> None:
    folder.mkdir()
    body = {"format": "report", "version": 1, "benchmark": benchmark, benchmark: numbers}
    write_json(folder / "report.json", {**body, "fingerprints": {"model": MODEL, **fingerprints}})


def write_reports(folder: Path, data: Dataset) -> None:
    """Reports of a model that predicts the first color's stars as hearts and everything else correctly."""
    rows = [row for i in range(len(data.sizes)) for row in data.sidecar(i).to_pylist()]
    keys, n = [row["key"] for row in rows], len(rows)
    labels = [f"{row['colour']} {row['shape']}" for row in rows]
    predictions = [NAMES[2] if label == NAMES[1] else label for label in labels]
    pairs = list(zip(labels, predictions, strict=True))
    confusion = [[pairs.count((label, predicted)) for predicted in NAMES] for label in NAMES]
    top1 = sum(label == predicted for label, predicted in pairs) / n
    zeroshot = {
        "n": n,
        "classes": 6,
        "templates": 1,
        "top1": top1,
        "top5": 1.0,
        "mean_per_class": top1,
        "chance": 1 / 6,
        "top1_low": top1 - 0.1,
        "top1_high": min(1.0, top1 + 0.1),
        "confusion": confusion,
        "per_class": [{"name": name, "n": labels.count(name), "top1": float(name != NAMES[1])} for name in NAMES],
        "confused": [{"label": NAMES[1], "predicted": NAMES[2], "n": labels.count(NAMES[1])}],
        "shape_top1": top1,
        "shape_chance": 1 / 3,
        "colour_top1": 1.0,
        "colour_chance": 1 / 2,
    }
    write_report(folder / "zeroshot", "zeroshot", zeroshot, data=data.fingerprint)
    top5 = [[name] * 5 for name in predictions]
    columns = {"key": keys, "label": labels, "predicted": top5, "score": [[0.9] * 5] * n}
    pq.write_table(pa.table(columns), folder / "zeroshot" / "predictions.parquet")
    section = {"r1": 0.5, "r5": 0.75, "r10": 0.875, "chance_r1": 0.02, "chance_r5": 0.1, "chance_r10": 0.2, "n": n}
    write_report(folder / "retrieval", "retrieval", {"t2i": section, "i2t": section}, data=data.fingerprint)
    # The own image of caption i has rank i.
    queries = [
        {
            "way": "t2i",
            "query": text,
            "key": keys[i],
            "rank": i,
            "top": [keys[(i + 1 + j) % n] for j in range(5)] if i else keys[:5],
            "right": [i == 0, False, False, False, False],
            "score": [0.9, 0.8, 0.7, 0.6, 0.5],
        }
        for i, text in enumerate(row["captions"][1] for row in rows)
    ]
    queries.append({**queries[0], "way": "i2t", "query": keys[0], "top": ["a caption"] * 5, "rank": 10**6})
    pq.write_table(pa.Table.from_pylist(queries), folder / "retrieval" / "queries.parquet")
    queries = [{"query": f"a {name}", "hits_right": 1, "relevant": labels.count(name)} for name in NAMES]
    search = {"n": 6, "k": 10, "mean_precision_at_10": 0.1, "chance": 0.2, "queries": queries}
    write_report(folder / "search", "search", search)
    hits = [
        {"query": query["query"], "top": keys[:10], "right": [True, *[False] * 9], "score": [0.5] * 10}
        for query in queries
    ]
    pq.write_table(pa.Table.from_pylist(hits), folder / "search" / "hits.parquet")


@pytest.fixture(scope="session")
def finished(cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo folder: two real datasets with awkward words; the other steps only have the files they need."""
    root = tmp_path_factory.mktemp("report")
    folder = root / "demo"
    for name, first, count, combinations in (("shards", 0, 36, TRAINED), ("test", 100, 48, TESTED)):
        write_table(root / f"{name}.parquet", first, count, combinations)
        arguments = [f"source.path={root / name}.parquet", "source.caption=captions", "runtime.workers=1"]
        done = cli("prep", "table", *arguments, "-o", folder / name)
        assert done.returncode == 0, done.stderr
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("schedule: {global_batch: 8, samples: 720}\n")
    log = [
        {
            "step": i,
            "samples": 8 * i,
            "loss": 3.0 / i,
            "acc_image": i / 90,
            "acc_text": i / 100,
            "samples_per_s": 40.0,
            "data_share": 0.01,
            "memory_gb": 0.5,
        }
        for i in range(1, 91)
    ]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for name in ("model", "embeddings"):
        (folder / name).mkdir()
        write_manifest(folder / name, name, MODEL, {})
    (folder / "model" / "config.json").write_text("{}")
    (folder / "index").mkdir()
    (folder / "index" / "current").write_text("000001\n")
    write_reports(folder, Dataset(folder / "test"))
    for step in ("run", "model", "zeroshot", "retrieval", "embeddings", "index", "search"):
        times = {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T10:05:00+00:00"}
        status = {"command": f"clipwright {step} --json", "exit_code": 0, "host": "a-host", **times}
        write_json(folder / step / "status.json", {**status, "versions": {"python": "3.11.7", "torch": "2.13.0"}})
    return folder


def write(folder: Path) -> None:
    (folder / "report.html").write_text(demo_page.make_page(Demo(folder)))


@pytest.fixture
def demo(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "demo"))


def test_page_states_the_numbers_of_the_reports(cli: Any, demo: Path) -> None:
    done = cli("report", demo, "--json")
    assert done.returncode == 0, done.stderr
    made, page = json.loads(done.stdout), (demo / "report.html").read_text()
    assert made["page"] == str(demo / "report.html")
    assert made["bytes"] == len(page.encode()) <= 3_000_000 and not list(demo.glob("*.partial"))
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    assert made["zeroshot"] == {"n": 48, "top1": 40 / 48, "chance": 1 / 6, "shape_top1": 40 / 48, "shape_chance": 1 / 3}
    assert made["search"] == {"n": 6, "precision": 0.1, "chance": 0.2}
    assert "Top-1 accuracy is 83 % on 48 images of combinations that training never showed, with 6 classes" in page
    assert "The shape is correct for 83 % of the images; chance given the color is 33 %." in page
    assert "Hardest: star, 50 % correct." in page and "No color was confused" in page
    assert "Easiest: 1, 100 % correct. Hardest: 2, 67 % correct." in page  # by count
    assert "8 × 빨간 star predicted as 빨간 $heart$" in page
    assert "The loss goes from 3.00 to 0.03. Chance is 2.08, the logarithm of the batch size 8." in page
    assert "Training took 18s." in page  # 720 samples at 40 per second
    assert "each image 20.0 times on average" in page
    assert "The model learned colors and shapes, and recognizes most images of new combinations." in page
    assert (
        "but not 6 combinations of the two, such as “R&amp;B $heart$”. Its top-1 accuracy on "
        "48 images of held-out combinations is" in page
    )
    # A score that is not better than chance is marked.
    assert re.search(r"Search.*10 %.*chance: 20 %.*✗ not far above", page.split('class="notice"')[0], re.S)
    # The worst captions are those of the highest ranks, in this order, without i2t rows.
    worst = page.split("<h3>Worst queries</h3>")[1].split("<details>")[0]
    assert re.findall(r"rank (\d+)", worst) == ["48", "47", "46", "45", "44", "43", "42", "41"]
    assert "1,000,001" not in page
    drawn = page.split("<h3>Random queries</h3>")[1].split("<h3>Worst queries</h3>")[0]
    assert drawn.count('class="row under"') == 8 and drawn.count("<figure") == 48


def rescore(demo: Path, step: str, **numbers: Any) -> str:
    """The page after the numbers of a step were changed."""
    place = demo / step / "report.json"
    tree = json.loads(place.read_text())
    tree[step].update(numbers)
    write_json(place, tree)
    write(demo)
    return (demo / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")


def test_page_of_a_model_that_did_not_learn(demo: Path) -> None:
    # It predicts one class for every image: six times the chance of 48 classes, and a fifth of the shapes.
    page = rescore(demo, "zeroshot", top1=0.125, chance=1 / 48, shape_top1=0.22, shape_chance=1 / 6)
    assert "The model did not learn enough" in page and "The model learned" not in page and "doctor" in page
    tiles = page.split('class="tiles"')[1].split('class="notice"')[0]
    assert tiles.count('class="verdict no">✗ not far above chance<') == 3
    page = rescore(demo, "zeroshot", top1=0.5, shape_top1=0.2, shape_chance=1 / 6)
    assert "The model learned colors, but hardly learned shapes." in page


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ({"top1": 0.95}, "learned colors and shapes, and recognizes nearly all images of new combinations."),
        ({"top1": 0.6}, "learned colors and shapes, and recognizes most images of new combinations."),
        ({"top1": 0.45}, "learned colors and shapes, and recognizes some images of new combinations."),
        ({"top1": 0.45, "colour_top1": 0.55}, "learned shapes, but hardly learned colors."),
        ({"top1": 0.45, "colour_top1": 0.55, "shape_top1": 0.4}, "neither its colors nor its shapes are far above"),
        ({"top1": 0.31}, "did not learn enough"),
    ],
)
def test_sentence_claims_no_more_than_the_scores(demo: Path, scores: dict[str, float], sentence: str) -> None:
    place = demo / "zeroshot" / "report.json"
    tree = json.loads(place.read_text())
    tree["zeroshot"].update(scores)
    write_json(place, tree)
    assert sentence in demo_page._verdict(Demo(demo))


def test_trained_combinations_are_not_called_unseen(demo: Path) -> None:
    shutil.rmtree(demo / "shards")
    shutil.copytree(demo / "test", demo / "shards")
    page = rescore(demo, "zeroshot")
    assert "never showed" not in page and "held-out" not in page and "83 % on 48 images, with 6 classes" in page


def test_page_is_reproducible_and_allows_only_its_own_script(demo: Path) -> None:
    write(demo)
    first = (demo / "report.html").read_bytes()
    write(demo)
    assert (demo / "report.html").read_bytes() == first
    page = first.decode()
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    assert page.count("<script") == 1 and "&lt;script&gt;" in page
    assert "<b>원" not in page
    assert page.count("<svg") == page.count('role="img"') == page.count("<title>") - 1 == page.count("<desc>")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(look: Any, demo: Path, width: int) -> None:
    write(demo)
    seen = look(demo / "report.html", width)
    assert (seen.errors, seen.requests, seen.overflow) == ([], [], 0)
    assert HOSTILE in seen.text and "빨간 <b>원</b>" in seen.text and "Zero-shot classification" in seen.text


def test_page_needs_no_torch() -> None:
    code = "import sys, clipwright.eval.demo.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_large_image_is_downscaled() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    shown = demo_page._small(file.getvalue())
    assert Image.open(io.BytesIO(shown)).size == (128, 85) and len(shown) < 20_000
    assert demo_page._small(make_image(0)) == make_image(0)


def test_charts_keep_text_as_text_and_curves_short() -> None:
    many = list(range(1, 5001))
    lines = {"a <b> & $x$ 한글": [1 / n for n in many], "other": [2 / n for n in many]}
    made = plots.curve("Title <i>. 한글", many, lines, label="loss", level=(0.5, "chance"))
    assert made == plots.curve("Title <i>. 한글", many, lines, label="loss", level=(0.5, "chance"))
    assert "a &lt;b&gt; &amp; $x$ 한글</text>" in made and "chance</text>" in made
    assert made.startswith("<svg viewBox") and "<title>Title &lt;i&gt;</title><desc>한글</desc>" in made
    assert max(path.count("L") for path in re.findall(r' d="([^"]*)"', made)) < plots.POINTS
    assert not re.search(r"#(0072b2|1b1f24)|font-family|<metadata|<dc:date", made)
    assert [float(size) for size in re.findall(r"font-size: ([\d.]+)px", made)] and min(
        float(size) for size in re.findall(r"font-size: ([\d.]+)px", made)
    ) >= 14
    assert plots.thin(many)[-1] == 5000 and len(plots.thin(many)) == 500 and plots.thin([1, 2]) == [1, 2]
    assert plots.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert plots.smooth([0.0, *[1.0] * 49])[-1] > 0.99


def test_long_names_in_a_matrix_are_shortened_to_fit() -> None:
    names = ["yellow cross with a long description", "빨간 별", "가나다라마바사아자차카타"]
    made = plots.matrix("Confusion. x", names, [(name, [1.0, 0.0, 0.0]) for name in names])
    texts = re.findall(r">([^<>]+)</text>", made)
    assert texts.count("yellow cross w…") == 2 and texts.count("빨간 별") == 2 and texts.count("가나다라마바사아…") == 2
    assert "0 0 340 " in made.split('viewBox="')[1]


def test_unfinished_demo_is_refused_by_the_command(cli: Any, refused: Any, demo: Path) -> None:
    (demo / "report.html").write_text("an older page")
    shutil.rmtree(demo / "zeroshot")
    again = f"clipwright eval scenes_zeroshot model={demo}/model data={demo}/test -o {demo}/zeroshot"
    refused(cli("report", demo), "E_UNFINISHED", 3, demo / "zeroshot", again, f"clipwright demo -o {demo}")
    assert (demo / "report.html").read_text() == "an older page" and not list(demo.glob("*.partial"))


@pytest.mark.parametrize(
    ("step", "file", "content", "expected"),
    [
        ("run", "status.json", '{"exit_code": 130}', "exit code 130"),
        ("run", "status.json", None, "no status.json"),
        ("run", "log.jsonl", "", "is empty"),
        ("run", "log.jsonl", '{"step": 1', "cannot be read"),
        ("zeroshot", "predictions.parquet", None, "no predictions.parquet"),
        ("zeroshot", "predictions.parquet", "no table", "cannot be read"),
        ("retrieval", "report.json", '{"benchmark": "search"}', "no numbers of the benchmark retrieval"),
        ("search", "hits.parquet", None, "no hits.parquet"),
        # Files that exist but do not have the content that the step writes.
        ("retrieval", "status.json", "[1]", "not an object"),
        ("retrieval", "status.json", "{}", "no exit_code"),
        ("retrieval", "status.json", '{"exit_code": 0}', "no command"),
        ("run", "log.jsonl", '{"step": 1}', "no samples"),
        ("run", "config.yaml", "", "no schedule.global_batch"),
        ("zeroshot", "report.json", "\udcff", "cannot be read"),
        ("zeroshot", "report.json", '{"benchmark": "zeroshot", "zeroshot": {}, "fingerprints": {}}', "has no n,"),
    ],
)
def test_unfinished_step_is_named(demo: Path, step: str, file: str, content: str | None, expected: str) -> None:
    (demo / step / file).unlink()
    if content is not None:
        (demo / step / file).write_text(content, errors="surrogateescape")
    with pytest.raises(ClipwrightError) as raised:
        write(demo)
    error = raised.value
    assert (error.code, error.where) == ("E_UNFINISHED", str(demo / step)) and expected in error.found
    # Without --fresh, the command would leave a finished run unchanged.
    again = f"-o {demo}/run --fresh`" if file in ("log.jsonl", "config.yaml") else "clipwright demo -o"
    assert f"-o {demo}/{step}" in error.fix and again in error.fix
    assert not (demo / "report.html").exists()


def test_table_of_another_step_is_refused(demo: Path) -> None:
    shutil.copy(demo / "search" / "hits.parquet", demo / "zeroshot" / "predictions.parquet")
    with pytest.raises(ClipwrightError, match=r"predictions\.parquet has no key"):
        write(demo)


def test_scores_of_another_model_are_refused(cli: Any, refused: Any, demo: Path) -> None:
    write_manifest(demo / "model", "model", "n" * 64, {})
    refused(cli("report", demo), "E_FINGERPRINT", 3, demo / "zeroshot" / "report.json", "clipwright eval")


def test_remedy_names_the_commands_of_the_folders_own_config(demo: Path) -> None:
    (demo / "config.yaml").write_text("seed: 7\nsteps: {train: 'train mine seed={seed} -o {demo}/run'}\n")
    shutil.rmtree(demo / "run")
    with pytest.raises(ClipwrightError) as raised:
        write(demo)
    assert f"`clipwright train mine seed=7 -o {demo}/run`" in raised.value.fix
    (demo / "config.yaml").write_text("")  # without steps, those of the shipped demo are named
    with pytest.raises(ClipwrightError, match=f"clipwright train scenes .* -o {demo}/run`"):
        write(demo)
