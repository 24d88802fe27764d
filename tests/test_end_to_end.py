"""All stages through the commands that a user types: pairs → shards → run → model → scores, index and hits."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import clipwright

pytestmark = pytest.mark.xdist_group("ranks")

# A model that learns in seconds: small images, few samples.
TRAIN = [
    "image.name=clip_rn_nano",
    "image.image_size=32",
    "text.depth=1",
    "embed_dim=64",
    "precision=fp32",
    "schedule.global_batch=64",
    "schedule.samples=6400",
    "schedule.warmup=640",
    "optim.lr=2e-3",
    "runtime.threads=1",
    "data.augment.flip=0",
]


def test_pairs_to_hits(cli: Any) -> None:
    arguments = ["source.count=600", "source.image_size=32", "runtime.workers=1"]
    made = cli.json("prep", "scenes", *arguments, "source.combinations=train", "-o", "shards")
    assert made["rows_in"] == 600 == made["written"] + made["merged"] + made["rejected"]
    cli("prep", "scenes", *arguments, "source.combinations=all", "source.split=test", "-o", "test")
    trained = cli.json("train", *TRAIN, "data.train=shards", "-o", "run")
    assert trained["steps"] == 100 and trained["loss_last"] < 0.8 * trained["loss_first"]
    line = json.loads((cli.folder / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "grad_norm", "scale", "lr", "samples_per_s", "data_share", "memory_gb"} <= line.keys()
    assert list((cli.folder / "run" / "tensorboard").iterdir())
    cli("export", "run", "-o", "model")
    retrieval = cli.json("eval", "retrieval", "model=model", "data=test", "-o", "report")["retrieval"]
    for direction in ("i2t", "t2i"):
        assert retrieval[direction]["r10"] > 2 * retrieval[direction]["chance_r10"]
    cli("embed", "model=model", "data=test", "-o", "embeddings")
    cli("index", "build", "flat", "embeddings=embeddings", "-o", "index")
    scores = cli.json("eval", "scenes_search", "index=index")["search"]
    assert scores["n"] > 5 and scores["mean_precision_at_10"] > 2 * scores["chance"]
    hits = cli.json("search", "index", f"text={scores['query']}", "k=3")["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["score"] >= hits[1]["score"] >= hits[2]["score"]
    _search_by_image(cli, hits[0])
    for folder in ("shards", "test", "run", "model", "embeddings", "index"):
        status = json.loads((cli.folder / folder / "status.json").read_text())
        assert status["exit_code"] == 0 and status["command"].startswith("clipwright ")
    assert not list(cli.folder.glob("**/*.partial"))


def _search_by_image(cli: Any, hit: dict[str, Any]) -> None:
    """The top-1 hit of an indexed image is the image itself."""
    data = clipwright.open_dataset(cli.folder / "test")
    shard = [data.tar_name(i) for i in range(len(data.sizes))].index(hit["tar"])
    row = data.sidecar(shard)["key"].to_pylist().index(hit["key"])
    (cli.folder / "query.jpg").write_bytes(data.image(shard, row))
    first = cli.json("search", "index", "image=query.jpg", "k=1")["hits"][0]
    assert first["key"] == hit["key"] and first["score"] > 0.999


def test_public_api_opens_the_folders_of_the_commands(cli: Any) -> None:
    cli("prep", "scenes", "source.count=64", "source.image_size=32", "runtime.workers=1", "-o", "data")
    cli("train", *TRAIN, "data.train=data", "runtime.stop_at=1", "-o", "run")
    cli("export", "run", "-o", "model")
    model = clipwright.load_model(cli.folder / "model")
    data = clipwright.open_dataset(cli.folder / "data")
    texts = model.embed_texts(["a red circle", "a blue star"])
    views = model.view(data.image(0, 0))[None]
    images = model.embed_images(views)
    assert texts.shape == (2, 64) and images.shape == (1, 64)
    assert abs(float((texts**2).sum(1)[0]) - 1) < 1e-5
    with pytest.raises(clipwright.ClipwrightError, match="E_MANIFEST"):
        clipwright.load_model(cli.folder / "run")


@pytest.mark.parametrize("ranks", [0, 2])
def test_training_needs_no_compiler(ranks: int, cli: Any) -> None:
    """Without c++, cc or ninja on the PATH, training runs and prints only JSON to stdout."""
    cli("prep", "scenes", "source.count=64", "source.image_size=32", "runtime.workers=1", "-o", "data")
    (cli.folder / "empty").mkdir()
    bare = {"PATH": str(cli.folder / "empty")}
    arguments = ["train", *TRAIN, "data.train=data", "runtime.stop_at=2", "-o", "run"]
    trained = cli.json(*arguments, ranks=ranks, env=bare)
    assert trained["steps"] == 2


def test_demo_is_a_list_of_clipwright_commands(cli: Any) -> None:
    done = cli("demo", "--dry-run")
    lines = [line for line in done.stdout.splitlines() if "clipwright " in line]
    assert [line.split(":")[0].split()[1] for line in lines][:3] == ["prep", "prep_test", "train"]
    assert not (cli.folder / "demo").exists()
    assert sum("seed=4711" in line for line in cli("demo", "--dry-run", "seed=4711").stdout.splitlines()) >= 3
    # Small versions of its two preps: the queries of the search are combinations that training never showed.
    for line in lines[:2]:
        arguments = shlex.split(line.split("clipwright ", 1)[1])
        cli(*arguments, "source.count=400", "runtime.workers=1")
    train, test = (
        [(row["colour"], row["shape"], row["held_out"]) for i in range(len(data.sizes)) for row in rows(data, i)]
        for data in (clipwright.open_dataset(cli.folder / "demo" / name) for name in ("shards", "test"))
    )
    trained = {(color, shape) for color, shape, _ in train}
    held_out = {(color, shape) for color, shape, is_held_out in test if is_held_out}
    assert len(held_out) == 10 and not held_out & trained


def test_small_demo_ends_with_its_report(cli: Any) -> None:
    small = "source.image_size=32 runtime.workers=1"
    steps = {
        "prep": f"prep scenes {small} source.count=300 source.combinations=train -o {{demo}}/shards",
        "prep_test": f"prep scenes {small} source.count=300 source.split=test source.combinations=all -o {{demo}}/test",
        "train": f"train {' '.join(TRAIN)} schedule.samples=640 data.train={{demo}}/shards -o {{demo}}/run",
    }
    printed = cli.json("demo", *(f"steps.{name}={line}" for name, line in steps.items()))
    report = json.loads((cli.folder / "demo" / "report.json").read_text())
    assert report == printed
    assert {"rows_in", "written", "merged", "rejected"} <= report["prep"].keys() and report["prep"]["rows_in"] == 300
    assert {"steps", "samples_per_s", "loss_first", "loss_last"} <= report["train"].keys()
    assert all({"r1", "r5", "r10", "n"} <= report["retrieval"][direction].keys() for direction in ("i2t", "t2i"))
    assert {"query", "hits_right", "k", "mean_precision_at_10"} <= report["search"].keys()
    assert 0 <= report["search"]["hits_right"] <= report["search"]["k"] == 10
    zeroshot = report["zeroshot"]
    assert {"top1", "shape_top1", "chance", "n"} <= zeroshot.keys() and zeroshot["n"] > 20
    assert (cli.folder / "demo" / "report.html").stat().st_size == report["report"]["bytes"] < 3_000_000
    assert report["report"]["zeroshot"]["top1"] == zeroshot["top1"]
    assert len(json.dumps(report)) < 12_000  # lists are only in the reports of the steps
    _check_that_a_foreign_folder_is_unchanged(cli)
    failed = cli("demo", "steps.prep=prep table source.path=nowhere.csv -o {demo}/x", "-o", "other", code=3)
    assert "error[E_INPUT]" in failed.stderr and "Traceback" not in failed.stderr
    assert not (cli.folder / "other" / "report.json").exists()


def _check_that_a_foreign_folder_is_unchanged(cli: Any) -> None:
    (cli.folder / "mine").mkdir()
    (cli.folder / "mine" / "config.yaml").write_text("other: config\n")
    assert "error[E_OUTPUT]" in cli.error("demo", "-o", "mine", code=2)
    assert [path.name for path in (cli.folder / "mine").iterdir()] == ["config.yaml"]


def rows(data: Any, shard: int) -> list[dict[str, Any]]:
    return data.sidecar(shard).select(["colour", "shape", "held_out"]).to_pylist()


def test_shipped_photo_configs(cli: Any, shared_data: Path) -> None:
    """The README's commands on few real photos with several captions each."""
    table = shared_data / "pairs" / "coco2017-cc-train.parquet"
    arguments = [f"source.path={table}", "source.caption=captions", "images.resize=shortest", "images.size=96"]
    made = cli.json("prep", "table", *arguments, "-o", "photos")
    assert (made["rows_in"], made["written"], made["rejected"]) == (125, 125, 0)
    cli("train", "photos", "data.train=photos", "schedule.global_batch=32", "runtime.stop_at=2", "-o", "run")
    cli("export", "run", "-o", "model")
    scores = cli.json("eval", "retrieval", "model=model", "data=photos")["retrieval"]
    assert scores["i2t"]["n"] == 125 and scores["t2i"]["n"] == 625
