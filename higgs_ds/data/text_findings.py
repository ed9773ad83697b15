"""Counts over a manifest's texts: what nobody says, the same opening in most rows, and texts that are composed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from .faults import Fault, plural
from .texts import LOST, oddities

COMPOSED = "composed"
MOST_OPENINGS = 4096  # that are counted at a time; those met once are forgotten first
LEAST_ROWS, LEAST_LABELLED = 20, 3  # that an opening must have, and one that ends as a label does
_SENTENCE_ENDS = tuple(".!?…。！？")
_LABEL_ENDS = tuple(":|>])}")

Place = tuple[int, int]  # line and element of a row


@dataclass
class _Seen:
    count: int
    place: Place
    example: str


@dataclass
class TextFindings:
    """Findings of one process; `merged` puts those of all ranks together."""

    rows: int = 0
    kinds: dict[str, _Seen] = field(default_factory=dict)
    openings: dict[str, _Seen] = field(default_factory=dict)  # by first word; the example is all that they begin with

    def look(self, text: str, given: str, place: Place) -> None:
        """Counts one row's text, as it is trained on and as it was given."""
        self.rows += 1
        for kind, example in oddities(given):
            _count(self.kinds, kind, _Seen(1, place, example))
        if text != given and text != given.strip():
            _count(self.kinds, COMPOSED, _Seen(1, place, text[:40]))
        word = text.partition(" ")[0]
        if (seen := self.openings.get(word)) is not None and text.startswith(seen.example):
            seen.count += 1  # as by far the most do, soon
            return
        _count(self.openings, word, _Seen(1, place, text), common=True)
        if len(self.openings) > MOST_OPENINGS:
            self.openings = {word: seen for word, seen in self.openings.items() if seen.count > 1}

    @classmethod
    def merged(cls, of_ranks: list[TextFindings]) -> TextFindings:
        """Findings of all ranks as one."""
        whole = cls(sum(findings.rows for findings in of_ranks))
        for findings in of_ranks:
            for key, seen in findings.kinds.items():
                _count(whole.kinds, key, seen)
            for key, seen in findings.openings.items():
                _count(whole.openings, key, seen, common=True)
        return whole

    def warnings(self, file: str) -> list[Fault]:
        """One for each kind, with its count and an example."""
        said = {
            f"{plural(seen.count, 'row')} with {kind}, e.g. {seen.example!r}: is it spoken?": seen.place
            for kind, seen in self.kinds.items()
            if kind != COMPOSED
        }
        for word, seen in self.openings.items():
            if opening := self._opening(word, seen):
                said[f"{seen.count:,} of {self.rows:,} texts begin with {opening!r}: is it spoken?"] = seen.place
        return [Fault(file, line, "text", what, True, element=element) for what, (line, element) in said.items()]

    def faults(self, file: str) -> list[Fault]:
        """Faults of the manifest rather than of a row: letters that were lost in most rows."""
        lost = self.kinds.get(LOST)
        if lost is None or 2 * lost.count <= self.rows:
            return []
        problem = (
            f"{lost.count:,} of {self.rows:,} texts hold U+FFFD, e.g. {lost.example!r}: "
            "they were read in another encoding than their own; export them again, as UTF-8"
        )
        return [Fault(file, lost.place[0], "text", problem, element=lost.place[1])]

    def notes(self, file: str) -> list[str]:
        """One line on texts that are trained on composed."""
        if (seen := self.kinds.get(COMPOSED)) is None:
            return []
        texts = f"{seen.count:,} text{' is' if seen.count == 1 else 's are'}"
        return [
            f"{file}: {texts} read with composed letters (NFC) and blanks for line breaks and no-break blanks, "
            f"as `generate` does, e.g. line {seen.place[0]}"
        ]

    def _opening(self, word: str, seen: _Seen) -> str | None:
        """The words that these texts begin with, if they are most of all and differ behind them."""
        is_label = word.endswith(_LABEL_ENDS) or ":" in seen.example
        if 2 * seen.count <= self.rows or seen.count < (LEAST_LABELLED if is_label else LEAST_ROWS):
            return None
        opening = seen.example[: seen.example.rfind(" ") + 1]
        is_all = seen.example.endswith(_SENTENCE_ENDS)  # one text many times, no opening
        return None if opening == "" or is_all or word.startswith(("[SPEAKER", "<SE")) else opening


def _count(counts: dict[str, _Seen], key: str, more: _Seen, *, common: bool = False) -> None:
    """Adds to a key's count; the example is the earliest row's, or with `common` what all begin with."""
    seen = counts.get(key)
    if seen is None:
        counts[key] = more
        return
    example = os.path.commonprefix([seen.example, more.example]) if common else min(seen, more, key=_place).example
    counts[key] = _Seen(seen.count + more.count, min(seen.place, more.place), example)


def _place(seen: _Seen) -> Place:
    return seen.place
