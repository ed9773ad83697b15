"""Speech from a model of any family: sampling settings, an answer, and the speaker protocol."""

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
    """The default dtype for speech: bf16 on a GPU; fp32 on a CPU, where bf16 is slower."""
    return "bf16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 0.95
    seed: int | None = None
    max_new_tokens: int = 1024
    ras_window: int | None = None  # repetition-aware sampling: redraw a code that is frequent in this many last frames
    ras_max_repeats: int = 2


@dataclass(frozen=True)
class Answer:
    """The model's answer to a prompt."""

    codes: np.ndarray | None  # int16 [codebooks, frames]; None if it answered without audio
    ended: bool = True  # by the model, not cut at `max_new_tokens`
    rules_agree: bool = False  # every stop rule ends the clip here


class Speaker(Protocol):
    """A base checkpoint with adapter and codec, ready to speak."""

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
            messages: turns of the prompt, before the assistant's.
            context: codes of the clips in the prompt, in reading order.
            force_audio: begin the answer with audio instead of leaving the choice to the model.
            stop: one of `stop_rules`; all but the first need greedy sampling.

        Raises:
            ConfigError: the model computes NaN or infinity.
        """

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform of codes, float32 [samples]."""
