"""Rendered scenes: images, captions in each language, and stable bytes of both."""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipwright.data_prep.build.pack import Prepared
from clipwright.data_prep.sources.base import SOURCES, Record, Source
from clipwright.data_prep.sources.scenes import drawing
from clipwright.data_prep.sources.scenes.grammar import ENGLISH, KOREAN, Grammar, Scene, particle
from clipwright.data_prep.sources.scenes.source import held_out
from clipwright.pipeline import pixels
from clipwright.pipeline.core.captions import normalize


def build(**fields: Any) -> Source:
    return SOURCES.build(SOURCES.preset("scenes", **fields))


def rows(source: Source) -> list[Record]:
    return list(source.read(range(source.count)))


def test_held_out_pairs_depend_on_the_seed_and_are_never_trained_on() -> None:
    sets = {seed: held_out(seed) for seed in range(40)}
    assert len(set(sets.values())) == 40
    for pairs in sets.values():
        assert len(pairs) == 10 and max(Counter(c for c, _ in pairs).values()) <= 2 >= max(
            Counter(s for _, s in pairs).values()
        )
    pairs_shown: dict[str, set[tuple[str, str]]] = {}
    for which in ("train", "held_out", "all"):
        source = build(count=1500, image_size=16, seed=3, combinations=which)
        rows = [record.columns.to_pylist()[0] for record in source.read(range(source.count))]
        pairs_shown[which] = {(row["colour"], row["shape"]) for row in rows}
        assert all(
            row["held_out"] == ((row["colour"], row["shape"]) in pairs_shown["held_out"])
            for row in rows
            if which == "held_out"
        )
        assert {row["count"] for row in rows} == {1, 2, 3}
        assert sum(row["count"] == 1 for row in rows) > 900
    named = {(ENGLISH.colours[c], ENGLISH.shapes[s]) for c, s in sets[3]}
    assert pairs_shown["held_out"] == named and len(pairs_shown["train"]) == 38 and not pairs_shown["train"] & named
    assert pairs_shown["all"] == pairs_shown["train"] | named


def test_captions_describe_the_scene() -> None:
    source = build(count=800, image_size=16, combinations="all")
    positions: Counter[str] = Counter()
    for record in source.read(range(source.count)):
        (row,) = record.columns.to_pylist()
        assert 2 <= len(set(map(str, record.captions))) == len(record.captions) <= 3
        for text in map(str, record.captions):
            assert row["colour"] in text and row["shape"] in text and "{" not in text
            assert " a orange" not in f" {text}" and " an " not in text.replace("an orange", "")
            number = [n for n in ("two", "three") if f"{n} " in text]
            assert number == ([] if row["count"] == 1 else [("two", "three")[row["count"] - 2]])
            assert [s for s in ("small", "medium", "large") if s in text] in ([], [row["size"]])
            if row["position"] and " the " in text and text.endswith(row["position"]):
                positions[row["position"]] += 1
    assert len(positions) == 9


def test_images_differ_by_seed_and_split_and_keep_their_bytes() -> None:
    images = [r.image for r in build(count=64).read(range(64))]
    keys = {pixels.pixel_key(image) for image in images if isinstance(image, np.ndarray)}
    assert len(keys) == 64
    for seed, split in ((1, "train"), (0, "test")):
        other = build(count=64, seed=seed, split=split)
        assert not keys & {pixels.pixel_key(r.image) for r in other.read(range(64)) if isinstance(r.image, np.ndarray)}
    flat = [np.mean(np.diff(image.astype(int), axis=1) == 0) for image in images if isinstance(image, np.ndarray)]
    assert max(flat) < 0.6 and np.mean(flat) < 0.3  # no flat backgrounds
    # Exactly these pixels on every machine, because only exactly rounded operations compute them.
    first = images[0]
    assert isinstance(first, np.ndarray) and pixels.pixel_key(first) == "e9eb3785f252b846c428274bda9c5a91"


