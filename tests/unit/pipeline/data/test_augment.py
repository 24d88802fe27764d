"""Training views and color jitter against straightforward reference implementations."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from clipwright.pipeline.data import augment
from clipwright.pipeline.data.augment import AugmentConfig, View, adjust_colors, crop_box, draw_color_jitter, resize
from clipwright.pipeline.data.order import SampleRng


def smooth(width: int, height: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def file_of(image: np.ndarray, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format, **options)
    return out.getvalue()


def rng(number: int) -> SampleRng:
    return SampleRng(0, "f", 0, str(number), "view")


def training_view(data: bytes, size: int, config: AugmentConfig, rng: SampleRng) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    View(data, config, rng).write(out)
    return out


Box = tuple[int, int, int, int]


def torchvision_crop(width: int, height: int, config: AugmentConfig, random: Random) -> Box:
    """RandomResizedCrop.get_params as torchvision documents it: ten attempts, then a center crop."""
    for _ in range(10):
        area = width * height * random.uniform(*config.scale)
        ratio = math.exp(random.uniform(math.log(config.ratio[0]), math.log(config.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = width, height
    if width / height < config.ratio[0]:
        h = round(width / config.ratio[0])
    elif width / height > config.ratio[1]:
        w = round(height * config.ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(64, 64), (500, 375), (301, 97), (7, 5)])
@pytest.mark.parametrize("scale", [(0.7, 1.0), (0.9, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_crops_are_distributed_as_in_torchvision(size: tuple[int, int], scale: tuple[float, float]) -> None:
    """Means and variances of area, aspect ratio, center and relative offset agree."""
    (width, height), config, random, count = size, AugmentConfig(scale=scale), Random(1), 4000
    boxes = (
        [crop_box(*size, config, rng(i)) for i in range(count)],
        [torchvision_crop(*size, config, random) for _ in range(count)],
    )
    numbers = []
    for left, top, w, h in (np.array(sample, float).T for sample in boxes):
        assert min(left) >= 0 <= min(top) and max(left + w) <= width and max(top + h) <= height
        offsets = left / np.maximum(width - w, 1), top / np.maximum(height - h, 1)
        numbers.append([w * h / (width * height), np.log(w / h), left + w / 2, top + h / 2, *offsets])
    for ours, expected in zip(*numbers, strict=True):
        for power in (1, 2):
            a, b = ((x - expected.mean()) ** power for x in (ours, expected))
            assert abs(a.mean() - b.mean()) < 4.5 * np.hypot(a.std(), b.std()) / math.sqrt(count) + 1e-9


@pytest.mark.parametrize("size", [(500, 375), (97, 301), (32, 32), (5, 7), (1, 40)])
def test_resize_matches_pillow_to_one_level(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    crop = image[: max(1, size[1] - 3), size[0] // 4 :]  # a non-contiguous view, as a crop is
    expected = np.asarray(Image.fromarray(crop).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(resize(crop, np.empty((64, 64, 3), np.uint8)) - expected)
    assert difference.mean() < 0.5 and (difference.max() <= 1 or size == (97, 301))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_view_is_the_resized_and_possibly_flipped_crop(format: str) -> None:
    image = smooth(300, 210)
    data = file_of(image, format, quality=95)
    flipped = 0
    for number in range(20):
        left, top, width, height = crop_box(300, 210, AugmentConfig(), rng(number))
        box = (left, top, left + width, top + height)
        expected = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC, box=box)).astype(int)
        got = training_view(data, 48, AugmentConfig(), rng(number))
        difference = [np.abs(got - view).mean() for view in (expected, expected[:, ::-1])]
        assert min(difference) < 4 < max(difference)
        flipped += difference[1] < difference[0]
    assert 5 <= flipped <= 15
    assert (training_view(data, 48, AugmentConfig(), rng(3)) == training_view(data, 48, AugmentConfig(), rng(3))).all()


@pytest.mark.parametrize("size", [1, 31, 224, 300])
def test_flipped_view_mirrors_the_unflipped_view(size: int) -> None:
    data = file_of(np.random.default_rng(2).integers(0, 256, (260, 311, 3), dtype=np.uint8), "PNG")
    plain, flipped = (training_view(data, size, AugmentConfig(flip=flip), rng(0)) for flip in (0.0, 1.0))
    assert (plain == flipped[:, ::-1]).all() and (size == 1 or (plain != flipped).any())


def test_view_starts_no_torch_thread_pool() -> None:
    """Torch would start a pool in each thread of the loader, as large as the trainer's own."""
    data = file_of(smooth(640, 480), "JPEG")
    threads, started = torch.get_num_threads(), []

    def count(work: Callable[[], object]) -> None:
        before = len(list(Path("/proc/self/task").iterdir()))
        work()
        started.append(len(list(Path("/proc/self/task").iterdir())) - before)

    torch.set_num_threads(3)
    try:
        view = partial(training_view, data, 224, AugmentConfig(flip=1.0), rng(0))
        for work in (view, torch.ones(224, 224, 3).exp):  # the second one shows that a thread pool would be detected
            worker = threading.Thread(target=count, args=(work,))
            worker.start()
            worker.join()
    finally:
        torch.set_num_threads(threads)
    assert started[0] == 0 < started[1]


