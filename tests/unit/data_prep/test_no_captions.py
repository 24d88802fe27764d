"""Images without captions: how they are offered, stored, inspected, and where captions are required."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

MakeImage = Callable[..., bytes]


def test_images_without_captions_become_a_dataset(tmp_path: Path, cli: Any, make_image: MakeImage) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    names = ("a.jpg", "b.png", "sub/c.jpg", "copy.jpg")
    for number, name in zip((0, 1, 2, 0), names, strict=True):
        (tmp_path / "photos" / name).write_bytes(make_image(number, format="PNG" if "png" in name else "JPEG"))
    error = cli.error("prep", "folder", "source.path=photos", "-o", "out", code=3)
    assert error.startswith("error[E_PREP_EMPTY]") and "4 images" in error and "add source.caption=none" in error

    (tmp_path / "photos" / "a.txt").write_text("not read")
    (tmp_path / "photos" / "b.json").write_text(json.dumps({"caption": "a column", "n": 3}))
    command = ("prep", "folder", "source.path=photos", "-o", "out", "source.caption=none")
    done = cli(*command)
    assert "next: clipwright embed model=MODEL data=out" in done.stdout + done.stderr
    result = cli.json(*command)
    assert (result["written"], result["merged"], result["rejects"]) == (3, 1, {})
    assert any(
        "text files that were not read" in note and note.endswith(": 1, the first is a.txt") for note in result["notes"]
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["captions"], manifest["captions_dropped"]) == (0, 0)
    rows = pq.read_table(tmp_path / "out" / "data-000000.parquet").to_pylist()
    assert [(row["captions"], row["caption"], row["n"]) for row in rows] == [
        ([], None, None),
        ([], "a column", 3),
        ([], None, None),
    ]
    with tarfile.open(tmp_path / "out" / "data-000000.tar") as tar:
        members = {member.name: member for member in tar}
        assert [name.rpartition(".")[2] for name in members] == ["jpg", "json", "json", "png", "jpg", "json"]
        for row in rows:
            opened = tar.extractfile(f"{row['key']}.json")
            assert opened is not None and json.load(opened)["captions"] == []
            assert any(member.offset_data == row["offset"] for member in members.values())

    assert cli.json("data", "verify", "out")["ok"]
    shown = cli.json("data", "stats", "out")
    assert (shown["captions"], shown["captions_per_image"]["max"], shown["caption_words"]) == (0, 0, {})
    assert "script" not in cli("data", "stats", "out").stdout
    assert cli.json("data", "view", "out", "-o", "pages")["kept"] == 3
    assert "no caption" in (tmp_path / "pages" / "view.html").read_text(encoding="utf-8")

    error = cli.error("train", "photos", "data.train=out", "-o", "run", code=3)
    assert error.startswith("error[E_CAP_EMPTY]") and "— out —" in error and "source.caption=none" in error
    assert not (tmp_path / "run").exists()


def test_verify_finds_a_text_that_the_sidecar_does_not_have(tmp_path: Path, run_prep: Any, make_image: Any) -> None:
    """A dataset whose sidecar states no captions, over a tar with a text member."""
    from clipwright.data_prep.inspect.verify import verify

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(make_image(0))
    (tmp_path / "photos" / "a.txt").write_text("words")
    for out, caption in (("with", "caption"), ("without", "none")):
        run_prep(
            tmp_path / out, "source.name=folder", f"source.path={tmp_path / 'photos'}", f"source.caption={caption}"
        )
    (tmp_path / "without" / "data-000000.tar").write_bytes((tmp_path / "with" / "data-000000.tar").read_bytes())
    faults = [fault["problem"] for fault in verify(tmp_path / "without", quiet=True)["faults"]]
    assert len(faults) == 1 and "captions" in faults[0]


def test_tars_without_captions_are_indexed(tmp_path: Path, cli: Any, make_image: MakeImage) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(make_image(number))
            tar.addfile(member, io.BytesIO(make_image(number)))
    error = cli.error("data", "index", "tars", code=3)
    assert error.startswith("error[E_PREP_EMPTY]") and "E_CAP_EMPTY 3" in error and "add caption=none" in error
    assert cli.json("data", "index", "tars", "caption=none")["written"] == 3
    assert cli.json("data", "verify", "tars")["ok"] and cli.json("data", "stats", "tars")["captions"] == 0