@pytest.mark.parametrize("shape", range(len(ENGLISH.shapes)))
def test_drawn_area_matches_the_shape(shape: int) -> None:
    """Compares coverage at 64 px with a mask drawn at 16 times the size: distances and antialiasing are right."""
    side, one = 64, np.ones(1, dtype=np.int64)
    centres = np.full((1, 3, 2), 0.5)
    axis = (np.arange(side * 16) + 0.5) / (side * 16)
    grid = np.meshgrid((axis - 0.5) / 0.3, (axis - 0.5) / 0.3)
    inside = drawing._DISTANCES[shape](grid[0].astype(np.float32)[None], grid[1].astype(np.float32)[None])[0] < 0
    wanted = inside.reshape(side, 16, side, 16).mean(axis=(1, 3))
    axis = ((np.arange(side) + 0.5) / side - 0.5) / 0.3
    x, y = (g.astype(np.float32)[None] for g in np.meshgrid(axis, axis))
    cover = np.clip(0.5 - drawing._DISTANCES[shape](x, y)[0] * 0.3 * side, 0, 1)
    assert abs(cover.sum() - wanted.sum()) / wanted.sum() < 0.03 and np.abs(cover - wanted).mean() < 0.01
    assert 0.3 < wanted.sum() / (0.6 * side) ** 2 < 0.85
    objects = drawing.Objects(one * shape, one * 0, one * 2, one, centres)
    words, look = np.zeros((1, drawing.noise_words(side)), np.uint64), drawing.LOOKS["normal"]
    image = drawing.draw(look, side, objects, np.full((1, 36), 0.5), words, np.zeros((1, 0, drawing.SPECK)))
    assert image.shape == (1, side, side, 3) and image[0, 32, 32, 0] > image[0, 32, 32, 1] + 60  # red in the middle


@pytest.mark.parametrize(
    ("noun", "subject", "topic"),
    [
        ("원", "원이", "원은"),
        ("정사각형", "정사각형이", "정사각형은"),
        ("삼각형", "삼각형이", "삼각형은"),
        ("별", "별이", "별은"),
        ("하트", "하트가", "하트는"),
        ("십자가", "십자가가", "십자가는"),
        ("값", "값이", "값은"),
        ("개", "개가", "개는"),
    ],
)
def test_korean_particles_follow_the_last_sound(noun: str, subject: str, topic: str) -> None:
    assert noun + particle(noun, "이", "가") == subject
    assert noun + particle(noun, "은", "는") == topic


def every(grammar: Grammar, scene: Scene) -> list[str]:
    """Returns all sentences of a grammar about a scene, in order."""
    templates = grammar.single if scene.count == 1 else grammar.several
    return [template.format_map(grammar.forms(grammar, scene)) for template in templates]


def test_sentences_of_both_languages_correspond() -> None:
    star = Scene(colour=1, shape=3, size=1, count=1, place=2)
    assert list(zip(every(ENGLISH, star), every(KOREAN, star), strict=True)) == [
        ("an orange star", "주황 별"),
        ("a medium orange star", "중간 크기의 주황 별"),
        ("a photo of an orange star", "주황 별 사진"),
        ("a picture of a medium orange star", "중간 크기의 주황 별 그림"),
        ("an orange star in the top right", "오른쪽 위에 있는 주황 별"),
        ("there is a medium orange star in the top right", "오른쪽 위에 중간 크기의 주황 별이 있다"),
        ("one orange star", "주황 별 한 개"),
        ("a star that is orange", "주황색인 별"),
        ("the star is orange", "별은 주황색이다"),
        ("an orange star of medium size", "크기가 중간인 주황 별"),
    ]
    crosses = Scene(colour=7, shape=5, size=0, count=3, place=None)
    assert list(zip(every(ENGLISH, crosses), every(KOREAN, crosses), strict=True)) == [
        ("three brown crosses", "갈색 십자가 세 개"),
        ("three small brown crosses", "작은 갈색 십자가 세 개"),
        ("a photo of three brown crosses", "갈색 십자가 세 개가 있는 사진"),
        ("there are three brown crosses", "갈색 십자가가 세 개 있다"),
        ("a group of three small brown crosses", "모여 있는 작은 갈색 십자가 세 개"),
        ("three crosses that are brown", "갈색인 십자가 세 개"),
        ("the three crosses are brown", "십자가 세 개는 갈색이다"),
    ]


@pytest.mark.parametrize("which", ["single", "several"])
def test_templates_of_both_languages_use_the_same_attributes(which: str) -> None:
    def attributes(template: str) -> set[str]:
        names = re.findall(r"{(\w+?)}", template)
        return {next(f for f in ("colour", "shape", "size", "number", "place") if f in name) for name in names}

    english, korean = getattr(ENGLISH, which), getattr(KOREAN, which)
    assert len(set(english)) == len(english) == len(korean) == len(set(korean))
    for ours, theirs in zip(english, korean, strict=True):
        # English marks a single object with `a`, `one` or `the`, Korean with nothing or with a counter.
        assert attributes(ours) - {"number"} == attributes(theirs) - {"number"}, (ours, theirs)
        assert which == "single" or "number" in attributes(ours) & attributes(theirs)
    for words in ("colours", "shapes", "sizes", "places"):
        assert len(getattr(ENGLISH, words)) == len(getattr(KOREAN, words)) == len(set(getattr(KOREAN, words)))


