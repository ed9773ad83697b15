"""Boson's model as this trainer calls it: the one class between PEFT and upstream, which drops only `labels`."""

from __future__ import annotations

import inspect

from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ..batching.layout import Layout
from .fused_head import FusedHead
from .padding_free import Objective, padding_free_forward

FORWARD_KEYS = frozenset(inspect.signature(HiggsAudioModel.forward).parameters) - {"self"}


class HiggsAudioForTraining(HiggsAudioModel):
    """Upstream's model under PEFT: `PeftModelForCausalLM` always passes `labels`, which upstream's forward rejects.

    That one key is dropped. Everything else reaches the model, and a key that it does not know is an error: dropping
    more than `labels` is how a trainer ends up with a loss of 0.0000. Weights keep upstream's names.

    With a `layout` the batch goes through the padding-free forward, which gives a loss instead of logits.
    """

    # Checkpoints of this family may carry these along; `model.check_weights` has said so once.
    _keys_to_ignore_on_load_unexpected = (r"audio_codebook_weights", r"rotary_emb\.(original_)?inv_freq")

    def __init__(self, config):
        super().__init__(config)
        FusedHead.adopt(self.audio_decoder_proj.text_lm_head)
        FusedHead.adopt(self.audio_decoder_proj.audio_lm_head)

    def forward(
        self,
        *args,
        labels=None,
        layout: Layout | None = None,
        objective: Objective | None = None,
        checkpoint_every: int = 0,
        input_gradient: bool = False,
        **kwargs,
    ):
        unknown = sorted(kwargs.keys() - FORWARD_KEYS)
        if unknown:
            raise TypeError(f"unknown keys in the batch: {', '.join(unknown)}; the model takes {sorted(FORWARD_KEYS)}")
        if layout is None:
            return super().forward(*args, **kwargs)
        return padding_free_forward(
            self,
            layout,
            objective,
            input_ids=kwargs["input_ids"],
            audio_out_ids=kwargs.get("audio_out_ids"),
            audio_in_ids=kwargs.get("audio_in_ids"),
            checkpoint_every=checkpoint_every,
            input_gradient=input_gradient,
        )
