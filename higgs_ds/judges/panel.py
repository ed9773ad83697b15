"""All judges of a clip; one that fails on it is reported, and left out of its line."""

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
    """The judges that were asked for."""

    words: Words | None = None
    voice: Voice | None = None
    sound: Dnsmos | None = None
    stops: Stops = field(default_factory=Stops)

    def enrol(self, recording: Clip) -> str | None:
        """Learns a speaker's voice and pace; returns a line where the voice cannot be had."""
        self.stops.enrol(recording)
        try:
            with reading(recording.sentence.origin):
                if self.voice is not None:
                    self.voice.enrol(recording)
        except ConfigError as error:
            return f"{error}; left out of the speaker's recordings"
        return None

    def line(self, name: str, file: str, clip: Clip) -> tuple[dict[str, object], dict[str, str]]:
        """A clip's line in judged.jsonl, of the set `name`, and what failed, see `judge`."""
        fields, failed = self.judge(clip)
        said = clip.sentence
        about = {"set": name, "file": file, "row": said.origin, "speaker": said.speaker, "text": said.text}
        return about | fields | ({"failed": failed} if failed else {}), failed

    def judge(self, clip: Clip) -> tuple[dict[str, object], dict[str, str]]:
        """Fields of a clip's line, and by judge the words in which it failed."""
        judges: dict[str, Callable[[Clip], dict[str, object]]] = {"stops": self.stops.judge, "levels": levels}
        for name, judge in (("words", self.words), ("voice", self.voice), ("sound", self.sound)):
            if judge is not None:
                judges[name] = judge.judge
        fields: dict[str, object] = {}
        failed: dict[str, str] = {}
        for name, ask in judges.items():
            try:
                with reading(name):
                    fields |= ask(clip)
            except ConfigError as error:
                failed[name] = str(error).removeprefix(f"{name}: ")
        return fields, failed


def open_panel(words: str, voice: str, sound: str, device: str) -> Panel:
    """The judges of these names, loaded; NONE leaves one out.

    Raises:
        ConfigError: a library that is missing or a model that cannot be loaded; all of them, a line each.
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
