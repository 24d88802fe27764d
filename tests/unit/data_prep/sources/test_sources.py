"""The contract of every registered source, and the formats of the table source."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.sources.base import SOURCES, Record, Source
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import canonical_json

MakeImage, Write = Callable[..., bytes], Callable[..., Path]


def build(name: str, **fields: Any) -> Source:
    return SOURCES.build(SOURCES.preset(name, **fields))


def as_tuple(record: Record) -> tuple[Any, ...]:
    image = record.image.tobytes() if isinstance(record.image, np.ndarray) else record.image
    rest = (record.columns.to_pylist(), record.source, record.source_key, record.reject)
    return record.row, image, record.captions, *rest


@pytest.fixture
def sources(tmp_path: Path, write_table: Write, make_image: MakeImage) -> dict[str, Source]:
    """A small instance of every registered source. A new source adds its own line here."""
    paths = [
        write_table([make_image(i) for i in range(k, k + 20)], [[f"{i}"] for i in range(20)], f"{k}.parquet")
        for k in (0, 20)
    ]
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i in range(40):
        stem = tmp_path / "images" / ("sub" if i % 3 else "") / f"{i:02d}"
        stem.with_suffix(".jpg").write_bytes(make_image(i))
        stem.with_suffix(".json").write_text(json.dumps({"caption": f"words {i}", "n": i, "x": None if i % 2 else 0.5}))
    sources = {
        "folder": build("folder", path=str(tmp_path / "images")),
        "table": build("table", path=[str(path) for path in paths], caption="captions"),
        "scenes": build("scenes", count=70, image_size=24),
    }
    assert set(sources) == set(SOURCES.entries)
    return sources


@pytest.mark.parametrize("name", sorted(SOURCES.entries))
def test_rows_do_not_depend_on_order_or_process(sources: dict[str, Source], name: str) -> None:
    source = sources[name]
    all_rows = [as_tuple(record) for record in source.read(range(source.count))]
    assert [row[0] for row in all_rows] == list(range(source.count))
    again = pickle.loads(pickle.dumps(source))
    for rows in ([0], [3, 17, 18, 39], list(range(1, source.count, 7)), [source.count - 1], []):
        assert [as_tuple(record) for record in again.read(rows)] == [all_rows[row] for row in rows]
    assert canonical_json(source.identity()) == canonical_json(again.identity())
    assert next(iter(source.read([0]))).columns.schema == source.columns


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_table_formats_give_the_same_records(tmp_path: Path, make_image: MakeImage, suffix: str) -> None:
    (tmp_path / "a.jpg").write_bytes(make_image(0))
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
    quote = '"' if suffix == "tsv" else None  # a tsv has none by default
    source = build("table", path=str(path), image="file", caption="text", where={"split": "train"}, quote=quote)
    records = list(source.read(range(source.count)))
    texts = [[t.decode() if isinstance(t, bytes) else t for t in record.captions] for record in records]
    assert texts == [['say "hi", twice'], ["third é"]]
    assert [record.columns.to_pylist() for record in records] == [
        [{"n": 1, "split": "train"}],
        [{"n": 3, "split": "train"}],
    ]
    assert source.columns.field("n").type == pa.int64()
    assert [record.source for record in records] == [f"t.{suffix}#0", f"t.{suffix}#2"]
    assert records[0].image == make_image(0) and records[0].source_key == "a.jpg"


def test_table_templates_structs_and_where(tmp_path: Path, make_image: MakeImage) -> None:
    table = pa.table(
        {
            "image": pa.array([{"bytes": make_image(i), "path": f"{i}.jpg"} for i in range(4)]),
            "class_name": ["cat", "ox", None, "owl"],
            "n": pa.array([1, 2, 3, 4], pa.int8()),
            "when": pa.array([10**9 + i for i in range(4)], pa.timestamp("ns")),
        }
    )
    path = tmp_path / "labelled.parquet"
    pq.write_table(table, path)
    source = build("table", path=str(path), caption="a photo of {class_name} {{no {n}}}", where={"n": [1, 3, 4]})
    records = list(source.read(range(source.count)))
    assert [r.captions for r in records] == [
        ["a photo of cat {no 1}"],
        [("E_CAP_EMPTY", "no value in column class_name")],
        ["a photo of owl {no 4}"],
    ]
    assert [r.source_key for r in records] == ["0.jpg", "2.jpg", "3.jpg"] and records[2].image == make_image(3)
    assert source.columns.names == ["class_name", "n", "when"]
    with pytest.raises(ClipwrightError) as caught:
        build("table", path=str(path), caption="class_name", where={"n": "many"})
    assert caught.value.code == "E_CONFIG_VALUE" and "source.where.n" in str(caught.value)


def test_table_identity_depends_on_content_not_location(
    tmp_path: Path, write_table: Write, make_image: MakeImage
) -> None:
    path = write_table([make_image(0)], [["x"]])
    first = build("table", path=str(path), caption="captions").identity()
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / path.name)
    assert build("table", path=str(moved), caption="captions").identity() == first
    assert str(tmp_path) not in canonical_json(first)
    write_table([make_image(1)], [["x"]])
    assert build("table", path=str(path), caption="captions").identity() != first
