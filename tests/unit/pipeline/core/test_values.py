"""Values as they are written in overrides and YAML files: what a field of each type reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from clipwright.pipeline.core.config import Choice, resolve
from clipwright.pipeline.core.config_files import read_config
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass


@configclass
class Item:
    path: str
    weight: float = 1


@configclass
class Own:
    name: str
    rate: float = 1.0
    on: bool = False


OWN: Registry[Any] = Registry("thing", "clipwright.pipeline.losses")
OWN.add(Own, lambda config: config, {"own": {}, "fast": {"rate": 3}})


@configclass
class Values:
    text: str = ""
    maybe: str | None = "x"
    number: float = 2
    count: int = 0
    limit: int | None = None
    either: int | str = 0
    flag: bool = False
    level: Literal[0, 1, 2] = 0
    mode: Literal["no", "on", "1e3"] = "no"
    blocks: Literal["none", "all"] | tuple[int, ...] = "none"
    paths: str | list[str] = "a"
    names: tuple[str, ...] = ()
    rates: tuple[float, float] = (0, 1)
    items: str | list[Item] = "a"
    where: dict[str, Any] | None = None
    env: dict[str, str] | None = None
    own: Annotated[Own, Choice(OWN, "own")]
    listed: tuple[Annotated[Own, Choice(OWN)], ...] = ()


SAME = [
    ("text", "no", "no"),
    ("text", "1e-3", "1e-3"),
    ("text", "007", "007"),
    ("text", "12:30", "12:30"),
    ("text", "2020-01-01", "2020-01-01"),
    ("text", "null", "null"),
    ("text", "1_000", "1_000"),
    ("maybe", "null", None),
    ("maybe", "~", None),
    ("maybe", "None", "None"),
    ("maybe", "off", "off"),
    ("number", "1e-3", 0.001),
    ("number", "1E3", 1000.0),
    ("number", "1", 1.0),
    ("number", ".5", 0.5),
    ("number", "1.", 1.0),
    ("number", "1_000.5", 1000.5),
    ("number", "-08", -8.0),
    ("number", "0x10", 16.0),
    ("count", "1e6", 1_000_000),
    ("count", "1_000", 1000),
    ("count", "08", 8),
    ("count", "010", 10),
    ("count", "0o10", 8),
    ("count", "0x1F", 31),
    ("count", "+5", 5),
    ("count", "5.0", 5),
    ("limit", "null", None),
    ("limit", "1e2", 100),
    ("either", "7", 7),
    ("either", "007", "007"),
    ("where", "{big: 99999999999999999999}", {"big": "99999999999999999999"}),
    ("flag", "true", True),
    ("flag", "False", False),
    ("flag", "yes", True),
    ("flag", "OFF", False),
    ("flag", "1", True),
    ("level", "2", 2),
    ("mode", "no", "no"),
    ("mode", "on", "on"),
    ("mode", "1e3", "1e3"),
    ("blocks", "all", "all"),
    ("blocks", "[0, 01]", [0, 1]),
    ("paths", "[007, no]", ["007", "no"]),
    ("paths", "12:30", "12:30"),
    ("names", "[yes, 1e3, null]", ["yes", "1e3", "null"]),
    ("rates", "[1e-1, 1]", [0.1, 1.0]),
    ("items", "[{path: no, weight: 1e1}]", [{"path": "no", "weight": 10.0}]),
    ("where", "{code: 007, n: 3, share: 0.5, id: 1e3, old: no, flag: True, gap: null, quoted: '3'}",
     {"code": "007", "n": 3, "share": 0.5, "id": "1e3", "old": "no", "flag": True, "gap": None, "quoted": "3"}),
    ("env", "{A: 1, B: no}", {"A": "1", "B": "no"}),
    ("own", "{name: own, rate: 1e1, on: yes}", {"name": "own", "rate": 10.0, "on": True}),
    ("listed", "[{name: fast, on: on}, {name: own, rate: 1}]",
     [{"name": "fast", "rate": 3.0, "on": True}, {"name": "own", "rate": 1.0, "on": False}]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "written", "value"), SAME)
def test_a_value_means_the_same_in_a_file_and_on_the_command_line(
    key: str, written: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{key}: {written}\n")
    stored = {}
    for source, resolved in {
        "override": resolve(Values, overrides=[f"{key}={written}"]),
        "file": resolve(Values, config=str(path)),
    }.items():
        found = resolved.tree[key]
        assert found == value and type(found) is type(value), source
        if isinstance(found, list):
            assert [type(item) for item in found] == [type(item) for item in value], source
        stored[source] = resolved.yaml()
    assert stored["override"] == stored["file"]
    # What a folder stores is read back as the same values.
    path.write_text(stored["file"])
    assert resolve(Values, config=str(path)).yaml() == stored["file"]


def test_numbers_of_defaults_and_presets_have_the_type_of_their_field() -> None:
    tree = resolve(Values, overrides=["own.name=fast"]).tree
    assert [type(value) for value in (tree["number"], *tree["rates"], tree["own"]["rate"])] == [float] * 4


@pytest.mark.parametrize(
    ("key", "written", "reason"),
    [
        ("number", "abc", "is not a number"),
        ("number", "1,000", "is not a number"),
        ("number", "12:30", "is not a number"),
        ("number", "yes", "is not a number"),
        ("number", "１", "is not a number"),
        ("number", "NaN", "is not a finite number"),
        ("number", ".inf", "is not a finite number"),
        ("number", "1e400", "is too large"),
        ("number", "-1e400", "is too large"),
        ("number", "", "an empty value"),
        ("count", "1.5", "is not an integer"),
        ("count", "true", "is not an integer"),
        ("count", "0o9", "is not an integer"),
        ("count", "1e30", "is too large"),
        ("count", "1e999999999", "is too large"),
        ("count", "9" * 40, "is too large"),
        ("count", "9223372036854775808", "is too large"),
        ("flag", "maybe", "is not true or false"),
        ("flag", "2", "is not true or false"),
        ("rates", "[0.5]", "has the length 1, not 2"),
        ("items", "[{weight: 1}]", "give every element of items its path"),
        ("mode", "ON", "did you mean 'on'?"),
        ("own", "fast", "write own.name=fast"),
        ("own", "3", "set the keys in it: own.key=value"),
        ("level", "3", "Input should be 0, 1 or 2"),
        ("mode", "off", "Input should be 'no', 'on' or '1e3'"),
        ("limit", "none", "is not an integer"),
        ("names", "a", "is not a list; write [a, b]"),
        ("names", "[a", "is not valid"),
        ("rates", "[a, 1]", "is not a number"),
        ("env", "A", "is not a mapping; write {key: value}"),
        ("own", "{rate: 1, rate: 2}", "the key rate is given twice"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, written: str, reason: str) -> None:
    with pytest.raises(ClipwrightError) as caught:
        resolve(Values, overrides=[f"{key}={written}"])
    line = str(caught.value)
    assert line.startswith("error[E_CONFIG_VALUE]") and f" — {key}" in line and reason in line, line


def test_the_last_of_several_overrides_of_a_key_wins() -> None:
    """A script can append its caller's overrides to its own."""
    assert resolve(Values, overrides=["count=1", "text=a", "count=2"]).value.count == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("text: a\ntext: b\n", "line 2: the key text is given twice, first in line 1"),
        ("own:\n  rate: 1\n  rate: 2\n", "line 3: the key rate is given twice, first in line 2"),
        ("own:\n\trate: 1\n", "indent with spaces, not with tabs"),
        ("text: !!python/object/apply:os.system [ls]\n", "line 1: the tag"),
        ("number: !!float 3\n", "the tag tag:yaml.org,2002:float is not allowed"),
        ("{a: 1}: b\n", "line 1: a key is not a text"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n" for last, name in zip("abcdef", "bcdefg", strict=True)
        ), "nested too deeply"),
        ("names: &x [*x]\n", "nested too deeply"),
        ("names: " + "[" * 1100 + "\n", "not valid YAML"),
        ("- a\n", "it is a list"),
        ("a\n", "it is a text"),
        ("text: [\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_plain_mapping_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ClipwrightError) as caught:
        read_config(path)
    line = str(caught.value)
    assert line.startswith("error[E_CONFIG_FILE]") and str(path) in line and reason in line, line


def test_merge_keys_empty_sections_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("own: {<<: {rate: 1e1, on: true}, rate: 2}\nwhere:\nmaybe: 'null'\nnumber: '1e1'\n")
    tree = resolve(Values, config=str(path)).tree
    assert (tree["own"]["rate"], tree["own"]["on"], tree["where"]) == (2.0, True, None)
    assert (tree["maybe"], tree["number"]) == ("null", 10.0)
    path.write_text("either: '7'\n")
    assert resolve(Values, config=str(path)).tree["either"] == "7"
    with pytest.raises(ClipwrightError, match="True is not a number"):
        resolve(Values, base={"count": True})
    path.write_text("own:\ntext: a\n")
    assert resolve(Values, config=str(path)).tree["own"]["name"] == "own"
    path.write_text("number:\n")
    with pytest.raises(ClipwrightError, match="an empty value"):
        resolve(Values, config=str(path))


def test_config_show_prints_what_was_meant(cli: Any) -> None:
    """The rows of the table above that a shipped config has, through a command."""
    words = ["optim.lr=1e-3", "schedule.samples=1e5", "seed=08", "runtime.compile=on", "runtime.zero=0x1"]
    tree = cli.json("config", "show", "train", "photos", "data.train=12:30", *words)
    assert (tree["optim"]["lr"], tree["schedule"]["samples"], tree["seed"]) == (0.001, 100_000, 8)
    assert (tree["runtime"]["compile"], tree["runtime"]["zero"], tree["data"]["train"]) == (True, 1, "12:30")
    for word in ("optim.lr=NaN", "seed=1.5", "runtime.compile=maybe"):
        key = word.partition("=")[0]
        line = cli.error("config", "show", "train", "photos", word, code=2)
        assert line.startswith("error[E_CONFIG_VALUE]") and f" — {key}" in line and "change the value" in line
