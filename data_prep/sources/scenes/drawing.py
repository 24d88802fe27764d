"""Drawing of colored shapes in batches of images: signed distances, shading, backgrounds, blur, noise.

Lengths are fractions of the image side, x to the right, y down. Pixels are computed with +, -, ×, ÷ and square roots
only, which round the same on every machine. Distances: I. Quilez, "2D distance functions".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np

# Colors and shapes are numbers here, in the order of the words in a grammar.
_RGB = np.array(
    [
        (214, 30, 36),
        (250, 136, 18),
        (246, 220, 40),
        (38, 160, 58),
        (30, 84, 212),
        (124, 44, 176),
        (252, 140, 190),
        (112, 66, 30),
    ],
    dtype=np.float32,
)
SPECK = 7  # uniform draws per speck


@dataclass(frozen=True)
class Look:
    """Parameters that make images easy or hard.

    A pair (least, range) stands for uniform draws from least to least + range. Color values are 0 to 255.
    """

    single: float  # fraction of images with one object
    double: float  # fraction of images with one or two objects
    radius: tuple[float, float, float]  # half the extent of a small, medium and large object
    turn: float  # largest rotation of an object, as the tangent of half the angle
    fade: tuple[float, float]  # how far an object's color is blended into the background's, 0 to 1
    ground: tuple[float, float]  # lightness of the background
    cast: float  # how far the background's color differs from grey
    field: tuple[float, float]  # variation of lightness over the background
    blur: tuple[float, float]  # weight of each neighbor, at most 0.25
    grain: tuple[float, float]  # strength of the noise
    specks: int  # small distractors, a third of them in front of the objects


LOOKS = {
    "easy": Look(
        single=0.9,
        double=0.98,
        radius=(0.18, 0.235, 0.33),
        turn=0.06,
        fade=(0.0, 0.0),
        ground=(165.0, 60.0),
        cast=24.0,
        field=(4.0, 10.0),
        blur=(0.0, 0.1),
        grain=(0.005, 0.015),
        specks=0,
    ),
    "normal": Look(
        single=0.7,
        double=0.9,
        radius=(0.14, 0.205, 0.31),
        turn=0.12,
        fade=(0.0, 0.0),
        ground=(70.0, 150.0),
        cast=36.0,
        field=(20.0, 70.0),
        blur=(0.0, 0.25),
        grain=(0.01, 0.07),
        specks=0,
    ),
    "hard": Look(
        single=0.7,
        double=0.9,
        radius=(0.1, 0.15, 0.22),
        turn=0.27,
        fade=(0.1, 0.35),
        ground=(70.0, 150.0),
        cast=80.0,
        field=(50.0, 100.0),
        blur=(0.1, 0.15),
        grain=(0.03, 0.1),
        specks=9,
    ),
}


@dataclass(frozen=True)
class Objects:
    """Content of B images: shape, color and size as indices, count, each (B), and centers (B, 3, 2) of the objects.

    The up to three objects of an image are equal.
    """

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    count: np.ndarray
    centers: np.ndarray


def noise_words(side: int) -> int:
    """Returns the number of random 64-bit words that the noise of one image takes."""
    return -(-side * side * 6 // 8)


def place(look: Look, count: np.ndarray, size: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Returns centers (B, 3, 2) of up to three objects, inside the image and apart; `u` (B, 9) are uniform draws."""
    room = 0.5 - np.array(look.radius)[size] * 1.04
    single = 0.5 + (u[:, 0:2] * 2 - 1) * room[:, None]
    # A direction without sine and cosine: a rational point on the unit circle, rotated by a multiple of 90 degrees.
    t = u[:, 0]
    x, y = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    turn = (u[:, 2] * 4).astype(np.int64)
    x, y = np.choose(turn, [x, -y, -x, y]), np.choose(turn, [y, x, -y, -x])
    # Two objects are opposite each other, three are 120 degrees apart.
    far = np.where(count == 3, 0.3, 0.25)
    step_x = np.where(count == 3, -0.5, -1.0)
    step_y = np.where(count == 3, np.sqrt(0.75), 0.0)
    centers = np.empty((len(count), 3, 2))
    for k in range(3):
        centers[:, k] = 0.5 + far[:, None] * np.stack([x, y], axis=1)
        x, y = x * step_x - y * step_y, x * step_y + y * step_x
    centers[count == 1, 0] = single[count == 1]
    return centers


