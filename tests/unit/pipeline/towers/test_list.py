"""`clipwright list towers`: figures at each preset's own resolution or at another, refusals among them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from clipwright.cli import app
from clipwright.pipeline.towers.base import IMAGE_TOWERS

FIGURES = ("params_features", "gmacs", "feature_dim")
FEW = ("vit_base_patch16", "vit_nano", "convmixer_768_32_k7_p7", "clip_rn50")


@pytest.fixture
def listed(monkeypatch, capfd):
    """`clipwright list WORDS` in this process, of a few image towers and every text tower."""
    entries = IMAGE_TOWERS.entries
    monkeypatch.setattr(IMAGE_TOWERS, "_entries", {name: entries[name] for name in FEW})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def call(*words: str) -> SimpleNamespace:
        capfd.readouterr()
        code = app(["list", *words], standalone_mode=False)
        printed = capfd.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return call


def test_the_list_has_the_published_figures(listed, published):
    rows = {row["name"]: row for row in json.loads(listed("towers", "--json").out)}
    vit, convmixer, resnet = (rows[name] for name in ("vit_base_patch16", "convmixer_768_32_k7_p7", "clip_rn50"))
    for row in (vit, convmixer):
        wanted = published[row["name"], 224]
        assert row["image_size"] == 224 and set(row) == {"name", "family", "image_size", *FIGURES, "source"}
        assert [row[key] for key in ("params_features", "feature_dim")] == [
            wanted["params_features"],
            wanted["feature_dim"],
        ]
        assert row["gmacs"] == pytest.approx(wanted["gmacs_counted"], rel=5e-3)
    assert [row["family"] for row in (vit, convmixer, resnet)] == ["vit", "convmixer", "clip"]
    assert "Dosovitskiy" in vit["source"]
    assert resnet["params_features"] == published["clip_rn50", 224]["params_visual_with_projection"]
    assert rows["vit_nano"]["image_size"] == 64
    text = rows["clip_text_b"]
    assert (text["gmacs"], text["image_size"], text["feature_dim"]) == (None, None, 512)


def test_another_resolution_lists_what_it_costs_and_who_refuses_it(listed, published):
    rows = {row["name"]: row for row in json.loads(listed("towers", "--json", "image_size=384").out)}
    vit, convmixer = rows["vit_base_patch16"], rows["convmixer_768_32_k7_p7"]
    wanted = published["vit_base_patch16", 384]
    assert (vit["image_size"], vit["params_features"]) == (384, wanted["params_features"])
    assert vit["gmacs"] == pytest.approx(wanted["gmacs_counted"], rel=5e-3)
    assert convmixer["image_size"] == 384 and [convmixer[key] for key in FIGURES] == [None] * 3
    assert convmixer["error"] == "384 is not a positive multiple of 7 (patch); use 378 or 385"
    assert rows["clip_text_b"]["params_features"] and rows["clip_text_b"]["image_size"] is None


def test_the_table_has_a_column_for_each_figure(listed):
    lines = listed("towers", "image_size=384").out.splitlines()
    assert lines[0].split() == ["name", "family", "image_size", *FIGURES, "source", "error"]
    assert "86,090,496       55.484  768" in next(line for line in lines if line.startswith("vit_base_patch16"))
    # At its own size every tower is built, but the one that wants a folder.
    assert [row["name"] for row in json.loads(listed("towers", "--json").out) if "error" in row] == ["huggingface"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("losses", "image_size=384"), "E_CONFIG_VALUE"),
        (("towers", "image_size=big"), "E_CONFIG_VALUE"),
        (("towers", "size=384"), "E_CONFIG_KEY"),
        (("tower",), "E_USAGE"),
        (("towers", "384"), "E_USAGE"),
    ],
)
def test_a_wrong_request_is_refused(listed, words, code):
    done = listed(*words)
    assert done.code == 2 and f"error[{code}]" in done.err and not done.out
