"""Speaking with a model of any family: sampling, an answer, and the protocol of a speaker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from ..codec.base import Codec
    from ..data.chatml import Turn
    from .spec import ModelSpec


def default_dtype(device: torch.device) -> str:
    """The dtype to speak in: a GPU is made for bf16, and a CPU slower in it."""
    return "bf16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Sampling:
    """The choice of tokens; temperature 0 takes the likeliest one."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 0.95
    seed: int | None = None
    max_new_tokens: int = 1024
    ras_window: int | None = None  # repetition-aware: a code that stands often in the last so many frames is redrawn
    ras_max_repeats: int = 2


@dataclass(frozen=True)
class Answer:
    """The model's answer to a prompt."""

    codes: np.ndarray | None  # int16 [codebooks, frames]; None if it answered without audio
    ended: bool = True  # by itself, and not at `max_new_tokens`
    rules_agree: bool = False  # whether every stop rule would have ended the clip here


class Speaker(Protocol):
    """Base checkpoint, adapter and codec, ready to speak."""

    spec: ModelSpec
    codec: Codec
    samplers: Mapping[str, Sampling]  # by the values of --sampler
    stop_rules: tuple[str, ...]  # values of --stop; the first is the default

    def speak(
        self,
        messages: Sequence[Turn],
        context: Sequence[np.ndarray],
        sampling: Sampling,
        *,
        force_audio: bool,
        stop: str = ...,
    ) -> Answer:
        """Answers a prompt.

        Args:
            messages: the prompt's turns; the assistant's turn follows.
            context: codes of the clips in the prompt, in reading order.
            force_audio: begin the answer with audio instead of leaving that to the model.
            stop: one of `stop_rules`; another than the first needs greedy sampling.

        Raises:
            ConfigError: the model computes NaN or infinity.
        """

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform of codes, float32 [samples]."""
