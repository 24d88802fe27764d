"""The report page of a demo folder: one self-contained HTML file, made from what its steps left on disk."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import random
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from clipwright.eval import plots
from clipwright.eval.demo.results import Demo
from clipwright.pipeline import pixels
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.log import format_duration
from clipwright.pipeline.core.page import render

PAGE = "report.html"
PAIRS, QUERIES, WORST, CONFUSED = 12, 8, 8, 6
SIDE, BYTES = 128, 8192  # a stored picture of more bytes is shown at this side
SPLIT = 4  # a column of at most so many values splits the zero-shot score
# What every dataset's sidecar holds; the other columns are the user's own.
_OWN = ("row", "key", "captions", "width", "height", "offset", "size", "sha256", "dhash", "source", "source_key")


def write(folder: Path) -> dict[str, Any]:
    """Writes `folder`/report.html; returns its path, its bytes and the headline numbers.

    Raises E_INPUT, E_UNFINISHED, E_FINGERPRINT and what the folders' readers raise; an older page then stays.
    """
    demo = Demo(folder)
    page = render(Path(__file__).with_name(PAGE), **_values(demo))
    atomic_write(folder / PAGE, page)
    return {"page": str(folder / PAGE), "bytes": len(page.encode()), **demo.headline()}


def small(data: bytes) -> bytes:
    """A picture as it is stored, or no larger than a page of two hundred can bear."""
    if len(data) <= BYTES:
        return data
    view = pixels.decode(data, min_side=SIDE)
    height, width = view.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    view = pixels.resize(view, max(1, round(width * scale)), max(1, round(height * scale)))
    return pixels.encode(view, "jpeg", quality=80)


def percent(share: float) -> str:
    """A share for a person: whole percents, with a decimal near both ends; no line breaks before its sign."""
    return f"{100 * share:.{0 if 0.1 <= share <= 0.99 or share in (0, 1) else 1}f}\N{NO-BREAK SPACE}%"


def _values(demo: Demo) -> dict[str, Any]:
    """What the template shows."""
    ends = [datetime.datetime.fromisoformat(status["ended"]) for status in demo.status.values()]
    begun = min(datetime.datetime.fromisoformat(status["started"]) for status in demo.status.values())
    trained, wall = _trained_seconds(demo), (max(ends) - begun).total_seconds()
    train = demo.status["run"]
    return {
        "title": "clipwright demo",
        "lead": "From pictures to a searchable model: what was made, learned and missed.",
        "percent": percent,
        "facts": {
            "Made": f"{max(ends):%d %B %Y, %H:%M} UTC",
            "Version": f"clipwright {importlib.metadata.version('clipwright')}, Python {train['versions']['python']}, "
            f"torch {train['versions'].get('torch', '?')}",
            "Machine": train["host"],
            "Training": format_duration(trained),
            # Steps that were found finished say when they were looked at again, not how long they took.
            **({"Whole demo": format_duration(wall)} if wall >= trained else {}),
        },
        "verdict": _verdict(demo),
        "commands": {name: status["command"].removesuffix(" --json") for name, status in demo.status.items()},
        "tiles": _tiles(demo),
        "data": _data(demo),
        "training": _training(demo, trained),
        "zeroshot": _zeroshot(demo),
        "confusion": _confusion(demo),
        "retrieval": _retrieval(demo),
        "search": _search(demo),
        "config": demo.text("run", "config.yaml"),
        "model_config": demo.text("model", "config.json"),
    }


def _tiles(demo: Demo) -> list[dict[str, str]]:
    z, t2i, search = demo.zeroshot, demo.retrieval["t2i"], demo.search
    told = [
        ("Zero-shot", f"right among {z['classes']} names", z["top1"], z["chance"], "guessing"),
        ("Shape", "named right", z["shape_top1"], z["shape_chance"], "from colour alone"),
        ("Retrieval R@1", "text → picture", t2i["r1"], t2i["chance_r1"], "guessing"),
        ("Retrieval R@10", "text → picture", t2i["r10"], t2i["chance_r10"], "guessing"),
        ("Search", f"precision at {search['k']}", demo.precision, search["chance"], "guessing"),
    ]
    return [
        {
            "name": name,
            "what": what,
            "share": percent(share),
            "beat": f"{level}: {percent(beat)}",
            "verdict": "✓ far above" if far_above(share, beat) else "somewhat above" if share > beat else "✗ not above",
        }
        for name, what, share, beat, level in told
    ]


def far_above(share: float, beat: float) -> bool:
    """Whether a model must have learned something to score so much.

    Not by ratio alone: one that gives every picture the same name can be six times as good as guessing, where few of
    the names are asked for.
    """
    return share >= 2 * beat and share >= beat + 0.15


def _verdict(demo: Demo) -> str:
    """In a sentence or two whether the model learned, and how one can tell."""
    z, t = demo.zeroshot, demo.headline()["zeroshot"]
    names = sorted({line["label"] for line in demo.predictions})
    if not far_above(t["top1"], t["chance"]):
        return (
            f"The model did not learn enough: of {z['n']:,} pictures it names {percent(t['top1'])} right, and guessing "
            f"gives {percent(t['chance'])}. If the loss under Training is still falling, train on more samples "
            "(schedule.samples); if it is not, run clipwright doctor."
        )
    if not demo.unseen:
        return f"The model learned: it names {percent(t['top1'])} of {z['n']:,} new pictures right."
    shapes = far_above(t["shape_top1"], t["shape_chance"])
    learned = "learned what colours and shapes are, not pictures by heart" if shapes else "has hardly learned shapes"
    pairs = f"{len(names)} pairs" if len(names) > 1 else "one pair"
    return (
        f"The model {learned}. Training showed every colour and every shape, but left out {pairs} of the two, such as "
        f"“{names[0]}”; of {z['n']:,} pictures of what it left out, {percent(t['top1'])} are named right, where "
        f"guessing gives {percent(t['chance'])}."
    )


def _data(demo: Demo) -> dict[str, Any]:
    """What went in and what came out, and pairs as training saw them."""
    made, samples = demo.train.manifest, demo.log[-1]["samples"]
    times = samples / max(made["written"], 1)
    places = [(shard, row) for shard, size in enumerate(demo.train.sizes) for row in range(size)]
    drawn = random.Random(0).sample(places, min(PAIRS, len(places)))
    return {
        "counts": [
            ("pairs in", made["rows_in"]),
            ("merged with a twin", made["merged"]),
            ("rejected", made["rejected"]),
            ("training pictures", made["written"]),
            ("seen in training", samples),
            ("new pictures for the tests", demo.test.samples),
        ],
        "says": f"{made['rows_in']:,} pairs went in, {made['written']:,} became training pictures; training saw "
        f"{samples:,}, each picture {times:.{1 if times >= 1 else 3}f} times on average. The tests "
        f"below are made with {demo.test.samples:,} other pictures.",
        "pairs": [
            {"image": small(demo.train.image(*place)), "captions": _ends(demo.train.record(*place)["captions"])}
            for place in drawn
        ],
    }


def _ends(captions: list[str]) -> list[str]:
    """The first and the last: of captions in two languages, one of each."""
    return captions if len(captions) < 2 else [captions[0], captions[-1]]


def _trained_seconds(demo: Demo) -> float:
    """Time spent training, from the log: it holds after a resume and when the folder is looked at again."""
    before = [{"samples": 0}, *demo.log]
    return sum((b["samples"] - a["samples"]) / b["samples_per_s"] for a, b in zip(before, demo.log, strict=False))


def _training(demo: Demo, seconds: float) -> dict[str, Any]:
    log, batch = demo.log, demo.batch
    x, chance = [line["samples"] for line in log], math.log(batch)
    loss = [line["loss"] for line in log]
    image, text, rate = ([line[k] for line in log] for k in ("acc_image", "acc_text", "samples_per_s"))
    says = {
        "loss": f"The loss goes from {loss[0]:.2f} to {loss[-1]:.2f}; a model that only guesses stays at {chance:.2f}, "
        f"the logarithm of the batch of {batch}.",
        "accuracy": f"Among the {batch} of a batch, {percent(image[-1])} of the pictures find a caption of theirs at "
        f"the end, and {percent(text[-1])} of the captions their picture; guessing finds {percent(1 / batch)}.",
        "rate": f"{statistics.median(rate):.0f} samples a second in the middle; "
        f"{percent(statistics.median([line['data_share'] for line in log]))} of the time was spent waiting for data, "
        f"{max(line['memory_gb'] for line in log):.1f} GB of memory was used. "
        f"Training took {format_duration(seconds)}.",
    }
    level = (chance, f"guessing: {chance:.2f}")
    figures = [
        ("Loss", says["loss"], plots.curve(f"Loss. {says['loss']}", x, {"loss": loss}, label="loss", level=level)),
        (
            "Accuracy inside the batch",
            says["accuracy"],
            plots.curve(
                f"Accuracy inside the batch. {says['accuracy']}",
                x,
                {"picture → caption": image, "caption → picture": text},
                label="right, %",
                percent=True,
            ),
        ),
        ("Speed", says["rate"], plots.curve(f"Speed. {says['rate']}", x, {"rate": rate}, label="samples a second")),
    ]
    keys = ("step", "samples", "loss", "acc_image", "acc_text", "samples_per_s")
    # A long run's table is thinned like its curves, only more.
    rows = [log[int(i)] for i in plots.thin(range(len(log)), 40)]
    return {"figures": figures, "columns": keys, "rows": [[line[k] for k in keys] for line in rows]}


def _zeroshot(demo: Demo) -> dict[str, Any]:
    """The scores beside what they must beat, and how they fall apart by the columns of the test set."""
    z, found = demo.zeroshot, demo.predictions
    rows = [demo.pictures.row(line["key"]) for line in found]
    kind = " of combinations that training never showed" if demo.unseen else ""
    says = (
        f"{percent(z['top1'])} of {z['n']:,} pictures{kind} get their own of {z['classes']} names; guessing gives "
        f"{percent(z['chance'])}. Shape is named right in {percent(z['shape_top1'])} of pictures; knowing only the "
        f"colour would give {percent(z['shape_chance'])}."
    )
    bars = [
        ("Colour and shape", z["top1"], z["chance"], "guessing"),
        ("Shape", z["shape_top1"], z["shape_chance"], "knowing only the colour"),
        ("Colour", z["colour_top1"], z["colour_chance"], "guessing"),
    ]
    parts = []
    for name in (name for name in rows[0] if name not in _OWN):
        by: dict[Any, list[bool]] = defaultdict(list)
        for row, line in zip(rows, found, strict=True):
            by[row[name]].append(line["label"] == line["predicted"][0])
        if 1 < len(by) <= SPLIT:
            parts.append(_split(name.removeprefix("input_"), by))
    return {
        "says": says,
        "bars": plots.bars(f"Zero-shot. {says}", bars),
        "rows": bars,
        "parts": parts,
        "range": f"{percent(z['top1_low'])} to {percent(z['top1_high'])}",
    }


def _split(column: str, by: dict[Any, list[bool]]) -> dict[str, Any]:
    """The zero-shot score for each value of a column; prep writes `input_size` where a user's column is `size`."""
    share = {value: sum(right) / len(right) for value, right in sorted(by.items(), key=lambda item: str(item[0]))}
    rows = [(f"{value} ({len(by[value])} pictures)", right, None, "") for value, right in share.items()]
    best, worst = max(share, key=lambda value: share[value]), min(share, key=lambda value: share[value])
    says = f"Easiest: {best}, {percent(share[best])} right. Hardest: {worst}, {percent(share[worst])}."
    if share[best] == share[worst]:
        says = f"All alike: {percent(share[best])} right."
    return {"name": column, "says": says, "rows": rows, "figure": plots.bars(f"Zero-shot by {column}. {says}", rows)}


