"""Invalid input to train and export: code, culprit and remedy of the error, and no partial output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clipwright.pipeline.folders.records import file_entries

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize(
    ("args", "code", "number", "pieces"),
    [
        (["image.name=vit_nanno"], 2, "E_CONFIG_CHOICE", ["vit_nanno", "did you mean 'vit_nano'?"]),
        (["optim.learning_rate=1"], 2, "E_CONFIG_KEY", ["optim.learning_rate", "use optim.lr"]),
        (["shedule.samples=1"], 2, "E_CONFIG_KEY", ["shedule", "did you mean 'schedule'?"]),
        (["optim.lr=fast"], 2, "E_CONFIG_VALUE", ["optim.lr", "change the value"]),
        (["image.image_size=33"], 2, "E_CONFIG_VALUE", ["image_size", "33"]),
        (["data.train=nowhere"], 3, "E_INPUT", ["nowhere", "check the path"]),
        (["schedule.global_batch=1000"], 3, "E_DATA_SMALL", ["96 samples", "lower schedule.global_batch"]),
        (["image.projection=none"], 2, "E_CONFIG_VALUE", ["embed_dim", "image.projection=linear"]),
        (["plugins=absent.py"], 2, "E_PLUGIN", ["absent.py", "check the path"]),
        (
            ["optim.name=sgd", "optim.lr=1e38", "schedule.warmup=0"],
            1,
            "E_NONFINITE",
            ["the weights are finite; newest checkpoint: none", "are possible causes", "data ledger run step="],
        ),
    ],
)
def test_error_names_culprit_and_remedy(
    args: list[str], code: int, number: str, pieces: list[str], scenes: Path, tmp_path: Path, small: Any
) -> None:
    base = [] if any(arg.startswith("data.train") for arg in args) else [f"data.train={scenes}"]
    line = small.cli(tmp_path).error("train", *small.settings, *base, *args, "-o", "run", code=code)
    assert line.startswith(f"error[{number}]: ")
    for piece in pieces:
        assert piece in line, line
    assert not (tmp_path / "run" / "latest").exists()
    assert not list(tmp_path.glob("**/*.partial"))


def test_missing_output_config_or_verb_is_a_usage_error(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    assert "error[E_USAGE]" in (line := cli.error("train", f"data.train={scenes}", code=2)) and "add -o DIR" in line
    line = cli.error("trian", "photos", code=2)
    assert line.startswith("error[E_USAGE]") and "trian" in line and "did you mean 'train'?" in line
    line = cli.error("train", "--foo", code=2)
    assert line.startswith("error[E_USAGE]") and "--foo" in line and "clipwright train --help" in line
    assert "clipwright" in cli().stdout  # no arguments: help, not an error
    assert "error[E_CONFIG_FILE]" in (line := cli.error("train", "phtos", "-o", "run", code=2)) and "photos" in line
    assert "error[E_CONFIG_FILE]" in cli.error("train", "./absent.yaml", "-o", "run", code=2)
    (tmp_path / "bad.yaml").write_text("a: [")
    assert (
        "error[E_CONFIG_FILE]" in (line := cli.error("train", "bad.yaml", "-o", "run", code=2)) and "bad.yaml" in line
    )


def test_dataset_without_manifest_or_with_a_changed_tar_is_refused(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    shutil.copytree(scenes, tmp_path / "data")
    tar = next((tmp_path / "data").glob("*.tar"))
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)
    line = cli.error("train", *small.settings, "data.train=data", "-o", "run", code=3)
    assert line.startswith("error[E_DATA_HASH]") and tar.name in line and "--fresh" in line
    (tmp_path / "data" / "manifest.json").unlink()
    line = cli.error("train", *small.settings, "data.train=data", "-o", "run", code=3)
    assert line.startswith("error[E_MANIFEST]") and "data" in line and "run clipwright data index data" in line
    assert not (tmp_path / "run").exists()


def test_refused_command_leaves_other_folders_unchanged(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    shutil.copytree(scenes, tmp_path / "data")
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    small(tmp_path, f"data.train={scenes}", "schedule.samples=16", "-o", "run")
    for args in (
        ["train", *small.settings, f"data.train={scenes}", "-o", "data"],
        ["train", *small.settings, f"data.train={scenes}", "precision=auto", "-o", "data"],
        ["export", "run", "-o", "data"],
    ):
        line = cli.error(*args, code=2)
        assert line.startswith("error[E_OUTPUT]") and "data" in line and "name a new folder" in line
    line = cli.error("train", *small.settings, "data.train=typo", "-o", "data", code=3)
    assert line.startswith("error[E_INPUT]")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    # A refused first attempt does not block the second.
    (tmp_path / "again").mkdir()
    cli.error("train", *small.settings, "data.train=typo", "-o", "again", code=3)
    small(tmp_path, f"data.train={scenes}", "schedule.samples=16", "-o", "again")
    line = cli.error("train", *small.settings, f"data.train={scenes}", "schedule.samples", "=", "9", "-o", "x", code=2)
    assert line.startswith("error[E_USAGE]") and "'='" in line and "train --help" in line
    (tmp_path / "file").write_text("mine")
    line = cli.error("train", *small.settings, f"data.train={scenes}", "-o", "file/run", code=1)
    assert line.startswith("error[E_SYSTEM]") and "file" in line and "fix the path" in line
    line = cli.error("train", *small.settings, f"data.train={scenes}", "-o", "file", code=2)
    assert line.startswith("error[E_OUTPUT]") and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("runtime.keep=-1", "greater than or equal to 1"),
        ("runtime.save_every=0", "greater than or equal to 1"),
        ("schedule.global_batch=0", "greater than or equal to 1"),
        ("optim.lr=.nan", "allowed: number > 0"),
        ("data.captions=0", "greater than or equal to 1"),
        ("text.context=4", "greater than or equal to 8"),
        ("schedule.warmup=100001", "100001; allowed: 0 to schedule.samples=100000"),
        ("schedule.samples=255", "255; allowed: schedule.global_batch=256 or more"),
        ("schedule.final_lr_ratio=1.5", "less than or equal to 1"),
        ("optim.betas=[0.9,1.0]", "less than 1"),
        ("data.augment.scale=[0.9,0.5]", "[0.9, 0.5]; allowed: 0 < smallest ≤ largest ≤ 1"),
        ("data.augment.ratio=[0,1]", "[0.0, 1.0]; allowed: 0 < smallest ≤ largest"),
        ("seed=-1", "greater than or equal to 0"),
    ],
)
def test_values_out_of_range_are_refused(word: str, allowed: str, tmp_path: Path, here: Any) -> None:
    line = here(tmp_path, "train", "data.train=nowhere", word, "-o", "run", code=2).error
    assert line.startswith("error[E_CONFIG_VALUE]") and word.split("=")[0] in line and allowed in line, line
    assert not list(tmp_path.iterdir())


def test_config_of_a_run_that_was_edited_by_hand_is_noticed(
    scenes: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    args = ["train", *small.settings, f"data.train={scenes}", "schedule.samples=32", "-o", "run"]
    here(tmp_path, *args, "runtime.stop_at=1")
    path = tmp_path / "run" / "config.yaml"
    original = path.read_text()
    path.write_text(original.replace("lr: 0.0005", "lr: 0.5").replace("log_every: 1", "log_every: 7"))
    line = here(tmp_path, "export", "run", "-o", "model", code=2).error
    assert line.startswith("error[E_RESUME]: the config of this run was changed by hand — run/config.yaml — ")
    assert "optim.lr: 0.0005 → 0.5 — undo the changes (identity.json has the run's values)" in line
    assert not (tmp_path / "model").exists()
    resumed = here(tmp_path, *args)
    assert (
        "warning: run/config.yaml was changed by hand (optim.lr: 0.0005 → 0.5): it is not used, and is " in resumed.err
    )
    assert path.read_text() == original.replace("stop_at: 1", "stop_at: null") and "resuming at step 1" in resumed.out
    here(tmp_path, "export", "run", "-o", "model")


def test_more_samples_on_resume_name_init_from(scenes: Path, tmp_path: Path, small: Any, here: Any) -> None:
    args = ["train", *small.settings, f"data.train={scenes}"]
    here(tmp_path, *args, "schedule.samples=32", "runtime.stop_at=1", "-o", "run")
    line = here(tmp_path, *args, "schedule.samples=64", "-o", "run", code=2).error
    assert line.startswith("error[E_RESUME]") and "schedule.samples: 32 → 64" in line
    assert "train on in a new run by init_from=run and another -o" in line


def test_export_and_model_folders(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    small(tmp_path, f"data.train={scenes}", "schedule.samples=32", "-o", "run")
    line = cli.error("export", "run", "step=7", "-o", "model", code=3)
    assert line.startswith("error[E_CKPT_NONE]") and "no step 7" in line and "leave step out" in line
    assert "error[E_INPUT]" in cli.error("export", "nowhere", "-o", "model", code=3)
    assert not (tmp_path / "model").exists()
    first = cli.json("export", "run", "-o", "model")
    again = cli.json("export", "run", "-o", "model2")
    assert first["fingerprint"] == again["fingerprint"] and first["samples"] == 32
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"manifest.json", "config.json", "model.safetensors", "README.md", "status.json"} <= names
    assert not any(name.endswith((".pt", ".pkl", ".bin")) for name in names)


def test_model_folder_that_does_not_match_its_manifest_is_refused(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    small(tmp_path, f"data.train={scenes}", "schedule.samples=16", "-o", "run")
    cli("export", "run", "-o", "model")
    model, evaluate = tmp_path / "model", ["eval", "retrieval", "model=model", f"data={scenes}"]
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    line = cli.error(*evaluate, code=3)
    assert line.startswith("error[E_MODEL_HASH]") and "model.safetensors" in line and "restore" in line
    (model / "model.safetensors").write_bytes(weights)
    # The manifest matches its files, but the weights do not match the config.
    config = json.loads((model / "config.json").read_text())
    config["embed_dim"] = 48
    (model / "config.json").write_text(json.dumps(config))
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["files"] = file_entries(model, manifest["files"])
    (model / "manifest.json").write_text(json.dumps(manifest))
    line = cli.error(*evaluate, code=3)
    assert line.startswith("error[E_MODEL_SHAPE]") and "projection" in line and "export the run again" in line


def test_plugin_tower_in_one_file_outside_the_package(scenes: Path, tmp_path: Path, small: Any) -> None:
    """One file, named in `plugins`; its presets are choices like any other."""
    (tmp_path / "mean_color.py").write_text(
        """
