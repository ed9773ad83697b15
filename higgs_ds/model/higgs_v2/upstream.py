"""The class between PEFT and Boson's model, which drops only `labels`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ...batching.batch_index import BatchIndex
from ..fused_head import FusedHead
from .layers import padding_free_forward
from .layouts import CARRIED_ALONG

FORWARD_KEYS = frozenset(inspect.signature(HiggsAudioModel.forward).parameters) - {"self"}


class HiggsAudioForTraining(HiggsAudioModel):
    """Upstream's model under PEFT: `PeftModelForCausalLM` always passes `labels`, which upstream's forward rejects.

    Only that key is dropped. Everything else reaches the model, and an unknown key is an error: dropping more than
    `labels` is how a trainer ends up with a loss of 0.0000. Weights keep upstream's names.

    With an `index`, the batch takes the padding-free forward, which returns a loss instead of logits.
    """

    _keys_to_ignore_on_load_unexpected = (CARRIED_ALONG,)  # reported by `check_weights`

    def __init__(self, config):
        super().__init__(config)
        FusedHead.adopt(self.audio_decoder_proj.text_lm_head)
        FusedHead.adopt(self.audio_decoder_proj.audio_lm_head)
        self._embedded: list[torch.Tensor] = []  # set while upstream's forward runs

    def forward(
        self,
        *args,
        labels=None,
        index: BatchIndex | None = None,
        objective: Any = None,  # an `Objective`, given with an index
        checkpoint_every: int = 0,
        input_gradient: bool = False,
        **kwargs,
    ):
        unknown = sorted(kwargs.keys() - FORWARD_KEYS)
        if unknown:
            raise TypeError(f"unknown keys in the batch: {', '.join(unknown)}; the model takes {sorted(FORWARD_KEYS)}")
        if index is None:
            self._embedded = []
            return super().forward(*args, **kwargs)
        return padding_free_forward(
            self,
            index,
            objective,
            input_ids=kwargs["input_ids"],
            audio_out_ids=kwargs.get("audio_out_ids"),
            audio_in_ids=kwargs.get("audio_in_ids"),
            checkpoint_every=checkpoint_every,
            input_gradient=input_gradient,
        )

    def _validate_model_kwargs(self, model_kwargs):
        """Skipped: `generate` would look for upstream's keys in this signature; `forward` refuses unknown ones."""

    def _embed_audio_ids(self, audio_ids):
        embedded = super()._embed_audio_ids(audio_ids)
        self._embedded.append(embedded)
        return embedded

    def _forward_core(self, hidden_states, **kwargs):
        """Upstream's layers; trained audio embeddings always get a gradient that passes through all of them.

        Upstream skips the embeddings if a batch has no audio. Under ZeRO that rank would then miss the collectives for
        their gradient, and those that gather weights for the backward through the first layer.
        """
        embedded, self._embedded = self._embedded, []
        if any(part.requires_grad for part in embedded):
            hidden_states = hidden_states + sum(part[:0].sum() for part in embedded)
        return super()._forward_core(hidden_states=hidden_states, **kwargs)
