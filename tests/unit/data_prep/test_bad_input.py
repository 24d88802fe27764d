"""Invalid inputs of `clipwright prep`, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MakeImage, Write = Callable[..., bytes], Callable[..., Path]


@pytest.fixture
def good(tmp_path: Path, write_table: Write, make_image: MakeImage) -> Path:
    return write_table([make_image(0), make_image(1)], [["one"], ["two"]])


def bomb() -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    data = zlib.compress(b"\0" * 3751 * 30_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code", "culprit", "remedy"),
    [
        (["source.caption=capt1ons"], "E_COLUMN", 3, "pairs.parquet: capt1ons", "did you mean 'captions'?"),
        (["source.image=imag"], "E_COLUMN", 3, "pairs.parquet: imag", "did you mean 'image'?"),
        (["source.image=captions"], "E_COLUMN", 3, "pairs.parquet: captions", "source.image"),
        (["source.caption=a {speciess}"], "E_COLUMN", 3, "speciess", "source.caption"),
        (["source.caption=a {species!r}"], "E_CONFIG_VALUE", 2, "a {species!r}", "{column}"),
        (["source.where={splt: train}"], "E_COLUMN", 3, "splt", "source.where"),
        (["source.path=nothing-*.csv"], "E_INPUT", 3, "nothing-*.csv", "check the path"),
        (["source.path=notes.txt"], "E_TABLE", 3, "notes.txt", "csv, tsv, jsonl or parquet"),
        (["source.path=broken.parquet"], "E_TABLE", 3, "broken.parquet", "check the file"),
        (["source.path=broken.jsonl"], "E_TABLE", 3, "broken.jsonl, line 2", "correct the line"),
        (["source.path=ragged.csv"], "E_TABLE", 3, "ragged.csv, line 3", "in quotes"),
        (["source.path=[pairs.parquet, other.parquet]"], "E_COLUMN", 3, "other.parquet: captions", "'caption'"),
        (["source.rooot=x"], "E_CONFIG_KEY", 2, "source.rooot", "did you mean 'source.root'?"),
        (["images.sise=3"], "E_CONFIG_KEY", 2, "images.sise", "did you mean 'images.size'?"),
        (["images.quality=101"], "E_CONFIG_VALUE", 2, "images.quality", "change the value"),
        (["shards.name=../x"], "E_CONFIG_VALUE", 2, "shards.name", "change the value"),
        (["source.name=tabel"], "E_CONFIG_CHOICE", 2, "tabel", "did you mean 'table'?"),
        (["source.path=empty.csv"], "E_PREP_EMPTY", 3, "table", "source.where"),
    ],
)
def test_prep_refuses_invalid_config_and_tables(
    tmp_path: Path,
    cli: Any,
    good: Path,
    arguments: list[str],
    code: str,
    exit_code: int,
    culprit: str,
    remedy: str,
) -> None:
    (tmp_path / "notes.txt").write_text("image caption")
    (tmp_path / "broken.parquet").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "broken.jsonl").write_text('{"image": "a", "captions": "b"}\n{"image": \n')
    (tmp_path / "ragged.csv").write_text("image,captions\na,b\nc,d,e\n")
    (tmp_path / "empty.csv").write_text("image,captions\n")
    pq.write_table(pa.table({"image": [b""], "caption": ["x"]}), tmp_path / "other.parquet")
    values = {"source.path": "pairs.parquet", "source.caption": "captions"}
    values.update(dict(argument.split("=", 1) for argument in arguments))
    overrides = [f"{key}={value}" for key, value in values.items()]
    error = cli.error("prep", "table", *overrides, "-o", "out", code=exit_code)
    assert error.startswith(f"error[{code}]") and culprit in error and remedy in error
    assert not (tmp_path / "out").exists()


def test_prep_rejects_bad_rows_and_writes_the_rest(tmp_path: Path, cli: Any, make_image: MakeImage) -> None:
    images = tmp_path / "images"
    images.mkdir()
    contents = {
        "good.jpg": make_image(0),
        "cut.jpg": make_image(1)[:300],
        "page.jpg": b"<!doctype html><title>404</title>",
        "none.jpg": b"",
        "bomb.png": bomb(),
        "nocap.jpg": make_image(2),
        "latin.jpg": make_image(3),
        "long.jpg": make_image(4),
    }
    for name, data in contents.items():
        (images / name).write_bytes(data)
    (tmp_path / "secret.jpg").write_bytes(make_image(9))
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "inside.jpg").symlink_to("good.jpg")
    lines = [f"{name},a picture".encode() for name in ("good.jpg", "cut.jpg", "page.jpg", "none.jpg", "bomb.png")]
    lines += [b"nocap.jpg,", b"latin.jpg,caf\xe9", b"long.jpg," + b"x" * 9000]
    lines += [
        b"link.jpg,x",
        b"../secret.jpg,x",
        b"absent.jpg,x",
        b",x",
        b".,x",
        b"/etc/hostname,x",
        b"inside.jpg,again",
    ]
    (tmp_path / "pairs.csv").write_bytes(b"image,caption\n" + b"\n".join(lines) + b"\n")
    result = cli.json("prep", "table", "source.path=pairs.csv", "source.root=images", "-o", "out")
    rows = {row["row"]: row for row in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}
    wanted = ["E_IMG_TRUNCATED", "E_IMG_FORMAT", "E_IMG_EMPTY", "E_IMG_PIXELS", "E_CAP_EMPTY", "E_CAP_ENCODING"]
    wanted += ["E_CAP_LONG", *["E_IMG_PATH"] * 6, "merged"]
    assert [rows[i]["reason"] for i in range(1, 15)] == wanted
    assert all(row["detail"] and row["source"] == f"pairs.csv#{row['row']}" for row in rows.values())
    assert "text/html" in rows[2]["detail"] and "900000000 pixels" in rows[4]["detail"]
    counts = ("rows_in", "written", "merged", "rejected")
    assert {name: result[name] for name in counts} == {"rows_in": 15, "written": 1, "merged": 1, "rejected": 13}
    assert result["rejects"]["E_IMG_PATH"] == 6 and result["shards"] == 1
    all_bytes = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "status.json")
    assert str(tmp_path).encode() not in all_bytes


def test_prep_without_usable_sample_fails_and_leaves_no_dataset(
    tmp_path: Path, cli: Any, make_image: MakeImage
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    (tmp_path / "pairs.tsv").write_text("image\tcaption\na.jpg\tx\nb.jpg\ty\n")
    arguments = ["prep", "table", "source.path=pairs.tsv", "-o", "out"]
    error = cli.error(*arguments, code=3)
    assert error.startswith("error[E_PREP_EMPTY]") and "E_IMG_FORMAT 1" in error and "rejects.parquet" in error
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "manifest.json" not in names and not [n for n in names if n.endswith((".tar", ".partial"))]
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["exit_code"], status["error"]["code"]) == (3, "E_PREP_EMPTY")
    (tmp_path / "a.jpg").write_bytes(make_image(0))  # with the input fixed, the same command works
    assert cli.json(*arguments)["written"] == 1


def test_prep_requires_output_and_dry_run_writes_nothing(tmp_path: Path, cli: Any, good: Path) -> None:
    arguments = ["prep", "table", "source.path=pairs.parquet", "source.caption=captions"]
    assert cli.error(*arguments, code=2).startswith("error[E_USAGE]")
    assert cli.json(*arguments, "--dry-run")["rows_in"] == 2
    assert cli.json(*arguments, "-o", "out", "--dry-run")["shards_at_most"] == 1
    assert not (tmp_path / "out").exists()
    done = cli(*arguments, "-o", "out", "--quiet")
    assert "2 rows in" in done.stdout and "next:" not in done.stdout and done.stderr == ""


def test_prep_modules_do_not_import_torch() -> None:
    code = (
        "import sys, clipwright.data_prep.cli; assert 'pyarrow' not in sys.modules; "
        "import clipwright.data_prep.build.pack; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
