"""The findings of `describe` in a manifest."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..data.chatml import Row
from ..data.faults import Fault
from ..data.transcripts import Spoken, oddness

ODDEST = 10


@dataclass
class Described:
    """A manifest's usable rows, with what is known of each, one entry a row."""

    spoken: Spoken
    rows: list[Row]
    seconds: np.ndarray  # float64 [rows], of all clips of a row
    tokens: np.ndarray  # int64 [rows]
    faults: list[Fault]
    notes: list[str] = field(default_factory=list)


def oddest(found: Described) -> list[int]:
    """The rows, at most ten, whose texts are spoken the most unlike the others; of few rows, the oddest lengths."""
    spoken = found.spoken
    there = np.flatnonzero(spoken.seconds > 0)
    score = abs(oddness(spoken)[there])
    if not score.any() and len(there):
        length = np.log(spoken.seconds[there])
        score = abs(length - np.median(length))
    return there[np.argsort(-score, kind="stable")[:ODDEST]].tolist()
