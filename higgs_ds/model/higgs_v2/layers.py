"""Upstream's model on flat rows: each token is computed once, and nothing waits for the device.

The mathematics is upstream's, and so are the modules (ZeRO-3 gathers each weight on use, LoRA stays in place). Text and
audio rows pass through their own norms and feed-forward networks as two slices, attention sees right-padded sequences
without a mask, and the heads see labelled rows only. All indices come from the batch's `BatchIndex`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioDualFFNDecoderLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...batching.batch_index import BatchIndex
from ...errors import ConfigError
from ...loss import HeadSums, head_sums, scaled_loss
from ..flat_rows import Rotate, RowsToSequences, SequencesToRows, causal_attention
from ..fused_head import LabelledRows, head_sums_of
from ..fused_lora import project
from ..fused_mlp import add_mlps
from ..training_forward import Objective, PaddingFreeOutput
from .spec import peculiarities

if TYPE_CHECKING:
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
    from boson_multimodal.model.higgs_audio.audio_head import HiggsAudioDecoderProjector

    Rope = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [N, 1, head_dim] each


def check_supported(config: HiggsAudioConfig) -> None:
    """Refuses a `HiggsAudioConfig` with layers that are not implemented here.

    Raises:
        ConfigError: naming them, and `--forward_impl upstream` as the remedy.
    """
    problems = [
        f"--forward_impl padding_free: the checkpoint has {what}; use --forward_impl upstream --loss_impl reference"
        for what in peculiarities(config)
    ]
    if problems:
        raise ConfigError(problems)


def padding_free_forward(
    model: HiggsAudioModel,
    index: BatchIndex,
    objective: Objective,
    *,
    input_ids: torch.Tensor,
    audio_out_ids: torch.Tensor | None,
    audio_in_ids: torch.Tensor | None,
    checkpoint_every: int = 0,
    input_gradient: bool = False,
) -> PaddingFreeOutput:
    """Runs one micro-batch through upstream's `HiggsAudioModel`.

    Args:
        input_ids: [batch, tokens], read at `index.text_index`.
        audio_out_ids, audio_in_ids: [codebooks, frames].
        checkpoint_every: recompute every N-th layer in the backward, beginning with the first; 0 for none.
        input_gradient: continue the backward to the first layer's input, although nothing trains there.
    """
    # Inputs: token ids and codes, in the shapes of the index.
    codes = _codes(model, audio_out_ids, audio_in_ids, input_ids)
    num_frames = codes.shape[1]
    arrived = num_frames == index.num_frames
    # Missing frames are reported by the guard. Until then this rank computes on zeros, so that no other waits for it.
    codes = _of_shape(codes, (codes.shape[0], index.num_frames))
    input_ids = _of_shape(input_ids, index.input_shape)
    # Embeddings: text rows first, audio rows behind them, and so through all layers.
    text = model.embed_tokens(input_ids.flatten().index_select(0, index.text_index))
    hidden = torch.cat([text, _embed_codes(model, codes)])
    if input_gradient and torch.is_grad_enabled():
        hidden.requires_grad_()
    # Rotary factors, once for all layers, by each row's position in its sequence.
    cos, sin = model.rotary_emb(hidden, index.positions[None])
    rope = cos.transpose(0, 1), sin.transpose(0, 1)  # [N, 1, head_dim]
    num_rows, last = hidden.shape[0], len(model.layers) - 1
    for number, layer in enumerate(model.layers):
        hidden = layer(
            hidden,
            index=index,
            rope=rope,
            # After the last attention only rows that a head predicts from are needed.
            outputs_only=number == last,
            recompute=bool(checkpoint_every) and number % checkpoint_every == 0 and torch.is_grad_enabled(),
        )
    # Heads: labelled rows only.
    text, audio = model.norm(hidden.index_select(0, index.head_rows)).split(index.num_head_rows)
    loss, sums, shape = _heads(model.audio_decoder_proj, text, audio, index, objective)
    if not arrived:
        shape = (0, *shape[1:])  # nothing was computed from the intended frames
    return PaddingFreeOutput(loss, sums, num_rows, num_frames, shape)


def _codes(
    model: HiggsAudioModel, audio_out_ids: torch.Tensor | None, audio_in_ids: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """Audio-out frames followed by audio-in frames, if the model reads those. [codebooks, frames]

    No weight may be accessed here, not even its device: under ZeRO-3 that would gather it, on this rank only.
    """
    given = (audio_out_ids, audio_in_ids if model.config.encode_audio_in_tokens else None)
    parts = [part for part in given if part is not None and part.shape[-1]]
    if not parts:
        return like.new_zeros((model.audio_num_codebooks, 0))
    return torch.cat(parts, dim=1)


def _of_shape(ids: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return ids if tuple(ids.shape) == tuple(shape) else ids.new_zeros(shape)


def _embed_codes(model: HiggsAudioModel, codes: torch.Tensor) -> torch.Tensor:
    """Sum (or mean) of a frame's codes, each in its codebook's own range. [codebooks, frames] -> [frames, hidden]"""
    first = torch.arange(codes.shape[0], device=codes.device) * model.audio_codebook_size
    embedded = model.audio_codebook_embeddings(codes + first[:, None])
    return embedded.mean(0) if model.config.audio_embed_avg else embedded.sum(0)


class DecoderLayer(HiggsAudioDualFFNDecoderLayer):
    """Upstream's dual-FFN layer, on flat rows if an index is given.

    It reads weights of several of its modules at once; under ZeRO-3 it is therefore a leaf module, gathered as a whole.
    """

    def forward(
        self, hidden: torch.Tensor, *args: Any, index: BatchIndex | None = None, recompute: bool = False, **kwargs: Any
    ) -> Any:
        """[N, hidden] -> [N, hidden], or with `outputs_only` the index's output rows, [K, hidden].

        With `recompute`, activations are recomputed in the backward.
        """
        if index is None:
            return super().forward(hidden, *args, **kwargs)
        if recompute:
            # Inside the module: outside it, ZeRO-3's hook would release the weights before the recomputation.
            return checkpoint(self.on_rows, hidden, index=index, **kwargs, use_reentrant=False)
        return self.on_rows(hidden, index=index, **kwargs)

    def on_rows(self, hidden: torch.Tensor, *, index: BatchIndex, rope: Rope, outputs_only: bool) -> torch.Tensor:
        """The layer's computation, see `forward`."""
        # Flat rows to padded sequences, attention, and back to flat rows.
        places, num_text = index.unpack_index, index.num_text
        heads = self.before_attention(hidden, num_text, rope, index.pack_index, places)
        if outputs_only:
            hidden, places = (rows.index_select(0, index.output_rows) for rows in (hidden, places))
            num_text = index.num_output_text
        attn = self.self_attn
        attended = causal_attention(heads, index, dropout=attn.attention_dropout if attn.training else 0.0)
        attended = SequencesToRows.apply(attended, places)
        return self.after_attention(hidden, attended, num_text)

    def before_attention(
        self, hidden: torch.Tensor, num_text: int, rope: Rope, pack_index: torch.Tensor, unpack_index: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Query, key and value at padded positions: [N, hidden] -> [positions, heads, head_dim] each."""
        attn = self.self_attn
        normed = _normed([self.input_layernorm, self.audio_input_layernorm], hidden, num_text)
        projected = project([attn.q_proj, attn.k_proj, attn.v_proj], normed)
        query, key, value = (rows.unflatten(1, (-1, attn.head_dim)) for rows in projected)  # [N, heads, head_dim]
        # Rotate flat rows: padding needs no rotation.
        query, key = Rotate.apply(query, *rope), Rotate.apply(key, *rope)
        return tuple(RowsToSequences.apply(rows, pack_index, unpack_index) for rows in (query, key, value))

    def after_attention(self, hidden: torch.Tensor, attended: torch.Tensor, num_text: int) -> torch.Tensor:
        """The layer's output, from its input rows and their attention output: [N, hidden] each -> [N, hidden]"""
        (out,) = project([self.self_attn.o_proj], attended)
        hidden = hidden + out
        # One network for text rows and one for audio rows, each added to its slice.
        norms = [self.post_attention_layernorm, self.audio_post_attention_layernorm]
        sizes = [num_text, hidden.shape[0] - num_text]
        return add_mlps([self.mlp, self.audio_mlp], _normed(norms, hidden, num_text), hidden, sizes)


def _normed(norms: list[nn.Module], rows: torch.Tensor, num_text: int) -> torch.Tensor:
    """Applies each norm to its slice of the rows. [N, hidden] -> [N, hidden]"""
    text, audio = norms
    return torch.cat([text(rows[:num_text]), audio(rows[num_text:])])


def _heads(
    heads: HiggsAudioDecoderProjector, text: torch.Tensor, audio: torch.Tensor, index: BatchIndex, objective: Objective
) -> tuple[torch.Tensor, HeadSums, tuple[int, ...]]:
    """Loss, sums and shape of the audio logits, from labelled rows after the last norm."""
    scales = objective.codebook_scales
    # Reference: complete logits and plain cross-entropy.
    if objective.impl == "reference":
        text_logits = heads.text_lm_head(text)
        audio_logits = heads.audio_lm_head(audio).unflatten(1, (scales.shape[0], -1))
        sums = head_sums(text_logits[None], audio_logits, index.text_targets[None], index.audio_targets)
        loss = scaled_loss(sums, objective.text_scale, scales)
        return loss, sums, tuple(audio_logits.shape)
    # Fused: each head computes its own loss, see `FusedHead.loss_of`.
    text_scale = torch.full((1,), objective.text_scale, dtype=scales.dtype, device=scales.device)
    of_text = heads.text_lm_head.loss_of(LabelledRows(text, index.text_targets[:, None], text_scale))
    of_audio = heads.audio_lm_head.loss_of(LabelledRows(audio, index.audio_targets, scales))
    sums = head_sums_of(of_text, of_audio)
    return of_text.loss + of_audio.loss, sums, of_audio.shape
