"""`data view`: the content of the page, escaping of captions, and a missing or changed source."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from clipwright.data_prep.inspect.view import ViewConfig, view

MakeImage = Callable[..., bytes]


def page(dataset: Path, out: Path, **fields: Any) -> tuple[str, dict[str, Any]]:
    result = view(ViewConfig(data=str(dataset), **fields), out, quiet=True)
    return (out / "view.html").read_text(encoding="utf-8"), result


def rejects(dataset: Path) -> dict[str, str]:
    return {row["reason"]: row["detail"] for row in pq.read_table(dataset / "rejects.parquet").to_pylist()}


def embedded_images(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(d))) for d in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)]


def test_page_shows_counts_kept_and_rejected_pairs(dataset: Path, tmp_path: Path) -> None:
    text, result = page(dataset, tmp_path / "pages")
    assert (result["kept"], result["rejected"], result["problem"]) == (10, 2, "")
    for number, label in ((13, "rows in"), (10, "written"), (1, "merged"), (2, "rejected")):
        assert f"<b>{number}</b> {label}" in text
    assert "E_<wbr>IMG_<wbr>TRUNCATED" in text and "the image cannot be decoded" in text
    assert rejects(dataset)["E_IMG_TRUNCATED"] in text and rejects(dataset)["E_CAP_EMPTY"] in text
    assert "빨간 원" in text and "猫とねこ" in text and "W" * 200 in text and "W" * 300 not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold&lt;/b&gt;" in text and text.count("<script") == 1
    # Ten kept images and the one rejected for its caption, all small.
    assert len(embedded_images(text)) == 11 and all(max(image.size) <= 160 for image in embedded_images(text))
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["view.html"]


def test_kept_pairs_are_spread_and_seeded(dataset: Path, tmp_path: Path) -> None:
    drawn = [page(dataset, tmp_path / f"{i}", kept=3, rejected=1, seed=seed)[0] for i, seed in enumerate((1, 1, 2))]
    assert drawn[0] == drawn[1] != drawn[2]
    sources = [int(n) for n in re.findall(r"pairs.parquet#(\d+) · [0-9a-f]{12}", drawn[0])]
    assert len(sources) == 3 and sources[0] < 4 <= sources[1] < 9 <= sources[2]
    none, result = page(dataset, tmp_path / "none", kept=0, rejected=0)
    assert (result["kept"], result["rejected"]) == (0, 0) and not embedded_images(none)


def test_missing_or_changed_source_is_reported_on_the_page(
    dataset: Path, tmp_path: Path, write_table: Callable[..., Path], make_image: MakeImage
) -> None:
    write_table([make_image(i) for i in range(100, 112)], [["other"]] * 12, n=list(range(12)))
    text, result = page(dataset, tmp_path / "changed")
    assert result["problem"] == "" and "the source has changed" in text and len(embedded_images(text)) == 10
    (tmp_path / "pairs.parquet").unlink()
    text, result = page(dataset, tmp_path / "moved")
    assert "The source cannot be read again" in text and "the input file does not exist" in result["problem"]
    assert "E_<wbr>CAP_<wbr>EMPTY" in text and "nothing but white space" in text and len(embedded_images(text)) == 10
    (dataset / "config.yaml").unlink()
    assert "cannot be read again" in page(dataset, tmp_path / "bare")[1]["problem"]


def test_plugin_named_by_a_dataset_is_not_run(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = dataset / "config.yaml"
    config.write_text(config.read_text() + f"plugins: [{tmp_path / 'evil.py'}]\n")
    assert "plugin" in page(dataset, tmp_path / "pages")[1]["problem"] and not (tmp_path / "ran").exists()


def test_changed_image_is_not_shown(dataset: Path, tmp_path: Path) -> None:
    tar = dataset / "data-000002.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    text, _ = page(dataset, tmp_path / "pages")
    assert text.count("has changed; run clipwright data verify") == 3 and len(embedded_images(text)) == 8
    tar.unlink()
    assert "No such file" in page(dataset, tmp_path / "pages")[0]


def test_command_resolves_source_relative_to_the_prep_folder(
    dataset: Path, tmp_path: Path, cli: Any, make_image: MakeImage
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(6):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(make_image(i))
        (tmp_path / "images" / f"{i}.txt").write_bytes("빨간 원".encode("cp949" if i == 3 else "utf-8"))
    cli("prep", "folder", "source.path=images", "-o", "made")
    result = cli.json("data", "view", tmp_path / "made", "-o", tmp_path / "pages", "rejected=5")
    assert (result["kept"], result["rejected"], result["problem"]) == (5, 1, "")
    (tmp_path / "elsewhere").mkdir()
    cli.folder = tmp_path / "elsewhere"
    assert cli.json("data", "view", "../made", "-o", "pages")["problem"] == ""
    text = (tmp_path / "elsewhere" / "pages" / "view.html").read_text(encoding="utf-8")
    assert len(embedded_images(text)) == 6 and "3.txt is not utf-8" in text and "source.encoding=" in text


def test_foreign_output_folder_is_refused_unchanged(dataset: Path, cli: Any) -> None:
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    error = cli.error("data", "view", "data", "-o", "data", code=2)
    assert error.startswith("error[E_OUTPUT]") and "data" in error and "name a new folder" in error
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before
    assert json.loads(cli("data", "view", "data", "-o", "pages", "--dry-run", "--json").stdout) == {"data": "data"}
    assert cli.error("data", "view", "data", code=2).startswith("error[E_USAGE]")


def test_page_in_a_browser(dataset: Path, tmp_path: Path, look: Any) -> None:
    page(dataset, tmp_path / "pages")
    for width in (1280, 390):
        rendered = look(tmp_path / "pages" / "view.html", width)
        assert (rendered.errors, rendered.requests, rendered.overflow) == ([], [], 0)
        for text in ("<script>alert(1)</script>", "빨간 원", "E_IMG_TRUNCATED"):
            assert text in rendered.text


def test_filters_and_pages_in_a_browser(
    tmp_path: Path, cli: Any, write_table: Callable[..., Path], make_image: MakeImage, browser: Any
) -> None:
    images = [make_image(i, height=24 + i) for i in range(60)] + [b"", b"text"]
    write_table(images, [[f"caption {i}"] for i in range(62)], n=list(range(62)))
    cli("prep", "table", "source.path=pairs.parquet", "source.caption=captions", "-o", "many")
    cli("data", "view", "many", "-o", "pages")
    tab = browser.new_page(viewport={"width": 390, "height": 900})
    try:
        tab.goto((tmp_path / "pages" / "view.html").as_uri())
        kept = tab.locator("#kept-pairs [data-item]:visible")
        form, output = tab.locator("form[data-target=kept-pairs]"), tab.locator("form[data-target=kept-pairs] output")
        assert kept.count() == 48 and output.inner_text() == "page 1 of 2 (60 of 60)"
        # One column on a phone.
        assert {round(kept.nth(i).bounding_box()["x"]) for i in range(4)} == {round(kept.first.bounding_box()["x"])}
        form.locator("button[name=next]").click()
        assert kept.count() == 12 and "caption 59" in kept.last.inner_text()
        form.locator("[data-key=text]").fill("CAPTION 1")
        assert kept.count() == 11 and output.inner_text() == "11 of 60"
        form.locator("[data-key=text]").fill("")
        form.locator("[data-key=height]").fill("80")
        assert kept.count() == 4
        form.locator("[data-key=source]").fill("#57")
        assert kept.count() == 1
        rejected = tab.locator("#rejected-rows [data-item]:visible")
        assert rejected.count() == 2 and tab.locator("#rejected-rows h3:visible").count() == 2
        tab.locator("select[data-key=reason]").select_option("E_IMG_EMPTY")
        assert rejected.count() == 1 and tab.locator("#rejected-rows h3:visible").inner_text() == "E_IMG_EMPTY"
    finally:
        tab.close()
    # Without the script, everything is shown.
    context = browser.new_context(java_script_enabled=False)
    try:
        tab = context.new_page()
        tab.goto((tmp_path / "pages" / "view.html").as_uri())
        assert tab.locator("#kept-pairs [data-item]:visible").count() == 60
        assert tab.locator("form:visible").count() == 0
    finally:
        context.close()