import torch
from torch import nn
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTower, ImageTowerConfig, TowerOutput

@configclass
class MeanColorConfig(ImageTowerConfig):
    width: int = 8

class MeanColor(ImageTower):
    def __init__(self, config):
        super().__init__()
        self.feature_dim, self.image_size = config.width, config.image_size
        self.lift = nn.Linear(3, config.width)

    def forward(self, images):
        tokens = self.lift(images.flatten(2).mean(2, keepdim=True).transpose(1, 2))
        return TowerOutput(tokens[:, 0], tokens, (1, 1))

IMAGE_TOWERS.add(MeanColorConfig, MeanColor, {"mean_color": {"image_size": 32}})
"""
    )
    cli = small.cli(tmp_path)
    args = [*small.settings[3:], "text.depth=2", "plugins=mean_color.py", "image.name=mean_color"]
    cli("train", *args, f"data.train={scenes}", "schedule.samples=32", "image.width=4", "-o", "run")
    assert small.losses(tmp_path / "run")[-1]["loss"] > 0
    identity = (tmp_path / "run" / "identity.json").read_text()
    assert "mean_color.py" in identity and str(tmp_path) not in identity
    line = cli.error("train", *args, f"data.train={scenes}", "image.width=wide", "-o", "other", code=2)
    assert line.startswith("error[E_CONFIG_VALUE]") and "image.width" in line
    # The model folder names the plugin, and never loads it.
    cli("export", "run", "-o", "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "plugins=mean_color.py" in card and str(tmp_path) not in card
    evaluate = ["eval", "retrieval", "model=model", f"data={scenes}"]
    line = cli.error(*evaluate, code=2)
    assert line.startswith("error[E_CONFIG_CHOICE]") and "model/config.json: name: mean_color" in line
    assert "add plugins=mean_color.py with the path of the plugin" in line
    cli(*evaluate, "plugins=mean_color.py")
    with (tmp_path / "mean_color.py").open("a") as file:
        file.write("\n# changed\n")
    resumed = ["train", *args, f"data.train={scenes}", "schedule.samples=32", "image.width=4", "-o", "run"]
    line = cli.error(*resumed, code=2)
    assert line.startswith("error[E_RESUME]") and "plugins" in line
    text = (tmp_path / "mean_color.py").read_text().replace('"mean_color"', '"vit_nano"')
    (tmp_path / "duplicate.py").write_text(text)
    line = cli.error("train", "plugins=duplicate.py", "-o", "x", code=2)
    assert line.startswith("error[E_PLUGIN]") and "duplicate.py" in line and "vit_nano exists" in line
    (tmp_path / "broken.py").write_text("import does_not_exist\n")
    line = cli.error("train", "plugins=broken.py", "-o", "x", code=2)
    assert line.startswith("error[E_PLUGIN]") and "broken.py" in line and "does_not_exist" in line


def test_run_folder_with_a_corrupt_identity_is_refused(small: Any, scenes: Path, tmp_path: Path) -> None:
    cli = small.cli(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "identity.json").write_text("{", encoding="utf-8")
    args = ["train", *small.settings[3:], f"data.train={scenes}", "runtime.stop_at=1", "-o", "run"]
    line = cli.error(*args, code=2)
    assert line.startswith("error[E_RESUME]") and "identity.json" in line and "--fresh" in line
    cli(*args, "--fresh")
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["seed"] == 0
    (tmp_path / "run" / "log.jsonl").write_text("")  # as a full disk may leave it
    line = cli.error(*args, code=3)
    assert line.startswith("error[E_INPUT]") and "log.jsonl" in line and "export" in line
