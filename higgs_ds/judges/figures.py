"""Figures of a set of clips with 95 % intervals, by bootstrap over speakers and texts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles

Unit = tuple[Hashable, Hashable]  # speaker and text
Ratios = Sequence[tuple[Unit, tuple[float, float]]]  # for each clip: unit, (numerator, denominator)


@dataclass(frozen=True)
class Figure:
    """A value and its interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Two-level bootstrap: draws speakers, then texts of each; all figures and sets of clips share the same draws."""

    def __init__(self, units: Sequence[Unit], seed: int = 0):
        """Takes the unit of every clip; duplicates are merged."""
        self._index = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        speakers: dict[Hashable, list[int]] = {}
        for (speaker, _), number in self._index.items():
            speakers.setdefault(speaker, []).append(number)
        random = np.random.default_rng(seed)
        speaker_counts = random.multinomial(len(speakers), [1 / len(speakers)] * len(speakers), size=DRAWS)
        self._counts = np.zeros((DRAWS, len(self._index)))  # of each unit in each draw
        for texts, drawn in zip(speakers.values(), speaker_counts.T, strict=True):
            self._counts[:, texts] = random.multinomial(drawn * len(texts), [1 / len(texts)] * len(texts))

    def figure(self, ratios: Ratios) -> Figure | None:
        """Computes sum of numerators / sum of denominators with its interval; None if the denominators sum to 0."""
        sums = self._sums(ratios)
        if not sums[1].sum():
            return None
        return self._with_interval(sums[0].sum() / sums[1].sum(), self._draws(sums))

    def difference(self, one: Ratios, other: Ratios) -> Figure | None:
        """Subtracts the second set's figure from the first's, over the units in both sets; None if there are none."""
        both = [self._sums(ratios) for ratios in (one, other)]
        shared = (both[0][1] > 0) & (both[1][1] > 0)
        if not shared.any():
            return None
        first, second = (sums * shared for sums in both)
        value = first[0].sum() / first[1].sum() - second[0].sum() / second[1].sum()
        return self._with_interval(value, self._draws(first) - self._draws(second))

    def _sums(self, ratios: Ratios) -> np.ndarray:
        """Numerators and denominators by unit, float64 [2, units]."""
        sums = np.zeros((2, len(self._index)))
        for unit, ratio in ratios:
            sums[:, self._index[unit]] += ratio
        return sums

    def _draws(self, sums: np.ndarray) -> np.ndarray:
        """The figure in each draw, float64 [draws]; NaN for a draw without a unit of the set."""
        numerator, denominator = (self._counts @ side for side in sums)
        return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)

    @staticmethod
    def _with_interval(value: float, draws: np.ndarray) -> Figure:
        low, high = np.nanpercentile(draws, INTERVAL)
        return Figure(float(value), float(low), float(high))
