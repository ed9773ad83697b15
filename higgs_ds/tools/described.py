"""The result of `describe`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..data.chatml import Row
from ..data.faults import Fault
from ..data.transcripts import SpeechStats, oddness

ODDEST = 10


@dataclass
class Described:
    """A manifest's usable rows, with what is known of each, one entry a row."""

    speech: SpeechStats
    rows: list[Row]
    seconds: np.ndarray  # float64 [rows], of all clips of a row
    tokens: np.ndarray  # int64 [rows]
    faults: list[Fault]
    notes: list[str] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)  # of all texts together


def oddest(found: Described) -> list[int]:
    """The rows, at most ten, whose texts are spoken the most unlike the others; of few rows, the oddest lengths."""
    speech = found.speech
    there = np.flatnonzero(speech.seconds > 0)
    score = abs(oddness(speech)[there])
    if not score.any() and len(there):
        length = np.log(speech.seconds[there])
        score = abs(length - np.median(length))
    return there[np.argsort(-score, kind="stable")[:ODDEST]].tolist()
