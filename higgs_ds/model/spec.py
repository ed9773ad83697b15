"""The trainer's knowledge of a checkpoint: sizes, token ids, and how its family writes a row. The family fills it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..data.chatml import AudioRef, Turn


@dataclass(frozen=True)
class ModelSpec(ABC):
    """Token ids, codebooks and sizes of one checkpoint, and how its family writes a row."""

    num_codebooks: int
    codebook_size: int  # codes are 0 to codebook_size - 1; the stream's BOS and EOS follow them
    stream_bos: int
    stream_eos: int
    use_delay_pattern: bool  # codebook k starts k frames later
    audio_in_token: int  # id that stands for all positions of a clip that is given
    audio_out_token: int  # id that stands for all positions of a clip that is, or might be, learned
    audio_in_codes: bool  # whether the model is given the codes of clips at `audio_in_token`
    pad_token: int
    hidden_size: int
    ffn_size: int
    num_ffns: int  # feed-forward networks of a layer; a token goes through one of them
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # text tokens
    max_positions: int

    @property
    def num_classes(self) -> int:
        """The classes of the audio head in a codebook: its codes, BOS and EOS (1026)."""
        return self.codebook_size + 2

    @property
    def max_code(self) -> int:
        """The largest id that may stand in `audio_out_ids` (1025)."""
        return self.num_classes - 1

    @property
    def widest(self) -> int:
        """The largest in- or output width of a projection: a LoRA matrix is at most rank times as large."""
        return max(self.hidden_size, self.ffn_size)

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer's projections: attention and its feed-forward networks."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_key_value_heads)
        return attention + self.num_ffns * 3 * self.hidden_size * self.ffn_size

    def problem_of(self, messages: Sequence[Turn], start_index: int | None) -> str | None:
        """Says what of a row this family has no words for; None for nothing."""
        return None

    @abstractmethod
    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        """Token ids, label ids (-100 where nothing is learned) and clips of a row, in reading order."""

    @abstractmethod
    def stream(self, codes: torch.Tensor) -> torch.Tensor:
        """A clip as the model is given it: [codebooks, frames] -> [codebooks, `stream_length(frames)`]"""

    @abstractmethod
    def stream_labels(self, codes: torch.Tensor, trained: bool) -> torch.Tensor:
        """The label at each place of `stream(codes)`, not shifted; -100 at the first and elsewhere, or everywhere."""

    @abstractmethod
    def stream_length(self, frames: int) -> int:
        """Positions that a clip of so many frames takes."""
