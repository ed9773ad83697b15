"""Plot of a run: losses over optimizer steps, from metrics.jsonl or from memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..files import replacing
from .history import CODEBOOK_METRICS, JUDGED_METRICS, NUM_CODEBOOKS, History
from .jsonl import read_rows

FIGURE_INCHES, DPI = (16, 10), 100  # 1600 x 1000 pixels
LOG_DECADES = 1.5  # wider ranges get a log axis
FEW_POINTS = 10  # fewer points get markers
MANY_RESUMES = 4  # more of them are not labelled
BLACK, BLUE, ORANGE, GREY = "#222222", "#1f77b4", "#c8550a", "#777777"


def draw_curves(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draws the curves of a metrics.jsonl, of a finished or running training; see `make_figure`.

    Raises:
        FileNotFoundError: the metrics file is missing.
        ValueError: the file has no losses, or a line that is not JSON.
    """
    history = History()
    for row in read_rows(Path(metrics_jsonl)):
        history.add(row)
    if not history:
        raise ValueError(f"{metrics_jsonl} has no losses to draw; expected names such as train/loss, eval/loss")
    draw_history(history, Path(png), title)


def draw_history(history: History, png: Path, title: str) -> None:
    """Draws a run's history, see `make_figure`; writes the file atomically."""
    figure = make_figure(history, title)
    with replacing(png) as beside:
        figure.savefig(beside, format="png")


def make_figure(history: History, title: str):
    """Draws a run's history as a matplotlib Figure of 1600 x 1000 pixels.

    Top: audio loss with validation, and loss by codebook. Bottom: text loss, total loss, gradient norm, learning rate,
    and judges' figures of the samples. Thin lines are logged values, thick lines are smoothed, circles are validations,
    a star marks the best, and dotted verticals mark resumes. Each y axis fits the smoothed curves, so spikes may be cut
    off; it is logarithmic if they span more than 1.5 decades.
    """
    # Imported on the first plot only; matplotlib's object interface has no global state.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=FIGURE_INCHES, dpi=DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=17, fontweight="bold", x=0.05, y=0.975, ha="left", parse_math=False)
    figure.text(0.985, 0.962, f"step {history.last_step:,}", ha="right", fontsize=13, color=GREY)
    above = figure.add_gridspec(1, 2, left=0.05, right=0.985, top=0.905, bottom=0.455, wspace=0.13)
    judged = [name for name in JUDGED_METRICS if name in history.series]
    below = figure.add_gridspec(1, 5 if judged else 4, left=0.05, right=0.985, top=0.315, bottom=0.06, wspace=0.24)

    audio = _Panel(figure.add_subplot(above[0]), history, "Audio loss")
    audio.train("train/audio_loss", ORANGE, "train")
    audio.validation("eval/audio_loss")
    audio.finish(legend_columns=2, resumes_in_words=True)
    books = _Panel(figure.add_subplot(above[1]), history, "Audio loss by codebook, train")
    for codebook, name in enumerate(CODEBOOK_METRICS):
        books.train(name, colormaps["viridis"](0.92 * codebook / (NUM_CODEBOOKS - 1)), f"{codebook}:")
    books.finish(legend_columns=4)
    for place, loss, heading, colour in ((0, "text_loss", "Text loss", BLUE), (1, "loss", "Total loss", BLACK)):
        panel = _Panel(figure.add_subplot(below[place]), history, heading, small=True)
        panel.train(f"train/{loss}", colour, "")
        panel.validation(f"eval/{loss}")
        panel.finish()
    norm = _Panel(figure.add_subplot(below[2]), history, "Gradient norm", small=True)
    norm.train("train/grad_norm", GREY, "")
    norm.finish()
    rate = _Panel(figure.add_subplot(below[3]), history, "Learning rate", small=True)
    rate.line("train/learning_rate", GREY)
    rate.finish(may_be_log=False)
    if judged:
        axes = figure.add_subplot(below[4])
        panel = _Panel(axes, history, "Samples", small=True)
        for name, colour in zip(judged, (ORANGE, BLUE, GREY), strict=False):
            panel.line(name, colour, name.removeprefix("eval/"))
        panel.finish(may_be_log=False)
        axes.set_title("", loc="right")
        axes.legend(fontsize=10, framealpha=0.6)
    return figure