def _confusion(demo: Demo) -> dict[str, Any]:
    """By colour and by shape: 48 names a side cannot be read, and each mistake is one of the two."""
    z = demo.zeroshot
    names = [row["name"] for row in z["per_class"]]
    tables = []
    for part, title in ((-1, "Shape"), (0, "Colour")):
        kinds = list(dict.fromkeys(name.split()[part] for name in names))
        counts = Counter[tuple[str, str]]()
        for name, row in zip(names, z["confusion"], strict=True):
            for other, n in zip(names, row, strict=True):
                counts[name.split()[part], other.split()[part]] += n
        totals = {kind: sum(counts[kind, other] for other in kinds) for kind in kinds}
        rows = [(a, [counts[a, b] / totals[a] for b in kinds]) for a in kinds if totals[a]]
        right = {kind: counts[kind, kind] / totals[kind] for kind, _ in rows}
        worst = min(right, key=lambda kind: right[kind])
        says = (
            f"Hardest is {worst}: right in {percent(right[worst])} of its pictures."
            if right[worst] < 1
            else f"No {title.lower()} was mistaken for another."
        )
        figure = plots.matrix(f"{title}: what a row's pictures were called, in percent. {says}", kinds, rows)
        tables.append({"title": title, "says": says, "figure": figure, "names": kinds, "rows": rows, "totals": totals})
    wrong = z["n"] - round(z["top1"] * z["n"])
    return {
        "tables": tables,
        "confused": z["confused"][:CONFUSED],
        "wrong": wrong,
        "classes": [row for row in z["per_class"] if row["n"]],
    }


