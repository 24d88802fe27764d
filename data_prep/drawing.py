"""Drawing of coloured shapes, many pictures at a time: signed distances, shading, backgrounds, blur, noise.

Lengths are in parts of the picture's side, x to the right, y down. Only +, -, ×, ÷ and square roots touch pixels:
they round alike on every machine. Distances: I. Quilez, "2D distance functions".
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin

import numpy as np

# Colours and shapes are numbers here, in the order of a grammar's words.
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
# Half of an object's extent, by size (small, medium, large).
_RADIUS = np.array([0.14, 0.205, 0.31])


def noise_words(side: int) -> int:
    """64-bit words of randomness that the noise of one picture takes."""
    return -(-side * side * 6 // 8)


def place(count: np.ndarray, size: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Centres (B, 3, 2) of up to three objects that stay inside the picture and apart; `u` (B, 9) uniform draws."""
    room = 0.5 - _RADIUS[size] * 1.04
    single = 0.5 + (u[:, 0:2] * 2 - 1) * room[:, None]
    # A direction without sine and cosine: a rational point on the circle, then one of four turns.
    t = u[:, 0]
    x, y = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    turn = (u[:, 2] * 4).astype(np.int64)
    x, y = np.choose(turn, [x, -y, -x, y]), np.choose(turn, [y, x, -y, -x])
    # Two stand opposite each other, three at thirds of a circle.
    far = np.where(count == 3, 0.3, 0.25)
    step_x = np.where(count == 3, -0.5, -1.0)
    step_y = np.where(count == 3, np.sqrt(0.75), 0.0)
    centres = np.empty((len(count), 3, 2))
    for k in range(3):
        centres[:, k] = 0.5 + far[:, None] * np.stack([x, y], axis=1)
        x, y = x * step_x - y * step_y, x * step_y + y * step_x
    centres[count == 1, 0] = single[count == 1]
    return centres


def draw(
    side: int,
    shape: np.ndarray,
    colour: np.ndarray,
    size: np.ndarray,
    count: np.ndarray,
    centres: np.ndarray,
    u: np.ndarray,
    words: np.ndarray,
) -> np.ndarray:
    """Pictures uint8 (B, side, side, 3).

    `shape`, `colour`, `size`, `count` (B); `centres` (B, 3, 2); `u` (B, 36) uniform draws; `words` (B, noise_words).
    """
    picture = _background(side, u[:, 8:34].astype(np.float32))
    axis = ((np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)).astype(np.float32)
    paint = _RGB[colour] * (0.88 + 0.24 * u[:, 0:1].astype(np.float32)) + 14 * (u[:, 1:4].astype(np.float32) - 0.5)
    radius = (_RADIUS[size] * (0.9 + 0.1 * u[:, 4])).astype(np.float32)
    # Turned by up to about 14 degrees, by a rational point on the circle.
    t = (u[:, 5] * 2 - 1) * 0.12
    c, s = ((1 - t * t) / (1 + t * t)).astype(np.float32), (2 * t / (1 + t * t)).astype(np.float32)
    light = (u[:, 6:8] * 2 - 1).astype(np.float32) * np.float32(0.18)
    for k in range(3):
        rows = np.flatnonzero(count > k)
        if not len(rows):
            break
        x = (axis[None, None, :] - centres[rows, k, 0, None, None].astype(np.float32)) / radius[rows, None, None]
        y = (axis[None, :, None] - centres[rows, k, 1, None, None].astype(np.float32)) / radius[rows, None, None]
        cr, sr = c[rows, None, None], s[rows, None, None]
        x, y = x * cr + y * sr, y * cr - x * sr
        shade = 1 + x * light[rows, 0, None, None] + y * light[rows, 1, None, None]
        cover = np.empty_like(x)
        for which, distance in enumerate(_DISTANCES):
            mine = shape[rows] == which
            if mine.any():
                inside = distance(x[mine], y[mine]) * (radius[rows[mine], None, None] * np.float32(side))
                cover[mine] = np.clip(np.float32(0.5) - inside, 0, 1)
        under = picture[rows]
        for channel in range(3):
            under[:, channel] += cover * (paint[rows, channel, None, None] * shade - under[:, channel])
        picture[rows] = under
    return _noise(_blur(picture, u[:, 34].astype(np.float32)), u[:, 35].astype(np.float32), words)


def _background(side: int, u: np.ndarray) -> np.ndarray:
    """Dull, uneven grounds float32 (B, 3, side, side): a tint and a smooth 4 × 4 field of light and dark."""
    tint = 70 + 150 * u[:, 0:1] + 36 * (u[:, 1:4] - 0.5)
    field = (u[:, 10:26].reshape(-1, 4, 4) - 0.5) * (20 + 70 * u[:, 6, None, None])
    place_at = np.arange(side, dtype=np.float32) * np.float32(3 / max(side - 1, 1))
    low = np.minimum(place_at.astype(np.int64), 2)
    part = place_at - low.astype(np.float32)
    part = part * part * (3 - 2 * part)
    lines = field[:, low, :] + (field[:, low + 1, :] - field[:, low, :]) * part[None, :, None]
    plane = lines[:, :, low] + (lines[:, :, low + 1] - lines[:, :, low]) * part[None, None, :]
    return tint[:, :, None, None] + plane[:, None]


def _blur(picture: np.ndarray, u: np.ndarray) -> np.ndarray:
    """A three-tap blur along both axes, from none to strong."""
    share = (u * np.float32(0.25))[:, None, None, None]
    picture[:, :, 1:-1] += share * (picture[:, :, :-2] + picture[:, :, 2:] - 2 * picture[:, :, 1:-1])
    picture[..., 1:-1] += share * (picture[..., :-2] + picture[..., 2:] - 2 * picture[..., 1:-1])
    return picture


def _noise(picture: np.ndarray, u: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Adds sensor noise (triangular, from two bytes a value) and rounds to uint8."""
    batch, _, side, _ = picture.shape
    raw = np.ascontiguousarray(words).view(np.uint8)[:, : side * side * 6].reshape(batch, 2, 3, side, side)
    grain = raw[:, 0].astype(np.float32) + raw[:, 1] - np.float32(255)
    strength = (np.float32(0.01) + np.float32(0.07) * u)[:, None, None, None]
    final = np.clip(picture + strength * grain + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(final.transpose(0, 2, 3, 1))


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - np.float32(0.95)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.82)


def _polygon(points: list[tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Signed distance to a closed polygon: nearest edge, and the sign by crossings of a ray."""
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
    """Two half circles on a rounded tip; Quilez' heart, scaled to reach from -1 to 1."""
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
