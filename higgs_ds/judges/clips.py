"""Sentences to speak, and the clips to judge against them."""

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

JUDGE_RATE = 16000  # sample rate of every judge's model
ENROLLED = 32  # recordings per speaker to learn voice and pace from


@dataclass
class Sentence:
    """A text to speak, with its speaker, language and recording where known."""

    text: str
    origin: str  # file and line; identifies the sentence
    speaker: str | None = None
    language: str | None = None  # Whisper's code; filled in by the recogniser if unknown
    recording: AudioRef | None = None

    @classmethod
    def of_row(cls, row: Row, language: object) -> Sentence | None:
        """Makes the sentence of a row's last clip, with the row's column `language`; None for a row without clip."""
        target = row.target()
        if target is None:
            return None
        code = language if isinstance(language, str) else None
        return cls(target[0].strip(), row.origin, row.speaker, code, row.audio_refs[target[1]][1])

    @property
    def unit(self) -> tuple[str | None, str]:
        """Unit of the bootstrap: clips of the same text and speaker are not independent."""
        return self.speaker, self.text


@dataclass(frozen=True)
class Clip:
    """Audio to judge against a sentence."""

    sentence: Sentence
    waveform: np.ndarray  # float32 [samples]; empty if the model produced no audio
    sample_rate: int
    ended: bool | None = None  # by the model rather than cut at a limit; None if unknown
    is_recording: bool = False

    @property
    def seconds(self) -> float:
        return len(self.waveform) / self.sample_rate

    @property
    def is_silent(self) -> bool:
        """True if every sample is zero."""
        return not self.waveform.any()

    def for_judges(self) -> np.ndarray:
        """Returns the waveform at JUDGE_RATE, clipped to -1 to 1."""
        if self.sample_rate == JUDGE_RATE:
            return np.clip(self.waveform, -1, 1)
        return np.clip(soxr.resample(self.waveform, self.sample_rate, JUDGE_RATE), -1, 1)


def spread(sentences: Sequence[Sentence], count: int) -> list[Sentence]:
    """Selects at most `count` sentences, evenly spaced."""
    places = np.unique(np.linspace(0, len(sentences) - 1, min(count, len(sentences))).astype(int))
    return [sentences[place] for place in places.tolist()]


def enrolled(sentences: Sequence[Sentence]) -> list[Sentence]:
    """Selects up to ENROLLED sentences per speaker; those without one count only if no sentence names a speaker."""
    by_speaker: dict[str | None, list[Sentence]] = {}
    none_named = all(sentence.speaker is None for sentence in sentences)
    for sentence in sentences:
        if sentence.speaker is not None or none_named:
            by_speaker.setdefault(sentence.speaker, []).append(sentence)
    return [sentence for group in by_speaker.values() for sentence in spread(group, ENROLLED)]


def read_clip(sentence: Sentence, ref: AudioRef | None, **about: Any) -> Clip:
    """Reads a clip; it is empty if `ref` is None. Raises ConfigError."""
    with reading(str(ref.path or sentence.origin) if ref else sentence.origin):
        sound = read_audio(ref, may_be_silent=True) if ref else (np.zeros(0, np.float32), JUDGE_RATE)
    return Clip(sentence, *sound, **about)


def library(module: str, flag: str, package: str) -> ModuleType:
    """Imports a judge's library. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "pip install -r requirements-judge.txt"
        raise ConfigError([f"{flag}: needs {package} ({words_of(error)}): {install}"]) from error
