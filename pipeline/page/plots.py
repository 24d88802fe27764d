"""Charts of a report as inline SVG: text stays text, colors follow the page's light or dark theme.

Charts are 340 units wide, which a phone shows at scale 1, so that no letter is smaller than 14 pixels. The colors are
those of Okabe and Ito; a line style, a frame or a word always repeats what a color means.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

WIDTH, FONT = 340, 14
POINTS = 500  # points per curve; more would not be visible
MAX_LABEL = 130  # units that the name of a class may take
FEW_POINTS = 12  # so few are also drawn as points
INK, SOFT, LINE, BLUE, ORANGE = "#1b1f24", "#57606a", "#d5dae0", "#0072b2", "#b34700"
_VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", BLUE: "--right", ORANGE: "--wrong"}
_STYLE: dict[Any, Any] = {
    "font.size": FONT,
    "text.color": INK,
    "text.parse_math": False,  # a class name may hold a dollar sign
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.fonttype": "none",
}


def chart(
    title: str, height: float, paint: Callable[[Axes], dict[str, Any] | None], margins: Sequence[float] = ()
) -> Markup:
    """Returns an SVG of one set of axes that `paint` fills; the same numbers give the same bytes.

    `title` is the text for screen readers. `margins`: left, right, top, bottom, in units. If `paint` returns the x
    values and the lines of a curve, `page.js` shows them at the pointer.
    """
    left, right, top, bottom = margins or (60, 14, 24, 46)
    # The salt makes the ids of markers and clips unique among the charts of a page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser renders the text with its own fonts
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
        curves = paint(figure.add_axes(box))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    attribute = ""
    if curves is not None:
        frame = (left, top, WIDTH - left - right, height - top - bottom)
        attribute = f' data-curve="{escape(json.dumps({"frame": frame, **curves}, ensure_ascii=False))}"'
    return _inline(file.getvalue(), title, height, attribute)


def _inline(svg: str, title: str, height: float, attribute: str) -> Markup:
    """Turns Matplotlib's file into an element of a page: no prolog, the page's fonts and colors, a title."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index(">", svg.index("<svg")) + 1 :], flags=re.DOTALL)
    body = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|PatchCollection|legend)_\d+"', "", body
    )
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    for color, name in _VARIABLES.items():
        body = body.replace(color, f"var({name})")
    name, _, description = title.partition(". ")
    start = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}"{attribute}>'
    return Markup(f"{start}<title>{escape(name)}</title><desc>{escape(description)}</desc>{body}")


