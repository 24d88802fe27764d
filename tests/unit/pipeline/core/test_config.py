"""Merging, choices, overrides and the errors of configs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest

from clipwright.pipeline.core.config import Choice, resolve, schema
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass


@configclass
class RoundConfig:
    name: str
    radius: float = 1.0
    label: str = "round"


@configclass
class SquareConfig:
    name: str
    side: int = 1


SHAPES: Registry[Any] = Registry("shape", "clipwright.pipeline.losses")
SHAPES.add(RoundConfig, lambda config: config, {"ball": {"radius": 2.0}, "disc": {"radius": 3.0}})
SHAPES.add(SquareConfig, lambda config: config, {"box": {"side": 4}})


@configclass
class Speed:
    workers: int = 2


@configclass
class Whole:
    shape: Annotated[Any, Choice(SHAPES, "ball")]
    text: str = "hello"
    maybe: str | None = None
    paths: str | list[str] = "a"
    where: dict[str, Any] | None = None
    runtime: Speed = Speed()


def test_layers_from_default_to_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("text: from file\nshape: {name: disc, label: x}\nruntime: {workers: 3}\n")
    resolved = resolve(Whole, config=str(path), overrides=["runtime.workers=5"])
    assert resolved.value.text == "from file"
    assert (resolved.value.shape.name, resolved.value.shape.radius, resolved.value.shape.label) == ("disc", 3.0, "x")
    assert resolved.value.runtime.workers == 5
    origins = resolved.origins
    assert origins["text"] == str(path)
    assert origins["shape.radius"] == "preset disc"
    assert origins["runtime.workers"] == "command line"
    assert origins["paths"] == "default"
    assert "runtime" not in resolved.identity()


def test_a_layer_that_changes_the_name_drops_what_lower_layers_set() -> None:
    base = {"shape": {"name": "disc", "radius": 9.0, "label": "x"}}
    assert resolve(Whole, base=base).value.shape.radius == 9.0
    swapped = resolve(Whole, base=base, overrides=["shape.name=box"]).value.shape
    assert (swapped.name, swapped.side) == ("box", 4)
    sibling = resolve(Whole, base=base, overrides=["shape.name=ball"]).value.shape
    assert (sibling.radius, sibling.label) == (2.0, "round")
    same = resolve(Whole, base=base, overrides=["shape.name=disc"]).value.shape
    assert same.radius == 9.0


def test_text_is_taken_verbatim_and_the_rest_as_yaml() -> None:
    value = resolve(
        Whole, overrides=["text=no", "maybe=#1 dog", "paths=[x, y]", "where.split=train", "where.n=3"]
    ).value
    assert (value.text, value.maybe, value.paths) == ("no", "#1 dog", ["x", "y"])
    assert value.where == {"split": "train", "n": 3}
    assert resolve(Whole, overrides=["maybe=null"]).value.maybe is None


@pytest.mark.parametrize(
    ("override", "code", "culprit", "remedy"),
    [
        ("shape.radiuss=2", "E_CONFIG_KEY", "shape.radiuss", "did you mean 'shape.radius'?"),
        ("runtme.workers=2", "E_CONFIG_KEY", "runtme", "did you mean 'runtime'?"),
        ("shape.name=bal", "E_CONFIG_CHOICE", "bal", "did you mean 'ball'?"),
        ("runtime.workers=many", "E_CONFIG_VALUE", "runtime.workers", "change the value"),
        ("shape.radius=wide", "E_CONFIG_VALUE", "shape.radius", "change the value"),
        ("runtime=3", "E_CONFIG_VALUE", "runtime", "runtime.key=value"),
        ("shape=box", "E_CONFIG_VALUE", "shape", "shape.name=box"),
    ],
)
def test_errors_name_the_key_and_the_remedy(override: str, code: str, culprit: str, remedy: str) -> None:
    with pytest.raises(ClipwrightError) as caught:
        resolve(Whole, overrides=[override])
    line = str(caught.value)
    assert line.startswith(f"error[{code}]: ") and "\n" not in line
    assert culprit in line and remedy in line
    assert caught.value.exit_code == 2


def test_schema_names_presets_and_forbids_other_keys() -> None:
    result = schema(Whole)
    assert result["additionalProperties"] is False
    names = {n for d in result["$defs"].values() for n in d["properties"].get("name", {}).get("enum", [])}
    assert {"ball", "disc"} <= names


@configclass
class Needs:
    inner: Speed = Speed()
    path: str


def test_a_partial_config_shows_what_is_required() -> None:
    with pytest.raises(ClipwrightError, match="path"):
        resolve(Needs)
    resolved = resolve(Needs, partial=True, overrides=["inner.workers=3"])
    assert resolved.tree == {"inner": {"workers": 3}, "path": "???"}
    assert "path: ???" in resolved.show() and "# required" in resolved.show()
    with pytest.raises(ClipwrightError):
        resolve(Needs, partial=True, overrides=["inner.workers=x"])
