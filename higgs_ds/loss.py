"""The loss over both heads as sums and counts; the trained loss never divides by a local count.

Text: position t predicts `expanded_labels[:, t + 1]`. Audio, codebook k: row i predicts `label_audio_ids[k, i + 1]`.
With N counted over the whole optimizer step (all micro-batches, all ranks),

    L = w_text · S_text / N_text + w_audio · Σ_k c_k · S_k / N_k,    Σ c_k = 1

DeepSpeed averages gradients over the ranks, so each micro-batch's loss is world_size × (its sums / global counts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .errors import ConfigError
from .options.sections import LossOptions

IGNORE = -100
HEADLINES = ("loss", "text_loss", "audio_loss")  # of `mean_losses`, without the codebooks


@dataclass
class HeadSums:
    """Sums of cross-entropy (nats, float32) and label counts of one micro-batch.

    `text_saturation` tells an honest zero: the maximum, over labelled text rows, of the exact cross-entropy (from the
    label's margin over all other tokens) divided by float32's resolution at the label's logit.
    """

    text_sum: torch.Tensor  # []
    text_count: torch.Tensor  # []
    codebook_sums: torch.Tensor  # [codebooks]
    codebook_counts: torch.Tensor  # [codebooks]
    text_saturation: torch.Tensor  # []


@dataclass(frozen=True)
class LossWeights:
    """Weights of the heads, and of the audio head's codebooks, which sum to 1."""

    text: float
    audio: float
    codebooks: tuple[float, ...]

    @classmethod
    def from_options(cls, options: LossOptions, num_codebooks: int) -> LossWeights:
        """Raises ConfigError if the number of codebook weights differs from the model's codebooks."""
        given = options.codebook_weights or [1.0] * num_codebooks
        if len(given) != num_codebooks:
            raise ConfigError([f"--codebook_weights: {len(given)} weights for a model with {num_codebooks} codebooks"])
        shares = tuple(weight / sum(given) for weight in given)
        return cls(options.text_loss_weight, options.audio_loss_weight, shares)


def text_targets(expanded_labels: torch.Tensor) -> torch.Tensor:
    """The target of each position: the next label; the last position has none. [batch, length]"""
    return F.pad(expanded_labels[:, 1:], (0, 1), value=IGNORE)


def flat_text_targets(labels: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """`text_targets` for concatenated sequences: the next label, if it belongs to the same sequence.

    Args:
        labels: [N].
        sequence: [N], sequence number of each position.
    """
    targets = F.pad(labels[1:], (0, 1), value=IGNORE)
    return targets.masked_fill(F.pad(sequence[1:], (0, 1), value=-1) != sequence, IGNORE)


def audio_targets(label_audio_ids: torch.Tensor) -> torch.Tensor:
    """Targets of each audio row: the next frame's codes. [codebooks, frames] -> [frames, codebooks]

    The first frame of every clip has no label, so that the shift never crosses from one clip into the next.
    """
    return F.pad(label_audio_ids[:, 1:], (0, 1), value=IGNORE).t()


def count_text_labels(label_ids: torch.Tensor) -> int:
    """Number of predicted text labels: all but those at position 0. [batch, tokens]"""
    return int((text_targets(label_ids) != IGNORE).sum())


def count_audio_labels(label_audio_ids: torch.Tensor) -> list[int]:
    """Numbers of predicted audio labels by codebook; a clip's first frame has none. [codebooks, frames]"""
    return (audio_targets(label_audio_ids) != IGNORE).sum(0).tolist()


def head_sums(
    text_logits: torch.Tensor, audio_logits: torch.Tensor, text_target: torch.Tensor, audio_target: torch.Tensor
) -> HeadSums:
    """Cross-entropy in float32 over labelled rows; part of the graph even without any.

    Args:
        text_logits: [batch, length, vocabulary], any float dtype.
        audio_logits: [frames, codebooks, codebook size].
        text_target: [batch, length], -100 for no label.
        audio_target: [frames, codebooks], -100 for no label.
    """
    labelled = text_target != IGNORE
    rows = text_logits[labelled].float()  # [labelled, vocabulary]
    targets = text_target[labelled]
    text_sum = F.cross_entropy(rows, targets, reduction="sum")
    losses = F.cross_entropy(
        audio_logits.float().flatten(0, 1), audio_target.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(audio_target.shape)  # [frames, codebooks]
    return HeadSums(
        text_sum=text_sum,
        text_count=labelled.sum(),
        codebook_sums=losses.sum(0),
        codebook_counts=(audio_target != IGNORE).sum(0),
        text_saturation=_saturation(rows.detach(), targets),
    )


def _saturation(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Maximum over rows of exact cross-entropy / float32's resolution at the label's logit; 0 without rows."""
    if rows.shape[0] == 0:
        return rows.new_zeros(())
    label = rows.gather(1, targets[:, None])  # [rows, 1]
    others = rows.scatter(1, targets[:, None], float("-inf")).logsumexp(1, keepdim=True)
    exact = F.softplus(others - label)  # log(1 + exp(-margin)), exact also where 1 + exp(-margin) rounds to 1
    resolution = torch.finfo(torch.float32).eps * label.abs().clamp(min=1.0)
    return (exact / resolution).max()


def scaled_loss(sums: HeadSums, text_scale: float, codebook_scales: torch.Tensor) -> torch.Tensor:
    """The scalar for the engine's backward; scales come from `loss_scales`."""
    return text_scale * sums.text_sum + (codebook_scales * sums.codebook_sums).sum()


def loss_scales(
    weights: LossWeights, text_count: float, codebook_counts: list[float], world_size: int
) -> tuple[float, list[float]]:
    """Factors of a micro-batch's sums, from the label counts of the whole optimizer step.

    × world_size, because the engine averages over ranks; no factor for accumulation, because the engine does not divide
    by it. A head without labels in the step has factor 0.
    """
    text = weights.text * world_size / text_count if text_count else 0.0
    audio = [
        weights.audio * share * world_size / count if count else 0.0
        for share, count in zip(weights.codebooks, codebook_counts, strict=True)
    ]
    return text, audio


def mean_losses(
    weights: LossWeights, text_sum: float, text_count: float, codebook_sums: list[float], codebook_counts: list[float]
) -> dict[str, float]:
    """`loss`, `text_loss`, `audio_loss` and `codebook_loss/k` from sums and counts, each only if it has labels.

    `audio_loss` is Σ c_k · S_k / N_k over the codebooks with labels.
    """
    losses: dict[str, float] = {}
    total = 0.0
    if text_count:
        losses["text_loss"] = text_sum / text_count
        total += weights.text * losses["text_loss"]
    if any(codebook_counts):
        audio = 0.0
        for k, (share, loss_sum, count) in enumerate(
            zip(weights.codebooks, codebook_sums, codebook_counts, strict=True)
        ):
            if count:
                losses[f"codebook_loss/{k}"] = loss_sum / count
                audio += share * loss_sum / count
        losses["audio_loss"] = audio
        total += weights.audio * audio
    losses["loss"] = total
    return losses
