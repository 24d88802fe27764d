"""The page of a demo folder: one self-contained HTML file, made from the output folders of its steps."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import random
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from clipwright.eval.demo.results import Demo
from clipwright.pipeline.core.messages import format_count, format_duration
from clipwright.pipeline.folders.schema import SIDECAR_SCHEMA
from clipwright.pipeline.page import plots
from clipwright.pipeline.page.render import percent, render
from clipwright.pipeline.page.thumbnail import thumbnail

TEMPLATE = Path(__file__).with_name("report.html")
PAIRS, QUERIES, WORST, CONFUSED = 12, 8, 8, 6  # how many of each are shown
MAX_BYTES, SMALL_SIDE = 8192, 128  # an image of more bytes is shown with this long side
SECTIONS = [
    ("data", "Data"),
    ("training", "Training"),
    ("zero-shot", "Zero-shot classification"),
    ("confusion", "Confusion"),
    ("retrieval", "Retrieval"),
    ("search", "Search"),
    ("commands", "How it was made"),
]
NEARLY_ALL = 0.9  # top-1 accuracy from which a verdict says so
SPLIT_VALUES = 4  # columns with at most this many values split the zero-shot score


def make_page(demo: Demo) -> str:
    """Returns the page of a demo."""
    return render(TEMPLATE, **_values(demo))


def _small(image: bytes) -> bytes:
    """Returns a stored image unchanged, or downscaled if it is too large for a page of two hundred images."""
    return thumbnail(image, SMALL_SIDE, max_bytes=MAX_BYTES)


def _values(demo: Demo) -> dict[str, Any]:
    """Returns the variables of the template."""
    ends = [datetime.datetime.fromisoformat(status["ended"]) for status in demo.status.values()]
    start = min(datetime.datetime.fromisoformat(status["started"]) for status in demo.status.values())
    training_seconds, demo_seconds = _training_seconds(demo), (max(ends) - start).total_seconds()
    train = demo.status["run"]
    versions = train["versions"]
    facts = {
        "Created": f"{max(ends):%d %B %Y, %H:%M} UTC",
        "Version": f"clipwright {importlib.metadata.version('clipwright')}, Python {versions['python']}, "
        f"torch {versions.get('torch', '?')}",
        "Machine": train["host"],
        "Training": format_duration(training_seconds),
    }
    # A step that had finished earlier records when it was checked again, not how long it took.
    if demo_seconds >= training_seconds:
        facts["Complete demo"] = format_duration(demo_seconds)
    return {
        "title": "clipwright demo",
        "lead": "From image-text pairs to a searchable model: data, training, scores and search results.",
        "sections": SECTIONS,
        "facts": facts,
        "verdict": _verdict(demo),
        "commands": {name: status["command"].removesuffix(" --json") for name, status in demo.status.items()},
        "tiles": _tiles(demo),
        "data": _data(demo),
        "training": _training(demo, training_seconds),
        "zeroshot": _zeroshot(demo),
        "confusion": _confusion(demo),
        "retrieval": _retrieval(demo),
        "search": _search(demo),
        "config": demo.text("run", "config.yaml"),
        "model_config": demo.text("model", "config.json"),
    }


def _tiles(demo: Demo) -> list[dict[str, str]]:
    z, t2i, search = demo.zeroshot, demo.retrieval["t2i"], demo.search
    scores = [
        ("Zero-shot", f"top-1 of {format_count(z['classes'], 'class', 'classes')}", z["top1"], z["chance"], "chance"),
        ("Shape", "top-1", z["shape_top1"], z["shape_chance"], "chance given the color"),
        ("Retrieval", "recall@1, text → image", t2i["r1"], t2i["chance_r1"], "chance"),
        ("Retrieval", "recall@10, text → image", t2i["r10"], t2i["chance_r10"], "chance"),
        ("Search", f"precision@{search['k']}", demo.precision, search["chance"], "chance"),
    ]
    tiles = []
    for name, measure, share, chance, chance_name in scores:
        # A small difference may be chance, so there is no word for it.
        verdict = "✓ far above chance" if far_above(share, chance) else "✗ not far above chance"
        tiles.append(
            {
                "name": name,
                "measure": measure,
                "share": percent(share),
                "chance": f"{chance_name}: {percent(chance)}",
                "verdict": verdict,
            }
        )
    return tiles


def far_above(share: float, chance: float) -> bool:
    """Whether a score proves that the model learned something.

    A ratio alone is not enough: where few of the classes occur, a model that predicts one class for every image can
    score six times the chance level.
    """
    return share >= 2 * chance and share >= chance + 0.15


def _verdict(demo: Demo) -> str:
    """States in a few sentences whether the model learned, and what shows it."""
    z = demo.zeroshot
    top1, chance = percent(z["top1"]), percent(z["chance"])
    if not far_above(z["top1"], z["chance"]):
        return (
            f"The model did not learn enough: its top-1 accuracy on {format_count(z['n'], 'image')} is "
            f"{top1}, and chance is "
            f"{chance}. If the loss under Training is still falling, train on more samples (schedule.samples); "
            "otherwise run clipwright doctor."
        )
    share = "most" if z["top1"] >= 0.5 else "some"
    if z["top1"] >= NEARLY_ALL:
        share = "nearly all"
    if not demo.unseen_combinations:
        return (
            f"The model recognizes {share} new images: its top-1 accuracy on "
            f"{format_count(z['n'], 'new image')} is {top1}; chance is {chance}."
        )
    colors = far_above(z["colour_top1"], z["colour_chance"])
    shapes = far_above(z["shape_top1"], z["shape_chance"])
    if colors and shapes:
        verdict = f"The model learned colors and shapes, and recognizes {share} images of new combinations."
    elif colors or shapes:
        learned, hardly = ("colors", "shapes") if colors else ("shapes", "colors")
        verdict = f"The model learned {learned}, but hardly learned {hardly}."
    else:
        verdict = "The model does better than chance, but neither its colors nor its shapes are far above chance."
    names = sorted({prediction["label"] for prediction in demo.predictions})
    held_out = format_count(len(names), "combination")
    return (
        f"{verdict} Training showed every color and every shape, but not {held_out} of the two, such as “{names[0]}”. "
        f"Its top-1 accuracy on {format_count(z['n'], 'image')} of held-out combinations is {top1}; "
        f"chance is {chance}."
    )


def _data(demo: Demo) -> dict[str, Any]:
    """Counts of preparation, and pairs as training saw them."""
    manifest, samples = demo.train.manifest, demo.log[-1]["samples"]
    repeats = samples / max(manifest["written"], 1)
    decimals = 1 if repeats >= 1 else 3
    positions = [(shard, row) for shard, size in enumerate(demo.train.sizes) for row in range(size)]
    drawn = random.Random(0).sample(positions, min(PAIRS, len(positions)))
    return {
        "counts": [
            ("input pairs", manifest["rows_in"]),
            ("merged duplicates", manifest["merged"]),
            ("rejected", manifest["rejected"]),
            ("training images", manifest["written"]),
            ("training samples", samples),
            ("test images", demo.test.samples),
        ],
        "text": f"Training data: {format_count(manifest['written'], 'image')} from "
        f"{format_count(manifest['rows_in'], 'pair')}. Training used {format_count(samples, 'sample')}: each image "
        f"{repeats:.{decimals}f} times on average. The scores below are measured on "
        f"{format_count(demo.test.samples, 'other image')}.",
        "pairs": [
            {
                "image": _small(demo.train.image(*position)),
                "captions": _first_and_last(demo.train.record(*position)["captions"]),
            }
            for position in drawn
        ],
    }


def _first_and_last(captions: list[str]) -> list[str]:
    """Of captions in two languages, one of each."""
    return captions if len(captions) < 2 else [captions[0], captions[-1]]


def _training_seconds(demo: Demo) -> float:
    """Training time, computed from the log so that it also holds for a resumed run."""
    seconds = 0.0
    previous_samples = 0
    for line in demo.log:
        seconds += (line["samples"] - previous_samples) / line["samples_per_s"]
        previous_samples = line["samples"]
    return seconds


def _training(demo: Demo, seconds: float) -> dict[str, Any]:
    log, batch = demo.log, demo.batch
    samples = [line["samples"] for line in log]
    loss, chance_loss = [line["loss"] for line in log], math.log(batch)
    image_accuracy, text_accuracy = [line["acc_image"] for line in log], [line["acc_text"] for line in log]
    rate = [line["samples_per_s"] for line in log]
    waiting = statistics.median([line["data_share"] for line in log])
    memory = max(line["memory_gb"] for line in log)
    loss_text = (
        f"The loss goes from {loss[0]:.2f} to {loss[-1]:.2f}. Chance is {chance_loss:.2f}, the logarithm of the batch "
        f"size {batch}."
    )
    accuracy_text = (
        f"In a batch of {batch}, {percent(image_accuracy[-1])} of the images rank a caption of theirs first at the "
        f"end, and {percent(text_accuracy[-1])} of the captions rank their image first; chance is {percent(1 / batch)}."
    )
    rate_text = (
        f"The median speed is {statistics.median(rate):.0f} samples/s. {percent(waiting)} of the time was "
        f"spent waiting for data; peak memory was {memory:.1f} GB. Training took {format_duration(seconds)}."
    )
    loss_figure = plots.curve(
        f"Loss. {loss_text}", samples, {"loss": loss}, label="loss", level=(chance_loss, f"chance: {chance_loss:.2f}")
    )
    accuracy_figure = plots.curve(
        f"Accuracy within the batch. {accuracy_text}",
        samples,
        {"image → text": image_accuracy, "text → image": text_accuracy},
        label="accuracy, %",
        percent=True,
    )
    rate_figure = plots.curve(f"Speed. {rate_text}", samples, {"rate": rate}, label="samples per second")
    columns = ("step", "samples", "loss", "acc_image", "acc_text", "samples_per_s")
    # The table of a long run is thinned more than its curves.
    rows = [log[int(i)] for i in plots.thin(range(len(log)), 40)]
    return {
        "figures": [
            ("Loss", loss_text, loss_figure),
            ("Accuracy within the batch", accuracy_text, accuracy_figure),
            ("Speed", rate_text, rate_figure),
        ],
        "columns": columns,
        "rows": [[line[column] for column in columns] for line in rows],
    }


def _zeroshot(demo: Demo) -> dict[str, Any]:
    """The scores with their chance levels, and the score split by the columns of the test set."""
    z, predictions = demo.zeroshot, demo.predictions
    rows = [demo.test_images.row(prediction["key"]) for prediction in predictions]
    kind = " of combinations that training never showed" if demo.unseen_combinations else ""
    text = (
        f"Top-1 accuracy is {percent(z['top1'])} on {format_count(z['n'], 'image')}{kind}, with "
        f"{format_count(z['classes'], 'class', 'classes')}; chance is "
        f"{percent(z['chance'])}. The shape is correct for {percent(z['shape_top1'])} of the images; chance given the "
        f"color is {percent(z['shape_chance'])}."
    )
    bars = [
        ("Color and shape", z["top1"], z["chance"], "chance"),
        ("Shape", z["shape_top1"], z["shape_chance"], "chance given the color"),
        ("Color", z["colour_top1"], z["colour_chance"], "chance"),
    ]
    splits = []
    for name in (name for name in rows[0] if name not in SIDECAR_SCHEMA.names):
        correct: dict[Any, list[bool]] = defaultdict(list)
        for row, prediction in zip(rows, predictions, strict=True):
            correct[row[name]].append(prediction["label"] == prediction["predicted"][0])
        if 1 < len(correct) <= SPLIT_VALUES:
            splits.append(_split(name.removeprefix("input_"), correct))
    return {
        "text": text,
        "bars": plots.bars(f"Zero-shot. {text}", bars),
        "rows": bars,
        "splits": splits,
        "interval": f"{percent(z['top1_low'])} to {percent(z['top1_high'])}",
    }


def _split(column: str, correct: dict[Any, list[bool]]) -> dict[str, Any]:
    """The accuracy for each value of a column. `clipwright prep` stores a user's column `size` as `input_size`."""
    accuracy = {value: sum(correct[value]) / len(correct[value]) for value in sorted(correct, key=str)}
    rows = [
        (f"{value} ({format_count(len(correct[value]), 'image')})", share, None, "")
        for value, share in accuracy.items()
    ]
    best, worst = max(accuracy, key=lambda value: accuracy[value]), min(accuracy, key=lambda value: accuracy[value])
    if accuracy[best] == accuracy[worst]:
        text = f"All values: {percent(accuracy[best])} correct."
    else:
        text = f"Easiest: {best}, {percent(accuracy[best])} correct. "
        text += f"Hardest: {worst}, {percent(accuracy[worst])} correct."
    return {"name": column, "text": text, "rows": rows, "figure": plots.bars(f"Zero-shot by {column}. {text}", rows)}


