"""Charts of a report as inline SVG: text stays text, colors follow the page's light or dark theme.

Charts are 340 units wide, which a phone shows at scale 1, so that no letter is smaller than 14 pixels. The colors are
those of Okabe and Ito; a line style, a frame or a word always repeats what a color means.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

WIDTH, FONT = 340, 14
POINTS = 500  # points per curve; more would not be visible
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


def chart(title: str, height: float, paint: Callable[[Axes], None], margins: Sequence[float] = ()) -> Markup:
    """Returns an SVG of one set of axes that `paint` fills; the same numbers give the same bytes.

    `title` is the text for screen readers. `margins`: left, right, top, bottom, in units.
    """
    left, right, top, bottom = margins or (52, 14, 12, 46)
    # The salt makes the ids of markers and clips unique among the charts of a page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser renders the text with its own fonts
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
        paint(figure.add_axes(box))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), title, height)


def _inline(svg: str, title: str, height: float) -> Markup:
    """Turns Matplotlib's file into an element of a page: no prolog, the page's fonts and colors, a title."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index(">", svg.index("<svg")) + 1 :], flags=re.DOTALL)
    body = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|PatchCollection|legend)_\d+"', "", body
    )
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    for color, name in _VARIABLES.items():
        body = body.replace(color, f"var({name})")
    name, _, description = title.partition(". ")
    start = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{start}<title>{escape(name)}</title><desc>{escape(description)}</desc>{body}")


def thin(values: Sequence[float], limit: int = POINTS) -> list[float]:
    """Returns at most `limit` of the values, evenly spaced and including the last."""
    if len(values) <= limit:
        return list(values)
    return [values[round(i * (len(values) - 1) / (limit - 1))] for i in range(limit)]


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the exponential moving average over about a twelfth of the values, without bias toward the first."""
    keep = 1 - 1 / max(2.0, len(values) / 12)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def curve(
    title: str,
    samples: Sequence[float],
    lines: dict[str, Sequence[float]],
    *,
    label: str,
    level: tuple[float, str] | None = None,
    percent: bool = False,
) -> Markup:
    """Plots curves over training samples, measured (faint) and smoothed (bold). `level`: a named horizontal line."""

    def paint(axes: Axes) -> None:
        x = thin([n / 1000 for n in samples])
        for (name, values), color, style in zip(lines.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
            axes.plot(x, thin(values), color=color, alpha=0.35, linewidth=1)
            axes.plot(x, thin(smooth(values)), color=color, linewidth=2.5, linestyle=style, label=name)
        if level is not None:
            axes.axhline(level[0], color=SOFT, linewidth=1.5, linestyle=":")
            axes.annotate(
                level[1],
                (1, level[0]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=SOFT,
            )
        if len(lines) > 1:
            axes.legend(frameon=False, loc="lower right", handlelength=1.6, borderaxespad=0.2)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        axes.locator_params(nbins=5)
        axes.set_xlabel("thousand training samples")
        axes.set_ylabel(label)

    return chart(title, 230, paint)


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


def matrix(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Plots a confusion matrix in percent of each row (a share for each of `names`); correct cells are framed."""
    left, top = 74, 74
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
        axes.set_xticks([j + 0.5 for j in range(len(names))], names, rotation=90, color=INK)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [kind for kind, _ in rows], color=INK)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    right = WIDTH - left - side * len(names)
    return chart(title, side * len(rows) + top + 4, paint, (left, right, top, 4))
