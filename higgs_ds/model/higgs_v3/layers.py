"""Qwen3's decoder on flat rows, with Higgs TTS 3's table of codes as its embedding and head.

Modules have the checkpoint's names. Training computes each token once, without padding or synchronisation with the
device: rows are in the order of the batch's `BatchIndex`, and only labelled rows reach the head. Generation uses the
same layers with cached keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from ...batching.batch_index import BatchIndex
from ...loss import HeadSums, head_sums, scaled_loss
from ..flat_rows import Rotate, RowsToSequences, SequencesToRows, causal_attention
from ..fused_head import FusedHead, HeadLoss, LabelledRows, head_sums_of
from ..fused_lora import project
from ..fused_mlp import FusedRmsNorm, add_mlps
from ..training_forward import Objective, PaddingFreeOutput
from .config import HiggsV3Config

Rope = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [N, 1, head_dim] each
Cache = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values by layer, [heads, positions, head_dim] each


class Attention(nn.Module):
    """Qwen3's attention: queries and keys are normalised per head before the rotation."""

    def __init__(self, config: HiggsV3Config):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        queries, keys = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        self.q_norm = FusedRmsNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = FusedRmsNorm(self.head_dim, config.rms_norm_eps)

    def heads(self, normed: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes rotated query and key, and value: [N, hidden] -> [N, heads, head_dim] each."""
        projected = project([self.q_proj, self.k_proj, self.v_proj], normed)
        query, key, value = (rows.unflatten(1, (-1, self.head_dim)) for rows in projected)
        return Rotate.apply(self.q_norm(query), *rope), Rotate.apply(self.k_norm(key), *rope), value


class DecoderLayer(nn.Module):
    """One decoder layer.

    It uses weights of several modules at once, so ZeRO-3 must gather it as a whole (a leaf module).
    """

    def __init__(self, config: HiggsV3Config):
        super().__init__()
        self.input_layernorm = FusedRmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = FusedRmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden: torch.Tensor, *, recompute: bool = False, **given: Any) -> torch.Tensor:
        """Computes `on_rows`; with `recompute`, again in the backward."""
        if recompute:
            # Inside the module, so that no ZeRO-3 hook releases the weights between recomputation and gradients.
            return checkpoint(self.on_rows, hidden, **given, use_reentrant=False)
        return self.on_rows(hidden, **given)

    def on_rows(self, hidden: torch.Tensor, *, index: BatchIndex, rope: Rope, outputs_only: bool) -> torch.Tensor:
        """Computes rows [N, hidden] -> [N, hidden], or with `outputs_only` only the index's output rows [K, hidden]."""
        heads = self.self_attn.heads(self.input_layernorm(hidden), rope)
        places = index.unpack_index
        # Flat rows to padded sequences, attention, and back to flat rows.
        packed = tuple(RowsToSequences.apply(rows, index.pack_index, places) for rows in heads)
        if outputs_only:
            hidden, places = (rows.index_select(0, index.output_rows) for rows in (hidden, places))
        attended = causal_attention(packed, index, dropout=self.self_attn.attention_dropout if self.training else 0.0)
        return self._after_attention(hidden, SequencesToRows.apply(attended, places))

    def cached_forward(self, hidden: torch.Tensor, rope: Rope, cache: Cache, number: int) -> torch.Tensor:
        """Computes a sequence's next rows with the cached ones, and adds them to the cache; `number` is the layer's."""
        query, key, value = (rows.transpose(0, 1) for rows in self.self_attn.heads(self.input_layernorm(hidden), rope))
        if number < len(cache):
            key, value = (torch.cat([kept, new], 1) for kept, new in zip(cache[number], (key, value), strict=True))
            cache[number] = (key, value)
        else:
            cache.append((key, value))
        length, before = query.shape[1], key.shape[1] - query.shape[1]
        seen = torch.ones(length, key.shape[1], dtype=torch.bool, device=query.device).tril(before)
        key, value = (rows.repeat_interleave(self.self_attn.num_key_value_groups, 0) for rows in (key, value))
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=seen)[0]
        return self._after_attention(hidden, attended.transpose(0, 1).flatten(1))

    def _after_attention(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        (out,) = project([self.self_attn.o_proj], attended)
        hidden = hidden + out
        return add_mlps([self.mlp], self.post_attention_layernorm(hidden), hidden, [hidden.shape[0]])


class CodeTable(FusedHead):
    """Table of all codebooks' codes, [codebooks · classes, hidden]: both embedding and head.

    Both uses call the module itself, so that ZeRO-3 gathers the shared weight each time.
    """

    def forward(self, hidden: Any, rows: LabelledRows | None = None) -> Any:
        """Embeds codes, int64 [codebooks, frames] -> [frames, hidden], summed over codebooks; else as `FusedHead`."""
        if isinstance(hidden, torch.Tensor) and not hidden.is_floating_point():
            first = torch.arange(hidden.shape[0], device=hidden.device) * (self.out_features // hidden.shape[0])
            return F.embedding(hidden + first[:, None], self.weight).sum(0)
        return super().forward(hidden, rows)


class HiggsV3Model(PreTrainedModel):
    """Higgs TTS 3 without its codec; computes the loss of a batch."""

    config_class = HiggsV3Config
    config: HiggsV3Config

    def __init__(self, config: HiggsV3Config):
        super().__init__(config)
        table = CodeTable(config.hidden_size, config.num_codebooks * config.num_classes, bias=False)
        self.tied = _named(
            embedding=_named(
                text_embedding=nn.Embedding(config.vocab_size, config.hidden_size),
                modality_embeddings=nn.ModuleList([_named(embedding=table)]),
            )
        )
        self.body = _named(
            layers=nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
            norm=FusedRmsNorm(config.hidden_size, config.rms_norm_eps),
        )

    @property
    def text_embedding(self) -> nn.Embedding:
        """Embedding of text tokens."""
        return self.get_submodule("tied.embedding.text_embedding")  # type: ignore[return-value]

    @property
    def code_table(self) -> CodeTable:
        """Table of codes, both embedding and head."""
        return self.get_submodule(TABLE)  # type: ignore[return-value]

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers."""
        return self.get_submodule("body.layers")  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        """Returns the text embedding, for transformers and PEFT."""
        return self.text_embedding

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: every weight comes from a file."""

    def rope(self, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Computes cosines and sines of positions, [N] -> [N, 1, head_dim] each, in `dtype`."""
        places = torch.arange(0, self.config.head_dim, 2, device=positions.device).float()
        frequencies = 1.0 / (self.config.rope_theta ** (places / self.config.head_dim))
        angles = positions.float()[:, None] * frequencies
        angles = torch.cat([angles, angles], 1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        index: BatchIndex,
        objective: Objective,
        audio_out_ids: torch.Tensor | None = None,
        audio_in_ids: torch.Tensor | None = None,
        checkpoint_every: int = 0,
        input_gradient: bool = False,
        **_unused: Any,
    ) -> PaddingFreeOutput:
        """Computes a micro-batch's loss; `_unused` are fields of other families' batches, and PEFT's additions.

        Args:
            input_ids: [batch, tokens], read at `index.text_index`.
            audio_out_ids, audio_in_ids: [codebooks, rows], see `prompt`.
            checkpoint_every: N recomputes every N-th layer in the backward, starting with the first; 0 for none.
            input_gradient: True extends the backward to the first layer's input, even if it is not trained.
        """
        streams = [_codes(ids, self.config.num_codebooks, input_ids) for ids in (audio_out_ids, audio_in_ids)]
        num_frames = sum(ids.shape[1] for ids in streams)
        arrived = num_frames == index.num_frames
        # The guard reports missing frames. Until then this rank computes on zeros, so that the others do not hang.
        if not arrived:
            streams = [input_ids.new_zeros((self.config.num_codebooks, n)) for n in (index.num_frames, 0)]
        if tuple(input_ids.shape) != tuple(index.input_shape):
            input_ids = input_ids.new_zeros(index.input_shape)
        hidden = self._embed(input_ids.flatten().index_select(0, index.text_index), streams)
        if input_gradient and torch.is_grad_enabled():
            hidden.requires_grad_()
        rope = self.rope(index.positions, hidden.dtype)
        num_rows, last = hidden.shape[0], len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                index=index,
                rope=rope,
                # After the last attention only rows with a label are needed.
                outputs_only=number == last,
                recompute=bool(checkpoint_every) and number % checkpoint_every == 0 and torch.is_grad_enabled(),
            )
        labelled = self.body["norm"](hidden.index_select(0, index.head_rows))  # type: ignore[operator, index]
        audio = labelled[index.num_head_rows[0] :]
        loss, sums, shape = _loss(self.code_table, audio, index, objective)
        if not arrived:
            shape = (0, *shape[1:])  # tells the guard that the intended frames were not computed
        return PaddingFreeOutput(loss, sums, num_rows, num_frames, shape)

    def _embed(self, text: torch.Tensor, streams: list[torch.Tensor]) -> torch.Tensor:
        """Embeds text rows, then rows of the targets' streams, then of the references' streams: [N, hidden]"""
        before = text.new_tensor([self.config.audio_token, self.config.reference_token])
        embedded = self.text_embedding(torch.cat([text, before]))
        rows, tokens = embedded[: len(text)], embedded[len(text) :]
        codes = torch.cat(streams, 1)
        # A row with only BOC marks the text token before a stream; streams contain no such row.
        marked = (codes == self.config.boc).all(0)[:, None]
        tokens = torch.cat([tokens[n].expand(ids.shape[1], -1) for n, ids in enumerate(streams)])
        return torch.cat([rows, torch.where(marked, tokens, self.code_table(codes))])

    @torch.no_grad()
    def cached_forward(self, text: torch.Tensor, codes: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        """Appends rows to a sequence, text ids [n] then codes [codebooks, m], and computes the logits after them.

        Returns:
            [codebooks, classes] float32; the rows are added to the cache.
        """
        hidden = self.text_embedding(text)
        if codes is not None:
            hidden = torch.cat([hidden, self.code_table(codes)])
        before = cache[0][0].shape[1] if cache else 0
        rope = self.rope(torch.arange(before, before + len(hidden), device=hidden.device), hidden.dtype)
        for number, layer in enumerate(self.layers):
            hidden = layer.cached_forward(hidden, rope, cache, number)  # type: ignore[operator]
        logits = self.code_table(self.body["norm"](hidden[-1:]))  # type: ignore[operator, index]
        return logits.view(self.config.num_codebooks, -1).float()


TABLE = "tied.embedding.modality_embeddings.0.embedding"


def _named(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


def _codes(ids: torch.Tensor | None, num_codebooks: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros((num_codebooks, 0)) if ids is None or not ids.shape[-1] else ids


def _loss(
    table: CodeTable, audio: torch.Tensor, index: BatchIndex, objective: Objective
) -> tuple[torch.Tensor, HeadSums, tuple[int, ...]]:
    """Computes loss, sums and the logits' shape from labelled rows after the last norm; text has no loss."""
    scales = objective.codebook_scales
    if objective.impl == "reference":
        logits = table(audio).unflatten(1, (scales.shape[0], -1))
        none = logits.new_zeros((1, 0, 1))
        sums = head_sums(none, logits, index.text_targets.new_zeros((1, 0)), index.audio_targets)
        return scaled_loss(sums, 0.0, scales), sums, tuple(logits.shape)
    of_audio = table.loss_of(LabelledRows(audio, index.audio_targets, scales))
    zero = scales.new_zeros(1)
    of_text = HeadLoss(zero[0], zero, index.text_targets.new_zeros(1), zero[0], (0, 1, 1))
    return of_audio.loss, head_sums_of(of_text, of_audio), of_audio.shape
