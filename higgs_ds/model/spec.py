"""Sizes, token ids and row format of a checkpoint, as the trainer needs them; filled in by its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from ..data.chatml import AudioRef, Turn


@dataclass(frozen=True)
class ModelSpec(ABC):
    """Token ids, codebooks and sizes of one checkpoint, and how its family writes a row."""

    norms_heads: ClassVar[bool] = False  # whether queries and keys are normed, head by head
    num_codebooks: int
    codebook_size: int  # codes are 0 to codebook_size - 1; the stream's BOS and EOS follow them
    stream_bos: int
    stream_eos: int
    use_delay_pattern: bool  # codebook k starts k frames later
    audio_in_token: int  # placeholder token of a clip in the prompt
    audio_out_token: int  # placeholder token of a clip in an answer
    audio_in_codes: bool  # whether the model reads the codes of clips at `audio_in_token`
    pad_token: int
    hidden_size: int
    ffn_size: int
    num_ffns: int  # feed-forward networks per layer; each token goes through one
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # text tokens
    max_positions: int

    @property
    def num_classes(self) -> int:
        """Classes of the audio head per codebook: codes, BOS and EOS (1026)."""
        return self.codebook_size + 2

    @property
    def max_code(self) -> int:
        """The largest id that may stand in `audio_out_ids` (1025)."""
        return self.num_classes - 1

    @property
    def widest(self) -> int:
        """The largest input or output width of a projection; a LoRA matrix has at most rank × this many values."""
        return max(self.hidden_size, self.ffn_size)

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer's projections: attention and its feed-forward networks."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_key_value_heads)
        return attention + self.num_ffns * 3 * self.hidden_size * self.ffn_size

    def problem_of(self, messages: Sequence[Turn], start_index: int | None) -> str | None:
        """Names the part of a row that this family cannot express; None if there is none."""
        return None

    @abstractmethod
    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        """Token ids, label ids (-100 for no label) and clips of a row, in reading order."""

    @abstractmethod
    def stream(self, codes: torch.Tensor) -> torch.Tensor:
        """The model's input for a clip: [codebooks, frames] -> [codebooks, `stream_length(frames)`]"""

    @abstractmethod
    def stream_labels(self, codes: torch.Tensor, trained: bool) -> torch.Tensor:
        """Unshifted labels of `stream(codes)`; -100 (no label) in the first column, or everywhere if not trained."""

    @abstractmethod
    def stream_length(self, frames: int) -> int:
        """Positions taken by a clip of this many frames."""
