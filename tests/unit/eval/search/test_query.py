"""Text and image queries, and models other than the one of the index."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipwright.eval.search.query import open_index, table
from clipwright.pipeline.core.tables import display_width


def test_text_query_as_json(cli, indexed, model):
    done = cli("search", indexed, "text=a  red\timage", "k=50", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["query"] == {"text": "a  red\timage"} and result["k"] == 50
    assert [hit["rank"] for hit in result["hits"]] == list(range(1, 8))  # the index has seven rows
    assert len({hit["key"] for hit in result["hits"]}) == 7
    scores = [hit["score"] for hit in result["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert open_index(indexed, model).search(text="a red image", k=50) == result["hits"]


def test_image_query_finds_the_image_itself(cli, image, indexed, tmp_path):
    searcher = open_index(indexed)
    for i in range(7):
        (tmp_path / "query.jpg").write_bytes(image(i))
        best = searcher.search(image=tmp_path / "query.jpg", k=1)[0]
        assert best["source_key"] == f"photos/{i}.jpg" and abs(best["score"] - 1) < 1e-3
    done = cli("search", indexed, f"image={tmp_path / 'query.jpg'}", "k=2")
    assert done.returncode == 0, done.stderr
    titles, first, _ = done.stdout.splitlines()
    assert titles.split() == ["image", "score", "caption"]
    assert first == "photos/6.jpg   1.000  a red image, number 6"


@pytest.mark.parametrize(
    ("query", "code", "exit_code", "named"),
    [
        ((), "E_USAGE", 2, ("text, image", "neither", "image=FILE")),
        (("text=a", "image=b"), "E_USAGE", 2, ("both",)),
        (("text=a", "k=0"), "E_CONFIG_VALUE", 2, ("k (command line)",)),
        (("text= ",), "E_CAP_EMPTY", 3, ("text",)),
        (("image=",), "E_CONFIG_VALUE", 2, ("image= without a value",)),
        (("image=.",), "E_INPUT", 3, ("Is a directory",)),
        (("image=none.jpg",), "E_INPUT", 3, ("none.jpg", "No such file", "check the path")),
        (("image=https://example.org/a.jpg",), "E_INPUT", 3, ("https://example.org/a.jpg", "download the image")),
        (("image=truncated.jpg",), "E_IMG_TRUNCATED", 3, ("truncated.jpg", "choose another image")),
        (("image=notes.txt", "-o", "page"), "E_IMG_FORMAT", 3, ("notes.txt",)),
    ],
)
def test_unusable_query_is_refused_before_index_and_model_are_read(
    quick_cli, refused, image, query, code, exit_code, named, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("truncated.jpg").write_bytes(image(0)[:300])
    Path("notes.txt").write_text("not an image")
    refused(quick_cli("search", "nowhere", *query), code, exit_code, *named)
    assert not Path("page").exists()


def test_table_fits_80_columns():
    def hit(caption: str | None, source_key: str | None = None, source: str | None = None) -> dict:
        return {"key": "k" * 32, "source": source, "source_key": source_key, "score": 0.5, "caption": caption}

    hits = [
        hit("한국어 " * 30, f"{'deep/' * 20}last name.jpg"),
        hit("a short\n caption", None, "list.csv#3"),
        hit(None),
    ]
    titles, long, short, bare = table({"hits": hits}).splitlines()
    assert titles.split() == ["image", "score", "caption"]
    assert max(map(display_width, (titles, long, short, bare))) <= 80
    assert long.startswith("…") and "deep/last name.jpg" in long and long.endswith("…") and "한국어 한국어" in long
    assert short.split(maxsplit=2) == ["list.csv#3", "0.500", "a short caption"]
    assert bare.split() == ["k" * 32, "0.500"]


def test_another_model_is_refused(quick_cli, refused, make_model, indexed, tmp_path):
    wider, other = make_model(tmp_path / "wider", dim=24), make_model(tmp_path / "other", seed=1)
    refused(quick_cli("search", indexed, "text=a", f"model={wider}"), "E_MODEL_DIM", 3, wider, "dimension 24", "has 16")
    ours = json.loads((other / "manifest.json").read_text())["fingerprint"][:16]
    theirs = json.loads((indexed / "versions/000001/manifest.json").read_text())["model"][:16]
    refused(quick_cli("search", indexed, "text=a", f"model={other}"), "E_FINGERPRINT", 3, other, ours, theirs)


def test_moved_index_asks_for_the_model_folder(cli, quick_cli, refused, indexed, model, tmp_path):
    moved = shutil.copytree(indexed, tmp_path / "deeper" / "index")
    refused(quick_cli("search", moved, "text=a"), "E_INPUT", 3, tmp_path, "no such folder", "model=DIR")
    missing = tmp_path / "renamed"
    refused(quick_cli("search", moved, "text=a", f"model={missing}"), "E_INPUT", 3, missing, "no such folder")
    assert cli("search", moved, "text=a", f"model={model}").returncode == 0
    (moved / "versions/000001/origin.json").unlink()
    refused(quick_cli("search", moved, "text=a"), "E_INPUT", 3, moved, "no path was recorded", "model=DIR")
    assert pq.read_schema(moved / "versions/000001/rows-00000.parquet").names[0] == "id"
