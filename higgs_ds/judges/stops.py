"""Endings: whether the model ended a clip itself, and its length relative to the pace of the recordings."""

from __future__ import annotations

from .clips import Clip


class Stops:
    """Judges a clip's length and ending."""

    def __init__(self) -> None:
        self._pace: dict[str | None, tuple[int, float]] = {}  # (characters, seconds) by speaker

    def enrol(self, recording: Clip) -> None:
        """Learns the speaker's pace."""
        sentence = recording.sentence
        characters, seconds = self._pace.get(sentence.speaker, (0, 0.0))
        self._pace[sentence.speaker] = characters + len(sentence.text), seconds + recording.seconds

    def judge(self, clip: Clip) -> dict[str, object]:
        """Returns a clip's fields; `length` is its duration relative to that of its text at the speaker's pace."""
        characters, seconds = self._pace.get(clip.sentence.speaker, (0, 0.0))
        expected = len(clip.sentence.text) * seconds / characters if characters else 0.0
        length = clip.seconds / expected if expected else None
        return {"seconds": clip.seconds, "ended": clip.ended, "length": length}
