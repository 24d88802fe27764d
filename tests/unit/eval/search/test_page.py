"""The page of a search: hits with images of the dataset, offline, and safe with any caption."""

import json
import re
import shutil

import pytest

ATTACK = "</div><script>document.body.textContent='taken'</script><img src=x onerror=alert(1)> {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def searched(tmp_path_factory, cli, make_dataset, model):
    """An index of five images beside its dataset; the caption of one image is an attack, two have long ones."""
    folder = tmp_path_factory.mktemp("searched")
    captions = {1: [ATTACK], 2: ["word " * 200], 3: ["unbroken" * 60], 4: []}
    data = make_dataset(folder / "data", 5, shard=2, captions=lambda i: captions.get(i, [f"image {i}"]))
    assert cli("embed", f"model={model}", f"data={data}", "-o", folder / "embeddings").returncode == 0
    built = cli("index", "build", "flat", f"embeddings={folder / 'embeddings'}", "-o", folder / "index")
    assert built.returncode == 0, built.stderr
    return folder


def images(page) -> int:
    return len(re.findall(r'<img src="data:image/jpeg', page.read_text(encoding="utf-8")))


def test_page_shows_the_hits(quick_cli, searched, image, look, tmp_path):
    out = tmp_path / "hits"
    (tmp_path / "query.jpg").write_bytes(image(3))
    done = quick_cli("search", searched / "index", f"image={tmp_path / 'query.jpg'}", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert result.pop("page") == str(out / "report.html") and result == report
    assert (report["format"], report["images"], report["problem"]) == ("report", 5, "")
    assert report["hits"][0]["source_key"] == "photos/3.jpg"
    assert images(out / "report.html") == 6  # five hits and the query
    for width in (390, 1280):
        seen = look(out / "report.html", width)
        assert not seen.errors and not seen.requests and seen.overflow == 0
        assert "1. photos/3.jpg" in seen.text and ATTACK in seen.text and "no caption" in seen.text
    assert f"page {out / 'report.html'}" in quick_cli("search", searched / "index", "text=a", "-o", out).stdout
    assert images(out / "report.html") == 5


def test_page_without_the_dataset_keeps_captions(quick_cli, refused, searched, make_dataset, tmp_path, model):
    index, out = shutil.copytree(searched / "index", tmp_path / "index"), tmp_path / "hits"
    arguments = ("search", index, "text=a", f"model={model}", "-o", out)
    done = quick_cli(*arguments)
    assert done.returncode == 0 and "data=DIR" in done.stdout, done.stderr
    page = (out / "report.html").read_text(encoding="utf-8")
    assert images(out / "report.html") == 0 and page.count("image not available") == 5 and "data=DIR" in page
    assert "unbroken" in page and "photos/2.jpg" in page
    assert json.loads((out / "report.json").read_text())["images"] == 0
    assert quick_cli(*arguments, f"data={searched / 'data'}").returncode == 0
    assert images(out / "report.html") == 5
    other = make_dataset(tmp_path / "other", 3)
    refused(quick_cli(*arguments, f"data={other}"), "E_FINGERPRINT", 3, other, "data=DIR")
    refused(quick_cli(*arguments, f"data={tmp_path / 'gone'}"), "E_INPUT", 3, tmp_path / "gone")
    # The recorded place now has another dataset; then it has the dataset, with an image that changed.
    (index / "versions/000001/origin.json").write_text(json.dumps({"data": str(other)}))
    assert "is no longer the dataset of the index" in quick_cli(*arguments).stdout
    (index / "versions/000001/origin.json").write_text(json.dumps({"data": "https://example.invalid/data"}))
    assert "The dataset is remote. To fetch its images: data=https://" in quick_cli(*arguments).stdout
    data = shutil.copytree(searched / "data", tmp_path / "data")
    tar = data / "set-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe", 1))
    assert quick_cli(*arguments, f"data={data}").returncode == 0
    assert images(out / "report.html") == 4 and "image cannot be read" in (out / "report.html").read_text()


def test_page_is_not_written_among_other_files(quick_cli, refused, indexed, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(quick_cli("search", indexed, "text=a", "-o", tmp_path), "E_OUTPUT", 2, tmp_path, "notes.txt")
    assert not (tmp_path / "report.html").exists()
