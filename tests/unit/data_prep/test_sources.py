"""The sources: every one in the registry keeps the contract; table's formats; scenes' pictures and words."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep import drawing
from clipwright.data_prep.sources.base import SOURCES, Record, Source
from clipwright.data_prep.sources.scenes import held_out
from clipwright.pipeline import pixels
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.records import canonical_json

Picture, Write = Callable[..., bytes], Callable[..., Path]


def build(name: str, **fields: Any) -> Source:
    return SOURCES.build(SOURCES.preset(name, **fields))


def told(record: Record) -> tuple[Any, ...]:
    image = record.image.tobytes() if isinstance(record.image, np.ndarray) else record.image
    rest = (record.columns.to_pylist(), record.source, record.source_key, record.reject)
    return record.row, image, record.captions, *rest


@pytest.fixture
def sources(tmp_path: Path, write_table: Write, picture: Picture) -> dict[str, Source]:
    """A small instance of every source of the registry: a new source adds its own line here."""
    paths = [
        write_table([picture(i) for i in range(k, k + 20)], [[f"{i}"] for i in range(20)], f"{k}.parquet")
        for k in (0, 20)
    ]
    made = {
        "table": build("table", path=[str(path) for path in paths], caption="captions"),
        "scenes": build("scenes", count=70, image_size=24),
    }
    assert set(made) == set(SOURCES.entries)
    return made


@pytest.mark.parametrize("name", sorted(SOURCES.entries))
def test_rows_are_the_same_in_any_order_and_any_process(sources: dict[str, Source], name: str) -> None:
    source = sources[name]
    everything = [told(record) for record in source.read(range(source.count))]
    assert [row[0] for row in everything] == list(range(source.count))
    again = pickle.loads(pickle.dumps(source))
    for rows in ([0], [3, 17, 18, 39], list(range(1, source.count, 7)), [source.count - 1], []):
        assert [told(record) for record in again.read(rows)] == [everything[row] for row in rows]
    assert canonical_json(source.identity()) == canonical_json(again.identity())
    assert next(iter(source.read([0]))).columns.schema == source.columns


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_table_formats_say_the_same(tmp_path: Path, picture: Picture, suffix: str) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    rows = [
        {"file": "a.jpg", "text": 'say "hi", twice', "n": 1, "split": "train"},
        {"file": "a.jpg", "text": "second", "n": 2, "split": "test"},
        {"file": "a.jpg", "text": "third é", "n": 3, "split": "train"},
    ]
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "," if suffix == "csv" else "\t"
        cells = [
            [str(v) if '"' not in str(v) else '"' + str(v).replace('"', '""') + '"' for v in r.values()] for r in rows
        ]
        path.write_text("\n".join(mark.join(line) for line in [list(rows[0]), *cells]) + "\n")
    source = build("table", path=str(path), image="file", caption="text", where={"split": "train"})
    found = list(source.read(range(source.count)))
    texts = [[t.decode() if isinstance(t, bytes) else t for t in record.captions] for record in found]
    assert texts == [['say "hi", twice'], ["third é"]]
    assert [record.columns.to_pylist() for record in found] == [
        [{"n": 1, "split": "train"}],
        [{"n": 3, "split": "train"}],
    ]
    assert source.columns.field("n").type == pa.int64()
    assert [record.source for record in found] == [f"t.{suffix}#0", f"t.{suffix}#2"]
    assert found[0].image == picture(0) and found[0].source_key == "a.jpg"


def test_templates_lists_structs_and_where(tmp_path: Path, picture: Picture) -> None:
    table = pa.table(
        {
            "image": pa.array([{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(4)]),
            "class_name": ["cat", "ox", None, "owl"],
            "n": pa.array([1, 2, 3, 4], pa.int8()),
            "when": pa.array([10**9 + i for i in range(4)], pa.timestamp("ns")),
        }
    )
    path = tmp_path / "labelled.parquet"
    pq.write_table(table, path)
    source = build("table", path=str(path), caption="a photo of {class_name} {{no {n}}}", where={"n": [1, 3, 4]})
    found = list(source.read(range(source.count)))
    assert [r.captions for r in found] == [["a photo of cat {no 1}"], [None], ["a photo of owl {no 4}"]]
    assert [r.source_key for r in found] == ["0.jpg", "2.jpg", "3.jpg"] and found[2].image == picture(3)
    assert source.columns.names == ["class_name", "n", "when"]
    with pytest.raises(ClipwrightError) as caught:
        build("table", path=str(path), caption="class_name", where={"n": "many"})
    assert caught.value.code == "E_CONFIG_VALUE" and "source.where.n" in str(caught.value)


def test_identity_names_content_not_place(tmp_path: Path, write_table: Write, picture: Picture) -> None:
    path = write_table([picture(0)], [["x"]])
    first = build("table", path=str(path), caption="captions").identity()
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / path.name)
    assert build("table", path=str(moved), caption="captions").identity() == first
    assert str(tmp_path) not in canonical_json(first)
    write_table([picture(1)], [["x"]])
    assert build("table", path=str(path), caption="captions").identity() != first


def test_held_out_pairs_are_drawn_by_the_seed_and_never_trained_on() -> None:
    sets = {seed: held_out(seed) for seed in range(40)}
    assert len(set(sets.values())) == 40
    for pairs in sets.values():
        assert len(pairs) == 10 and max(Counter(c for c, _ in pairs).values()) <= 2 >= max(
            Counter(s for _, s in pairs).values()
        )
    shown: dict[str, set[tuple[str, str]]] = {}
    for which in ("train", "held_out", "all"):
        source = build("scenes", count=1500, image_size=16, seed=3, combinations=which)
        rows = [record.columns.to_pylist()[0] for record in source.read(range(source.count))]
        shown[which] = {(row["colour"], row["shape"]) for row in rows}
        assert all(
            row["held_out"] == ((row["colour"], row["shape"]) in shown["held_out"])
            for row in rows
            if which == "held_out"
        )
        assert {row["count"] for row in rows} == {1, 2, 3}
        assert sum(row["count"] == 1 for row in rows) > 900
    named = {(drawing.COLOURS[c], drawing.SHAPES[s]) for c, s in sets[3]}
    assert shown["held_out"] == named and len(shown["train"]) == 38 and not shown["train"] & named
    assert shown["all"] == shown["train"] | named


def test_scene_captions_name_what_is_shown() -> None:
    source = build("scenes", count=800, image_size=16, combinations="all")
    words: Counter[str] = Counter()
    for record in source.read(range(source.count)):
        (row,) = record.columns.to_pylist()
        assert 2 <= len(set(map(str, record.captions))) == len(record.captions) <= 3
        for text in map(str, record.captions):
            assert row["colour"] in text and row["shape"] in text and "{" not in text
            assert " a orange" not in f" {text}" and " an " not in text.replace("an orange", "")
            number = [n for n in ("two", "three") if f"{n} " in text]
            assert number == ([] if row["count"] == 1 else [("two", "three")[row["count"] - 2]])
            assert [s for s in ("small", "medium", "large") if s in text] in ([], [row["size"]])
            if row["position"] and " the " in text and text.endswith(row["position"]):
                words[row["position"]] += 1
    assert len(words) == 9


def test_scenes_are_lively_differ_by_seed_and_split_and_keep_their_bytes() -> None:
    pictures = [r.image for r in build("scenes", count=64).read(range(64))]
    keys = {pixels.pixel_key(image) for image in pictures if isinstance(image, np.ndarray)}
    assert len(keys) == 64
    for seed, split in ((1, "train"), (0, "test")):
        other = build("scenes", count=64, seed=seed, split=split)
        assert not keys & {pixels.pixel_key(r.image) for r in other.read(range(64)) if isinstance(r.image, np.ndarray)}
    flat = [np.mean(np.diff(image.astype(int), axis=1) == 0) for image in pictures if isinstance(image, np.ndarray)]
    assert max(flat) < 0.6 and np.mean(flat) < 0.3  # no flat grounds
    # The very pixels, on any machine: only exactly rounded operations make them.
    first = pictures[0]
    assert isinstance(first, np.ndarray) and pixels.pixel_key(first) == "e9eb3785f252b846c428274bda9c5a91"


@pytest.mark.parametrize("shape", range(len(drawing.SHAPES)))
def test_drawn_area_is_that_of_the_shape(shape: int) -> None:
    """Coverage at 64 px against a mask drawn at 16 times the size: the distances are right and antialiased."""
    side, one = 64, np.ones(1, dtype=np.int64)
    centres = np.full((1, 3, 2), 0.5)
    axis = (np.arange(side * 16) + 0.5) / (side * 16)
    grid = np.meshgrid((axis - 0.5) / 0.3, (axis - 0.5) / 0.3)
    inside = drawing._DISTANCES[shape](grid[0].astype(np.float32)[None], grid[1].astype(np.float32)[None])[0] < 0
    wanted = inside.reshape(side, 16, side, 16).mean(axis=(1, 3))
    axis = ((np.arange(side) + 0.5) / side - 0.5) / 0.3
    x, y = (g.astype(np.float32)[None] for g in np.meshgrid(axis, axis))
    cover = np.clip(0.5 - drawing._DISTANCES[shape](x, y)[0] * 0.3 * side, 0, 1)
    assert abs(cover.sum() - wanted.sum()) / wanted.sum() < 0.03 and np.abs(cover - wanted).mean() < 0.01
    assert 0.3 < wanted.sum() / (0.6 * side) ** 2 < 0.85
    made = drawing.draw(
        side, one * shape, one * 0, one * 2, one, centres, np.full((1, 36), 0.5), np.zeros((1, 3072), np.uint64)
    )
    assert made.shape == (1, side, side, 3) and made[0, 32, 32, 0] > made[0, 32, 32, 1] + 60  # red in the middle