def _confusion(demo: Demo) -> dict[str, Any]:
    """Confusion by shape and by color, as a matrix of all 48 classes would be too large to read."""
    z = demo.zeroshot
    names = [row["name"] for row in z["per_class"]]
    tables = []
    for word, title in ((-1, "Shape"), (0, "Color")):
        kinds = list(dict.fromkeys(name.split()[word] for name in names))
        counts = Counter[tuple[str, str]]()
        for name, row in zip(names, z["confusion"], strict=True):
            for predicted, n in zip(names, row, strict=True):
                counts[name.split()[word], predicted.split()[word]] += n
        totals = {kind: sum(counts[kind, predicted] for predicted in kinds) for kind in kinds}
        tested = [kind for kind in kinds if totals[kind]]
        rows = [(kind, [counts[kind, predicted] / totals[kind] for predicted in kinds]) for kind in tested]
        accuracy = {kind: counts[kind, kind] / totals[kind] for kind in tested}
        worst = min(tested, key=lambda kind: accuracy[kind])
        if accuracy[worst] < 1:
            text = f"Hardest: {worst}, {percent(accuracy[worst])} correct."
        else:
            text = f"No {title.lower()} was confused with another."
        figure = plots.matrix(f"{title}: predictions for each row, in percent. {text}", kinds, rows)
        tables.append({"title": title, "text": text, "figure": figure, "names": kinds, "rows": rows, "totals": totals})
    return {
        "tables": tables,
        "confused": z["confused"][:CONFUSED],
        "errors": z["n"] - round(z["top1"] * z["n"]),
        "classes": [row for row in z["per_class"] if row["n"]],
    }


