"""The folder source: which files form rows, their captions and columns, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.sources.base import SOURCES, Source
from clipwright.pipeline import pixels
from clipwright.pipeline.core.errors import ClipwrightError

MakeImage, Write, Run = Callable[..., bytes], Callable[..., Path], Callable[..., Any]
KOREAN = "빨간 원"


def build(folder: Path, **fields: Any) -> Source:
    return SOURCES.build(SOURCES.preset("folder", path=str(folder), **fields))


@pytest.fixture
def images(tmp_path: Path, make_image: MakeImage) -> Path:
    """A folder with every kind of caption file, unusual names, links, and files that are not part of a pair."""
    folder = tmp_path / "images"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for i, name in enumerate(
        ("a.jpg", "b/c.PNG", "b/deep/d.e.jpeg", "b/f.jpg", ".hidden/x.jpg", ".y.jpg", "z.jpg.partial")
    ):
        (folder / name).write_bytes(make_image(i, format="PNG" if "PNG" in name else "JPEG"))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + f"first\r\n\n  \n{KOREAN}\n".encode())
    (folder / "a.json").write_text(json.dumps({"caption": "not taken", "n": 1, "width": 7, "tags": ["x"]}))
    (folder / "b" / "c.json").write_text(json.dumps({"caption": ["one", "two"], "n": 2.5, "ok": True, "odd": "text"}))
    (folder / "b" / "deep" / "d.e.TXT").write_text("dots")
    (folder / "b" / "f.json").write_text(json.dumps({"captions": ["under captions"], "n": None, "odd": 3}))
    (folder / "lone.txt").write_text("no image")
    (folder / ".hidden" / "x.txt").write_text("hidden")
    (folder / "link").symlink_to("b")
    return folder


def test_folder_reads_pairs_captions_and_columns(images: Path) -> None:
    source = build(images)
    source.scan(quiet=True)
    rows = list(source.read(range(source.count)))
    assert [(row.source, row.source_key) for row in rows] == [
        ("a.jpg", "a.jpg"),
        ("b/c.PNG", "b/c.PNG"),
        ("b/deep/d.e.jpeg", "b/deep/d.e.jpeg"),
        ("b/f.jpg", "b/f.jpg"),
    ]
    assert [row.captions for row in rows] == [["first", KOREAN], ["one", "two"], ["dots"], ["under captions"]]
    assert dict(zip(source.columns.names, source.columns.types, strict=True)) == {
        "n": pa.float64(),
        "width": pa.int64(),
        "ok": pa.bool_(),
    }
    assert [row.columns.to_pylist()[0]["n"] for row in rows] == [1.0, 2.5, None, None]
    assert any("tags, odd" in note for note in source.notes)
    assert "caption files without an image: 1, the first is lone.txt" in source.notes
    assert "linked folders that were not followed: 1, the first is link" in source.notes


def test_folder_with_custom_caption_key_and_encoding(tmp_path: Path, make_image: MakeImage) -> None:
    (tmp_path / "a.jpg").write_bytes(make_image(0))
    (tmp_path / "a.txt").write_bytes(KOREAN.encode("cp949"))
    (tmp_path / "b.jpg").write_bytes(make_image(1))
    (tmp_path / "b.json").write_bytes(json.dumps({"alt": KOREAN, "caption": "x"}, ensure_ascii=False).encode("cp949"))
    rows = list(build(tmp_path, encoding="cp949", caption="alt").read([0, 1]))
    assert [row.captions for row in rows] == [[KOREAN], [KOREAN]]


def test_identity_depends_on_names_and_content_not_location(images: Path, tmp_path: Path) -> None:
    before = build(images).identity()
    moved = images.rename(tmp_path / "elsewhere")
    assert build(moved).identity() == before
    (moved / "lone.txt").write_text("of no image")
    assert build(moved).identity() == before
    for change in (
        lambda: (moved / "a.txt").write_text("other words"),
        lambda: (moved / "a.jpg").write_bytes((moved / "b" / "f.jpg").read_bytes()),
        lambda: (moved / "a.jpg").rename(moved / "aa.jpg"),
    ):
        change()
        after = build(moved).identity()
        assert after != before
        before = after


def test_folder_and_table_give_the_same_keys(
    tmp_path: Path, write_table: Write, make_image: MakeImage, run_prep: Run
) -> None:
    image_bytes = [make_image(i) for i in range(12)]
    image_bytes[7] = image_bytes[2]
    table = write_table(image_bytes, [[f"caption {i}", KOREAN] for i in range(12)])
    (tmp_path / "images").mkdir()
    for i, data in enumerate(image_bytes):
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(data)
        (tmp_path / "images" / f"{i:02d}.txt").write_text(f"caption {i}\n{KOREAN}\n", encoding="utf-8")
    run_prep(tmp_path / "table", "source.name=table", f"source.path={table}", "source.caption=captions")
    shards = ("images.resize=longest", "images.size=32", "shards.samples=3")
    for workers in (1, 2):
        arguments = ("source.name=folder", f"source.path={tmp_path / 'images'}", *shards, f"runtime.workers={workers}")
        run_prep(tmp_path / f"folder{workers}", *arguments)
    rows = {
        name: [
            (row["key"], row["captions"])
            for path in sorted((tmp_path / name).glob("data-*.parquet"))
            for row in pq.read_table(path).to_pylist()
        ]
        for name in ("table", "folder1")
    }
    assert rows["table"] == rows["folder1"] and len(rows["table"]) == 11
    assert rows["table"][2] == (pixels.bytes_key(image_bytes[2]), ["caption 2", KOREAN, "caption 7"])
    assert content(tmp_path / "folder1") == content(tmp_path / "folder2")


def content(out: Path) -> dict[str, str]:
    keep = ("status.json", "config.yaml")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir()) if p.name not in keep}


def test_folder_run_resumes_after_failure(images: Path, tmp_path: Path, run_prep: Run, monkeypatch: Any) -> None:
    from clipwright.data_prep.build import shards

    arguments = ("source.name=folder", f"source.path={images}", "shards.samples=1")
    run_prep(tmp_path / "clean", *arguments)
    write = shards.write_json
    monkeypatch.setattr(
        shards, "write_json", lambda path, receipt: 1 / 0 if receipt["shard"] == 2 else write(path, receipt)
    )
    with pytest.raises(ZeroDivisionError):
        run_prep(tmp_path / "out", *arguments)
    monkeypatch.undo()
    assert (tmp_path / "out" / "plan.parquet").is_file() and not (tmp_path / "out" / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("data-00000[01].tar")}
    run_prep(tmp_path / "out", *arguments)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before and len(before) == 2
    assert content(tmp_path / "out") == content(tmp_path / "clean")


def test_rejects_name_the_file_and_the_remedy(images: Path, tmp_path: Path, cli: Any, make_image: MakeImage) -> None:
    os.mkfifo(images / "pipe.jpg")
    (tmp_path / "secret.jpg").write_bytes(make_image(90))
    (tmp_path / "secret.txt").write_text("secret words")
    (images / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    cases: dict[str, tuple[Any, str, list[str]]] = {
        "bare": (None, "E_CAP_EMPTY", ["no bare.txt or bare.json", "beside the image"]),
        "blank": (b" \n\n", "E_CAP_EMPTY", ["blank.txt", "has no caption"]),
        "korean": (
            KOREAN.encode("cp949"),
            "E_CAP_ENCODING",
            ["korean.txt is not utf-8", "0xbb at position 0", "set source."],
        ),
        "wide": (KOREAN.encode("utf-16"), "E_CAP_ENCODING", ["0xff at position 0", "source.encoding=utf-16"]),
        "unmarked": (b"w\0o\0r\0d\0", "E_CAP_ENCODING", ["unmarked.txt", "source.encoding=utf-16-le"]),
        "led": (tmp_path / "secret.txt", "E_CAP_FILE", ["led.txt", "leaves the root"]),
    }
    for i, (stem, (captions, _, _)) in enumerate(cases.items()):
        (images / f"{stem}.jpg").write_bytes(make_image(20 + i))
        if isinstance(captions, bytes):
            (images / f"{stem}.txt").write_bytes(captions)
        elif captions is not None:
            (images / f"{stem}.txt").symlink_to(captions)
    for stem, text in (("cut", '{"caption": "x"'), ("list", '["x"]'), ("object", '{"caption": {"en": "x"}}')):
        (images / f"{stem}.jpg").write_bytes(make_image(40 + len(stem)))
        (images / f"{stem}.json").write_text(text)
    (images / "new.jxl").write_bytes(b"\xff\x0a\0\0")
    (images / "new.txt").write_text("a format that is not read")
    result = cli.json("prep", "folder", "source.path=images", "-o", "out")
    rejects = {Path(r["source"]).stem: r for r in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}
    for stem, (_, code, arguments) in cases.items():
        assert rejects[stem]["reason"] == code, stem
        assert all(word in rejects[stem]["detail"] for word in arguments), rejects[stem]["detail"]
    wanted = {
        "cut": "E_CAP_FILE",
        "list": "E_CAP_FILE",
        "object": "E_CAP_FILE",
        "new": "E_IMG_FORMAT",
        "pipe": "E_IMG_PATH",
        "out": "E_IMG_PATH",
    }
    assert {stem: rejects[stem]["reason"] for stem in wanted} == wanted and len(rejects) == len(cases) + len(wanted)
    assert (result["rows_in"], result["written"], result["rejected"]) == (16, 4, 12)
    assert any("lone.txt" in note for note in result["notes"])
    all_bytes = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "status.json")
    assert b"secret words" not in all_bytes and str(tmp_path).encode() not in all_bytes


def test_unreadable_text_file_counts_as_dropped_caption(tmp_path: Path, make_image: MakeImage, run_prep: Run) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(make_image(0))
    (tmp_path / "images" / "a.txt").write_bytes(KOREAN.encode("cp949"))
    (tmp_path / "images" / "a.json").write_text(json.dumps({"caption": "red circle"}))
    manifest = run_prep(tmp_path / "out", "source.name=folder", f"source.path={tmp_path / 'images'}").manifest
    assert (manifest["written"], manifest["captions"], manifest["captions_dropped"]) == (1, 1, 1)


def test_notes_escape_control_characters_in_names(tmp_path: Path, make_image: MakeImage) -> None:
    (tmp_path / "a.jpg").write_bytes(make_image(0))
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "new\nline\x1b[2J.txt").write_text("of no image")
    assert build(tmp_path).notes == ["caption files without an image: 1, the first is new\\nline\\x1b[2J.txt"]


def test_duplicate_provides_the_missing_caption(tmp_path: Path, make_image: MakeImage, run_prep: Run) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(make_image(0))
    (tmp_path / "images" / "b.txt").write_text("words of b")
    manifest = run_prep(tmp_path / "out", "source.name=folder", f"source.path={tmp_path / 'images'}").manifest
    assert (manifest["written"], manifest["merged"], manifest["rejected"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code", "culprit", "remedy"),
    [
        (["source.path=nowhere"], "E_INPUT", 3, "nowhere", "check the path"),
        (["source.path=file.csv"], "E_INPUT", 3, "file.csv", "prep table"),
        (["source.path=empty"], "E_PREP_EMPTY", 3, "empty", "source.path"),
        (["source.path=bare"], "E_PREP_EMPTY", 3, "bare", "beside a.jpg"),
        (["source.path=bare", "source.encoding=klingon"], "E_CONFIG_VALUE", 2, "klingon", "cp949"),
        (["source.path=bare", "source.encoding=hex"], "E_CONFIG_VALUE", 2, "hex", "utf-8"),
    ],
)
def test_prep_folder_refuses_invalid_input(
    tmp_path: Path,
    make_image: MakeImage,
    cli: Any,
    arguments: list[str],
    code: str,
    exit_code: int,
    culprit: str,
    remedy: str,
) -> None:
    (tmp_path / "file.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("words")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.jpg").write_bytes(make_image(0))
    (tmp_path / "bare" / "other.txt").write_text("words of another stem")
    error = cli.error("prep", "folder", *arguments, "-o", "out", code=exit_code)
    assert error.startswith(f"error[{code}]") and culprit in error and remedy in error
    assert not (tmp_path / "out").exists()


def test_image_changed_during_a_run_stops_it(
    images: Path, tmp_path: Path, run_prep: Run, make_image: MakeImage
) -> None:
    from clipwright.data_prep.sources import folder

    scan = folder.FolderSource.scan
    with pytest.MonkeyPatch.context() as patch:

        def change(self: Any, *, quiet: bool = False) -> None:
            scan(self, quiet=quiet)
            (images / "a.jpg").write_bytes(make_image(77))

        patch.setattr(folder.FolderSource, "scan", change)
        with pytest.raises(ClipwrightError) as caught:
            run_prep(tmp_path / "out", "source.name=folder", f"source.path={images}")
    assert caught.value.code == "E_INPUT" and "a.jpg" in str(caught.value)


def test_names_of_caption_files(tmp_path: Path, make_image: MakeImage) -> None:
    """Every common name of a caption file is found; an exact stem wins over a language."""
    accent, decomposed = "caf\u00e9", "cafe\u0301"
    files = {
        "a.jpg": {"a.jpg.txt": "name and ending"},
        "b.jpg": {"b.caption": "caption"},
        "c.jpg": {"c.ko.txt": "korean", "c.en.txt": "english", "c.txt": "plain", "c.caption": "last"},
        f"{accent}.jpg": {f"{decomposed}.txt": "decomposed"},
        f"{decomposed}s.jpg": {f"{accent}s.en.txt": "composed"},
        "d.jpg": {"d.txt": "of d"},
        "d.en.jpg": {"d.en.txt": "of d.en"},
        "E.JPG": {"E.TXT": "upper case"},
        "f.jpg": {"f.JSON": json.dumps({"text": "text", "blip_caption": "kept as a column"})},
        "g.jpg": {"g.json": json.dumps({"blip_caption": "blip"})},
        "h.jpg": {"h.json": json.dumps({"captions": ["one", "two"], "caption": "c"}), "h.txt": "first of a list"},
        "i.jpg": {"i.json": json.dumps({"caption": "not taken", "n": 1}), "i.txt": "text"},
        "j.jpg": {"j.jpg.json": json.dumps({"caption": "json beside the name", "n": 2})},
    }
    for number, (image, texts) in enumerate(files.items()):
        (tmp_path / image).write_bytes(make_image(number))
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
    source = build(tmp_path)
    source.scan(quiet=True)
    rows = {row.source: row for row in source.read(range(source.count))}
    assert {name: row.captions for name, row in rows.items()} == {
        "a.jpg": ["name and ending"],
        "b.jpg": ["caption"],
        "c.jpg": ["plain", "english", "korean", "last"],
        f"{accent}.jpg": ["decomposed"],
        f"{decomposed}s.jpg": ["composed"],
        "d.jpg": ["of d"],
        "d.en.jpg": ["of d.en"],
        "E.JPG": ["upper case"],
        "f.jpg": ["text"],
        "g.jpg": ["blip"],
        "h.jpg": ["one", "two"],
        "i.jpg": ["text"],
        "j.jpg": ["json beside the name"],
    }
    assert rows["f.jpg"].columns.to_pylist() == [{"blip_caption": "kept as a column", "n": None, "caption": None}]
    assert rows["h.jpg"].columns.to_pylist()[0]["caption"] == "c" and rows["i.jpg"].columns.to_pylist()[0]["n"] == 1
    english = build(tmp_path, text_suffixes=[".en.txt"], caption=["blip_caption"], text="whole")
    by_name = {row.source: row.captions for row in english.read(range(english.count))}
    assert by_name["c.jpg"] == ["english"] and by_name["f.jpg"] == ["kept as a column"]
    assert [code for code, _ in by_name["h.jpg"]] == ["E_CAP_EMPTY"] and by_name["d.jpg"] == ["of d.en"]


def test_files_that_a_folder_brings_are_counted(tmp_path: Path, make_image: MakeImage, cli: Any) -> None:
    """Files of the operating system, links in circles, odd names and deep trees: used, or counted in a note."""
    folder = tmp_path / "photos"
    deep = "/".join(["d"] * 300)
    for name in ("a.jpg", "a.png", "__MACOSX/._a.jpg", "__MACOSX/b.jpg", ".x.jpg", ".cache/c.jpg", f"{deep}/e.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_image(len(name), format="PNG" if name.endswith("png") else "JPEG"))
    for name in (
        "a.txt",
        "lone.txt",
        f"{deep}/e.txt",
        "latin.txt",
        "readme.md",
        "Thumbs.db",
        ".DS_Store",
        "desktop.ini",
    ):
        (folder / name).write_text(name[-8:])
    latin = os.fsencode(folder) + b"/caf\xe9"
    for suffix, data in ((b".jpg", make_image(50)), (b".txt", b"latin name")):
        with open(latin + suffix, "wb") as file:  # noqa: PTH123  bytes that are not UTF-8
            file.write(data)
    (folder / "circle").symlink_to(".")
    (folder / "self.jpg").symlink_to("self.jpg")
    result = cli.json("prep", "folder", "source.path=photos", "-o", "out")
    assert (result["rows_in"], result["written"]) == (5, 4) and result["rejects"] == {"E_IMG_PATH": 1}
    rows = {
        row["source"]: row["captions"] for row in pq.read_table(tmp_path / "out" / "data-000000.parquet").to_pylist()
    }
    assert rows == {
        "a.jpg": ["a.txt"],
        "a.png": ["a.txt"],
        "caf\\udce9.jpg": ["latin name"],
        f"{deep}/e.jpg": ["/d/e.txt"],
    }
    assert result["notes"] == [
        "caption files without an image: 2, the first is latin.txt",
        "images that share their caption files with another image of the same stem: 2, the first is a.jpg",
        "linked folders that were not followed: 1, the first is circle",
        "hidden images that were ignored: 1, the first is .x.jpg",
    ]
    # A folder that cannot be read may hold any number of images. A path beyond the system's limit is one, for root too.
    limit = "n" * 250
    place = os.open(folder, os.O_RDONLY)
    for _ in range(17):
        os.mkdir(limit, dir_fd=place)
        inner = os.open(limit, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    error = cli.error("prep", "folder", "source.path=photos", "-o", "out2", code=3)
    assert error.startswith("error[E_INPUT]") and limit in error and "name too long" in error and "move it out" in error
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("suffix", ["txt", ".json", ".", "./x"])
def test_unusable_endings_are_refused(tmp_path: Path, cli: Any, suffix: str) -> None:
    (tmp_path / "photos").mkdir()
    command = ("prep", "folder", "source.path=photos", f"source.text_suffixes=[{suffix}]", "-o", "out")
    error = cli.error(*command, code=2)
    assert error.startswith("error[E_CONFIG_VALUE]") and f"source.text_suffixes: {suffix}" in error
    assert "[.txt, .caption]" in error