class _Panel:
    """A pair of axes, and the values to fit its y axis to."""

    def __init__(self, axes, history: History, heading: str, *, small: bool = False):
        self._axes = axes
        self._history = history
        self._small = small
        self._shown: list[np.ndarray] = []
        axes.set_title(heading, fontsize=12 if small else 14, loc="left")

    def train(self, name: str, colour, label: str) -> None:
        """Draws raw values thin and smoothed ones thick; the legend shows the last smoothed value."""
        if name not in self._history.series:
            return
        steps, values = map(np.asarray, self._history.series[name].points())
        smoothed = _smooth(values)
        few = len(steps) < FEW_POINTS
        if not few:
            self._axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.28)
        width = 1.6 if self._small else 2.4
        figure = f"{label}  {smoothed[-1]:#.4g}"
        self._axes.plot(steps, smoothed, color=colour, linewidth=width, marker="o" if few else None, label=figure)
        finite = values[np.isfinite(values)]
        # The y axis shows the smoothed curve and most raw values.
        self._shown += [smoothed, np.quantile(finite, [0.02, 0.98])] if finite.size else []

    def line(self, name: str, colour, label: str = "") -> None:
        """Draws the values without smoothing; a label shows the last one."""
        if name in self._history.series:
            steps, values = map(np.asarray, self._history.series[name].points())
            style = {"color": colour, "linewidth": 1.6, "marker": "o" if len(steps) < FEW_POINTS else None}
            self._axes.plot(steps, values, label=f"{label}  {values[-1]:#.3g}" if label else None, **style)
            self._shown.append(values)

    def validation(self, name: str) -> None:
        """Draws circles on a dashed line, and a star at the minimum."""
        if name not in self._history.series:
            return
        steps, values = map(np.asarray, self._history.series[name].points())
        style = {"markerfacecolor": "white", "markeredgewidth": 1.6, "zorder": 4, "clip_on": False}
        self._axes.plot(
            steps,
            values,
            color=BLACK,
            linestyle=(0, (4, 2)),
            linewidth=1.2,
            marker="o",
            markersize=4 if self._small else 6,
            markevery=math.ceil(len(steps) / 30),
            label=f"validation  {values[-1]:#.4g}",
            **style,
        )
        self._shown.append(values)
        if not self._small and np.isfinite(values).any() and len(values) > 1:
            best = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
            label = f"best  {values[best]:#.4g} at step {steps[best]:,}"
            star = {"marker": "*", "markersize": 15, "zorder": 5, "linestyle": "none", "clip_on": False}
            self._axes.plot([steps[best]], [values[best]], color=BLACK, label=label, **star)

    def finish(
        self, legend_columns: int | None = None, *, resumes_in_words: bool = False, may_be_log: bool = True
    ) -> None:
        """Sets scale, labels and legend; without `legend_columns`, the legend is a line beside the heading."""
        axes = self._axes
        self._scale(may_be_log)
        self._mark_resumes(resumes_in_words)
        if not self._small:
            axes.set_xlabel("optimizer step", fontsize=12)
            axes.set_ylabel(f"cross-entropy, nats{' (log)' if axes.get_yscale() == 'log' else ''}", fontsize=12)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5 if self._small else 9)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(labelsize=10 if self._small else 11)
        axes.grid(True, which="major", color="#e2e2e2")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if not self._shown:
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", fontsize=12, color="#888888")
        elif legend_columns:
            # Below the axes, where no curve can overlap it.
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.11)}
            axes.legend(fontsize=11.5, ncols=legend_columns, frameon=False, **place)
        else:
            figures = "   ".join(line.get_label().strip() for line in axes.get_lines() if line.get_label()[0] != "_")
            axes.set_title(figures.replace("validation", "val"), fontsize=11, loc="right", color=GREY)

    def _scale(self, may_be_log: bool) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        values = np.concatenate(self._shown) if self._shown else np.zeros(0)
        values = values[np.isfinite(values)]
        positive = values[values > 0]
        if may_be_log and positive.size and positive.max() > positive.min() * 10**LOG_DECADES:
            # A loss of exactly 0 is left out on a log axis.
            self._axes.set_yscale("log", nonpositive="mask")
            low, high = positive.min(), positive.max()
            self._axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
            if high < low * 1e4:
                self._axes.yaxis.set_major_locator(LogLocator(subs=(1,) if self._small else (1, 2, 5)))
                self._axes.yaxis.set_major_formatter("{x:g}")
                self._axes.yaxis.set_minor_formatter(NullFormatter())
            return
        if self._shown and max(np.nanmax(np.abs(shown), initial=0.0) for shown in self._shown) < 1e-2:
            self._axes.yaxis.set_major_formatter("{x:.1e}")
        if values.size:
            low, high = values.min(), values.max()
            margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            self._axes.set_ylim(low - margin, high + margin)

    def _mark_resumes(self, in_words: bool) -> None:
        resumed = self._history.resumed_after
        for step in resumed if self._shown else []:
            self._axes.axvline(step, color=GREY, linewidth=1.1, linestyle=":", zorder=1)
            if in_words and len(resumed) <= MANY_RESUMES:
                where = {"xy": (step, 1), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                words = {"va": "top", "ha": "left", "fontsize": 10.5, "color": GREY}
                self._axes.annotate(f"resumed after step {step:,}", xytext=(5, -2), **where, **words)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about 1/25 of the points, skipping non-finite values.

    At the start, where a loss falls fastest, the window of the i-th point is at most i wide.
    """
    half = len(values) // 50
    window = np.ones(2 * half + 1)
    finite = np.isfinite(values)
    # np.convolve sums directly; a running sum would turn losses of exactly 0 into 1e-13.
    total = np.convolve(np.where(finite, values, 0.0), window)[half : half + len(values)]
    count = np.convolve(finite.astype(float), window)[half : half + len(values)]
    for i in range(min(2 * half, len(values))):
        near = slice(i - i // 2, i + i // 2 + 1)
        total[i], count[i] = values[near][finite[near]].sum(), finite[near].sum()
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)
