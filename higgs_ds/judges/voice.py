"""Speaker similarity: cosine similarity of a clip to its speaker's recordings, those of the same sentence left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, reading
from .clips import JUDGE_RATE, Clip, library

RESEMBLYZER = "resemblyzer"


class Embedder(Protocol):
    """A model that tells voices apart."""

    def embed(self, clip: Clip) -> np.ndarray:
        """Vector [dimensions] of a clip's voice, of any length. Raises whatever its library does."""


def open_embedder(name: str, device: str) -> Embedder:
    """`resemblyzer`, or transformers' x-vector model (WavLM's) in a folder or on the hub.

    Raises:
        ConfigError: its library is missing, or the model cannot be loaded.
    """
    with reading(f"--voice: {name!r} cannot be loaded (a folder is looked for first, then the hub)"):
        return Resemblyzer(device) if name == RESEMBLYZER else XVector(name, device)


class Resemblyzer:
    """The d-vectors of resemblyzer, whose weights are in its wheel."""

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
            raise ConfigError([f"--voice: {name} has no preprocessor_config.json; it is no x-vector model's folder"])
        self._extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
        model, about = AutoModelForAudioXVector.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
        if missing := [key for key in about["missing_keys"] if "parametrizations" not in key]:
            raise ConfigError([f"--voice: {name} lacks {missing[0]} and {len(missing) - 1} more; it has no x-vector"])
        self._model: Any = model.to(device).eval()

    def embed(self, clip: Clip) -> np.ndarray:
        """See `Embedder`."""
        import torch

        inputs = self._extractor(clip.for_judges(), sampling_rate=JUDGE_RATE, return_tensors="pt")
        with torch.no_grad():
            return self._model(**inputs.to(self._model.device)).embeddings[0].float().cpu().numpy()


class Voice:
    """The judge of the voice."""

    def __init__(self, name: str, device: str):
        """Raises ConfigError as `open_embedder`."""
        self._embedder = open_embedder(name, device)
        self._enrolled: dict[str | None, dict[str, np.ndarray]] = {}  # by speaker, by the sentence's origin

    def enrol(self, recording: Clip) -> None:
        """Learns the speaker's voice. Raises as `judge`."""
        sentence = recording.sentence
        self._enrolled.setdefault(sentence.speaker, {})[sentence.origin] = self._unit(recording)

    def judge(self, clip: Clip) -> dict[str, object]:
        """Fields of a clip's line; none where nothing is said, or there is no recording to compare with.

        Without another recording of the speaker a clip is compared with that of its own sentence. Raises whatever the
        embedder does, and ConfigError where it hears no voice.
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
            raise ConfigError([f"{clip.sentence.origin}: no voice is heard in it"])
        return vector / length
