"""A run's losses over optimizer steps, in bounded memory."""

from __future__ import annotations

import math
from array import array

NUM_CODEBOOKS = 8
CODEBOOK_METRICS = tuple(f"train/codebook_loss/{codebook}" for codebook in range(NUM_CODEBOOKS))
PLOTTED_METRICS = {f"{part}/{loss}" for part in ("train", "eval") for loss in ("loss", "text_loss", "audio_loss")}
JUDGED_METRICS = ("eval/wer", "eval/similarity", "eval/stops")
PLOTTED_METRICS |= {*CODEBOOK_METRICS, *JUDGED_METRICS, "train/learning_rate", "train/grad_norm"}
RESUMED = "resumed_after"  # in a resumed run's first row: the step it continues from

# A series holds up to twice as many points.
MAX_POINTS = 2048  # plots are about 700 pixels wide
MAX_RANK_POINTS = 64  # per rank, since W&B's chart has all ranks


class Series:
    """A metric over steps. Beyond `2 * max_points` values, each point is the mean of 2, then 4, 8, … values."""

    def __init__(self, max_points: int = MAX_POINTS):
        self._max_points = max_points
        self._steps, self._values = array("q"), array("d")
        self._stride = 1
        self._pending: list[float] = []  # values of the incomplete last point
        self._last_step = 0

    def add(self, step: int, value: float) -> None:
        """Appends a value; steps must increase."""
        self._last_step = step
        self._pending.append(value)
        if len(self._pending) == self._stride:
            self._steps.append(step)
            self._values.append(_mean(self._pending))
            self._pending = []
        if len(self._steps) == 2 * self._max_points:
            pairs = zip(self._values[::2], self._values[1::2], strict=True)
            self._values = array("d", [_mean(pair) for pair in pairs])
            self._steps = self._steps[1::2]
            self._stride *= 2

    def points(self) -> tuple[array, array]:
        """Returns steps (the last of each point) and values (means over finite values, else NaN)."""
        steps, values = self._steps[:], self._values[:]
        if self._pending:
            steps.append(self._last_step)
            values.append(_mean(self._pending))
        return steps, values


def _mean(values) -> float:
    """Averages the finite values; a single value is returned unchanged."""
    if len(values) == 1:
        return values[0]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


class History:
    """A run's plotted metrics by name, and the steps at which it was resumed."""

    def __init__(self):
        self.series: dict[str, Series] = {}
        self.resumed_after: list[int] = []
        self.last_step = 0
        self._ranks: list[Series] = []

    def add(self, row: dict) -> None:
        """Adds the plotted metrics of a row of metrics.jsonl."""
        step = row["global_step"]
        if RESUMED in row:
            self.resumed_after.append(row[RESUMED])
        for name in PLOTTED_METRICS & row.keys():
            self.series.setdefault(name, Series()).add(step, float(row[name]))
            self.last_step = step
        for rank, loss in enumerate(row.get("rank/loss", ())):
            if rank == len(self._ranks):
                self._ranks.append(Series(MAX_RANK_POINTS))
            if loss is not None:
                self._ranks[rank].add(step, float(loss))

    def rank_losses(self) -> list[tuple[list[int], list[float]]]:
        """Returns steps and finite losses of each rank."""
        parts = [zip(*series.points(), strict=True) for series in self._ranks]
        finite = [[(step, loss) for step, loss in part if math.isfinite(loss)] for part in parts]
        return [([step for step, _ in points], [loss for _, loss in points]) for points in finite]

    def __bool__(self) -> bool:
        return any(name.endswith("loss") or "loss/" in name for name in self.series)
