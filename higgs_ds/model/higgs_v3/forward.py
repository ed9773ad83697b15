"""Training module made from a model with LoRA; the computation itself is in `layers`."""

from __future__ import annotations

from torch import nn

from ...errors import ConfigError
from ..training_forward import TrainingForward
from .config import HiggsV3Config
from .layers import CodeTable, DecoderLayer


def training_forward(
    model: nn.Module,
    config: HiggsV3Config,
    *,
    forward_impl: str = "padding_free",
    loss_impl: str = "fused",
    checkpoint_every: int = 0,
    compiled: bool = False,
) -> nn.Module:
    """Makes the module for the engine; see the options of the same names.

    Raises:
        ConfigError: this family does not support an option.
    """
    problems = []
    if forward_impl != "padding_free":
        problems.append(f"--forward_impl {forward_impl}: is not supported for Higgs TTS 3; leave the flag out")
    if compiled:
        problems.append("--compile: is not supported for Higgs TTS 3; leave the flag out")
    if problems:
        raise ConfigError(problems)
    for module in model.modules():
        if isinstance(module, CodeTable):
            module.trained = module.weight.requires_grad
    return TrainingForward(
        model,
        num_codebooks=config.num_codebooks,
        classes=config.num_classes,
        leaf_kinds=(DecoderLayer,),
        loss_impl=loss_impl,
        checkpoint_every=checkpoint_every,
    )