def halves(record: Record) -> tuple[list[str], list[str]]:
    """Returns the English and the Korean captions of a row that has both."""
    texts = [str(text) for text in record.captions]
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def test_rows_correspond_between_languages() -> None:
    english, korean, both = (rows(build(count=300, image_size=16, language=name)) for name in ("en", "ko", "both"))
    pairs = {text: other for record in both for text, other in zip(*halves(record), strict=True)}
    for one, other, two in zip(english, korean, both, strict=True):
        assert isinstance(one.image, np.ndarray) and isinstance(other.image, np.ndarray)
        assert (one.image == other.image).all()
        assert two.captions == one.captions + other.captions
        assert [pairs[str(text)] for text in one.captions] == other.captions
        assert len(set(other.captions)) == len(other.captions)
        (ours,), (theirs,) = one.columns.to_pylist(), other.columns.to_pylist()
        assert two.columns == one.columns
        for name, words in (("colour", "colours"), ("shape", "shapes"), ("size", "sizes"), ("position", "places")):
            translation = dict(zip(getattr(ENGLISH, words), getattr(KOREAN, words), strict=True))
            assert theirs[name] == (translation[ours[name]] if ours[name] else None)
        assert (ours["count"], ours["held_out"]) == (theirs["count"], theirs["held_out"])
        for text in map(str, other.captions):
            assert theirs["colour"] in text and theirs["shape"] in text and not re.search("[a-zA-Z{}]", text)
            assert normalize(text) == text


def looks(difficulty: str, count: int = 400) -> dict[str, float]:
    """Measures images: fraction with a single object, unevenness of the edges, difference of neighboring pixels."""
    records = rows(build(count=count, combinations="all", difficulty=difficulty, image_size=64))
    images = np.stack([record.image for record in records if isinstance(record.image, np.ndarray)]).astype(float)
    columns = [record.columns.to_pylist()[0] for record in records]
    single = np.array([row["count"] == 1 for row in columns])
    # The outermost pixels of each image, which few objects and specks reach.
    edge = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    return {
        "single": float(single.mean()),
        "busy": float(np.std(edge, axis=1).mean()),
        "grain": float(np.abs(np.diff(images, axis=2)).mean()),
    }


def test_difficulty_changes_object_count_background_and_noise() -> None:
    easy, normal, hard = (looks(name) for name in ("easy", "normal", "hard"))
    assert easy["single"] > 0.85 > normal["single"] > 0.6
    assert 4 * easy["busy"] < 2 * normal["busy"] < hard["busy"] * 1.5
    assert 3 * easy["grain"] < 2 * normal["grain"] < 1.5 * hard["grain"]


