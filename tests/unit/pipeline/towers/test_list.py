"""`clipwright list towers`: costs at each preset's image size or at another, including unsupported sizes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from clipwright.cli import app
from clipwright.pipeline.towers.base import IMAGE_TOWERS

COSTS = ("params_features", "gmacs", "feature_dim")
LISTED = ("vit_base_patch16", "vit_nano", "convmixer_768_32_k7_p7", "clip_rn50")


@pytest.fixture
def listed(monkeypatch, capfd):
    """Runs `clipwright list ARGUMENTS` in this process, with a few image towers and every text tower."""
    entries = IMAGE_TOWERS.entries
    monkeypatch.setattr(IMAGE_TOWERS, "_entries", {name: entries[name] for name in LISTED})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def call(*arguments: str) -> SimpleNamespace:
        capfd.readouterr()
        code = app(["list", *arguments], standalone_mode=False)
        printed = capfd.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return call


def test_list_has_the_published_costs(listed, published):
    rows = {row["name"]: row for row in json.loads(listed("towers", "--json").out)["towers"]}
    vit, convmixer, resnet = (rows[name] for name in ("vit_base_patch16", "convmixer_768_32_k7_p7", "clip_rn50"))
    for row in (vit, convmixer):
        expected = published[row["name"], 224]
        assert row["image_size"] == 224 and set(row) == {"name", "family", "image_size", *COSTS, "source"}
        assert [row[key] for key in ("params_features", "feature_dim")] == [
            expected["params_features"],
            expected["feature_dim"],
        ]
        assert row["gmacs"] == pytest.approx(expected["gmacs_counted"], rel=5e-3)
    assert [row["family"] for row in (vit, convmixer, resnet)] == ["vit", "convmixer", "clip"]
    assert "Dosovitskiy" in vit["source"]
    assert resnet["params_features"] == published["clip_rn50", 224]["params_visual_with_projection"]
    assert rows["vit_nano"]["image_size"] == 64
    text = rows["clip_text_b"]
    assert (text["gmacs"], text["image_size"], text["feature_dim"]) == (None, None, 512)


def test_other_image_size_lists_costs_and_unsupported_towers(listed, published):
    rows = {row["name"]: row for row in json.loads(listed("towers", "--json", "image_size=384").out)["towers"]}
    vit, convmixer = rows["vit_base_patch16"], rows["convmixer_768_32_k7_p7"]
    expected = published["vit_base_patch16", 384]
    assert (vit["image_size"], vit["params_features"]) == (384, expected["params_features"])
    assert vit["gmacs"] == pytest.approx(expected["gmacs_counted"], rel=5e-3)
    assert convmixer["image_size"] == 384 and [convmixer[key] for key in COSTS] == [None] * 3
    assert convmixer["error"] == "384 is not a positive multiple of 7 (patch); use 378 or 385"
    assert rows["clip_text_b"]["params_features"] and rows["clip_text_b"]["image_size"] is None


def test_table_has_a_column_per_cost(listed):
    lines = listed("towers", "image_size=384").out.splitlines()
    assert lines[0].split() == ["name", "family", "image_size", *COSTS[:2]]
    assert lines[-1] == "not shown: feature_dim, source, error; --json has all columns"
    assert "86,090,496       55.484" in next(line for line in lines if line.startswith("vit_base_patch16"))
    # Every tower is built at its own size, except the one that needs a folder.
    assert [row["name"] for row in json.loads(listed("towers", "--json").out)["towers"] if "error" in row] == [
        "huggingface"
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("losses", "image_size=384"), "E_CONFIG_VALUE"),
        (("towers", "image_size=big"), "E_CONFIG_VALUE"),
        (("towers", "size=384"), "E_CONFIG_KEY"),
        (("tower",), "E_USAGE"),
        (("towers", "384"), "E_USAGE"),
    ],
)
def test_invalid_request_is_rejected(listed, arguments, code):
    done = listed(*arguments)
    assert done.code == 2 and f"error[{code}]" in done.err and not done.out
