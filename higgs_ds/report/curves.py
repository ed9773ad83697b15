"""The picture of a run: its losses over optimizer steps, drawn from metrics.jsonl or from memory."""

import math
from pathlib import Path

import numpy as np

from ..files import replacing
from .jsonl import read_rows

NUM_CODEBOOKS = 8
# label, training metric, validation metric, colour
LOSS_CURVES = (
    ("total", "train/loss", "eval/loss", "#222222"),
    ("text", "train/text_loss", "eval/text_loss", "#1f77b4"),
    ("audio", "train/audio_loss", "eval/audio_loss", "#d95f02"),
)
CODEBOOK_METRICS = tuple(f"train/codebook_loss/{codebook}" for codebook in range(NUM_CODEBOOKS))
PLOTTED_METRICS = {name for _, *names, _ in LOSS_CURVES for name in names} | set(CODEBOOK_METRICS)

# metric name -> (global steps, values)
History = dict[str, tuple[list[int], list[float]]]


def draw_curves(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draw the loss curves of a metrics.jsonl, of a finished or a running training.

    Left: total, text and audio loss in nats, raw (thin) and smoothed (thick), with validation as marked lines.
    Right: the losses of the 8 codebooks. x is the global step; the y axis turns logarithmic above 1.5 decades.

    Raises:
        FileNotFoundError: no such metrics file.
        ValueError: it holds none of the losses above, or a line that is not JSON.
    """
    history: History = {}
    for row in read_rows(Path(metrics_jsonl)):
        remember(history, row)
    if not history:
        raise ValueError(f"{metrics_jsonl} has no losses to draw; expected names such as train/loss, eval/loss")
    draw_history(history, Path(png), title)


def remember(history: History, row: dict) -> None:
    """Add the losses of one row to what the plot is drawn from."""
    for name in PLOTTED_METRICS & row.keys():
        steps, values = history.setdefault(name, ([], []))
        steps.append(row["global_step"])
        values.append(float(row[name]))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about 1/25 of the run, at most 500 points; non-finite values are skipped."""
    half = min(len(values) // 50, 250)
    window = np.ones(2 * half + 1)
    finite = np.isfinite(values)
    # np.convolve adds directly: with a running sum, rounding would turn losses of exactly 0 into 1e-13 and the like.
    total = np.convolve(np.where(finite, values, 0.0), window)[half : half + len(values)]
    count = np.convolve(finite.astype(float), window)[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def draw_history(history: History, png: Path, title: str) -> None:
    """Draws what `remember` gathered; see `draw_curves` for what is where. The file appears whole or not at all."""
    # The object interface of matplotlib leaves pyplot's global state alone, and the import waits for the first plot.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), dpi=100)  # 1600 x 700 pixels
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.225, top=0.87, wspace=0.14)
    figure.suptitle(title, fontsize=17, fontweight="bold", y=0.97, parse_math=False)
    losses, codebooks = figure.subplots(1, 2)

    for label, train, validation, colour in LOSS_CURVES:
        # The total is wider: it stays visible under a text or audio loss that is all of it.
        _draw_curve(losses, history, train, label, colour, width=3.8 if label == "total" else 2.2)
        if validation in history:
            steps, values = history[validation]
            losses.plot(
                steps,
                values,
                color=colour,
                linestyle="--",
                linewidth=1.4,
                marker="o",
                markersize=7,
                markevery=math.ceil(len(steps) / 30),
                markerfacecolor="white",
                markeredgewidth=1.8,
                zorder=4,
                label=f"validation  {values[-1]:#.4g}",
            )
    for codebook, name in enumerate(CODEBOOK_METRICS):
        colour = colormaps["viridis"](0.92 * codebook / (NUM_CODEBOOKS - 1))
        _draw_curve(codebooks, history, name, f"{codebook}:", colour, width=2.2)

    losses.set_title("Loss", fontsize=14)
    codebooks.set_title("Audio loss by codebook (train)", fontsize=14)
    _finish_axes(losses, legend_title=None, legend_columns=3)
    _finish_axes(codebooks, legend_title="codebook", legend_columns=4)

    with replacing(png) as beside:
        figure.savefig(beside, format="png")


def _draw_curve(axes, history: History, name: str, label: str, colour, width: float) -> None:
    """One training metric: every value thin, their smoothed course thick."""
    if name not in history:
        return
    steps, values = history[name]
    smoothed = _smooth(np.array(values))
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    # A line through very few points is a speck: mark them.
    marker = "o" if len(steps) < 10 else None
    axes.plot(steps, smoothed, color=colour, linewidth=width, marker=marker, label=f"{label}  {smoothed[-1]:#.4g}")


def _finish_axes(axes, legend_title: str | None, legend_columns: int) -> None:
    """Scale, labels and legend, the same for both panels."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = np.array([value for line in axes.get_lines() for value in line.get_ydata()], dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    unit = "nats"
    if positive.size and positive.max() > positive.min() * 10**1.5:
        # A loss of exactly 0 has no place on a log axis: its points are left out.
        axes.set_yscale("log", nonpositive="mask")
        unit = "nats, log scale"
        if positive.max() < positive.min() * 1e4:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("optimizer step", fontsize=13)
    axes.set_ylabel(f"cross-entropy ({unit})", fontsize=13)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=12)
    axes.grid(True, which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_lines():
        # Below the axes no curve can run into it. Figures are the last of the thick line.
        axes.legend(
            fontsize=12,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.12),
            title=legend_title,
            title_fontsize=12,
            ncols=legend_columns,
            frameon=False,
        )
    else:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", fontsize=13, color="#888888")
