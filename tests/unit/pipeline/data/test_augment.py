"""Training views and colours against the plain way of making them."""

from __future__ import annotations

import io
import math
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipwright.pipeline.data import augment
from clipwright.pipeline.data.augment import AugmentConfig, View, crop_box, draw_colour, recolour, resize
from clipwright.pipeline.data.order import Draw


def smooth(width: int, height: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def file_of(picture: np.ndarray, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format, **options)
    return out.getvalue()


def draw(number: int) -> Draw:
    return Draw(0, "f", 0, str(number), "view")


def training_view(data: bytes, size: int, config: AugmentConfig, draw: Draw) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    View(data, config, draw).write(out)
    return out


Box = tuple[int, int, int, int]


def torchvisions_crop(width: int, height: int, config: AugmentConfig, chance: random.Random) -> Box:
    """RandomResizedCrop.get_params as torchvision documents it: ten tries, then the middle."""
    for _ in range(10):
        area = width * height * chance.uniform(*config.scale)
        ratio = math.exp(chance.uniform(math.log(config.ratio[0]), math.log(config.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return chance.randint(0, width - w), chance.randint(0, height - h), w, h
    w, h = width, height
    if width / height < config.ratio[0]:
        h = round(width / config.ratio[0])
    elif width / height > config.ratio[1]:
        w = round(height * config.ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(64, 64), (500, 375), (301, 97), (7, 5)])
@pytest.mark.parametrize("scale", [(0.7, 1.0), (0.9, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_crops_follow_torchvisions_law(size: tuple[int, int], scale: tuple[float, float]) -> None:
    """Area, aspect, place and distance from the edges have its means and spreads."""
    (width, height), config, chance, count = size, AugmentConfig(scale=scale), random.Random(1), 4000
    boxes = (
        [crop_box(*size, config, draw(i)) for i in range(count)],
        [torchvisions_crop(*size, config, chance) for _ in range(count)],
    )
    numbers = []
    for left, top, w, h in (np.array(one, float).T for one in boxes):
        assert min(left) >= 0 <= min(top) and max(left + w) <= width and max(top + h) <= height
        whole = left / np.maximum(width - w, 1), top / np.maximum(height - h, 1)
        numbers.append([w * h / (width * height), np.log(w / h), left + w / 2, top + h / 2, *whole])
    for mine, wanted in zip(*numbers, strict=True):
        for power in (1, 2):
            one, other = ((x - wanted.mean()) ** power for x in (mine, wanted))
            assert abs(one.mean() - other.mean()) < 4.5 * np.hypot(one.std(), other.std()) / math.sqrt(count) + 1e-9


@pytest.mark.parametrize("size", [(500, 375), (97, 301), (32, 32), (5, 7), (1, 40)])
def test_resize_is_pillows_to_one_level(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    cut = picture[: max(1, size[1] - 3), size[0] // 4 :]  # a view with strides of its own, as a crop is
    wanted = np.asarray(Image.fromarray(cut).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    apart = np.abs(resize(cut, np.empty((64, 64, 3), np.uint8)) - wanted)
    assert apart.mean() < 0.5 and (apart.max() <= 1 or size == (97, 301))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_view_is_the_crop_resized_and_perhaps_mirrored(format: str) -> None:
    picture = smooth(300, 210)
    data = file_of(picture, format, quality=95)
    mirrored = 0
    for number in range(20):
        left, top, width, height = crop_box(300, 210, AugmentConfig(), draw(number))
        box = (left, top, left + width, top + height)
        wanted = np.asarray(Image.fromarray(picture).resize((48, 48), Image.Resampling.BICUBIC, box=box)).astype(int)
        got = training_view(data, 48, AugmentConfig(), draw(number))
        apart = [np.abs(got - w).mean() for w in (wanted, wanted[:, ::-1])]
        assert min(apart) < 4 < max(apart)
        mirrored += apart[1] < apart[0]
    assert 5 <= mirrored <= 15
    assert (
        training_view(data, 48, AugmentConfig(), draw(3)) == training_view(data, 48, AugmentConfig(), draw(3))
    ).all()


@pytest.mark.parametrize("size", [1, 31, 224, 300])
def test_a_mirrored_view_is_the_view_mirrored(size: int) -> None:
    data = file_of(np.random.default_rng(2).integers(0, 256, (260, 311, 3), dtype=np.uint8), "PNG")
    one, other = (training_view(data, size, AugmentConfig(flip=flip), draw(0)) for flip in (0.0, 1.0))
    assert (one == other[:, ::-1]).all() and (size == 1 or (one != other).any())


def test_a_view_takes_no_team_of_threads() -> None:
    """Torch would start one for each thread of the loader, as large as the trainer's own."""
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads by /proc")
    data = file_of(smooth(640, 480), "JPEG")
    threads, started = torch.get_num_threads(), []

    def count(work: Callable[[], object]) -> None:
        before = len(list(Path("/proc/self/task").iterdir()))
        work()
        started.append(len(list(Path("/proc/self/task").iterdir())) - before)

    torch.set_num_threads(3)
    try:
        view = partial(training_view, data, 224, AugmentConfig(flip=1.0), draw(0))
        for work in (view, torch.ones(224, 224, 3).exp):  # the second shows that a team would be seen
            worker = threading.Thread(target=count, args=(work,))
            worker.start()
            worker.join()
    finally:
        torch.set_num_threads(threads)
    assert started[0] == 0 < started[1]


def test_a_jpeg_is_decoded_no_larger_than_its_crop_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    decode = augment.Picture.decode

    def watched(self: augment.Picture, min_side: int | None = None) -> np.ndarray:
        made = decode(self, min_side)
        seen.append(made.shape)
        return made

    monkeypatch.setattr(augment.Picture, "decode", watched)
    data = file_of(smooth(1000, 800), "JPEG")
    for scale, size, shrink in (
        ((1.0, 1.0), 90, 8),
        ((1.0, 1.0), 101, 4),
        ((0.25, 0.25), 90, 4),
        ((0.25, 0.25), 201, 1),
    ):
        config = AugmentConfig(
            scale=scale, ratio=(1.25, 1.25)
        )  # the picture's own ratio: crops of 1/1 and 1/2 its sides
        training_view(data, size, config, draw(0))
        assert seen[-1] == (800 // shrink, 1000 // shrink, 3), (scale, size)


def test_a_crop_of_a_shrunken_picture_keeps_its_place() -> None:
    """A crop covers the same stretch whether the picture was decoded at 1/1 or at 1/4."""
    data = file_of(smooth(1200, 900), "JPEG", quality=95)
    whole = file_of(smooth(1200, 900), "PNG")
    for number in range(10):
        one, other = (training_view(d, 64, AugmentConfig(scale=(0.4, 1.0)), draw(number)) for d in (data, whole))
        assert np.abs(one.astype(int) - other).mean() < 3


def slow_colour(picture: np.ndarray, colour: tuple[float, ...]) -> np.ndarray:
    """One step after another, on one image, in float64."""
    brightness, contrast, saturation, hue = colour
    luma = np.array([0.299, 0.587, 0.114])
    yiq = np.array([luma, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    y, i, q = np.moveaxis(picture.astype(np.float64) @ yiq.T, 2, 0)
    turned = (i + 1j * q) * np.exp(2j * np.pi * hue)
    made = np.stack([y, turned.real, turned.imag], axis=2) @ np.linalg.inv(yiq).T
    grey = (made @ luma)[..., None]
    made = (grey + saturation * (made - grey)) * brightness
    middle = (made @ luma).mean()
    return np.clip(np.rint(middle + contrast * (made - middle)), 0, 255)


def test_colours_are_those_of_the_plain_steps() -> None:
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), dtype=np.uint8))
    colours = [(1, 1, 1, 0), (1.3, 1, 1, 0), (1, 0.6, 1, 0), (1, 1, 0, 0), (1, 1, 1.4, 0.2), (0.8, 1.2, 0.7, -0.4)]
    made = recolour(views, torch.tensor(colours, dtype=torch.float32)).numpy()
    for number, colour in enumerate(colours):
        assert np.abs(made[number] - slow_colour(views[number].numpy(), colour)).max() <= 1
    assert (made[0] == views[0].numpy()).all()
    assert (made[3] == made[3][..., :1]).all()
    planar = views.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # however they lie in memory
    assert (recolour(planar, torch.tensor(colours, dtype=torch.float32)).numpy() == made).all()


def test_colours_are_drawn_within_their_bounds() -> None:
    config = AugmentConfig(jitter=(0.4, 0.3, 0.2, 0.1), jitter_chance=0.5, grey=0.25)
    assert config.colours and not AugmentConfig().colours
    drawn = np.array([draw_colour(config, draw(number)) for number in range(2000)])
    grey = drawn[:, 2] == 0
    plain = (drawn[:, 0] == 1) & (drawn[:, 3] == 0)
    assert abs(grey.mean() - 0.25) < 0.04 and abs(plain.mean() - 0.5) < 0.04
    for column, (middle, width) in enumerate([(1, 0.4), (1, 0.3), (1, 0.2), (0, 0.1)]):
        moved = drawn[~plain & ~grey][:, column] - middle
        assert np.abs(moved).max() <= width and moved.min() < -0.8 * width and moved.max() > 0.8 * width
    assert {draw_colour(AugmentConfig(), draw(number)) for number in range(50)} == {(1.0, 1.0, 1.0, 0.0)}
