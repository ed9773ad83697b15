"""Sentences to be said, and clips that should say them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import soxr

from ..data.audio import read_audio
from ..data.chatml import AudioRef, Row
from ..errors import ConfigError, reading, words_of

JUDGE_RATE = 16000  # samples a second that every judge's model listens at
ENROLLED = 32  # recordings of a speaker that voices and paces are learnt from


@dataclass
class Sentence:
    """A text, and what is known of how it should sound."""

    text: str
    origin: str  # file and line, by which sentences are told apart
    speaker: str | None = None
    language: str | None = None  # as Whisper codes it; filled in by the recogniser where it is not known
    recording: AudioRef | None = None

    @classmethod
    def of_row(cls, row: Row, language: object) -> Sentence | None:
        """The clip that a row speaks, with its column `language`; None where it speaks none."""
        target = row.target()
        if target is None:
            return None
        code = language if isinstance(language, str) else None
        return cls(target[0].strip(), row.origin, row.speaker, code, row.audio_refs[target[1]][1])

    @property
    def unit(self) -> tuple[str | None, str]:
        """The same for sentences whose figures hang together: one text of one speaker."""
        return self.speaker, self.text


@dataclass(frozen=True)
class Clip:
    """Sound that should say a sentence."""

    sentence: Sentence
    waveform: np.ndarray  # float32 [samples]; empty where the model said nothing
    sample_rate: int
    ended: bool | None = None  # by itself, and not at a limit; None where that is not known
    is_recording: bool = False

    @property
    def seconds(self) -> float:
        return len(self.waveform) / self.sample_rate

    @property
    def is_silent(self) -> bool:
        """True where there is no sound at all."""
        return not self.waveform.any()

    def for_judges(self) -> np.ndarray:
        """The waveform at JUDGE_RATE, within -1 to 1."""
        if self.sample_rate == JUDGE_RATE:
            return np.clip(self.waveform, -1, 1)
        return np.clip(soxr.resample(self.waveform, self.sample_rate, JUDGE_RATE), -1, 1)


def spread(sentences: Sequence[Sentence], count: int) -> list[Sentence]:
    """At most `count` of them, evenly spread."""
    places = np.unique(np.linspace(0, len(sentences) - 1, min(count, len(sentences))).astype(int))
    return [sentences[place] for place in places.tolist()]


def enrolled(sentences: Sequence[Sentence]) -> list[Sentence]:
    """ENROLLED recordings of each speaker; one without a speaker is anybody's, unless all are."""
    of_speakers: dict[str | None, list[Sentence]] = {}
    nobody_is_named = all(sentence.speaker is None for sentence in sentences)
    for sentence in sentences:
        if sentence.speaker is not None or nobody_is_named:
            of_speakers.setdefault(sentence.speaker, []).append(sentence)
    return [sentence for of_one in of_speakers.values() for sentence in spread(of_one, ENROLLED)]


def read_clip(sentence: Sentence, ref: AudioRef | None, **about: Any) -> Clip:
    """A clip, empty where it has no file. Raises ConfigError."""
    with reading(str(ref.path or sentence.origin) if ref else sentence.origin):
        sound = read_audio(ref, may_be_silent=True) if ref else (np.zeros(0, np.float32), JUDGE_RATE)
    return Clip(sentence, *sound, **about)


def library(module: str, flag: str, package: str) -> ModuleType:
    """A judge's library, imported. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "pip install -r requirements-judge.txt"
        raise ConfigError([f"{flag}: needs {package} ({words_of(error)}): {install}"]) from error
