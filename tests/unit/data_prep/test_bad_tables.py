"""Tables that `clipwright prep table` refuses, each with its file, line or column and the override that reads it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.build.pack import PrepConfig, open_source
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError

MakeImage = Callable[..., bytes]
KOREAN = "image,caption,분류\na.jpg,빨간 원,도형\n"
NESTED = {"image": "a.jpg", "s": [{"raw": "one", "tokens": ["one"]}]}
FILES: dict[str, str | bytes] = {
    "korean.csv": KOREAN.encode("cp949"),
    "utf8.csv": KOREAN,
    "latin.csv": "image,caption\na.jpg,café\nb.jpg,forêt\n".encode("latin-1"),
    "wide.csv": KOREAN.encode("utf-16-le"),
    "wide.jsonl": '{"image": "a", "caption": "b"}\n'.encode("utf-16-be"),
    "semicolon.csv": "image;caption\na.jpg;a cat, sitting\n",
    "tabs.csv": "image\tcaption\na.jpg\ta cat, sitting\n",
    "open_clip.csv": "filepath\ttitle\na.jpg\ta cat, sitting\n",
    "commas.tsv": "image,caption\na.jpg,x\n",
    "open.csv": 'caption,image\n" open quote,0.jpg\na cat,1.jpg\nhe said " hi,2.jpg\n',
    "unclosed.csv": 'caption,image\nx,y\n"never closed,0.jpg\nx,y\n',
    "endless.csv": 'caption,image\n"never closed,0.jpg\n' + "x,y\n" * 300,
    "ragged.tsv": 'caption\timage\n"two\nlines"\ta.jpg\n',
    "excel.csv": "sep=;\r\nimage;caption\r\na.jpg;x\r\n",
    "bare.csv": "photos/1.jpg,a cat\nphotos/2.jpg,a dog\n",
    "empty.csv": b"",
    "twice.csv": "image,caption,caption\na,b,c\n",
    "urls.csv": "image,caption\nhttps://example.com/a.jpg,x\n",
    "nested.jsonl": json.dumps(NESTED) + "\n",
    "deep.jsonl": '{"image": "a.jpg", "s": [[{"raw": "x"}]]}\n',
    "texts.jsonl": '{"image": "a.jpg", "caption": ["x"]}\n',
    "number.jsonl": '{"image": "a.jpg", "caption": "x"}\n\n[1, 2]\n',
    "one.json": '{"image": "a.jpg", "caption": "x"}',
    "boxes.json": json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [1]}]}),
    "list.json": "[1]",
    "cut.json": '[{"image": "a"},\n{"image": ',
    "cut.csv.gz": b"\x1f\x8b\x08\0\0\0\0\0",
}


REFUSED = [
    ("korean.csv", [], "E_TABLE", "it looks like cp949", "set source.encoding=cp949"),
    ("utf8.csv", ["source.encoding=cp949"], "E_TABLE", "not cp949 text", "set source.encoding=utf-8"),
    ("latin.csv", [], "E_TABLE", "2 lines not valid utf-8, the first is line 2", "set source.encoding=latin-1"),
    ("wide.csv", [], "E_TABLE", "line 1 has zero bytes", "set source.encoding=utf-16-le"),
    ("wide.jsonl", [], "E_TABLE", "line 1 has zero bytes", "set source.encoding=utf-16-be"),
    ("semicolon.csv", [], "E_TABLE", "image;caption; it looks like ';'", "set 'source.delimiter=;'"),
    ("tabs.csv", [], "E_TABLE", "it looks like tab", "set source.delimiter=tab"),
    ("open_clip.csv", [], "E_TABLE", "it looks like tab", "set source.delimiter=tab"),
    ("commas.tsv", [], "E_TABLE", "it looks like ','", "set source.delimiter=,"),
    ("open.csv", [], "E_TABLE", "line 2 — text follows the quote that closes it in line 4", "source.quote=none"),
    ("unclosed.csv", [], "E_TABLE", "line 3 — the file ends inside it", "source.quote=none"),
    ("endless.csv", [], "E_TABLE", "line 2 — it is still open 100 lines later", "source.quote=none"),
    ("ragged.tsv", [], "E_TABLE", "ragged.tsv, line 2 — 1 field separated by tab, 2 in", "'source.quote=\"'"),
    ("excel.csv", [], "E_TABLE", "a note of Excel", "delete that line, and set 'source.delimiter=;'"),
    ("bare.csv", [], "E_TABLE", "the file has no header", "for example image,caption"),
    ("empty.csv", [], "E_TABLE", "empty.csv — the file is empty", "check the file"),
    ("twice.csv", [], "E_COLUMN", "several columns of this name — twice.csv: caption", "its own name"),
    ("urls.csv", [], "E_COLUMN", "https://example.com/a.jpg", "clipwright data index"),
    ("nested.jsonl", ["source.caption=s"], "E_COLUMN", "its texts are under s.raw", "set source.caption=s.raw"),
    ("nested.jsonl", ["source.caption=s.Tokenz"], "E_COLUMN", "the fields of s are raw, tokens", "'tokens'"),
    ("nested.jsonl", ["source.caption=s.tokens"], "E_COLUMN", "list<item: list<item: string>>", "lists of texts"),
    ("nested.jsonl", ["source.caption=a {s}"], "E_COLUMN", "does not hold one text", "write {s.raw}"),
    ("nested.jsonl", ["source.image=s", "source.caption=none"], "E_COLUMN", "not hold images", "source.image"),
    ("nested.parquet", ["source.caption=s"], "E_COLUMN", "its texts are under s.raw", "set source.caption=s.raw"),
    ("deep.jsonl", ["source.caption=s.raw"], "E_COLUMN", "list<item: list<item: string>>", "lists of texts"),
    ("texts.jsonl", ["source.caption=a {caption}"], "E_COLUMN", "does not hold one text", "column of one text"),
    ("number.jsonl", [], "E_TABLE", "number.jsonl, line 3 — a list: [1, 2]", "one object per line"),
    ("one.json", [], "E_TABLE", "an object with the keys image, caption", "an array of objects"),
    ("boxes.json", [], "E_TABLE", "the annotations hold image_id, bbox", "captions_val2017.json"),
    ("list.json", [], "E_TABLE", "item 0 of the array — a int: 1", "array of objects"),
    ("cut.json", [], "E_TABLE", "line 2, item 1 of the array", "check the file"),
    ("cut.csv.gz", [], "E_TABLE", "cut.csv.gz — the compressed data is damaged", "decompress it"),
    ("nested.parquet", ["source.delimiter=;"], "E_CONFIG_VALUE", "csv and tsv files only", "leave out"),
    ("nested.jsonl", ["source.quote=none"], "E_CONFIG_VALUE", "csv and tsv files only", "leave out source.quote"),
    ("nested.parquet", ["source.encoding=cp949"], "E_CONFIG_VALUE", "text files only", "leave out"),
    ("latin.csv", ["source.encoding=klingon"], "E_CONFIG_VALUE", "klingon", "cp949"),
    ("latin.csv", ["source.delimiter=||"], "E_CONFIG_VALUE", "'||' (allowed: one ASCII", "source.delimiter=tab"),
    ("latin.csv", ["source.delimiter=é"], "E_CONFIG_VALUE", "'é' (allowed: one ASCII", "source.delimiter=tab"),
    ("latin.csv", ["source.quote=''"], "E_CONFIG_VALUE", "one ASCII character, or none", "source.quote=none"),
    ("latin.csv", ["source.quote=;", "source.delimiter=;"], "E_CONFIG_VALUE", "other than", "source.quote=none"),
    ("tabs.csv", ["source.delimiter=tab", "source.where.caption=x"], "E_PREP_EMPTY", "a cat, sitting", "occur"),
    ("open_clip.csv", ["source.delimiter=tab"], "E_COLUMN", "columns are filepath, title", "set source.image=filepath"),
    ("open_clip.csv", ["source.delimiter=tab", "source.image=filepath"], "E_COLUMN", "caption", "source.caption=title"),
    ("nested.jsonl", ["source.caption=s.raw", "source.where={s.raw: x}"], "E_COLUMN", "nested.jsonl: s.raw", "where"),
    ("utf8.csv", ["source.root=photos"], "E_INPUT", "source.root: photos — no such folder", "check the path"),
    (".", [], "E_INPUT", "source.path: . — it is an empty folder", "check the path"),
]
# Through a command: one of each code, and one of each key.
_FIRST = list({row[2]: row for row in reversed(REFUSED)}.values())
COMMANDS = [*_FIRST, *(row for row in REFUSED if row[0] in ("semicolon.csv", "open.csv"))]


def write_table(folder: Path, name: str) -> None:
    if name == "nested.parquet":
        pq.write_table(pa.Table.from_pylist([NESTED]), folder / name)
    elif name in FILES:
        content = FILES[name]
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(("path", "arguments", "code", "culprit", "remedy"), REFUSED)
def test_table_source_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    arguments: list[str],
    code: str,
    culprit: str,
    remedy: str,
) -> None:
    write_table(tmp_path, path)
    monkeypatch.chdir(tmp_path)
    resolved = resolve(PrepConfig, overrides=["source.name=table", f"source.path={path}", *arguments])
    with pytest.raises(ClipwrightError) as caught:
        open_source(resolved.value, quiet=True)
    error = str(caught.value)
    assert error.startswith(f"error[{code}]") and culprit in error and remedy in error
    assert len(error) < 700


def test_prep_refuses_tables_before_it_writes(tmp_path: Path, cli: Any) -> None:
    for path, arguments, code, culprit, remedy in COMMANDS:
        write_table(tmp_path, path)
        exit_code = 2 if code == "E_CONFIG_VALUE" else 3
        error = cli.error("prep", "table", f"source.path={path}", *arguments, "-o", "out", code=exit_code)
        assert error.startswith(f"error[{code}]") and culprit in error and remedy in error
    assert {code for _, _, code, _, _ in COMMANDS} == {code for _, _, code, _, _ in REFUSED}
    assert not (tmp_path / "out").exists()


def test_prep_of_a_semicolon_table_without_captions(tmp_path: Path, cli: Any, make_image: MakeImage) -> None:
    """Images as base64, a path and a text that is neither, through the command to the stored dataset."""
    (tmp_path / "b.jpg").write_bytes(make_image(1))
    cells = [base64.b64encode(make_image(0)).decode(), "b.jpg", "x" * 19_000, "s3://bucket/c.jpg"]
    rows = "".join(f"{cell};{number:03d}\r\n" for number, cell in enumerate(cells))
    (tmp_path / "pairs.csv").write_bytes(f"\ufeffimage;code\r\n\r\n{rows}".encode())
    arguments = ["source.path=pairs.csv", "source.delimiter=;", "source.caption=none", "-o", "out"]
    result = cli.json("prep", "table", *arguments)
    assert (result["written"], result["rejects"]) == (2, {"E_IMG_PATH": 2})
    assert result["notes"] == ["pairs.csv: 5 lines after the header hold 4 rows, 1 blank line"]
    written = pq.read_table(tmp_path / "out" / "data-000000.parquet").to_pylist()
    assert [(row["captions"], row["code"], row["source_key"]) for row in written] == [
        ([], "000", None),
        ([], "001", "b.jpg"),
    ]
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert "19,000 characters" in rejects[0]["detail"] and len(rejects[0]["detail"]) < 300
    assert "s3://bucket/c.jpg is a URL" in rejects[1]["detail"]
    assert cli.json("prep", "table", *arguments)["fingerprint"] == result["fingerprint"]
    error = cli.error("prep", "table", *arguments, "source.quote=none", code=2)
    assert error.startswith("error[E_RESUME]") and "quote" in error
