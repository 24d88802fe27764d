"""Confidence intervals of scores."""

from __future__ import annotations

import math

from clipwright.pipeline.page.render import percent


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a proportion: `successes` of `n` > 0 independent trials.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    proportion = successes / n
    weight = z * z / n
    middle = proportion + weight / 2
    half_width = z * math.sqrt(proportion * (1 - proportion) / n + weight / (4 * n))
    return max(0.0, (middle - half_width) / (1 + weight)), min(1.0, (middle + half_width) / (1 + weight))


def format_interval(share: float, n: int) -> str:
    """Returns a share of `n` trials as `41 % (95 % interval 38 % to 44 %)`."""
    low, high = wilson_interval(round(share * n), n)
    return f"{percent(share)} ({percent(0.95)} interval {percent(low)} to {percent(high)})"
