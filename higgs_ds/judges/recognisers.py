"""Speech recognisers, chosen by name: Whisper through transformers or faster-whisper, or pocketsphinx."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, reading
from .clips import JUDGE_RATE, library

SPHINX = "pocketsphinx"
WINDOW_SEC = 30  # that Whisper hears at once


class Recogniser(Protocol):
    """A model that writes down what it hears."""

    spellings: dict[str, str]  # of English, as its normaliser takes them: British to American

    def hear(self, waveform: np.ndarray, language: str | None) -> tuple[str, str]:
        """Text of a waveform float32 [samples] at JUDGE_RATE, and its language, told by the model if it is None.

        Raises whatever its library does.
        """


def open_recogniser(name: str, device: str) -> Recogniser:
    """`pocketsphinx`, a folder (of faster-whisper where it holds model.bin), or transformers' Whisper by hub id.

    Raises:
        ConfigError: its library is missing, or the model cannot be loaded.
    """
    with reading(f"--words: {name!r} cannot be loaded (a folder is looked for first, then the hub)"):
        if name == SPHINX:
            return PocketSphinx()
        if (Path(name) / "model.bin").is_file():
            return FasterWhisper(Path(name), device)
        return Whisper(name, device)


def language_code(language: str | None) -> str | None:
    """`en` for `en-US`, `EN_us` and `en`; names (`english`) stay as they are, in small letters."""
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
            language = language or self._told(features)
            asked = {"language": language, "task": "transcribe"}
        ids = self._model.generate(
            features, attention_mask=inputs.attention_mask, return_timestamps=is_long or None, do_sample=False, **asked
        )
        return self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip(), language or "en"

    def _told(self, features: Any) -> str:
        """The language of the first 30 seconds."""
        found = int(self._model.detect_language(features[:, :, :3000])[0])
        return next(token for token, number in self._languages.items() if number == found).strip("<|>")


class FasterWhisper:
    """Whisper in CTranslate2's format, from a folder."""

    def __init__(self, folder: Path, device: str):
        faster_whisper = library("faster_whisper", "--words", "faster-whisper")
        if not (folder / "tokenizer.json").is_file():  # which the library would fetch
            raise ConfigError([f"--words: {folder} has no tokenizer.json; convert the model with its tokenizer"])
        self._model = faster_whisper.WhisperModel(str(folder), device=device.partition(":")[0], local_files_only=True)
        self.spellings: dict[str, str] = {}

    def hear(self, waveform: np.ndarray, language: str | None) -> tuple[str, str]:
        """See `Recogniser`."""
        if not self._model.model.is_multilingual:
            _only_english(language)
        # One temperature, and no text of its own as context: the same clip is heard the same, and loops are the clip's.
        parts, about = self._model.transcribe(
            waveform, language=language, temperature=0.0, condition_on_previous_text=False
        )
        return " ".join(part.text.strip() for part in parts).strip(), about.language


class PocketSphinx:
    """The English model of pocketsphinx's wheel: small, offline, and wrong in every fourth word."""

    def __init__(self) -> None:
        self.spellings: dict[str, str] = {}
        # Each clip is normalised by itself: with the default the order of the clips would change what is heard.
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
        raise ConfigError([f"the recogniser knows English alone, and this is {language!r}"])
