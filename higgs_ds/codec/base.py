"""The interface of a codec: audio to codes and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..errors import ConfigError


class Codec(Protocol):
    """The interface that Boson's codec and the sample codec share."""

    num_codebooks: int
    codebook_size: int  # codes are 0..codebook_size - 1
    frame_rate: float  # frames a second
    sample_rate: int  # of what decode returns

    @property
    def fingerprint(self) -> str:
        """Changes whenever the codes would."""

    def encode(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """Codes int16 [num_codebooks, frames] of a mono waveform float32 [samples]."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform float32 [samples] of codes [num_codebooks, frames]."""

    def build(self) -> None:
        """Loads what `encode` and `decode` need, which the first of them would do otherwise."""

    def release(self) -> None:
        """Gives back the memory that `build` took; the codec may still be used, and then loads it again."""


def check_fits(codec: Codec, num_codebooks: int, codebook_size: int) -> None:
    """Raises ConfigError unless the codec has a model's codebooks, and no codes but those that the model knows."""
    has, needs = codec.num_codebooks, num_codebooks
    if has < needs:
        raise ConfigError([f"--codec: has {has} codebooks, the model needs {needs}; use its own codec"])
    if codec.codebook_size > codebook_size:
        last, known = codec.codebook_size - 1, codebook_size - 1
        raise ConfigError([f"--codec: has codes up to {last}, the model knows 0 to {known}"])


def check_codes(codes: np.ndarray, codec: Codec) -> None:
    """Raises ValueError unless codes are whole numbers [num_codebooks, 1 or more frames] that the codec has."""
    expected = f"codes must be whole numbers 0..{codec.codebook_size - 1} of shape [{codec.num_codebooks}, frames]"
    is_2d = codes.ndim == 2 and codes.shape[0] == codec.num_codebooks and codes.shape[1] > 0
    if not is_2d or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"{expected}, found {codes.dtype} of shape {list(codes.shape)}")
    if codes.min() < 0 or codes.max() >= codec.codebook_size:
        raise ValueError(f"{expected}, found {codes.min()}..{codes.max()}")
