"""Spec of a Higgs TTS 3 checkpoint: sizes from its config, token ids from its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...data.chatml import AudioRef, Turn
from ...loss import IGNORE
from ..spec import ModelSpec
from . import prompt
from .config import HiggsV3Config


@dataclass(frozen=True)
class HiggsV3Spec(ModelSpec):
    """See `ModelSpec`; a clip's placeholder is the text token before its stream, see `prompt`."""

    norms_heads: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: HiggsV3Config, token_ids: Mapping[str, int]) -> HiggsV3Spec:
        """Makes the spec from the checked config and the ids of `prompt.PROMPT_TOKENS`."""
        return cls(
            num_codebooks=config.num_codebooks,
            codebook_size=config.boc,
            stream_bos=config.boc,
            stream_eos=config.eoc,
            use_delay_pattern=True,
            audio_in_token=token_ids[prompt.REF_AUDIO],
            audio_out_token=token_ids[prompt.AUDIO],
            audio_in_codes=True,
            pad_token=config.eos_token_id if config.eos_token_id < config.vocab_size else 0,
            hidden_size=config.hidden_size,
            ffn_size=config.intermediate_size,
            num_ffns=1,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
        )

    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        """See `prompt.tokenize`."""
        return prompt.tokenize(messages, start_index, tokenizer)

    def problem_of(self, messages: Sequence[Turn], start_index: int | None) -> str | None:
        """See `prompt.parse_turns`."""
        try:
            prompt.parse_turns(messages, start_index)
        except prompt.UnsupportedRowError as error:
            return error.problem
        return None

    def stream(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the row of the text token, then the delayed codes: [codebooks, frames + codebooks]"""
        return prompt.with_marker(prompt.delayed(codes, self.stream_bos, self.stream_eos), self.stream_bos)

    def stream_labels(self, codes: torch.Tensor, trained: bool) -> torch.Tensor:
        """Returns the labels: codes and EOC, but not BOC; the text token's row has none."""
        labels = prompt.with_marker(prompt.delayed(codes, IGNORE, self.stream_eos), IGNORE)
        return labels if trained else torch.full_like(labels, IGNORE)

    def stream_length(self, frames: int) -> int:
        """Returns the width of `stream`: the text token, the frames, and the delay of the last codebook."""
        return frames + self.num_codebooks
