"""Audio to codes and back: Boson's codec, or the sample codec where Boson's weights cannot be had."""

import functools
import hashlib
import json
import pickle
from pathlib import Path
from typing import Protocol

import numpy as np

from .config import DEFAULT_CODEC, DEFAULT_CODEC_REVISION, ConfigError

CODEC_FILES = ("config.json", "model.pth", "sample_codec.json", "codebooks.safetensors")

# Only HuBERT's training masks frames with it. Checkpoint and model may each have it or not, and the codes are the same.
UNUSED_WEIGHT = "semantic_model.masked_spec_embed"


class Codec(Protocol):
    num_codebooks: int
    codebook_size: int  # codes are 0..codebook_size - 1
    frame_rate: float  # frames a second
    sample_rate: int  # of what decode returns
    fingerprint: str  # changes whenever the codes would

    def encode(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """Codes int16 [num_codebooks, frames] of a mono waveform float32 [samples]."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform float32 [samples] of codes [num_codebooks, frames]."""


def load_codec(name_or_path: str, revision: str | None = None, device: str = "cpu") -> Codec:
    """The codec in a local folder (Boson's or a sample codec) or in a repository of the hub.

    `revision` is of the hub; None means the pinned one for `DEFAULT_CODEC`, the newest for any other.
    Raises ConfigError for what is neither, for a folder that lacks a file or holds the newer layout, for weights that
    do not fit their config, and for what the hub does not give.
    """
    try:
        folder = Path(name_or_path)
        if not folder.exists():
            folder = _download(name_or_path, revision)
        elif revision is not None:
            raise ValueError(f"codec {name_or_path!r} is a local folder, which has no revision: leave {revision!r} out")
        return _load_folder(folder, device)
    except OSError as error:
        raise ConfigError(
            [
                f"--codec: {name_or_path!r} cannot be loaded: {error}. A folder is looked for first, then the hub or "
                "its cache, where Boson's codec also has its bosonai/hubert_base; a sample codec needs neither"
            ]
        ) from error
    except ValueError as error:
        raise ConfigError([f"--codec: {error}"]) from error


def check_codes(codes: np.ndarray, codec: Codec) -> None:
    """Raises ValueError unless codes are whole numbers [num_codebooks, 1 or more frames] that the codec has."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be whole numbers, found {codes.dtype}")
    if codes.ndim != 2 or codes.shape[0] != codec.num_codebooks:
        raise ValueError(f"codes must have shape [{codec.num_codebooks}, frames], found {list(codes.shape)}")
    if codes.shape[1] == 0:
        raise ValueError("codes have no frames")
    low, high = codes.min(), codes.max()
    if low < 0 or high >= codec.codebook_size:
        found = low if low < 0 else high
        raise ValueError(f"codes must be 0..{codec.codebook_size - 1}, found {found}")


class BosonCodec:
    """Boson's own codec, `HiggsAudioTokenizer` of boson_multimodal."""

    def __init__(self, folder: Path, device: str):
        """Read config.json and model.pth of a folder. Raises ValueError unless every weight finds its place."""
        import torch
        from boson_multimodal.audio_processing.higgs_audio_tokenizer import HiggsAudioTokenizer

        self._files = (folder / "config.json", folder / "model.pth")
        config_path, weights_path = self._files
        try:
            config = json.loads(config_path.read_bytes())
            # The constructor gets bosonai/hubert_base from the hub or its cache, with trust_remote_code=True; the
            # weights of that HuBERT are among those in model.pth.
            self._model = HiggsAudioTokenizer(**config, device=device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path} is no config of Boson's codec: {error}") from error
        if self._model.quantizer_type != "RVQ":
            raise ValueError(f"{config_path}: bins must be a whole number (of codes), found {config['bins']}")
        try:
            # Not upstream's loader: it leaves weights out silently (strict=False) and weights_only to torch's default.
            weights = torch.load(weights_path, map_location="cpu", weights_only=True)
            fit = self._model.load_state_dict(weights, strict=False)
        except (RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{weights_path} does not hold the weights of Boson's codec: {error}") from error
        missing = [name for name in fit.missing_keys if name != UNUSED_WEIGHT]
        unexpected = [name for name in fit.unexpected_keys if name != UNUSED_WEIGHT]
        if missing or unexpected:
            raise ValueError(
                f"{weights_path} does not fit its config.json: missing {missing}, unexpected {unexpected}; "
                f"get both from one revision of the codec, such as {DEFAULT_CODEC} at {DEFAULT_CODEC_REVISION}"
            )
        self._model.to(device).eval()
        self.num_codebooks = int(self._model.n_q)
        self.codebook_size = int(self._model.quantizer.bins)  # the model's own codebook_size is a width
        self.frame_rate = float(self._model.frame_rate)
        self.sample_rate = int(self._model.sample_rate)

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in reversed(self._files):
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return f"boson:{digest.hexdigest()}"

    def encode(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """Codes int16 [8, frames] of a mono waveform float32 [samples]."""
        # Under one frame upstream's convolutions have nothing to stand on.
        short = int(np.ceil(sample_rate / self.frame_rate)) - len(waveform)
        if short > 0:
            waveform = np.pad(waveform, (0, short))
        return self._model.encode(waveform.astype(np.float32), sample_rate).cpu().numpy().astype(np.int16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform float32 [samples] of codes [8, frames]. Raises ValueError for codes that there are not."""
        import torch

        check_codes(codes, self)
        with torch.no_grad():
            return self._model.decode(torch.from_numpy(codes.astype(np.int64))[None])[0, 0]


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError

    if revision is None and repo == DEFAULT_CODEC:
        revision = DEFAULT_CODEC_REVISION
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(CODEC_FILES)))
    except HFValidationError as error:
        raise ValueError(f"codec {repo!r} is neither a folder here nor the name of a repository on the hub") from error


def _load_folder(folder: Path, device: str) -> Codec:
    files = {path.name for path in folder.iterdir()}
    if "sample_codec.json" in files:
        from .sample_codec import SampleCodec

        return SampleCodec.load(folder)
    if {"config.json", "model.pth"} <= files:
        return BosonCodec(folder, device)
    if "config.json" in files:
        newer = " (only model.safetensors: the layout of newer transformers)" if "model.safetensors" in files else ""
        raise ValueError(
            f"codec folder {folder} has config.json but no model.pth{newer}; boson_multimodal reads "
            f"{DEFAULT_CODEC} at revision {DEFAULT_CODEC_REVISION}"
        )
    raise ValueError(
        f"{folder} is no codec: it lacks config.json and model.pth (Boson's), or sample_codec.json (a sample codec)"
        if "model.pth" not in files
        else f"codec folder {folder} has model.pth but lacks config.json"
    )