def thin(values: Sequence[float], limit: int = POINTS) -> list[float]:
    """Returns at most `limit` of the values, evenly spaced and including the last."""
    if len(values) <= limit:
        return list(values)
    return [values[round(i * (len(values) - 1) / (limit - 1))] for i in range(limit)]


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the exponential moving average over about a twelfth of the values, without bias toward the first.

    A value that is not finite is left out of the average, which keeps its last value there.
    """
    keep = 1 - 1 / max(2.0, len(values) / 12)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight if weight else math.nan)
    return means


def curve(
    title: str,
    samples: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    label: str,
    level: tuple[float, str] | None = None,
    percent: bool = False,
    smoothed: bool = True,
    resumed: Sequence[float] = (),
    skipped: Sequence[float] = (),
    best: tuple[float, float] | None = None,
) -> Markup:
    """Plots curves over training samples, measured (faint) and smoothed (bold), or measured only.

    level: a named horizontal line. resumed, skipped: samples at which a run was resumed (dashed vertical lines) and
    steps were skipped (ticks at the bottom). best: a point to mark. Values that are not finite leave a gap.
    """
    factor, unit = _unit(max(samples))

    def paint(axes: Axes) -> dict[str, Any]:
        x = [n / factor for n in thin(samples)]
        # A line needs two points; a few points are easier to see as points.
        marker = "o" if len(x) <= FEW_POINTS else ""
        for (name, values), color, style in zip(lines.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
            measured: dict[str, Any] = {"alpha": 0.35, "linewidth": 1} if smoothed else {"linewidth": 2, "label": name}
            axes.plot(x, thin(values), color=color, marker=marker, markersize=4, **measured)
            if smoothed:
                axes.plot(x, thin(smooth(values)), color=color, linewidth=2.5, linestyle=style, label=name)
        if level is not None:
            _draw_level(axes, *level)
        for at in resumed:
            axes.axvline(at / factor, color=SOFT, linewidth=1, linestyle="--")
        for at in skipped:
            axes.axvline(at / factor, ymax=0.06, color=ORANGE, linewidth=1.5)
        if best is not None:
            axes.plot([best[0] / factor], [best[1]], color=ORANGE, marker="D", markersize=8, fillstyle="none")
        if len(lines) > 1:
            axes.legend(frameon=False, loc="best", handlelength=1.6, borderaxespad=0.2)
        if all(value >= 0 for values in lines.values() for value in values if math.isfinite(value)):
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0, right=1.02 * max(samples) / factor)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        else:
            axes.yaxis.set_major_formatter(_short_number)
        axes.locator_params(nbins=5)
        axes.set_xlabel(f"{unit}training samples")
        axes.set_ylabel(label)
        scale = 100 if percent else 1
        shown = {name: [_rounded(scale * value) for value in thin(values)] for name, values in lines.items()}
        return {
            "range": [factor * end for end in axes.get_xlim()],
            "x": thin(samples),
            "unit": "samples",
            "lines": shown,
        }

    return chart(title, 230, paint)


def _draw_level(axes: Axes, value: float, name: str) -> None:
    axes.axhline(value, color=SOFT, linewidth=1.5, linestyle=":")
    axes.annotate(
        name,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=SOFT,
    )


def _unit(most: float) -> tuple[int, str]:
    """Returns the unit of an axis that ends at `most`, and its name."""
    if most >= 10_000_000:
        return 1_000_000, "million "
    return (1000, "thousand ") if most >= 10_000 else (1, "")


def _short_number(value: float, _: object = None) -> str:
    """Formats an axis value in few characters: 0.25, 12,000, 5e-5."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _rounded(value: float) -> float | None:
    """Returns a value with five digits; None for one that is not finite, which JSON does not have."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def bars(title: str, rows: Sequence[tuple[str, float, float | None, str]]) -> Markup:
    """Plots shares as bars: (label, share, chance level or None, its name). A mark below the bar shows the chance."""
    heights = [48 if chance is None else 64 for _, _, chance, _ in rows]

    def paint(axes: Axes) -> None:
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(sum(heights), 0)
        top = 0
        for (label, share, chance, name), height in zip(rows, heights, strict=True):
            axes.text(0, top + 15, label, weight="bold")
            axes.text(1, top + 15, f"{100 * share:.0f} %", weight="bold", ha="right")
            axes.add_patch(Rectangle((0, top + 21), 1, 14, color=LINE, alpha=0.5, linewidth=0))
            axes.add_patch(Rectangle((0, top + 21), share, 14, color=BLUE, linewidth=0))
            if chance is not None:
                axes.plot([chance, chance], [top + 21, top + 40], color=ORANGE, linewidth=3, solid_capstyle="butt")
                side = "left" if chance < 0.5 else "right"
                axes.text(chance, top + 53, f"{name} {100 * chance:.0f} %", color=ORANGE, ha=side)
            top += height

    return chart(title, sum(heights) + 6, paint, (4, 4, 2, 4))


def _text_width(text: str) -> float:
    """Returns about how wide a text is: letters of East Asian scripts are as wide as the font is high."""
    return sum(FONT if ord(letter) > 0x1100 else 0.58 * FONT for letter in text)


def _fit(name: str) -> str:
    """Shortens the name of a row or column to MAX_LABEL."""
    if _text_width(name) <= MAX_LABEL:
        return name
    while _text_width(name) > MAX_LABEL - FONT:
        name = name[:-1]
    return f"{name}…"


def matrix(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Plots a confusion matrix in percent of each row (a share for each of `names`); correct cells are framed."""
    labels = {name: _fit(name) for name in names}
    left = top = max(74.0, *(_text_width(label) + 10 for label in labels.values()))
    side = min(36.0, (WIDTH - left - 4) / len(names))

    def paint(axes: Axes) -> None:
        axes.set_xlim(0, len(names))
        axes.set_ylim(len(rows), 0)
        for i, (kind, shares) in enumerate(rows):
            own = names.index(kind)
            for j, share in enumerate(shares):
                color, weight = (BLUE, "bold") if j == own else (ORANGE, "normal")
                if share > 0:
                    fill = Rectangle((j, i), 1, 1, color=color, alpha=0.12 + 0.5 * share, linewidth=0)
                    axes.add_patch(fill)
                if share >= 0.005 or j == own:
                    text = f"{100 * share:.0f}"
                    axes.text(j + 0.5, i + 0.5, text, ha="center", va="center_baseline", weight=weight)
            frame = Rectangle((own + 0.04, i + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.5)
            axes.add_patch(frame)
        axes.set_xticks([j + 0.5 for j in range(len(names))], list(labels.values()), rotation=90, color=INK)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [labels[kind] for kind, _ in rows], color=INK)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    right = WIDTH - left - side * len(names)
    return chart(title, side * len(rows) + top + 4, paint, (left, right, top, 4))