def draw(look: Look, side: int, objects: Objects, u: np.ndarray, words: np.ndarray, specks: np.ndarray) -> np.ndarray:
    """Returns images uint8 (B, side, side, 3).

    `u` (B, 36) and `specks` (B, look.specks, SPECK) are uniform draws, `words` (B, noise_words) random words.
    """
    image, tint = _background(look, side, u[:, 8:34].astype(np.float32))
    specks = specks.astype(np.float32)
    behind = look.specks - look.specks // 3
    for k in range(behind):
        _speck(image, specks[:, k])
    _objects(look, image, objects, tint, u)
    for k in range(behind, look.specks):
        _speck(image, specks[:, k])
    weight = np.float32(look.blur[0]) + np.float32(look.blur[1]) * u[:, 34].astype(np.float32)
    strength = np.float32(look.grain[0]) + np.float32(look.grain[1]) * u[:, 35].astype(np.float32)
    return _noise(_blur(image, weight), strength, words)


def _objects(look: Look, image: np.ndarray, objects: Objects, tint: np.ndarray, u: np.ndarray) -> None:
    side, centers = image.shape[-1], objects.centers
    axis = ((np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)).astype(np.float32)
    u32 = u.astype(np.float32)
    paint = _RGB[objects.colour] * (0.88 + 0.24 * u32[:, 0:1]) + 14 * (u32[:, 1:4] - 0.5)
    paint += (look.fade[0] + look.fade[1] * u32[:, 12:13]) * (tint - paint)
    radius = (np.array(look.radius)[objects.size] * (0.9 + 0.1 * u[:, 4])).astype(np.float32)
    # Rotated by a rational point on the unit circle.
    t = (u[:, 5] * 2 - 1) * look.turn
    c, s = ((1 - t * t) / (1 + t * t)).astype(np.float32), (2 * t / (1 + t * t)).astype(np.float32)
    light = (u[:, 6:8] * 2 - 1).astype(np.float32) * np.float32(0.18)
    for k in range(3):
        rows = np.flatnonzero(objects.count > k)
        if not len(rows):
            break
        x = (axis[None, None, :] - centers[rows, k, 0, None, None].astype(np.float32)) / radius[rows, None, None]
        y = (axis[None, :, None] - centers[rows, k, 1, None, None].astype(np.float32)) / radius[rows, None, None]
        cr, sr = c[rows, None, None], s[rows, None, None]
        x, y = x * cr + y * sr, y * cr - x * sr
        shade = 1 + x * light[rows, 0, None, None] + y * light[rows, 1, None, None]
        cover = np.empty_like(x)
        for shape, distance in enumerate(_DISTANCES):
            same = objects.shape[rows] == shape
            if same.any():
                inside = distance(x[same], y[same]) * (radius[rows[same], None, None] * np.float32(side))
                cover[same] = np.clip(np.float32(0.5) - inside, 0, 1)
        under = image[rows]
        for channel in range(3):
            under[:, channel] += cover * (paint[rows, channel, None, None] * shade - under[:, channel])
        image[rows] = under


