"""What the table source reads: values, types, captions and images of each format."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.sources.base import SOURCES, Record
from clipwright.data_prep.sources.table import TableSource
from clipwright.data_prep.sources.tables import delimited, images, json_rows
from clipwright.pipeline.core.errors import ClipwrightError

MakeImage = Callable[..., bytes]
KOREAN = "image,caption,분류\na.jpg,빨간 원,도형\n"


def open_table(path: Path | list[Path], **fields: Any) -> TableSource:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    source = SOURCES.build(SOURCES.preset("table", path=paths, **fields))
    assert isinstance(source, TableSource)
    return source


def read(source: TableSource) -> list[Record]:
    return list(source.read(range(source.count)))


def captions(source: TableSource) -> list[Any]:
    return [record.captions for record in read(source)]


def columns(source: TableSource) -> list[dict[str, Any]]:
    return [record.columns.to_pylist()[0] for record in read(source)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def test_quotes_have_no_meaning_in_a_tsv_unless_stated(write: Callable[..., Path]) -> None:
    rows = ['" open quote\t0.jpg', "a cat\t1.jpg", 'he said " hi\t2.jpg', "a dog\t3.jpg"]
    path = write("a.tsv", "caption\timage\n" + "\n".join(rows) + "\n")
    source = open_table(path)
    assert [record.source_key for record in read(source)] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert captions(source) == [['" open quote'], ["a cat"], ['he said " hi'], ["a dog"]] and not source.notes
    quoted = write("b.tsv", 'image\tcaption\na.jpg\t"say ""hi"""\n')
    assert captions(open_table(quoted, quote='"')) == [['say "hi"']]
    unquoted = open_table(quoted)
    assert captions(unquoted) == [['"say ""hi"""']]
    assert "quotes around 1 field" in unquoted.notes[0] and "'source.quote=\"'" in unquoted.notes[0]


def test_rows_of_several_lines_are_counted(write: Callable[..., Path]) -> None:
    text = 'image,caption\n\na.jpg,"two\nlines, one comma"\r\n\nb.jpg,"he said ""hi"""\nc.jpg,5" wide\rd.jpg,last'
    source = open_table(write("a.csv", text))
    assert captions(source) == [["two\nlines, one comma"], ['he said "hi"'], ['5" wide'], ["last"]]
    assert source.notes == ["a.csv: 7 lines after the header hold 4 rows, 1 of them spans several lines in quotes"]
    blank = open_table(write("b.csv", "image,caption\n\n\na.jpg,x\n\n"))
    assert captions(blank) == [["x"]] and blank.notes == ["b.csv: 4 lines after the header hold 1 row, 3 blank lines"]
    long = "\n".join(["x"] * 100)  # a field may span as many lines
    assert captions(open_table(write("c.csv", f'image,caption\na.jpg,"{long}"\nb.jpg,y\n'))) == [[long], ["y"]]


