"""The training forward of any family: from a batch to its loss and stats.

`trainer.py` calls the engine, the engine calls `TrainingForward.forward`, which passes through PEFT to the family's
model (`higgs_v2/layers.py`). `higgs_v2/reference.py` is upstream's own forward, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..batching.batch_index import BatchIndex
from ..loss import HeadSums
from ..step_stats import ForwardReport, MicroBatchStats


@dataclass(frozen=True)
class Objective:
    """Settings of the loss: `impl` is "fused" or "reference", factors come from `loss_scales`."""

    impl: str
    text_scale: float
    codebook_scales: torch.Tensor  # [codebooks] float32


class PaddingFreeOutput(NamedTuple):
    """Loss, sums and computed shapes of a micro-batch; a tuple, since DeepSpeed's hooks handle tuples."""

    loss: torch.Tensor  # [] float32
    sums: HeadSums
    num_rows: int  # rows of the hidden states
    num_frames: int  # audio frames that reached the model
    audio_logits_shape: tuple[int, ...]  # rows × codebooks × classes that the audio head computed


class TrainingForward(nn.Module):
    """The default training forward: one micro-batch without padding to loss and stats.

    All positions come from the batch's `BatchIndex`, so that nothing waits for the device. The heads see labelled rows
    only, and compute loss and gradient in one pass.
    """

    input_gradient = False

    def __init__(
        self,
        model: nn.Module,
        *,
        num_codebooks: int,
        classes: int,
        leaf_kinds: tuple[type[nn.Module], ...],
        loss_impl: str = "fused",
        checkpoint_every: int = 0,
    ):
        """
        Args:
            model: PEFT's, around one that takes the batch's inputs with `objective`, `checkpoint_every` and
                `input_gradient`, and returns a `PaddingFreeOutput`.
            classes: per codebook, its codes, BOS and EOS (1026).
            leaf_kinds: classes that read weights of several of their modules at once: ZeRO-3 must gather them whole.
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
        self.leaf_modules = tuple(kind for kind in leaf_kinds if kind in kinds)  # with any, ZeRO-3 sets input_gradient

    def forward(
        self, inputs: dict[str, Any], text_scale: float, codebook_scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ForwardReport]:
        """Runs one micro-batch.

        Args:
            inputs: `Batch.model_inputs`, including its index.
            text_scale, codebook_scales: factors of the sums, from `loss_scales`; a number, and [codebooks].

        Returns:
            the loss for backward ([], float32); `MicroBatchStats`, flat, on the device; the report.
        """
        index: BatchIndex = inputs["index"]
        objective = Objective(self.loss_impl, text_scale, codebook_scales)
        # Through PEFT, which adds `labels`, to the family's model (higgs_v2/upstream.py, layers.py).
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
            found = f"text labels expand to {index.num_labels} positions, {outputs.num_rows} were computed"
            report.problems.append(("expanded_labels", found))
        expected = (index.audio_targets.shape[0], self.num_codebooks, self.classes)
        if outputs.audio_logits_shape != expected or outputs.num_frames != index.num_frames:
            found = f"audio logits have shape {outputs.audio_logits_shape}, expected {expected}; {outputs.num_frames} "
            found += f"audio frames reached the model, expected {index.num_frames}"
            report.problems.append(("audio_logits", found))
        if report.problems:
            # The guard will drop this step; the backward still runs, for the collectives of the other ranks.
            loss = outputs.loss * 0
            return loss, MicroBatchStats.unknown(loss, self.num_codebooks), report
        return outputs.loss, MicroBatchStats.on_device(outputs.sums, outputs.loss), report
