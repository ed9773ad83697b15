"""The training forward: from a batch to its loss and stats.

`trainer.py` calls the engine, the engine calls `TrainingForward.forward` below, which goes through PEFT to
`layers.py`, where the model is computed. `reference.py` is upstream's own way, to compare with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...batching.batch_index import BatchIndex
from ...errors import ConfigError
from ...step_stats import ForwardReport, MicroBatchStats
from ..fused_head import FusedHead
from ..fused_lora import LoraHead
from ..fused_mlp import FusedRmsNorm, adopt
from .layers import DecoderLayer, Objective, PaddingFreeOutput, check_supported
from .modules import HEADS
from .reference import ReferenceForward

if TYPE_CHECKING:
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig


class TrainingForward(nn.Module):
    """The training forward that everybody runs: one micro-batch, no padding, to loss and stats.

    The batch's `BatchIndex` holds every position, so that nothing here waits for the device. Both heads see labelled
    rows alone, and give loss and gradient in one pass.
    """

    input_gradient = False

    def __init__(
        self, model: nn.Module, *, num_codebooks: int, classes: int, loss_impl: str = "fused", checkpoint_every: int = 0
    ):
        """
        Args:
            model: PEFT's, around `HiggsAudioForTraining`.
            classes: what a codebook's head tells apart: its codes, BOS and EOS (1026).
            loss_impl: "fused", or "reference" for plain cross-entropy on the labelled rows' logits.
            checkpoint_every: every N-th decoder layer is recomputed in the backward; 0 for none.
        """
        super().__init__()
        self.model = model
        self.num_codebooks = num_codebooks
        self.classes = classes
        self.loss_impl = loss_impl
        self.checkpoint_every = checkpoint_every
        kinds = {type(module) for module in model.modules()}
        # Modules that use their parts' weights at once: ZeRO-3 must gather them whole, and then needs `input_gradient`.
        self.leaf_modules = tuple(kind for kind in (DecoderLayer, LoraHead) if kind in kinds)

    def forward(
        self, inputs: dict[str, Any], text_scale: float, codebook_scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ForwardReport]:
        """One micro-batch.

        Args:
            inputs: `Batch.model_inputs`, its index among them.
            text_scale, codebook_scales: factors of the sums in the loss, from `loss_scales`; a number, and [codebooks].

        Returns:
            the loss for backward ([], float32); `MicroBatchStats`, flat, on the device; the report.
        """
        index: BatchIndex = inputs["index"]
        objective = Objective(self.loss_impl, text_scale, codebook_scales)
        # Out through PEFT, which adds `labels` and calls HiggsAudioForTraining.forward (upstream.py); back from
        # padding_free_forward, which computes the loss.
        outputs: PaddingFreeOutput = self.model(
            **inputs,
            objective=objective,
            checkpoint_every=self.checkpoint_every,
            input_gradient=self.input_gradient,
        )
        report = ForwardReport(
            expanded_labels_shape=(index.num_sequences, index.longest),
            audio_logits_shape=outputs.audio_logits_shape,
            path="collator",
        )
        if index.num_labels != outputs.num_rows:
            report.problems.append(
                (
                    "expanded_labels",
                    f"text labels expand to {index.num_labels} positions, {outputs.num_rows} were computed",
                )
            )
        expected = (index.audio_targets.shape[0], self.num_codebooks, self.classes)
        if outputs.audio_logits_shape != expected or outputs.num_frames != index.num_frames:
            report.problems.append(
                (
                    "audio_logits",
                    f"audio logits have shape {outputs.audio_logits_shape}, expected {expected}; {outputs.num_frames} "
                    f"audio frames reached the model, expected {index.num_frames}",
                )
            )
        if report.problems:
            # The step will not be taken (guard); this keeps every collective of backward in step with other ranks.
            loss = outputs.loss * 0
            return loss, MicroBatchStats.unknown(loss, self.num_codebooks), report
        return outputs.loss, MicroBatchStats.on_device(outputs.sums, outputs.loss), report


def training_forward(
    model: nn.Module,
    config: HiggsAudioConfig,
    *,
    forward_impl: str = "padding_free",
    loss_impl: str = "fused",
    checkpoint_every: int = 0,
    compiled: bool = False,
) -> nn.Module:
    """The module that the engine runs, for a model with this `HiggsAudioConfig`; see the options of the same names.

    Raises:
        ConfigError: LoRA on a head, to which the fused loss would give no gradient.
    """
    if forward_impl == "upstream":
        return ReferenceForward.from_config(model, config)
    check_supported(config)
    heads = {name: module for name, module in model.named_modules() if name.endswith(HEADS)}
    if loss_impl == "fused":
        adapted = [name for name, head in heads.items() if not isinstance(head, FusedHead)]
        if adapted:
            raise ConfigError(
                [
                    f"--loss_impl fused: {name} has LoRA, which would get no gradient; use --loss_impl reference"
                    for name in adapted
                ]
            )
        for head in heads.values():
            head.trained = head.weight.requires_grad
    for head in heads.values():
        adopt(head, LoraHead)
    adopt(model, FusedRmsNorm)
    adopt(model, DecoderLayer)
    forward = TrainingForward(
        model,
        num_codebooks=config.audio_num_codebooks,
        classes=config.audio_codebook_size + 2,
        loss_impl=loss_impl,
        checkpoint_every=checkpoint_every,
    )
    if compiled:
        from .compiled import compile_layers  # torch's compiler takes seconds to import

        compile_layers(forward)
    return forward