def _retrieval(demo: Demo) -> dict[str, Any]:
    """Captions with their top-5 images: a random sample, and those whose first relevant image ranks lowest."""
    by_caption = {row["query"]: row for row in reversed(demo.queries) if row["way"] == "t2i"}
    queries = [by_caption[caption] for caption in sorted(by_caption)]
    drawn = random.Random(0).sample(queries, min(QUERIES, len(queries)))
    worst = sorted(queries, key=lambda row: (-row["rank"], row["query"]))[:WORST]
    if worst and worst[0]["rank"]:
        worst_text = f"The {format_count(len(worst), 'caption')} whose first relevant image ranks lowest."
    else:
        worst_text = "Every caption has a relevant image at rank 1."
    t2i = demo.retrieval["t2i"]
    return {
        "text": f"Recall@1 is {percent(t2i['r1'])} and recall@10 is {percent(t2i['r10'])} over "
        f"{format_count(t2i['n'], 'caption')}; "
        f"chance is {percent(t2i['chance_r1'])} and {percent(t2i['chance_r10'])}. "
        "An image is relevant (framed, marked ✓) if the caption was written for it or if it has exactly the same "
        "caption; an image that fits but has other captions does not count. Numbers are cosine similarities. The last "
        "image of a row (dashed) is the caption's own image, with the rank of the first relevant image.",
        "drawn": [_query_row(demo, row) | {"own": _hit(demo, row["key"])} for row in drawn],
        "worst": [_query_row(demo, row) | {"own": _hit(demo, row["key"])} for row in worst],
        "drawn_text": f"{format_count(len(drawn), 'random caption')} and their top-5 images.",
        "worst_text": worst_text,
        "directions": [("text → image", t2i), ("image → text", demo.retrieval["i2t"])],
    }


def _search(demo: Demo) -> dict[str, Any]:
    k = demo.search["k"]
    drawn = random.Random(0).sample(demo.hits, min(QUERIES, len(demo.hits)))
    return {
        "text": f"{format_count(demo.search['n'], 'text query', 'text queries')} against the index of "
        f"{format_count(demo.test.samples, 'image')}. "
        f"Mean precision@{k} is {percent(demo.precision)}; chance is {percent(demo.search['chance'])}.",
        "drawn": [_query_row(demo, row) | {"relevant": sum(row["right"])} for row in drawn],
        "queries": demo.search["queries"],
        "k": k,
    }


def _query_row(demo: Demo, row: dict[str, Any]) -> dict[str, Any]:
    hits = [
        _hit(demo, key) | {"relevant": relevant, "score": score}
        for key, relevant, score in zip(row["top"], row["right"], row["score"], strict=True)
    ]
    return {"query": row["query"], "rank": row.get("rank", 0) + 1, "hits": hits}


def _hit(demo: Demo, key: str) -> dict[str, Any]:
    return {"image": _small(demo.test_images.image(key)), "caption": demo.test_images.row(key)["captions"][0]}
