"""All judges of a clip; a judge that fails on a clip is reported, and its fields are omitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, reading
from .clips import Clip
from .sound import Dnsmos, levels
from .stops import Stops
from .voice import Voice
from .words import Words

NONE = "none"


@dataclass
class Panel:
    """The selected judges."""

    words: Words | None = None
    voice: Voice | None = None
    sound: Dnsmos | None = None
    stops: Stops = field(default_factory=Stops)

    def enrol(self, recording: Clip) -> str | None:
        """Learns a speaker's voice and pace; returns a message if the voice model fails on the recording."""
        self.stops.enrol(recording)
        try:
            with reading(recording.sentence.origin):
                if self.voice is not None:
                    self.voice.enrol(recording)
        except ConfigError as error:
            return f"{error}; recording ignored"
        return None

    def line(self, name: str, file: str, clip: Clip) -> tuple[dict[str, object], dict[str, str]]:
        """Judges a clip of the set `name`; returns its line of judged.jsonl, and the failures as in `judge`."""
        fields, failed = self.judge(clip)
        sentence = clip.sentence
        about = {"set": name, "file": file, "row": sentence.origin, "speaker": sentence.speaker, "text": sentence.text}
        return about | fields | ({"failed": failed} if failed else {}), failed

    def judge(self, clip: Clip) -> tuple[dict[str, object], dict[str, str]]:
        """Judges a clip; returns the measured fields, and an error message for each judge that failed."""
        judges: dict[str, Callable[[Clip], dict[str, object]]] = {"stops": self.stops.judge, "levels": levels}
        for name, judge in (("words", self.words), ("voice", self.voice), ("sound", self.sound)):
            if judge is not None:
                judges[name] = judge.judge
        fields: dict[str, object] = {}
        failed: dict[str, str] = {}
        for name, measure in judges.items():
            try:
                with reading(name):
                    fields |= measure(clip)
            except ConfigError as error:
                failed[name] = str(error).removeprefix(f"{name}: ")
        return fields, failed


def open_panel(words: str, voice: str, sound: str, device: str) -> Panel:
    """Loads the judges of these names; NONE omits a judge.

    Raises:
        ConfigError: libraries are missing or models cannot be loaded; one line per judge.
    """
    openers: dict[str, Callable[[], Any]] = {
        "words": lambda: None if words == NONE else Words(words, device),
        "voice": lambda: None if voice == NONE else Voice(voice, device),
        "sound": lambda: None if sound == NONE else Dnsmos(),
    }
    opened: dict[str, Any] = {}
    problems: list[str] = []
    for name, opener in openers.items():
        try:
            opened[name] = opener()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Panel(**opened)
