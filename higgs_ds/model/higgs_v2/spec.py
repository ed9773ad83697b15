"""The spec of a Higgs Audio v2 checkpoint, from its `HiggsAudioConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...data.chatml import AudioRef, Turn
from ...loss import IGNORE
from ..spec import ModelSpec
from . import prompt


@dataclass(frozen=True)
class HiggsV2Spec(ModelSpec):
    """See `ModelSpec`."""

    @classmethod
    def from_config(cls, config) -> HiggsV2Spec:
        """From a `HiggsAudioConfig`."""
        text = config.text_config
        return cls(
            num_codebooks=config.audio_num_codebooks,
            codebook_size=config.audio_codebook_size,
            stream_bos=config.audio_stream_bos_id,
            stream_eos=config.audio_stream_eos_id,
            use_delay_pattern=config.use_delay_pattern,
            audio_in_token=config.audio_in_token_idx,
            audio_out_token=config.audio_out_token_idx,
            audio_in_codes=config.encode_audio_in_tokens,
            pad_token=config.pad_token_id,
            hidden_size=text.hidden_size,
            ffn_size=text.intermediate_size,
            num_ffns=2,  # one for text, one for audio
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
        )

    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        """Boson's ChatML, see `prompt.tokenize`."""
        return prompt.tokenize(messages, start_index, tokenizer)

    def stream(self, codes: torch.Tensor) -> torch.Tensor:
        """BOS, codes, EOS, with the delay pattern: [codebooks, frames] -> [codebooks, `stream_length(frames)`]"""
        framed = F.pad(F.pad(codes, (1, 0), value=self.stream_bos), (0, 1), value=self.stream_eos)
        return prompt.delay(framed, self.stream_bos, self.stream_eos) if self.use_delay_pattern else framed

    def stream_labels(self, codes: torch.Tensor, trained: bool) -> torch.Tensor:
        """The codes and one EOS per codebook, delayed; -100 elsewhere, or everywhere if not trained."""
        framed = F.pad(F.pad(codes, (1, 0), value=IGNORE), (0, 1), value=self.stream_eos)
        labels = prompt.delay(framed, IGNORE, IGNORE) if self.use_delay_pattern else framed
        return labels if trained else torch.full_like(labels, IGNORE)

    def stream_length(self, frames: int) -> int:
        """Columns of `stream`: frames, BOS, EOS, and the last codebook's delay."""
        return frames + 2 + (self.num_codebooks - 1 if self.use_delay_pattern else 0)


def peculiarities(config) -> list[str]:
    """Lists, in words, what a `HiggsAudioConfig` has that Boson's generation checkpoints do not."""
    layers = config.text_config.num_hidden_layers
    # "dual_ffn_fast_forward" differs from "dual_ffn" only in layers without a dual FFN; here every layer has one.
    dual = config.audio_adapter_type in ("dual_ffn", "dual_ffn_fast_forward")
    has = {
        f"audio_adapter_type {config.audio_adapter_type!r}": not dual,
        f"a dual FFN in only some of its {layers} layers": (
            dual and set(config.audio_dual_ffn_layers or ()) != set(range(layers))
        ),
        "an audio tower": not config.skip_audio_tower or config.encode_whisper_embed,
        "its own attention for audio (use_audio_out_self_attention)": config.use_audio_out_self_attention,
        "a projector of audio embeddings (use_audio_out_embed_projector)": config.use_audio_out_embed_projector,
        "decoder layers before its heads (audio_decoder_proj_num_layers)": config.audio_decoder_proj_num_layers,
        "an RQ transformer (use_rq_transformer)": config.use_rq_transformer,
    }
    return [what for what, is_so in has.items() if is_so]
