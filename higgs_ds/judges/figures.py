"""Figures of a set of clips with their 95 % intervals, by bootstrap over speakers and texts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles

Unit = tuple[Hashable, Hashable]  # speaker and text
# Of each clip: its unit, and what it adds to the figure's numerator and to its denominator.
Ratios = Sequence[tuple[Unit, tuple[float, float]]]


@dataclass(frozen=True)
class Figure:
    """A figure, and the ends of its interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Draws of speakers, and of each drawn speaker's texts, the same ones for every figure and every set of clips."""

    def __init__(self, units: Sequence[Unit], seed: int = 0):
        """Takes (speaker, text) of every clip; equal ones are one unit."""
        self._index = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        speakers: dict[Hashable, list[int]] = {}
        for (speaker, _), number in self._index.items():
            speakers.setdefault(speaker, []).append(number)
        random = np.random.default_rng(seed)
        of_speakers = random.multinomial(len(speakers), [1 / len(speakers)] * len(speakers), size=DRAWS)
        self._times = np.zeros((DRAWS, len(self._index)))  # how often a draw holds a unit
        for texts, drawn in zip(speakers.values(), of_speakers.T, strict=True):
            self._times[:, texts] = random.multinomial(drawn * len(texts), [1 / len(texts)] * len(texts))

    def figure(self, ratios: Ratios) -> Figure | None:
        """Sum of the numerators over that of the denominators, of (unit, ratio) a clip; None without any."""
        sums = self._sums(ratios)
        if not sums[1].sum():
            return None
        return self._of(sums[0].sum() / sums[1].sum(), self._draws(sums))

    def difference(self, one: Ratios, other: Ratios) -> Figure | None:
        """The figure of one set less that of another, over the units that both have; None without any."""
        both = [self._sums(of_set) for of_set in (one, other)]
        shared = (both[0][1] > 0) & (both[1][1] > 0)
        if not shared.any():
            return None
        first, second = (sums * shared for sums in both)
        value = first[0].sum() / first[1].sum() - second[0].sum() / second[1].sum()
        return self._of(value, self._draws(first) - self._draws(second))

    def _sums(self, ratios: Ratios) -> np.ndarray:
        """float64 [2, units]: numerators and denominators."""
        sums = np.zeros((2, len(self._index)))
        for unit, ratio in ratios:
            sums[:, self._index[unit]] += ratio
        return sums

    def _draws(self, sums: np.ndarray) -> np.ndarray:
        """float64 [draws]; NaN where a draw holds no unit of the set."""
        above, below = (self._times @ side for side in sums)
        return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)

    @staticmethod
    def _of(value: float, draws: np.ndarray) -> Figure:
        low, high = np.nanpercentile(draws, INTERVAL)
        return Figure(float(value), float(low), float(high))
