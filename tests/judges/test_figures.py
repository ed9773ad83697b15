"""Intervals against an explicit bootstrap, and the verdicts drawn from them."""

from __future__ import annotations

import numpy as np
import pytest

from higgs_ds.judges.figures import Bootstrap
from higgs_ds.judges.summary import summary

RANDOM = np.random.default_rng(1)


def rates(count: int, speaker: str, rate: float) -> list:
    return [((speaker, f"text {i}"), (float(RANDOM.binomial(8, rate)), 8.0)) for i in range(count)]


def test_an_interval_over_texts_equals_that_of_an_explicit_bootstrap():
    ratios = rates(40, "a", 0.2)
    figure = Bootstrap([unit for unit, _ in ratios]).figure(ratios)
    errors, words = np.array([ratio for _, ratio in ratios]).T
    drawn = RANDOM.integers(0, 40, (20000, 40))
    low, high = np.percentile(errors[drawn].sum(1) / words[drawn].sum(1), (2.5, 97.5))
    assert figure.value == errors.sum() / words.sum()
    assert (figure.low, figure.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_speakers_are_drawn_too():
    """Two voices differ in rate: drawing texts only would make the interval too narrow."""
    ratios = rates(40, "a", 0.05) + rates(40, "b", 0.5)
    figure = Bootstrap([unit for unit, _ in ratios]).figure(ratios)
    assert figure.low < 0.1 and figure.high > 0.4
    one = Bootstrap([unit for unit, _ in ratios[:40]]).figure(ratios[:40])
    assert one.high - one.low < 0.06


def test_repeated_clips_of_a_text_count_as_one_unit():
    ratios = rates(20, "a", 0.2)
    once, twice = (Bootstrap([unit for unit, _ in some]).figure(some) for some in (ratios, ratios * 2))
    assert once == twice
    assert Bootstrap([("a", "b")]).figure([]) is None


def lines(errors: list[int]) -> list:
    said = [{"wer": e / 8, "dropped": 0, "inserted": 0, "replaced": e, "looped": 0, "units": 8} for e in errors]
    return [(("a", f"text {i}"), line | {"cer": 0.0, "characters": 40}) for i, line in enumerate(said)]


def test_a_small_difference_on_forty_clips_is_not_called_worse():
    recordings = RANDOM.binomial(8, 0.21, 40)
    other, bad = RANDOM.permutation(recordings), np.minimum(recordings + RANDOM.binomial(1, 0.5, 40), 8)
    sets = {"recordings": recordings, "same": recordings, "other": other, "bad": bad}
    found = summary({name: lines(errors.tolist()) for name, errors in sets.items()})
    verdicts = {line.split(" against ")[0]: line for line in found if " against " in line}
    assert "WER +0.000 [+0.000, +0.000] no clear difference" in verdicts["same"]
    assert "no clear difference; CER" in verdicts["other"] and "worse; CER" in verdicts["bad"]
    assert found[1].split() == ["clips", "40", "40", "40"]
    assert float(found[2].split()[1]) == pytest.approx(recordings.sum() / 320, abs=0.0005)
