"""Text and image queries, and models other than the one of the index."""

import json
import shutil

import pyarrow.parquet as pq

from clipwright.eval.search.query import open_index


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
        assert best["source"] == f"{i}.jpg" and abs(best["score"] - 1) < 1e-3
    done = cli("search", indexed, f"image={tmp_path / 'query.jpg'}", "k=2")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[1]
    assert first.split()[0] == "1" and "image, number 6" in first and "6.jpg" in first


def test_unusable_queries_are_refused(quick_cli, refused, image, indexed, tmp_path):
    (tmp_path / "truncated.jpg").write_bytes(image(0)[:300])
    refused(quick_cli("search", indexed), "E_USAGE", 2, "text, image", "neither")
    refused(quick_cli("search", indexed, "text=a", "image=b"), "E_USAGE", 2, "both")
    refused(quick_cli("search", indexed, "text=a", "k=0"), "E_CONFIG_VALUE", 2, "k (command line)")
    refused(quick_cli("search", indexed, "text= "), "E_CAP_EMPTY", 3, "text")
    refused(quick_cli("search", indexed, f"image={tmp_path / 'none.jpg'}"), "E_INPUT", 3, tmp_path / "none.jpg")
    refused(
        quick_cli("search", indexed, f"image={tmp_path / 'truncated.jpg'}"),
        "E_IMG_TRUNCATED",
        3,
        tmp_path / "truncated.jpg",
    )


def test_another_model_is_refused(quick_cli, refused, make_model, indexed, tmp_path):
    wider, other = make_model(tmp_path / "wider", dim=24), make_model(tmp_path / "other", seed=1)
    refused(quick_cli("search", indexed, "text=a", f"model={wider}"), "E_MODEL_DIM", 3, wider, "dimension 24", "has 16")
    ours = json.loads((other / "manifest.json").read_text())["fingerprint"][:16]
    theirs = json.loads((indexed / "versions/000001/manifest.json").read_text())["model"][:16]
    refused(quick_cli("search", indexed, "text=a", f"model={other}"), "E_FINGERPRINT", 3, other, ours, theirs)


def test_moved_index_asks_for_the_model_folder(cli, refused, indexed, model, tmp_path):
    moved = shutil.copytree(indexed, tmp_path / "deeper" / "index")
    refused(cli("search", moved, "text=a"), "E_INPUT", 3, "model=DIR")
    assert cli("search", moved, "text=a", f"model={model}").returncode == 0
    assert pq.read_schema(moved / "versions/000001/rows-00000.parquet").names[0] == "id"
