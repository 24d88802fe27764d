"""Every config key of `prep` and `data index` changes what it names. A new key needs an entry here."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from config_keys import config_keys

from clipwright.data_prep.build.engines import WorkerRuntime
from clipwright.data_prep.foreign.index import ForeignIndexConfig, index
from clipwright.pipeline.core.errors import ClipwrightError

TESTS = Path(__file__).resolve().parents[2]

SCENES = ["source.name=scenes", "source.count=6", "source.image_size=32"]
FOLDER = ["source.name=folder", "source.path={inputs}/folder"]
TABLE = ["source.name=table", "source.path={inputs}/pairs.csv"]
SIZES = [*TABLE, "images.resize=shortest"]
# Key → (overrides under which it has an effect, overrides that change it): the dataset differs.
KEYS: dict[str, tuple[list[str], list[str]]] = {
    "duplicates": (TABLE, ["duplicates=first"]),
    "images.format": ([*SIZES, "images.size=16"], ["images.format=png"]),
    "images.quality": ([*SIZES, "images.size=16"], ["images.quality=50"]),
    "images.resize": ([*TABLE, "images.size=30"], ["images.resize=longest"]),
    "images.size": (SIZES, ["images.size=16"]),
    "shards.name": (SCENES, ["shards.name=other"]),
    "shards.samples": (SCENES, ["shards.samples=4"]),
    "source.name": (TABLE, ["source.name=folder", "source.path={inputs}/folder"]),
    "source.path (folder)": (FOLDER, ["source.path={inputs}/other"]),
    "source.caption (folder)": (["source.name=folder", "source.path={inputs}/json"], ["source.caption=title"]),
    "source.encoding (folder)": (FOLDER, ["source.encoding=latin-1"]),
    "source.text (folder)": (FOLDER, ["source.text=whole"]),
    "source.text_suffixes (folder)": (FOLDER, ["source.text_suffixes=[.label]"]),
    "source.count (scenes)": (SCENES, ["source.count=7"]),
    "source.image_size (scenes)": (SCENES, ["source.image_size=40"]),
    "source.seed (scenes)": (SCENES, ["source.seed=1"]),
    "source.split (scenes)": (SCENES, ["source.split=test"]),
    "source.combinations (scenes)": (SCENES, ["source.combinations=held_out"]),
    "source.language (scenes)": (SCENES, ["source.language=ko"]),
    "source.difficulty (scenes)": (SCENES, ["source.difficulty=hard"]),
    "source.path (table)": (TABLE, ["source.path={inputs}/other.csv"]),
    "source.image (table)": (TABLE, ["source.image=second"]),
    "source.caption (table)": (TABLE, ["source.caption=title"]),
    "source.root (table)": (TABLE, ["source.root={inputs}/root"]),
    "source.where (table)": (TABLE, ["source.where={title: t0}"]),
    "source.delimiter (table)": (["source.name=table", "source.path={inputs}/bars.csv"], ["source.delimiter=|"]),
    "source.encoding (table)": (TABLE, ["source.encoding=latin-1"]),
    "source.quote (table)": (
        ["source.name=table", "source.path={inputs}/quoted.csv"],
        ["source.quote=none"],
    ),
}
# Keys of runs: the file of tests/ that has the test.
ELSEWHERE = {
    "runtime.part": "unit/data_prep/build/test_parts.py",
    "runtime.workers": "unit/data_prep/build/test_resume.py",
}
# Keys of `data index`: the captions differ.
INDEX_KEYS = {
    "data": {},
    "duplicates": {"duplicates": "first"},
    "caption": {"caption": "title"},
    "encoding": {"encoding": "latin-1"},
    "text": {"text": "whole"},
    "text_suffixes": {"text_suffixes": [".label"]},
}


def test_every_key_has_a_test() -> None:
    assert config_keys("prep") == {*KEYS, *ELSEWHERE}
    assert config_keys("data index") == {*INDEX_KEYS, "runtime.workers"}
    for key, file in ELSEWHERE.items():
        assert key.rpartition(".")[2] in (TESTS / file).read_text(encoding="utf-8"), f"{file} does not mention {key}"


@pytest.fixture
def inputs(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    """Folders and tables of a few images, whose captions differ by file, column and encoding."""
    for name in ("folder", "other", "json", "root"):
        (tmp_path / name).mkdir()
    for number in range(3):
        (tmp_path / "root" / f"{number}.png").write_bytes(make_image(number + 20, 60, 40, "PNG"))
        (tmp_path / f"{number}.png").write_bytes(make_image(number, 60, 40, "PNG"))
        for folder in ("folder", "other", "json"):
            (tmp_path / folder / f"{number}.png").write_bytes(make_image(number, 60, 40, "PNG"))
        text = f"a caf\u00e9, number {number}\nsecond line\n"
        (tmp_path / "folder" / f"{number}.txt").write_bytes(text.encode())
        (tmp_path / "folder" / f"{number}.label").write_text(f"label {number}")
        (tmp_path / "other" / f"{number}.txt").write_text(f"other {number}")
        (tmp_path / "json" / f"{number}.json").write_text(json.dumps({"caption": f"c{number}", "title": f"t{number}"}))
    rows = [f'{n % 3}.png,{(n + 1) % 3}.png,"a caf\u00e9, ""{n}""",t{n}' for n in range(4)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,second,caption,title", *rows]))
    (tmp_path / "other.csv").write_text("image,caption\n0.png,other\n")
    (tmp_path / "quoted.csv").write_text('image,caption\n0.png,"a quoted text"\n')
    bars = [f"{n}.png|a,b{n}|c{n}" for n in range(3)]
    (tmp_path / "bars.csv").write_text("\n".join(["image|x,caption|caption", *bars]))
    return tmp_path


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".tar", ".parquet")}