def test_jpeg_is_decoded_no_larger_than_its_crop_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    decode = augment.EncodedImage.decode

    def recorded(self: augment.EncodedImage, min_side: int | None = None) -> np.ndarray:
        pixels = decode(self, min_side)
        seen.append(pixels.shape)
        return pixels

    monkeypatch.setattr(augment.EncodedImage, "decode", recorded)
    data = file_of(smooth(1000, 800), "JPEG")
    for scale, size, shrink in (
        ((1.0, 1.0), 90, 8),
        ((1.0, 1.0), 101, 4),
        ((0.25, 0.25), 90, 4),
        ((0.25, 0.25), 201, 1),
    ):
        config = AugmentConfig(
            scale=scale, ratio=(1.25, 1.25)
        )  # the image's own ratio: crops of all and of half of each side
        training_view(data, size, config, rng(0))
        assert seen[-1] == (800 // shrink, 1000 // shrink, 3), (scale, size)


def test_crop_of_a_downscaled_image_covers_the_same_region() -> None:
    """A crop covers the same region whether the image was decoded at full or at quarter size."""
    data = file_of(smooth(1200, 900), "JPEG", quality=95)
    lossless = file_of(smooth(1200, 900), "PNG")
    for number in range(10):
        config = AugmentConfig(scale=(0.4, 1.0))
        downscaled, full = (training_view(file, 64, config, rng(number)) for file in (data, lossless))
        assert np.abs(downscaled.astype(int) - full).mean() < 3


def slow_color_jitter(image: np.ndarray, jitter: tuple[float, ...]) -> np.ndarray:
    """One step after the other, on one image, in float64."""
    brightness, contrast, saturation, hue = jitter
    luma = np.array([0.299, 0.587, 0.114])
    yiq = np.array([luma, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    y, i, q = np.moveaxis(image.astype(np.float64) @ yiq.T, 2, 0)
    rotated = (i + 1j * q) * np.exp(2j * np.pi * hue)
    rgb = np.stack([y, rotated.real, rotated.imag], axis=2) @ np.linalg.inv(yiq).T
    gray = (rgb @ luma)[..., None]
    rgb = (gray + saturation * (rgb - gray)) * brightness
    mean = (rgb @ luma).mean()
    return np.clip(np.rint(mean + contrast * (rgb - mean)), 0, 255)


def test_color_jitter_matches_the_separate_steps() -> None:
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), dtype=np.uint8))
    jitters = [(1, 1, 1, 0), (1.3, 1, 1, 0), (1, 0.6, 1, 0), (1, 1, 0, 0), (1, 1, 1.4, 0.2), (0.8, 1.2, 0.7, -0.4)]
    adjusted = adjust_colors(views, torch.tensor(jitters, dtype=torch.float32)).numpy()
    for number, jitter in enumerate(jitters):
        assert np.abs(adjusted[number] - slow_color_jitter(views[number].numpy(), jitter)).max() <= 1
    assert (adjusted[0] == views[0].numpy()).all()
    assert (adjusted[3] == adjusted[3][..., :1]).all()
    planar = views.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # in any memory layout
    assert (adjust_colors(planar, torch.tensor(jitters, dtype=torch.float32)).numpy() == adjusted).all()


def test_color_jitter_stays_within_its_bounds() -> None:
    config = AugmentConfig(jitter=(0.4, 0.3, 0.2, 0.1), jitter_probability=0.5, grayscale=0.25)
    assert config.changes_color and not AugmentConfig().changes_color
    drawn = np.array([draw_color_jitter(config, rng(number)) for number in range(2000)])
    gray = drawn[:, 2] == 0
    plain = (drawn[:, 0] == 1) & (drawn[:, 3] == 0)
    assert abs(gray.mean() - 0.25) < 0.04 and abs(plain.mean() - 0.5) < 0.04
    for column, (middle, width) in enumerate([(1, 0.4), (1, 0.3), (1, 0.2), (0, 0.1)]):
        moved = drawn[~plain & ~gray][:, column] - middle
        assert np.abs(moved).max() <= width and moved.min() < -0.8 * width and moved.max() > 0.8 * width
    assert {draw_color_jitter(AugmentConfig(), rng(number)) for number in range(50)} == {(1.0, 1.0, 1.0, 0.0)}
