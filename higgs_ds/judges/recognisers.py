"""Speech recognisers by name: Whisper through transformers or faster-whisper, or pocketsphinx."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, reading
from .clips import JUDGE_RATE, library

SPHINX = "pocketsphinx"
WINDOW_SEC = 30  # Whisper's window


class Recogniser(Protocol):
    """A speech recogniser."""

    spellings: dict[str, str]  # British to American English, for the text normaliser

    def hear(self, waveform: np.ndarray, language: str | None) -> tuple[str, str]:
        """Transcribes a waveform, float32 [samples] at JUDGE_RATE; detects the language if it is None.

        Returns (text, language). Raises any error of its library.
        """


def open_recogniser(name: str, device: str) -> Recogniser:
    """Loads a recogniser: `pocketsphinx`, a folder (faster-whisper's if it has a model.bin), or a hub id of a Whisper.

    Raises:
        ConfigError: the library is missing, or the model cannot be loaded.
    """
    with reading(f"--words: cannot load {name!r} as a folder or from the hub"):
        if name == SPHINX:
            return PocketSphinx()
        if (Path(name) / "model.bin").is_file():
            return FasterWhisper(Path(name), device)
        return Whisper(name, device)


def language_code(language: str | None) -> str | None:
    """Normalises a language code: `en` for `en-US`, `EN_us` and `en`; names such as `English` become lower case."""
    plain = (language or "").strip().lower()
    return (plain if len(plain) > 8 else re.split("[-_]", plain)[0]) or None


class Whisper:
    """Whisper in transformers' format."""

    def __init__(self, name: str, device: str):
        import torch
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        self._processor = WhisperProcessor.from_pretrained(name)
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self._model: Any = WhisperForConditionalGeneration.from_pretrained(name, torch_dtype=dtype).to(device).eval()
        self._languages: dict[str, int] = getattr(self._model.generation_config, "lang_to_id", None) or {}
        self.spellings = self._processor.tokenizer.english_spelling_normalizer or {}

    def hear(self, waveform: np.ndarray, language: str | None) -> tuple[str, str]:
        """See `Recogniser`."""
        is_long = len(waveform) > WINDOW_SEC * JUDGE_RATE
        whole = {"truncation": False, "padding": "longest"} if is_long else {}
        inputs = self._processor(
            waveform, sampling_rate=JUDGE_RATE, return_tensors="pt", return_attention_mask=True, **whole
        ).to(self._model.device)
        features = inputs.input_features.to(self._model.dtype)
        if not self._languages:
            _only_english(language)
            asked = {}
        else:
            language = language or self._detected(features)
            asked = {"language": language, "task": "transcribe"}
        ids = self._model.generate(
            features, attention_mask=inputs.attention_mask, return_timestamps=is_long or None, do_sample=False, **asked
        )
        return self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip(), language or "en"

    def _detected(self, features: Any) -> str:
        """Language of the first 30 seconds."""
        found = int(self._model.detect_language(features[:, :, :3000])[0])
        return next(token for token, number in self._languages.items() if number == found).strip("<|>")


class FasterWhisper:
    """Whisper in CTranslate2's format, from a folder."""

    def __init__(self, folder: Path, device: str):
        faster_whisper = library("faster_whisper", "--words", "faster-whisper")
        if not (folder / "tokenizer.json").is_file():  # the library would download one
            raise ConfigError([f"--words: {folder} has no tokenizer.json; convert the model with its tokenizer"])
        self._model = faster_whisper.WhisperModel(str(folder), device=device.partition(":")[0], local_files_only=True)
        self.spellings: dict[str, str] = {}

    def hear(self, waveform: np.ndarray, language: str | None) -> tuple[str, str]:
        """See `Recogniser`."""
        if not self._model.model.is_multilingual:
            _only_english(language)
        # A single temperature makes transcripts reproducible; without its own text as context Whisper does not loop.
        parts, about = self._model.transcribe(
            waveform, language=language, temperature=0.0, condition_on_previous_text=False
        )
        return " ".join(part.text.strip() for part in parts).strip(), about.language


class PocketSphinx:
    """The English model in pocketsphinx's wheel: small and offline, but about one word in four is wrong."""

    def __init__(self) -> None:
        self.spellings: dict[str, str] = {}
        # Normalises each clip on its own; by default the transcript depends on the clips before.
        self._decoder = library("pocketsphinx", "--words", "pocketsphinx").Decoder(
            samprate=JUDGE_RATE, cmn="batch", loglevel="FATAL"
        )

    def hear(self, waveform: np.ndarray, language: str | None) -> tuple[str, str]:
        """See `Recogniser`."""
        _only_english(language)
        samples = np.clip(np.round(waveform * 32768), -32768, 32767).astype("<i2")
        self._decoder.start_utt()
        try:
            self._decoder.process_raw(samples.tobytes(), full_utt=True)
        finally:
            self._decoder.end_utt()
        heard = self._decoder.hyp()
        return (heard.hypstr if heard else ""), "en"


def _only_english(language: str | None) -> None:
    if language not in (None, "en", "english"):
        raise ConfigError([f"the recogniser supports English only, and the language is {language!r}"])
