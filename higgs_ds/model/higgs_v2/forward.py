"""Build the training forward of a loaded model: the padding-free one of `layers.py`, or upstream's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ...errors import ConfigError
from ..fused_head import FusedHead
from ..fused_lora import LoraHead
from ..fused_mlp import FusedRmsNorm, adopt
from ..training_forward import TrainingForward
from .layers import DecoderLayer, check_supported
from .modules import HEADS
from .reference import ReferenceForward

if TYPE_CHECKING:
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig


def training_forward(
    model: nn.Module,
    config: HiggsAudioConfig,
    *,
    forward_impl: str = "padding_free",
    loss_impl: str = "fused",
    checkpoint_every: int = 0,
    compiled: bool = False,
) -> nn.Module:
    """The module for the engine to run, for a model with this `HiggsAudioConfig`.

    Args:
        forward_impl: "padding_free", or "upstream" with the reference loss alone.
        loss_impl: "fused", or "reference" for plain cross-entropy on the labelled rows' logits.
        checkpoint_every: every N-th decoder layer is recomputed in the backward; 0 for none.
        compiled: run decoder layers under torch.compile.

    Raises:
        ConfigError: LoRA on a head, which would get no gradient from the fused loss.
    """
    if forward_impl == "upstream":
        return ReferenceForward.from_config(model, config)
    check_supported(config)
    heads = {name: module for name, module in model.named_modules() if name.endswith(HEADS)}
    if loss_impl == "fused":
        adapted = [name for name, head in heads.items() if not isinstance(head, FusedHead)]
        why = "has LoRA, which would get no gradient; use --loss_impl reference"
        if adapted:
            raise ConfigError([f"--loss_impl fused: {name} {why}" for name in adapted])
        for head in heads.values():
            head.trained = head.weight.requires_grad
    # Modules change class in place, so that weights, names and ZeRO-3's gathering stay as they are.
    for head in heads.values():
        adopt(head, LoraHead)
    adopt(model, FusedRmsNorm)
    adopt(model, DecoderLayer)
    forward = TrainingForward(
        model,
        num_codebooks=config.audio_num_codebooks,
        classes=config.audio_codebook_size + 2,
        leaf_kinds=(DecoderLayer, LoraHead),
        loss_impl=loss_impl,
        checkpoint_every=checkpoint_every,
    )
    if compiled:
        from .compiled import compile_layers  # torch's compiler takes seconds to import

        compile_layers(forward)
    return forward