def prepared(folder: Path, overrides: list[str], run_prep: Callable[..., Any]) -> dict[str, bytes] | str:
    """Returns the files of the dataset, or the error if the overrides are refused."""
    out = folder / f"out-{len(list(folder.iterdir()))}"
    try:
        run_prep(out, *(override.replace("{inputs}", str(folder)) for override in overrides))
    except ClipwrightError as error:
        return error.code
    return content(out)


@pytest.mark.parametrize("key", KEYS)
def test_key_changes_the_dataset(key: str, inputs: Path, run_prep: Callable[..., Any]) -> None:
    base, changed = KEYS[key]
    names = {override.partition("=")[0] for override in changed}
    expected = prepared(inputs, base, run_prep)
    kept = [override for override in base if override.partition("=")[0] not in names]
    found = prepared(inputs, [*kept, *changed], run_prep)
    assert isinstance(found, dict), found
    assert found != expected, f"{key} is ignored"


def indexed_captions(folder: Path, make_image: Callable[..., bytes], **settings: Any) -> list[list[str]]:
    """Returns the captions of a tar of two equal images and one with captions in JSON, as `data index` reads them."""
    folder.mkdir()
    members = [
        ("0.jpg", make_image(0)),
        ("0.txt", "a caf\u00e9\nsecond line\n".encode()),
        ("0.label", b"a label"),
        ("1.jpg", make_image(0)),
        ("1.txt", b"the same image"),
        ("1.label", b"another label"),
        ("2.jpg", make_image(1)),
        ("2.json", json.dumps({"caption": "c", "title": "t"}).encode()),
    ]
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    runtime = WorkerRuntime(workers=1)
    manifest = index(ForeignIndexConfig(data=str(folder), runtime=runtime, **settings), quiet=True).manifest
    return [
        captions
        for shard in manifest["shards"]
        for captions in pq.read_table(folder / shard["sidecar"])["captions"].to_pylist()
    ]


@pytest.mark.parametrize("key", INDEX_KEYS)
def test_key_changes_the_indexed_captions(key: str, tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    expected = [["a caf\u00e9", "second line", "the same image"], ["c"]]
    found = indexed_captions(tmp_path / "tars", make_image, **INDEX_KEYS[key])
    assert (found == expected) == (key == "data"), found