def _retrieval(demo: Demo) -> dict[str, Any]:
    """Captions with the pictures found for them: some drawn by seed, and those whose own picture came last."""
    asked = {row["query"]: row for row in reversed(demo.queries) if row["way"] == "t2i"}
    asked = dict(sorted(asked.items()))
    drawn = random.Random(0).sample(list(asked.values()), min(QUERIES, len(asked)))
    worst = sorted(asked.values(), key=lambda row: (-row["rank"], row["query"]))[:WORST]
    t2i = demo.retrieval["t2i"]
    return {
        "says": f"{percent(t2i['r1'])} of {t2i['n']:,} captions find a right picture at once, {percent(t2i['r10'])} "
        f"among the first ten; guessing gives {percent(t2i['chance_r1'])} and {percent(t2i['chance_r10'])}. "
        "Right, framed and marked ✓, is the picture the caption was written for or another with the very same caption; "
        "a picture that fits but was described in other words is not. Numbers are cosine similarities. The last of a "
        "row, dashed, is the picture the caption was written for, with the rank of the first right one.",
        "drawn": [_found(demo, row) | {"own": _hit(demo, row["key"])} for row in drawn],
        "worst": [_found(demo, row) | {"own": _hit(demo, row["key"])} for row in worst],
        "drawn_says": f"{len(drawn)} captions, and the five nearest pictures.",
        "worst_says": f"The {len(worst)} captions whose right picture came last."
        if worst and worst[0]["rank"]
        else "No caption was missed: a right picture came first for each.",
        "ways": [("text → picture", t2i), ("picture → text", demo.retrieval["i2t"])],
    }


def _search(demo: Demo) -> dict[str, Any]:
    k = demo.search["k"]
    drawn = random.Random(0).sample(demo.hits, min(QUERIES, len(demo.hits)))
    return {
        "says": f"{demo.search['n']} questions to the index of {demo.test.samples:,} pictures: on average "
        f"{percent(demo.precision)} of the first {k} hits show what was asked for; guessing gives "
        f"{percent(demo.search['chance'])}.",
        "drawn": [_found(demo, row) | {"right": sum(row["right"])} for row in drawn],
        "queries": demo.search["queries"],
        "k": k,
    }


def _found(demo: Demo, row: dict[str, Any]) -> dict[str, Any]:
    hits = [
        _hit(demo, key) | {"right": right, "score": score}
        for key, right, score in zip(row["top"], row["right"], row["score"], strict=True)
    ]
    return {"query": row["query"], "rank": row.get("rank", 0) + 1, "hits": hits}


def _hit(demo: Demo, key: str) -> dict[str, Any]:
    return {"image": small(demo.pictures.image(key)), "caption": demo.pictures.row(key)["captions"][0]}
