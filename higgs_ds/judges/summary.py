"""Figures of several sets of clips as a table, and their differences from the recordings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .figures import Bootstrap, Figure, Ratios, Unit

RECORDINGS, CODEC = "recordings", "codec"  # reference sets
COLUMNS = 3  # sets per table on the console

Line = dict  # a clip's fields, see `Panel.judge`
Judged = Sequence[tuple[Unit, Line]]


def _mean(field: str) -> Callable[[Line], tuple[float, float] | None]:
    return lambda line: (line[field], 1) if line.get(field) is not None else None


def _per_word(field: str) -> Callable[[Line], tuple[float, float] | None]:
    return lambda line: (line[field], line["units"]) if "units" in line else None


def _wer(line: Line) -> tuple[float, float] | None:
    errors = sum(line.get(field, 0) for field in ("dropped", "inserted", "replaced"))
    return None if line.get("wer") is None else (errors, line["units"])


# Each with 1 if higher is better, -1 if lower is better, 0 if neither.
MEASURES: dict[str, tuple[Callable[[Line], tuple[float, float] | None], int]] = {
    "WER": (_wer, -1),
    "CER": (lambda line: (line["cer"] * line["characters"], line["characters"]) if "cer" in line else None, -1),
    "words dropped": (_per_word("dropped"), 0),
    "words inserted": (_per_word("inserted"), 0),
    "words looped": (_per_word("looped"), 0),
    "similarity": (_mean("similarity"), 1),
    "DNSMOS": (_mean("dnsmos"), 1),
    "loudness, LUFS": (_mean("loudness"), 0),
    "silence before, s": (_mean("silence_before"), 0),
    "silence within, s": (_mean("silence_within"), 0),
    "silence behind, s": (_mean("silence_behind"), 0),
    "samples clipped": (_mean("clipped"), 0),
    "ended by itself": (_mean("ended"), 0),
    "length": (_mean("length"), 0),
}


def _ratios(judged: Judged, measure: str) -> Ratios:
    of_line, _ = MEASURES[measure]
    return [(unit, ratio) for unit, line in judged if (ratio := of_line(line)) is not None]


def value_of(judged: Judged, measure: str) -> float | None:
    """Computes a set's figure, sum of numerators / sum of denominators; None if no clip has it."""
    ratios = [ratio for _, ratio in _ratios(judged, measure)]
    denominator = sum(count for _, count in ratios)
    return sum(amount for amount, _ in ratios) / denominator if denominator else None


def bootstrap_of(sets: Mapping[str, Judged]) -> Bootstrap:
    """Makes the bootstrap for all figures of these sets."""
    return Bootstrap([unit for judged in sets.values() for unit, _ in judged])


def table(sets: Mapping[str, Judged], bootstrap: Bootstrap) -> list[tuple[str, list[str]]]:
    """Makes the rows of a table: a measure, and its figure with interval for each set."""
    rows = [("clips", [str(len(judged)) for judged in sets.values()])]
    for measure in MEASURES:
        figures = [bootstrap.figure(_ratios(judged, measure)) for judged in sets.values()]
        if any(figures):
            rows.append((measure, [_text(figure) for figure in figures]))
    return rows


def compared(sets: Mapping[str, Judged], bootstrap: Bootstrap) -> list[str]:
    """Describes each set's differences from the recordings of the same texts, one line per set."""
    lines = []
    for name in (name for name in sets if name != RECORDINGS and RECORDINGS in sets):
        found = []
        for measure, (_, better) in MEASURES.items():
            ratios = [_ratios(sets[of], measure) for of in (name, RECORDINGS)]
            difference = bootstrap.difference(*ratios) if better else None
            if difference is not None:
                sides = difference.low * better, difference.high * better
                verdict = "better" if min(sides) > 0 else "worse" if max(sides) < 0 else "no clear difference"
                found.append(f"{measure} {_text(difference, '+')} {verdict}")
        lines += [f"{name} against the {RECORDINGS}: {'; '.join(found)}"] if found else []
    return lines


def summary(sets: Mapping[str, Judged]) -> list[str]:
    """Summarises the sets for the console: tables of figures, then the differences from the recordings."""
    bootstrap, names, lines = bootstrap_of(sets), list(sets), []
    for first in range(0, len(names), COLUMNS):
        shown = names[first : first + COLUMNS]
        rows = [("", shown), *table({name: sets[name] for name in shown}, bootstrap)]
        lines += ["".join([f"{measure:<18}", *(f"{cell:<29}" for cell in cells)]).rstrip() for measure, cells in rows]
    return lines + compared(sets, bootstrap)


def _text(figure: Figure | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"