@pytest.mark.parametrize("size", range(3))
def test_objects_shrink_fade_and_rotate_with_difficulty(size: int) -> None:
    """Draws one red square in the middle and measures area, contrast and rotation under each difficulty."""
    side, batch = 96, 64
    one = np.ones(batch, dtype=np.int64)
    u = np.random.default_rng(0).random((batch, 36))
    areas, contrasts, turns = {}, {}, {}
    for name, look in drawing.LOOKS.items():
        quiet = replace(look, field=(0.0, 0.0), grain=(0.0, 0.0), blur=(0.0, 0.0), specks=0)
        objects = drawing.Objects(one, 0 * one, size * one, one, np.full((batch, 3, 2), 0.5))
        words = np.zeros((batch, drawing.noise_words(side)), np.uint64)
        images = drawing.draw(quiet, side, objects, u, words, np.zeros((batch, 0, drawing.SPECK))).astype(float)
        away = np.abs(images - images[:, :1, :1]).sum(axis=3)
        inside = away > away[:, side // 2, side // 2][:, None, None] / 2
        areas[name] = inside.mean()
        contrasts[name] = away[:, side // 2, side // 2].mean()
        # A square that is not rotated fills its bounding box.
        boxes = [np.ptp(np.nonzero(mask)[0]) * np.ptp(np.nonzero(mask)[1]) / mask.sum() for mask in inside]
        turns[name] = np.mean(boxes)
    assert areas["easy"] > 1.1 * areas["normal"] > 1.8 * areas["hard"]
    assert contrasts["easy"] > contrasts["hard"] and contrasts["normal"] > 1.15 * contrasts["hard"]
    assert turns["easy"] < turns["normal"] < turns["hard"]


def test_only_hard_images_have_specks() -> None:
    assert [drawing.LOOKS[name].specks for name in ("easy", "normal", "hard")] == [0, 0, 9]
    look, side = drawing.LOOKS["hard"], 64
    none = np.zeros(1, dtype=np.int64)
    objects = drawing.Objects(none, none, none, none, np.full((1, 3, 2), 0.5))  # count 0: nothing but specks
    u, words = np.full((1, 36), 0.5), np.zeros((1, drawing.noise_words(side)), np.uint64)
    specks = np.full((1, 9, drawing.SPECK), 0.5)
    specks[0, :, 0] = (np.arange(9) + 0.5) / 9  # in a row
    specks[0, :, 3:6] = [1, 0, 0]
    with_specks = drawing.draw(look, side, objects, u, words, specks)[0].astype(int)
    without = drawing.draw(replace(look, specks=0), side, objects, u, words, specks[:, :0])[0].astype(int)
    changed = np.abs(with_specks - without).sum(axis=2) > 60
    assert changed[24:40].any() and not changed[:24].any() and not changed[40:].any()
    steps = np.diff(changed[side // 2].astype(int))
    assert (steps == 1).sum() == 9  # nine separate specks


def test_every_difficulty_keeps_its_bytes() -> None:
    keys = {}
    for name in ("easy", "normal", "hard"):
        (record,) = build(count=1, difficulty=name).read([0])
        assert isinstance(record.image, np.ndarray)
        keys[name] = pixels.pixel_key(record.image)
    assert keys == {
        "easy": "c08285e478f056737d8639ee9bcfed96",
        "normal": "e9eb3785f252b846c428274bda9c5a91",
        "hard": "e2fa1c6e81fed1e0b0f93489f1d3c984",
    }
    # At any size that the config allows, even if a speck's square is almost as large as the image.
    for side in (16, 17, 257):
        for record in build(count=40, difficulty="hard", image_size=side).read(range(40)):
            assert isinstance(record.image, np.ndarray) and record.image.shape == (side, side, 3)


def test_prep_preserves_korean_text(tmp_path: Path, run_prep: Callable[..., Prepared]) -> None:
    """Korean text is intact in the tar's text and JSON, in the sidecar, and in labels made from its columns."""
    run_prep(tmp_path / "out", "source.name=scenes", "source.count=30", "source.image_size=16", "source.language=ko")
    wanted = rows(build(count=30, image_size=16, language="ko"))
    (sidecar,) = (tmp_path / "out").glob("*-000000.parquet")
    stored = pq.read_table(sidecar).to_pylist()
    assert [row["captions"] for row in stored] == [record.captions for record in wanted]
    labels = {"{colour} {shape}".format(**row) for row in stored}
    assert labels <= {f"{colour} {shape}" for colour in KOREAN.colours for shape in KOREAN.shapes}
    with tarfile.open(sidecar.with_suffix(".tar")) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        for row in stored:
            text, member = files[f"{row['key']}.txt"], files[f"{row['key']}.json"]
            assert text is not None and member is not None
            assert text.read().decode() == row["captions"][0]
            raw = member.read().decode()
            assert row["captions"][-1] in raw  # as written, not as escapes
            metadata = json.loads(raw)
            assert metadata["captions"] == row["captions"] and metadata["columns"]["shape"] == row["shape"]


def test_rejects_preserve_korean_text(
    tmp_path: Path,
    run_prep: Callable[..., Prepared],
    write_table: Callable[..., Path],
    make_image: Callable[..., bytes],
) -> None:
    images = [make_image(0), make_image(0), b"no image"]
    captions = [["빨간 원"], [unicodedata.normalize("NFD", "원은 빨간색이다")], ["별"]]
    table = write_table(images, captions, name="쌍.parquet", shape=["원", "원", "별"])
    run_prep(tmp_path / "out", "source.name=table", f"source.path={table}", "source.caption=captions")
    (sidecar,) = (tmp_path / "out").glob("*-000000.parquet")
    (row,) = pq.read_table(sidecar).to_pylist()
    assert row["captions"] == ["빨간 원", "원은 빨간색이다"] and row["shape"] == "원" and "쌍" in row["source"]
    merged, broken = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert merged["reason"] == "merged" and '"shape":"원"' in merged["record"] and "쌍" in merged["source"]
    assert normalize(json.loads(merged["record"])["captions"][0]) == "원은 빨간색이다"
    assert broken["reason"] == "E_IMG_FORMAT" and "쌍" in broken["source"]