def _background(look: Look, side: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns backgrounds float32 (B, 3, side, side) and their tint (B, 3): the tint plus a smooth 4 × 4 field."""
    tint = look.ground[0] + look.ground[1] * u[:, 0:1] + look.cast * (u[:, 1:4] - 0.5)
    field = (u[:, 10:26].reshape(-1, 4, 4) - 0.5) * (look.field[0] + look.field[1] * u[:, 6, None, None])
    place_at = np.arange(side, dtype=np.float32) * np.float32(3 / max(side - 1, 1))
    low = np.minimum(place_at.astype(np.int64), 2)
    part = place_at - low.astype(np.float32)
    part = part * part * (3 - 2 * part)
    lines = field[:, low, :] + (field[:, low + 1, :] - field[:, low, :]) * part[None, :, None]
    plane = lines[:, :, low] + (lines[:, :, low + 1] - lines[:, :, low]) * part[None, None, :]
    return tint[:, :, None, None] + plane[:, None], tint


def _speck(image: np.ndarray, u: np.ndarray) -> None:
    """Draws a small disc or square of random color on each image; `u` (B, SPECK) are uniform draws."""
    batch, channels, side, _ = image.shape
    radius = (np.float32(0.015) + np.float32(0.035) * u[:, 2]) * np.float32(side)
    reach = -(-side // 10) + 2  # side in pixels of a square that holds the largest speck
    center = u[:, 0:2] * np.float32(side)
    start = np.clip(center.astype(np.int64) - reach // 2, 0, side - reach)
    pixels = start[:, :, None] + np.arange(reach)
    x, y = ((pixels[:, i] + np.float32(0.5)).astype(np.float32) - center[:, i, None] for i in (0, 1))
    x, y = x[:, None, :], y[:, :, None]
    away = np.where(u[:, 6, None, None] < 0.5, np.sqrt(x * x + y * y), np.maximum(np.abs(x), np.abs(y)))
    cover = np.clip(np.float32(0.5) - (away - radius[:, None, None]), 0, 1)[:, None]
    at = (
        np.arange(batch)[:, None, None, None],
        np.arange(channels)[None, :, None, None],
        pixels[:, 1][:, None, :, None],
        pixels[:, 0][:, None, None, :],
    )
    under = image[at]
    image[at] = under + cover * (u[:, 3:6, None, None] * np.float32(255) - under)


def _blur(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Applies a three-tap blur along both axes; `weight` (B) is that of each neighbor, 0 to 0.25."""
    weight = weight[:, None, None, None]
    image[:, :, 1:-1] += weight * (image[:, :, :-2] + image[:, :, 2:] - 2 * image[:, :, 1:-1])
    image[..., 1:-1] += weight * (image[..., :-2] + image[..., 2:] - 2 * image[..., 1:-1])
    return image


def _noise(image: np.ndarray, strength: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Adds sensor noise (triangular, from two bytes per value) of `strength` (B) and rounds to uint8."""
    batch, _, side, _ = image.shape
    raw = np.ascontiguousarray(words).view(np.uint8)[:, : side * side * 6].reshape(batch, 2, 3, side, side)
    grain = raw[:, 0].astype(np.float32) + raw[:, 1] - np.float32(255)
    final = np.clip(image + strength[:, None, None, None] * grain + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(final.transpose(0, 2, 3, 1))


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - np.float32(0.95)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.82)


def _polygon(points: list[tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns the signed distance to a closed polygon: to the nearest edge, with the sign from ray crossings."""
    corners = np.array(points, dtype=np.float32)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        best = np.full_like(x, np.inf)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
            dx, dy = px - ex * along, py - ey * along
            np.minimum(best, dx * dx + dy * dy, out=best)
            crosses = (py >= 0) != (y - by >= 0)
            inside ^= crosses & ((px * ey < py * ex) == (ey > 0))
        return np.where(inside, -np.sqrt(best), np.sqrt(best))

    return distance


def _star_points() -> list[tuple[float, float]]:
    radii = (1.08, 0.46)
    return [(radii[i % 2] * sin(pi * i / 5), -radii[i % 2] * cos(pi * i / 5)) for i in range(10)]


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the signed distance to a heart (Quilez), scaled to the range -1 to 1."""
    x, y = np.abs(x) * np.float32(0.6), np.float32(0.55) - y * np.float32(0.6)
    up_x, up_y = x - np.float32(0.25), y - np.float32(0.75)
    lobe = np.sqrt(up_x * up_x + up_y * up_y) - np.float32(np.sqrt(2) / 4)
    top = x * x + (y - 1) * (y - 1)
    half = np.maximum(x + y, 0) * np.float32(0.5)
    edge = np.minimum(top, (x - half) * (x - half) + (y - half) * (y - half))
    side = np.where(x > y, np.float32(1), np.float32(-1))
    return np.where(x + y > 1, lobe, np.sqrt(edge) * side) * np.float32(1 / 0.6)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(0.95), np.minimum(x, y) - np.float32(0.34))


_DISTANCES = (
    _circle,
    _square,
    _polygon([(0.0, -0.98), (1.0, 0.78), (-1.0, 0.78)]),
    _polygon(_star_points()),
    _heart,
    _cross,
)
