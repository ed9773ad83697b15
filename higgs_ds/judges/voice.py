"""Speaker similarity: mean cosine similarity of a clip to its speaker's recordings of other sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, reading
from .clips import JUDGE_RATE, Clip, library

RESEMBLYZER = "resemblyzer"


class Embedder(Protocol):
    """A speaker embedding model."""

    def embed(self, clip: Clip) -> np.ndarray:
        """Returns a clip's speaker embedding [dimensions], not normalised. Raises any error of its library."""


def open_embedder(name: str, device: str) -> Embedder:
    """Loads a model: `resemblyzer`, or an x-vector model (WavLM) of transformers from a folder or the hub.

    Raises:
        ConfigError: the library is missing, or the model cannot be loaded.
    """
    with reading(f"--voice: cannot load {name!r} as a folder or from the hub"):
        return Resemblyzer(device) if name == RESEMBLYZER else XVector(name, device)


class Resemblyzer:
    """Resemblyzer's d-vectors; the weights are in its wheel."""

    def __init__(self, device: str):
        self._library = library("resemblyzer", "--voice", "resemblyzer")
        self._encoder = self._library.VoiceEncoder(device, verbose=False)

    def embed(self, clip: Clip) -> np.ndarray:
        """See `Embedder`."""
        return self._encoder.embed_utterance(self._library.preprocess_wav(clip.waveform, clip.sample_rate))


class XVector:
    """An x-vector model of transformers."""

    def __init__(self, name: str, device: str):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        if Path(name).is_dir() and not (Path(name) / "preprocessor_config.json").is_file():
            raise ConfigError([f"--voice: {name} is not an x-vector model: it has no preprocessor_config.json"])
        self._extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
        model, about = AutoModelForAudioXVector.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
        if missing := [key for key in about["missing_keys"] if "parametrizations" not in key]:
            more = f" and {len(missing) - 1} more" * (len(missing) > 1)
            raise ConfigError([f"--voice: {name} is not an x-vector model: it has no {missing[0]}{more}"])
        self._model: Any = model.to(device).eval()

    def embed(self, clip: Clip) -> np.ndarray:
        """See `Embedder`."""
        import torch

        inputs = self._extractor(clip.for_judges(), sampling_rate=JUDGE_RATE, return_tensors="pt")
        with torch.no_grad():
            return self._model(**inputs.to(self._model.device)).embeddings[0].float().cpu().numpy()


class Voice:
    """Judges a clip's similarity to its speaker."""

    def __init__(self, name: str, device: str):
        """Raises ConfigError as `open_embedder`."""
        self._embedder = open_embedder(name, device)
        self._enrolled: dict[str | None, dict[str, np.ndarray]] = {}  # unit vectors by speaker and origin

    def enrol(self, recording: Clip) -> None:
        """Learns the speaker's voice. Raises as `judge`."""
        sentence = recording.sentence
        self._enrolled.setdefault(sentence.speaker, {})[sentence.origin] = self._unit(recording)

    def judge(self, clip: Clip) -> dict[str, object]:
        """Returns a clip's fields, none if it is silent or its speaker has no recording.

        A clip is compared with the recording of its own sentence only if the speaker has no other. Raises any error of
        the embedder, and ConfigError if it detects no voice.
        """
        origin, known = clip.sentence.origin, self._enrolled.get(clip.sentence.speaker, {})
        others = [vector for where, vector in known.items() if where != origin]
        if not others and not clip.is_recording:
            others = list(known.values())
        if not others or clip.is_silent:
            return {}
        own = known[origin] if clip.is_recording and origin in known else self._unit(clip)
        return {"similarity": float(np.mean(others @ own))}

    def _unit(self, clip: Clip) -> np.ndarray:
        vector = self._embedder.embed(clip).astype(np.float64)
        length = float(np.linalg.norm(vector))
        if not length > 0 or not np.isfinite(length):
            raise ConfigError([f"{clip.sentence.origin}: no voice detected in the clip"])
        return vector / length