@pytest.mark.parametrize("seed", range(6))
def test_csv_rows_equal_those_of_the_csv_module(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Random rows, in blocks of a few bytes, so that quoted line ends lie at the ends of blocks."""
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 20 + 30 * seed)
    draw = random.Random(seed)
    pieces = ["a", ",", '"', "\n", "\r\n", "é", "", " ", "가", "word"]
    rows = [["".join(draw.choices(pieces, k=draw.randrange(1, 9))) + "." for _ in range(3)] for _ in range(60)]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=draw.choice(["\n", "\r\n"])).writerows([["image", "caption", "n"], *rows])
    source = open_table(write("a.csv", out.getvalue()))
    assert [record.columns.to_pylist()[0]["n"] for record in read(source)] == [row[2] for row in rows]
    assert captions(source) == [[row[1]] for row in rows]
    picked = sorted(draw.sample(range(60), 7))
    assert [record.captions for record in source.read(picked)] == [[rows[row][1]] for row in picked]


@pytest.mark.parametrize("encoding", ["cp949", "utf-16", "utf-16-le", "utf-8", "utf-8-sig", "gz"])
def test_encodings(write: Callable[..., Path], encoding: str) -> None:
    if encoding == "gz":
        path, option = write("a.csv.gz", gzip.compress(KOREAN.encode())), "utf-8"
    else:
        marked = encoding in ("utf-16", "utf-8-sig")  # the mark decides
        path, option = write("a.csv", KOREAN.encode(encoding)), "cp949" if marked else encoding
    source = open_table(path, encoding=option)
    assert captions(source) == [["빨간 원"]] and columns(source) == [{"분류": "도형"}]
    lines = [json.dumps({"image": "a.jpg", "caption": "빨간 원"}, ensure_ascii=False)] * 2
    jsonl = write("a.jsonl", "\n".join(lines).encode("utf-8" if encoding == "gz" else encoding))
    assert captions(open_table(jsonl, encoding=option)) == [["빨간 원"]] * 2


def test_damaged_lines_are_rejected_alone(write: Callable[..., Path]) -> None:
    lines = ["café,x".encode(), b"caf\xe9,y", *[b"plain,caf\xe9"] * 1, "né,z".encode()]
    source = open_table(write("a.csv", b"caption,n,image\n" + b"".join(line + b",i.jpg\n" for line in lines)))
    assert captions(source) == [["café"], [b"caf\xe9"], ["plain"], ["né"]]
    assert [row["n"] for row in columns(source)] == ["x", "y", None, "z"]
    assert source.notes == [
        "a.csv: 2 lines not valid utf-8, the first is line 3 (it looks like latin-1); their captions are rejected"
    ]


def test_text_stays_as_written_and_only_exact_numbers_become_numbers(write: Callable[..., Path]) -> None:
    table = {
        "code": (["007", "008", "12"], pa.string()),
        "id": (["000000123456", "1", "2"], pa.string()),
        "plain": (["1", "-2", ""], pa.int64()),
        "large": (["9007199254740993", "1", "2"], pa.int64()),
        "huge": (["99999999999999999999", "1", "2"], pa.string()),
        "score": (["0.5", "2", "nan"], pa.float64()),
        "whole": (["1.0", "2.5", "1e+20"], pa.float64()),
        "padded": (["1.50", "2.5", "3.5"], pa.string()),
        "exponent": (["1e5", "2", "3"], pa.string()),
        "day": (["2024-01-01", "2024-01-02", ""], pa.string()),
        "flag": (["true", "false", ""], pa.bool_()),
        "mixed": (["true", "False", "x"], pa.string()),
        "empty": (["", "nan", ""], pa.null()),
        "word": (["None", "NA", "nan"], pa.string()),
        "count": (["3", "NaN", "nan"], pa.int64()),
    }
    rows = list(zip(*(cells for cells, _ in table.values()), strict=True))
    text = "\n".join(",".join(["x.jpg", *row]) for row in [tuple(table), *rows]).replace("x.jpg", "image", 1)
    path = write("a.csv", text)
    template = "agent {code} {id} {whole} {exponent} {day} {padded} {word}"
    source = open_table(path, caption=template)
    assert {field.name: field.type for field in source.columns} == {name: kind for name, (_, kind) in table.items()}
    assert captions(source) == [
        ["agent 007 000000123456 1.0 1e5 2024-01-01 1.50 None"],
        ["agent 008 1 2.5 2 2024-01-02 2.5 NA"],
        [("E_CAP_EMPTY", "no value in column day")],
    ]
    first, second, third = columns(source)
    assert (first["code"], first["plain"], first["large"], first["whole"]) == ("007", 1, 9007199254740993, 1.0)
    assert (second["plain"], second["score"], second["flag"], second["word"]) == (-2, 2.0, False, "NA")
    assert (third["plain"], third["score"], third["flag"], third["whole"]) == (None, None, None, 1e20)
    assert (first["count"], second["count"], third["count"]) == (3, None, None)
    assert captions(open_table(path, caption="word")) == [["None"], ["NA"], ["nan"]]
    assert captions(open_table(path, caption="score")) == [["0.5"], ["2"], [None]]
    assert captions(open_table(path, caption="empty")) == [[None], [None], [None]]
    assert [row["id"] for row in columns(open_table(path, caption="code", where={"code": ["007"]}))] == ["000000123456"]


def test_missing_numbers_of_parquet_are_missing_captions(tmp_path: Path) -> None:
    scores = pa.array([1.5, float("nan"), None, 3.0])
    pq.write_table(
        pa.table({"image": ["x"] * 4, "score": scores, "half": scores.cast(pa.float16())}), tmp_path / "a.parquet"
    )
    assert captions(open_table(tmp_path / "a.parquet", caption="score")) == [["1.5"], [None], [None], ["3"]]
    pq.write_table(pa.table({"image": ["x"] * 2, "word": ["", "a"]}), tmp_path / "b.parquet")
    empty = ("E_CAP_EMPTY", "no value in column word")
    assert captions(open_table(tmp_path / "b.parquet", caption="is {word}")) == [[empty], ["is a"]]
    missing = ("E_CAP_EMPTY", "no value in column half")
    assert captions(open_table(tmp_path / "a.parquet", caption="is {half}"))[:3] == [["is 1.5"], [missing], [missing]]


def test_types_are_unified_over_files(tmp_path: Path, write: Callable[..., Path]) -> None:
    parts = [
        write("a.csv", "image,caption,late,number,mixed,first\na.jpg,x,,1,1,9\n"),
        write("b.csv", "image,mixed,caption,late,number,last\nb.jpg,one,y,text,0.5,007\n"),
        write("c.jsonl", '{"image": "c.jpg", "caption": "z", "number": null, "mixed": {"a": [1]}}\n'),
        tmp_path / "d.parquet",
    ]
    pq.write_table(pa.table({"image": ["d.jpg"], "caption": ["w"], "number": pa.array([2], pa.int32())}), parts[3])
    source = open_table(parts)
    names = {
        "late": pa.string(),
        "number": pa.float64(),
        "mixed": pa.string(),
        "first": pa.int64(),
        "last": pa.string(),
    }
    assert {field.name: field.type for field in source.columns} == names
    assert columns(source) == [
        {"late": None, "number": 1.0, "mixed": "1", "first": 9, "last": None},
        {"late": "text", "number": 0.5, "mixed": "one", "first": None, "last": "007"},
        {"late": None, "number": None, "mixed": '{"a":[1]}', "first": None, "last": None},
        {"late": None, "number": 2.0, "mixed": None, "first": None, "last": None},
    ]
    assert [record.source for record in read(source)] == ["a.csv#0", "b.csv#0", "c.jsonl#0", "d.parquet#0"]
    assert captions(open_table(parts, where={"number": [0.5, 2]})) == [["y"], ["w"]]
    pq.write_table(pa.table({"image": ["e"], "caption": ["v"], "first": pa.array([2**64 - 1], pa.uint64())}), parts[3])
    assert [row["first"] for row in columns(open_table([parts[0], parts[3]]))] == ["9", str(2**64 - 1)]
    big = 2**53 + 1  # float64 does not hold it
    exact = [write("e.csv", f"image,caption,n\na,x,{big}\n"), write("f.csv", "image,caption,n\nb,y,0.5\n")]
    assert [row["n"] for row in columns(open_table(exact))] == [str(big), "0.5"]
    pq.write_table(pa.table({"image": ["d.jpg"], "caption": ["w"], "n": [big]}), parts[3])
    assert [row["n"] for row in columns(open_table([parts[3], exact[1]]))] == [str(big), "0.5"]


def test_jsonl_values(write: Callable[..., Path]) -> None:
    lines = [
        '{"image": "a.jpg", "caption": "a", "id": 1, "price": 1.10}',
        "",
        '{"image": "b.jpg", "caption": ["b", null, "c"], "id": "x2", "price": 2}',
        '{"image": "c.jpg", "caption": NaN, "price": 1e999, "new": [1, 2], "day": "2024-01-01"}',
        '{"image": "d.jpg", "caption": {"en": "d"}, "new": null}',
    ]
    source = open_table(write("a.jsonl", "\n".join(lines)), caption="caption")
    assert captions(source) == captions_of_four
    assert columns(source)[0] == {"id": "1", "price": 1.1, "new": None, "day": None}
    assert columns(source)[2] == {"id": None, "price": None, "new": [1, 2], "day": "2024-01-01"}
    assert captions(open_table(write("b.jsonl", "\n".join(lines[:3])), caption="{price} for {id}")) == [
        ["1.10 for 1"],
        ["2 for x2"],
    ]
    lines = [json.dumps({"image": f"{i}.jpg", "caption": "x", "late": i - 1500}) for i in range(3000)]
    lines[2900] = '{"image": "a", "caption": "é", "late": "word"}'
    long = open_table(write("d.jsonl", "\n".join(lines)))
    assert long.columns.field("late").type == pa.string() and long.count == 3000
    rows = [0, 1700, 2900, 2999]
    assert [record.columns.to_pylist()[0]["late"] for record in long.read(rows)] == ["-1500", "200", "word", "1499"]
    assert open_table(write("e.jsonl", "\n".join(lines[:2900]))).columns.field("late").type == pa.int64()
    many = [json.dumps({"image": "a", "caption": "x", f"key{i}": i}) for i in range(300)]
    wide = open_table(write("c.jsonl", "\n".join(many)))
    assert wide.columns.names == ["json"] and columns(wide)[7] == {"json": '{"key7":7}'}


captions_of_four = [
    ["a"],
    ["b", None, "c"],
    [None],
    [("E_CAP_FILE", "a dict in place of a caption, expected a text or a list of texts")],
]


def test_nested_captions_and_documents(tmp_path: Path, write: Callable[..., Path]) -> None:
    rows = [{"image": "a.jpg", "sentences": [{"raw": "one", "tokens": ["one"]}, {"raw": "two", "tokens": []}]}]
    pq.write_table(pa.Table.from_pylist([*rows, {"image": "b.jpg", "sentences": None}]), tmp_path / "a.parquet")
    assert captions(open_table(tmp_path / "a.parquet", caption="sentences.raw")) == [["one", "two"], [None]]
    for name, content in {
        "lines.jsonl": json.dumps(rows[0]) + "\n",
        "lines.json": f"{json.dumps(rows[0])}\n{json.dumps(rows[0])}\n",
        "array.json": json.dumps(rows * 2, indent=1),
        "karpathy.json": json.dumps({"dataset": "x", "images": rows}),
        "packed.json.gz": gzip.compress(json.dumps(rows).encode()),
    }.items():
        assert captions(open_table(write(name, content), caption="sentences.raw"))[0] == ["one", "two"], name
    struct = pa.array([{"text": "in English", "url": "u"}])
    pq.write_table(pa.table({"image": ["a"], "meta": struct, "meta.text": ["dotted name"]}), tmp_path / "b.parquet")
    assert captions(open_table(tmp_path / "b.parquet", caption="meta.text")) == [["dotted name"]]
    assert captions(open_table(tmp_path / "b.parquet", caption="{meta.url}!")) == [["u!"]]
    scores = pa.array([{"score": float("nan")}, {"score": 2.5}])
    pq.write_table(pa.table({"image": ["a", "b"], "meta": scores}), tmp_path / "c.parquet")
    missing = ("E_CAP_EMPTY", "no value in column meta.score")
    assert captions(open_table(tmp_path / "c.parquet", caption="rated {meta.score}")) == [[missing], ["rated 2.5"]]


def test_coco_annotations(write: Callable[..., Path]) -> None:
    images = [{"id": 7, "file_name": "7.jpg", "height": 3}, {"id": 8, "file_name": "8.jpg", "height": 4}]
    texts = [(7, "one"), (9, "elsewhere"), (7, "two")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(texts)]
    path = write("captions.json", json.dumps({"info": {}, "images": images, "annotations": annotations}))
    source = open_table(path)
    assert captions(source) == [["one", "two"], []]
    assert [record.source_key for record in read(source)] == ["7.jpg", "8.jpg"]
    assert columns(source)[0] == {"id": 7, "file_name": "7.jpg", "height": 3}
    assert source.notes == ["captions.json: annotations of 1 image that the file does not list"]


def test_lists_written_as_text_are_noted(write: Callable[..., Path]) -> None:
    path = write("a.csv", """image,caption,n\na.jpg,"['one', 'two']",1\nb.jpg,"[""three""]",2\n""")
    source = open_table(path)
    assert captions(source) == [["['one', 'two']"], ['["three"]']]
    assert "look like lists written as text (['one', 'two'])" in source.notes[0] and "jsonl" in source.notes[0]
    assert not open_table(path, caption="n").notes


def test_column_names(tmp_path: Path, write: Callable[..., Path]) -> None:
    source = open_table(write("a.csv", ",image path, caption ,x,x\n0,a.jpg,text,1,2\n"), image="image path")
    assert captions(source) == [["text"]] and columns(source) == [{"column_1": 0, "x": 1, "x_2": 2}]
    assert [record.source_key for record in read(source)] == ["a.jpg"]
    arrays = [pa.array(["a.jpg", "b.jpg"]), pa.array(["x", "y"]), pa.array([1, 2]), pa.array([2, 1])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["image", "caption", "n", "n"]), tmp_path / "b.parquet")
    twice = open_table(tmp_path / "b.parquet", where={"n_2": 1})
    assert captions(twice) == [["y"]] and columns(twice) == [{"n": 2, "n_2": 1}]


def test_images_in_text_and_paths(tmp_path: Path, write: Callable[..., Path], make_image: MakeImage) -> None:
    image = make_image(1)
    packed = base64.b64encode(image).decode()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.jpg").write_bytes(image)
    (tmp_path / "sub" / "caf\udce9.jpg").write_bytes(image)
    good = {
        packed: None,
        base64.urlsafe_b64encode(image).decode(): None,
        packed.rstrip("="): None,
        f"data:image/jpeg;base64,{packed}": None,
        "sub/a b.jpg": "sub/a b.jpg",
        "sub\\a b.jpg": "sub\\a b.jpg",
        f"file://{tmp_path}/sub/a%20b.jpg": f"file://{tmp_path}/sub/a%20b.jpg",
    }
    bad = {
        "https://example.com/a.jpg": ("E_IMG_PATH", "URLs are not downloaded"),
        "C:\\photos\\a.jpg": ("E_IMG_PATH", "a path of Windows"),
        "file://server/a.jpg": ("E_IMG_PATH", "another computer"),
        "data:image/png;base64,!!!": ("E_IMG_FORMAT", "not base64"),
        packed[:101]: ("E_IMG_TRUNCATED", "base64"),
        "x" * 20_000: ("E_IMG_PATH", "a text of 20,000 characters"),
        "": ("E_IMG_PATH", "no image"),
    }
    lines = [json.dumps({"image": text, "caption": "x"}) for text in (*good, *bad)]
    records = read(open_table(write("a.jsonl", "\n".join(lines))))
    for record, key in zip(records, good.values(), strict=False):
        assert record.image == image and record.source_key == key and record.reject is None
    for record, (code, detail) in zip(records[len(good) :], bad.values(), strict=True):
        assert record.image is None and record.reject is not None
        assert record.reject[0] == code and detail in record.reject[1] and len(record.reject[1]) < 400
    (latin,) = read(open_table(write("b.csv", b"image,caption\nsub/caf\xe9.jpg,x\n")))
    assert latin.image == image and latin.source_key == "sub/caf\\udce9.jpg"
    pq.write_table(pa.table({"image": [packed.encode(), image], "caption": ["x", "y"]}), tmp_path / "c.parquet")
    assert [record.image for record in read(open_table(tmp_path / "c.parquet"))] == [image, image]


def test_sizes_are_bounded(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, make_image: MakeImage) -> None:
    for module in (delimited, json_rows):
        monkeypatch.setattr(module, "BLOCK_BYTES", 100)
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 2000)
    monkeypatch.setattr(json_rows, "_HEAD_BYTES", 100)
    monkeypatch.setattr(json_rows, "MAX_DOCUMENT_BYTES", 3000)
    row = {"image": "a.jpg", "caption": "x" * 1900}
    assert open_table(write("a.jsonl", json.dumps(row) + "\n")).count == 1
    assert open_table(write("a.csv", f"image,caption\na.jpg,{'x' * 1900}\n")).count == 1
    assert open_table(write("a.json", json.dumps([row]))).count == 1
    for name, content, found in [
        ("b.csv", f"image,caption\na,b\n{'x' * 4000}\n", "b.csv, line 3 — more than"),
        ("b.jsonl", json.dumps(row) + "\n" + "x" * 4000, "b.jsonl, line 2 — more than"),
        ("b.json", json.dumps([row] * 2), "one JSON value of more than"),
    ]:
        with pytest.raises(ClipwrightError) as caught:
            open_table(write(name, content))
        assert caught.value.code == "E_TABLE" and found in str(caught.value)
    image = make_image(2)
    packed = base64.b64encode(image).decode()
    path = write("c.jsonl", json.dumps({"image": packed, "caption": "x"}))
    for limit, reject in ((len(image), None), (len(image) - 1, "E_IMG_FORMAT")):
        monkeypatch.setattr(images, "MAX_IMAGE_BYTES", limit)
        (record,) = read(open_table(path))
        assert (record.reject and record.reject[0]) == reject and (record.image == image) == (reject is None)


def test_scan_is_reused_while_the_files_are_the_same(write: Callable[..., Path]) -> None:
    path = write("a.csv", "image,caption\na.jpg,x\n")
    source = open_table(path)
    source.scan(quiet=True)
    again = open_table(path)
    assert again.load_scan(json.loads(json.dumps(source.scan_result()))) and again.identity() == source.identity()
    write("a.csv", "image,caption\na.jpg,xy\n")
    with pytest.raises(ClipwrightError, match=r"E_INPUT.*changed while it was being read.*a\.csv"):
        read(source)
    changed = open_table(path)
    assert not changed.load_scan(json.loads(json.dumps(source.scan_result())))
    assert changed.identity() != source.identity()
    for key, value in (("delimiter", ","), ("quote", "none"), ("encoding", "cp949")):
        assert open_table(path, **{key: value}).identity() != changed.identity()
