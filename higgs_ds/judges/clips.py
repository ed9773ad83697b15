"""Sentences to be said, and clips that should say them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import soxr

from ..data.chatml import AudioRef
from ..errors import ConfigError, words_of

JUDGE_RATE = 16000  # samples a second that every judge's model listens at


@dataclass
class Sentence:
    """A text, and what is known of how it should sound."""

    text: str
    origin: str  # file and line, by which sentences are told apart
    speaker: str | None = None
    language: str | None = None  # as Whisper codes it; filled in by the recogniser where it is not known
    recording: AudioRef | None = None

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


def library(module: str, flag: str, package: str) -> ModuleType:
    """A judge's library, imported. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "pip install -r requirements-judge.txt"
        raise ConfigError([f"{flag}: needs {package} ({words_of(error)}): {install}"]) from error
