"""Weighted mixtures of datasets in a training config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def config(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    """A config that mixes the scenes with a small dataset, three to one at first."""
    folder = tmp_path_factory.mktemp("mixture")
    small.cli(folder)("prep", "scenes", "source.count=20", "source.image_size=32", "source.seed=9", "-o", "few")
    shutil.copytree(scenes, folder / "many")
    datasets = [{"path": "many", "weight": 3}, {"path": "few"}]
    reweight = [{"at": 128, "weights": [1, 1]}]
    (folder / "mixed.yaml").write_text(yaml.safe_dump({"data": {"train": datasets, "reweight": reweight}}))
    return folder / "mixed.yaml"


def test_mixture_trains_resumes_and_is_exported(config: Path, small: Any, here: Any) -> None:
    args = ["./mixed.yaml", "schedule.samples=192", "runtime.save_every=5"]
    args += ["tokenizer.name=sentencepiece", "tokenizer.vocab_size=300"]  # trained on the captions of both
    folder = config.parent
    stdout = small(folder, *args, "-o", "uninterrupted").stdout
    assert "data 116 samples in 4 shards of 2 datasets" in stdout and "(epochs: many 1.3, few 3.2)" in stdout
    small(folder, *args, "-o", "run", "runtime.stop_at=7")
    (folder / "few").rename(folder / "less")
    moved = "data.train=[{path: many, weight: 3}, {path: less}]"
    assert "resuming at step 7" in small(folder, *args, moved, "-o", "run").stdout
    ours, theirs = (small.losses(folder / name) for name in ("run", "uninterrupted"))
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs] and len(ours) == 12
    heavier = "data.train=[{path: many, weight: 4}, {path: less}]"
    line = here(folder, "train", *small.settings, *args, heavier, "-o", "run", code=2).error
    assert line.startswith("error[E_RESUME]") and "data.train" in line and "--fresh" in line
    (folder / "less").rename(folder / "few")
    model = json.loads(here(folder, "export", "run", "-o", "model", "--json").out)
    assert model["samples"] == 192 and len(model["dataset"]) == 64


@pytest.mark.parametrize(
    ("word", "code", "number", "pieces"),
    [
        ("data.train=[{path: many}, {path: fwe}]", 3, "E_INPUT", ["fwe", "check the path"]),
        ("data.train=[{path: many, weight: -1}]", 2, "E_CONFIG_VALUE", ["data.train.0.weight", "-1", "greater than"]),
        ("data.train=[]", 2, "E_CONFIG_VALUE", ["data.train", "an empty list", "{path: DIR, weight: NUMBER}"]),
        ("data.reweight=[{at: 100, weights: [1, 2]}]", 2, "E_CONFIG_VALUE", ["data.reweight.0", "use 128"]),
        ("schedule.global_batch=48", 3, "E_DATA_SMALL", ["few", "20 samples", "24", "lower schedule.global_batch"]),
    ],
)
def test_invalid_mixture_is_refused(
    word: str, code: int, number: str, pieces: list[str], config: Path, small: Any, here: Any
) -> None:
    line = here(config.parent, "train", "./mixed.yaml", *small.settings, word, "-o", "refused", code=code).error
    assert line.startswith(f"error[{number}]") and all(piece in line for piece in pieces), line
    assert not (config.parent / "refused" / "latest").exists()


def test_doctor_checks_every_dataset_of_a_mixture(config: Path, small: Any, here: Any) -> None:
    args = ["doctor", "./mixed.yaml", *small.settings, "schedule.samples=192"]
    for check, expected in (("samples", "116, epochs: 1.3, 3.2"), ("images", "64 decoded")):
        printed = here(config.parent, *args, f"check={check}").out
        assert expected in " ".join(printed.split()), printed
    done = here(config.parent, *args, "schedule.global_batch=48", "check=samples", code=1)
    assert "E_DATA_SMALL" in done.out and "20 samples" in done.out
