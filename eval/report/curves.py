"""The figures of a run: its logged numbers over training samples, each with a sentence and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from clipwright.eval.report.run_folder import RunFolder
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.losses.base import MAX_LOG_SCALE
from clipwright.pipeline.page import plots
from clipwright.pipeline.page.render import percent

TABLE_ROWS = 40  # of a figure's table; the curve has up to plots.POINTS points
FURTHER_FIGURES = 8  # numbers that are logged beside the usual ones, such as those of techniques
VALIDATION = "val_"
# Fields of a record that are no curve of their own, or that another figure shows.
_NOT_SHOWN = {"step", "samples", "resumed", "saved", "slow", "accepted", "skipped", "negatives"}


@dataclass(frozen=True)
class CurveFigure:
    """A figure with its title, a sentence about it, and its numbers as a table."""

    title: str
    text: str
    figure: Markup | None  # None if there is nothing to draw
    columns: list[str]
    rows: list[list[float | int | None]]


class Curves:
    """Makes the figures of one run."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.samples = run.samples()
        self.resumed = [
            float(record["resumed"] * run.batch) for record in run.log if isinstance(record.get("resumed"), int)
        ]
        self.skipped = self._skipped()
        self._used: set[str] = set()

    def training(self) -> list[CurveFigure]:
        """The figures of training, in order of importance; those of numbers that were never logged are left out."""
        rate, waiting = self.run.series("samples_per_s"), self.run.series("data_share")
        figures = [
            self._curve("Loss", {"loss": "loss"}, self._change("The loss", "loss"), level=self._chance()),
            self._curve(
                "Accuracy within the batch",
                {"image → text": "acc_image", "text → image": "acc_text"},
                self._accuracy(),
                percent_axis=True,
            ),
            self._curve("Learning rate", {"lr": "lr"}, self._change("The learning rate", "lr"), smoothed=False),
            self._curve(
                "Logit scale",
                {"scale": "scale"},
                f"{self._change('The logit scale', 'scale')} Its ceiling is {math.exp(MAX_LOG_SCALE):.0f}.",
                smoothed=False,
                level=self._ceiling(),
            ),
            self._curve(
                "Gradient norm",
                {"norm": "grad_norm"},
                f"{self._change('The norm', 'grad_norm')} {self._skipped_text()}",
            ),
            self._curve(
                "Speed",
                {"samples/s": "samples_per_s"},
                f"Median {_median(rate, '{:,.0f}')} samples/s.",
                unit="samples per second",
            ),
            self._curve(
                "Wait for data",
                {"share": "data_share"},
                f"Median share of the time {_median(waiting, '{:.1%}')}.",
                percent_axis=True,
            ),
            self._curve("Memory", {"GB": "memory_gb"}, self._memory(), unit="GB", smoothed=False),
            self._curve("Replaced samples", {"replaced": "replaced"}, "Samples that could not be read.", smoothed=False)
            if any(value > 0 for value in self.run.series("replaced"))
            else None,
            *self._further(),
        ]
        return [figure for figure in figures if figure is not None]

    def validation(self) -> list[CurveFigure]:
        """Recall on the held-out set, with the best step of each figure marked."""
        figures: list[CurveFigure] = []
        for k in (1, 5, 10):
            lines = {"image → text": f"val_i2t_r{k}", "text → image": f"val_t2i_r{k}"}
            figure = self._validation_curve(f"Recall@{k}", lines)
            if figure is not None:
                figures.append(figure)
        others = [name for name in self._names() if name.startswith(VALIDATION) and name not in self._used]
        for name in others[:FURTHER_FIGURES]:
            figure = self._validation_curve(name, {name: name}, share=False)
            if figure is not None:
                figures.append(figure)
        return figures

    def best_step(self) -> tuple[int, float] | None:
        """Step and value of the best mean Recall@1 of both directions; None without validation. The earliest wins."""
        best: tuple[int, float] | None = None
        for record, i2t, t2i in zip(
            self.run.log, self.run.series("val_i2t_r1"), self.run.series("val_t2i_r1"), strict=True
        ):
            mean = (i2t + t2i) / 2
            if math.isfinite(mean) and (best is None or mean > best[1]):
                best = (record["step"], mean)
        return best

    def _validation_curve(self, title: str, lines: dict[str, str], *, share: bool = True) -> CurveFigure | None:
        series = [self.run.series(name) for name in lines.values()]
        rows = [i for i, record in enumerate(self.run.log) if any(name in record for name in lines.values())]
        means = {i: statistics.fmean(numbers[i] for numbers in series) for i in rows}
        finite = {i: mean for i, mean in means.items() if math.isfinite(mean)}
        if not finite:
            return None
        best = max(finite, key=lambda i: finite[i])
        step, value = self.run.log[best]["step"], finite[best]
        what = "mean of both directions" if len(lines) > 1 else "value"
        text = f"Highest {what} {percent(value) if share else f'{value:.4g}'} at step {step:,} (◇)."
        return self._curve(
            title, lines, text, rows=rows, smoothed=False, percent_axis=share, best=(self.samples[best], value)
        )

    def _curve(
        self,
        title: str,
        lines: dict[str, str],
        text: str,
        *,
        rows: Sequence[int] | None = None,
        percent_axis: bool = False,
        unit: str = "",
        smoothed: bool = True,
        level: tuple[float, str] | None = None,
        best: tuple[float, float] | None = None,
    ) -> CurveFigure | None:
        """Returns the figure of some logged numbers: name in the legend → name in the log. rows: of the log."""
        self._used |= set(lines.values())
        chosen = list(range(len(self.samples)) if rows is None else rows)
        names = set(self._names())
        series = {name: self.run.series(key) for name, key in lines.items() if key in names}
        if not series:
            return None
        values = {name: [numbers[i] for i in chosen] for name, numbers in series.items()}
        steps = [self.run.log[i]["step"] for i in chosen]
        x = [self.samples[i] for i in chosen]
        table = [
            [step, int(at), *(None if math.isnan(number) else number for number in numbers)]
            for step, at, *numbers in zip(steps, x, *values.values(), strict=True)
        ]
        columns = ["step", "samples", *(lines[name] for name in values)]
        shown = [table[int(i)] for i in plots.thin(range(len(table)), TABLE_ROWS)]
        if not any(math.isfinite(number) for numbers in values.values() for number in numbers):
            return CurveFigure(title, "No finite value was logged.", None, columns, shown)
        figure = plots.curve(
            f"{title}. {text}",
            x,
            values,
            label="%" if percent_axis else unit,
            level=level,
            percent=percent_axis,
            smoothed=smoothed,
            resumed=self.resumed,
            skipped=self.skipped,
            best=best,
        )
        return CurveFigure(title, text, figure, columns, shown)

    def _further(self) -> list[CurveFigure | None]:
        """Figures of the numbers that are logged beside the usual ones."""
        names = [
            name
            for name in self._names()
            if name not in self._used | _NOT_SHOWN | {"replaced"} and not name.startswith(VALIDATION)
        ]
        return [self._curve(name, {name: name}, self._change("It", name)) for name in names[:FURTHER_FIGURES]]

    def _names(self) -> list[str]:
        """Names of the numbers in the log, in order of appearance."""
        return list(
            dict.fromkeys(
                name
                for record in self.run.log
                for name, value in record.items()
                if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
            )
        )

    def _change(self, what: str, name: str) -> str:
        finite = [value for value in self.run.series(name) if math.isfinite(value)]
        if not finite:
            return ""
        if len(finite) == 1:
            return f"{what} is {finite[0]:.4g}."
        return f"{what} goes from {finite[0]:.4g} to {finite[-1]:.4g}."

    def _chance(self) -> tuple[float, str] | None:
        """The softmax loss of a random model: the logarithm of the texts that an image is compared with."""
        negatives = [value for value in self.run.series("negatives") if math.isfinite(value)]
        loss = self.run.tree.get("loss") or {}
        plain = loss.get("name") == "softmax" and not self.run.tree.get("techniques")
        if not plain or not negatives or (loss.get("matryoshka") or {}).get("dims"):
            return None
        chance = math.log(1 + statistics.median(negatives))
        return chance, f"chance: {chance:.2f}"

    def _accuracy(self) -> str:
        image, text = self.run.series("acc_image"), self.run.series("acc_text")
        ends = [values[-1] for values in (image, text) if values and math.isfinite(values[-1])]
        if len(ends) < 2:
            return "Share of the batch whose own partner has the highest similarity."
        return (
            f"At the end, {percent(ends[0])} of the images rank a caption of theirs first in the batch, and "
            f"{percent(ends[1])} of the captions their image."
        )

    def _ceiling(self) -> tuple[float, str] | None:
        """The ceiling of the logit scale, once the scale is close enough for both to be seen."""
        ceiling = math.exp(MAX_LOG_SCALE)
        highest = max((value for value in self.run.series("scale") if math.isfinite(value)), default=0)
        return (ceiling, f"ceiling: {ceiling:.0f}") if highest > ceiling / 4 else None

    def _memory(self) -> str:
        peak = max((value for value in self.run.series("memory_gb") if math.isfinite(value)), default=math.nan)
        return f"Peak of rank 0: {peak:.1f} GB." if math.isfinite(peak) else ""

    def _skipped(self) -> list[float]:
        """The samples of the logged steps since whose predecessor a step was skipped."""
        counts = [value if math.isfinite(value) else 0.0 for value in self.run.series("skipped")]
        grown = [now > before for before, now in zip([0.0, *counts], counts, strict=False)]
        return [at for at, is_grown in zip(self.samples, grown, strict=True) if is_grown]

    def _skipped_text(self) -> str:
        count = next((value for value in reversed(self.run.series("skipped")) if math.isfinite(value)), 0)
        if not count:
            return ""
        return f"{format_count(int(count), 'step')} skipped: the loss or a gradient was not finite."


def _median(values: Sequence[float], form: str) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return form.format(statistics.median(finite)) if finite else "–"


def training_seconds(run: RunFolder) -> float:
    """Returns the training time, computed from the log so that it also holds for a resumed run."""
    seconds = previous = 0.0
    for samples, rate in zip(run.samples(), run.series("samples_per_s"), strict=True):
        if rate > 0:
            seconds += max(0.0, samples - previous) / rate
        previous = samples
    return seconds
