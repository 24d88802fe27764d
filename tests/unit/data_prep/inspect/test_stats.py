"""`data stats`: statistics checked against manual counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipwright.data_prep.inspect.stats import script, stats


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a red circle", "Latin"),
        ("été à la plage", "Latin"),
        ("빨간 원 3", "Hangul"),
        ("红色的圆", "Han"),
        ("猫とねこ", "Kana"),
        ("カメラー", "Kana"),
        ("красный круг", "Cyrillic"),
        ("دائرة حمراء", "Arabic"),
        ("κόκκινος", "Greek"),
        ("עיגול", "Hebrew"),
        ("लाल", "Devanagari"),
        ("빨간 circle", "mixed"),
        ("12:30 — №5 🙂", "none"),
    ],
)
def test_script_of_caption(text: str, wanted: str) -> None:
    assert script(text) == wanted


def test_statistics_match_manual_counts(dataset: Path) -> None:
    result = stats(dataset, quiet=True)
    assert (result["samples"], result["shards"], result["rows_in"], result["rejected"]) == (10, 3, 13, 2)
    # Widths 40, 48, … 136 without those of rows 5 (merged), 8 and 11 (rejected); all 48 high.
    widths = sorted({40 + 8 * i for i in range(13)} - {80, 104, 128})
    assert (result["width"]["min"], result["width"]["max"]) == (40, 136)
    assert result["width"]["mean"] == sum(widths) / 10 and result["height"]["median"] == 48
    assert result["aspect"]["max"] == round(136 / 48, 3)
    assert result["shortest_side_histogram"] == {"32-64": 10}
    assert sum(result["aspect_histogram"].values()) == 10 and result["aspect_histogram"]["1-1.01"] == 1
    # 8 samples of two captions, one of them with a third from its duplicate; one of three, one of one.
    assert result["captions"] == 7 * 2 + 3 + 3 + 1 and result["captions_per_image"]["max"] == 3
    assert result["caption_characters"]["max"] == 300 and result["caption_words"]["max"] == 3
    assert result["scripts"] == {"Latin": 19, "Hangul": 1, "Kana": 1}
    assert result["duplicates"]["exact_merged"] == 1
    assert result["equal_captions"]["top"] == [{"caption": "a red circle", "images": 8}]
    assert result["equal_captions"]["repeated"] == 1 and result["equal_captions"]["distinct"] == 14
    assert result["rejects"] == {"E_CAP_EMPTY": 1, "E_IMG_TRUNCATED": 1}


def test_near_duplicates_are_counted(tmp_path: Path, write_table: Any, run_prep: Any, make_image: Any) -> None:
    images = [make_image(0), make_image(0, quality=95), make_image(1), make_image(2)]
    table = write_table(images, [[f"{i}"] for i in range(4)])
    run_prep(tmp_path / "out", "source.name=table", f"source.path={table}", "source.caption=captions")
    assert stats(tmp_path / "out", quiet=True)["duplicates"] == {"exact_merged": 0, "near_groups": 1, "near_images": 2}


def test_command_prints_a_table_or_json(dataset: Path, tmp_path: Path, cli: Any) -> None:
    before = {path.name for path in dataset.iterdir()}
    text = cli("data", "stats", "data", "-o", "report").stdout
    for text_part in ("10 samples in 3 shards", "characters", "Hangul", "E_IMG_TRUNCATED", "8 × a red circle"):
        assert text_part in text
    assert (tmp_path / "report" / "report.json").is_file() and {path.name for path in dataset.iterdir()} == before
    assert cli.json("data", "stats", "data") == stats(dataset, quiet=True) | {"data": "data"}
    (dataset / "data-000001.parquet").unlink()
    error = cli.error("data", "stats", "data", code=3)
    assert error.startswith("error[E_DATA_HASH]") and "data-000001.parquet" in error and "data verify" in error
    error = cli.error("data", "stats", "data", "-o", "data", code=2)
    assert "E_OUTPUT" in error and {path.name for path in dataset.iterdir()} == before - {"data-000001.parquet"}
