"""Upstream's forward with the plain loss, as a reference: `--forward_impl upstream --loss_impl reference`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...loss import IGNORE, audio_targets, head_sums, scaled_loss, text_targets
from ...step_stats import ForwardReport, MicroBatchStats


class AlignmentError(ValueError):
    """Lengths of text labels and the model's sequence, or numbers of clips and placeholders, differ."""


def clip_lengths(starts: torch.Tensor, total_frames: int) -> torch.Tensor:
    """Frames of each clip, from its start in the concatenation. [clips]"""
    return torch.diff(starts, append=starts.new_tensor([total_frames]))


def expand_labels(
    label_ids: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    audio_out_token: int,
    audio_in_token: int,
    out_lengths: torch.Tensor,
    in_lengths: torch.Tensor,
    length: int | None = None,
    round_to: int = 8,
) -> torch.Tensor:
    """Rebuilds the model's `expanded_labels` from the batch alone.

    Each placeholder expands to one -100 per frame of its clip. Upstream pads on the left if the batch has one row, else
    on the right, to a multiple of 8, and trims common padding in multiples of 8.

    Args:
        label_ids, input_ids, attention_mask: [batch, tokens].
        out_lengths, in_lengths: frames of the clips at `<|AUDIO_OUT|>` and `<|AUDIO|>`, in reading order.
        length: the model's sequence length, to be checked, if known.

    Raises:
        AlignmentError: numbers of clips and placeholders differ, or the two lengths do; states both.
    """
    for name, token, lengths in (
        ("<|AUDIO_OUT|>", audio_out_token, out_lengths),
        ("<|AUDIO|>", audio_in_token, in_lengths),
    ):
        placeholders = int((input_ids == token).sum())
        if placeholders != len(lengths):
            raise AlignmentError(f"the batch has {placeholders} {name} tokens for {len(lengths)} clips")
    repeats = torch.ones_like(input_ids)
    repeats[input_ids == audio_out_token] = out_lengths.to(repeats)
    repeats[input_ids == audio_in_token] = in_lengths.to(repeats)
    is_clip = (input_ids == audio_out_token) | (input_ids == audio_in_token)
    flat = label_ids.masked_fill(is_clip, IGNORE)
    rows = [row.repeat_interleave(count) for row, count in zip(flat, repeats, strict=True)]
    masks = [row.repeat_interleave(count) for row, count in zip(attention_mask.bool() | is_clip, repeats, strict=True)]
    left = input_ids.shape[0] == 1
    width = _round_up(max(len(row) for row in rows), round_to)

    def pad(row: torch.Tensor, value) -> torch.Tensor:
        missing = width - len(row)
        return F.pad(row, (missing, 0) if left else (0, missing), value=value)

    labels = torch.stack([pad(row, IGNORE) for row in rows])
    used = torch.stack([pad(mask, False) for mask in masks]).any(0).nonzero()
    if left:
        labels = labels[:, int(used[0]) // round_to * round_to :]
    else:
        labels = labels[:, : _round_up(int(used[-1]) + 1, round_to)]
    if length is not None and labels.shape[1] != length:
        raise AlignmentError(
            f"text labels expand to {labels.shape[1]} positions, the model's sequence has {length}; refusing to cut"
        )
    return labels


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class ReferenceForward(nn.Module):
    """Upstream's forward: the model, loss sums, and a scalar loss scaled for the whole optimizer step."""

    def __init__(
        self, model: nn.Module, *, audio_out_token: int, audio_in_token: int, num_codebooks: int, classes: int
    ):
        """`classes`: per codebook, its codes, BOS and EOS (1026)."""
        super().__init__()
        self.model = model
        self.audio_out_token = audio_out_token
        self.audio_in_token = audio_in_token
        self.num_codebooks = num_codebooks
        self.classes = classes

    @classmethod
    def from_config(cls, model: nn.Module, config) -> ReferenceForward:
        """For a model with this `HiggsAudioConfig`."""
        return cls(
            model,
            audio_out_token=config.audio_out_token_idx,
            audio_in_token=config.audio_in_token_idx,
            num_codebooks=config.audio_num_codebooks,
            classes=config.audio_codebook_size + 2,
        )

    def forward(
        self, inputs: dict[str, Any], text_scale: float, codebook_scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ForwardReport]:
        """One micro-batch.

        Returns:
            the loss for backward ([], float32); the flat values of `MicroBatchStats` (float32, detached); the report.
        """
        report = ForwardReport()
        outputs = self.model(**inputs)
        audio_logits = outputs.audio_logits
        report.audio_logits_shape = None if audio_logits is None else tuple(audio_logits.shape)
        labels = self._expanded_labels(inputs, outputs, report)
        frames = self._frames(inputs)
        if report.audio_logits_shape != (frames, self.num_codebooks, self.classes):
            wanted = (frames, self.num_codebooks, self.classes)
            found = f"audio logits have shape {report.audio_logits_shape}, expected {wanted}"
            report.problems.append(("audio_logits", found))
        if report.problems or labels is None:
            # The guard will drop this step; the backward still runs, for the collectives of the other ranks.
            loss = sum(out.float().sum() * 0 for out in (outputs.logits, audio_logits) if out is not None)
            return loss, MicroBatchStats.unknown(loss, self.num_codebooks), report
        targets = audio_targets(inputs["label_audio_ids"].view(self.num_codebooks, -1)) if frames else None
        if targets is None:
            targets = torch.full((0, self.num_codebooks), IGNORE, device=audio_logits.device)
        sums = head_sums(outputs.logits, audio_logits, text_targets(labels), targets)
        loss = scaled_loss(sums, text_scale, codebook_scales)
        return loss, MicroBatchStats.on_device(sums, loss), report

    @staticmethod
    def _frames(inputs) -> int:
        codes = inputs.get("audio_out_ids")
        return 0 if codes is None else codes.shape[-1]

    def _expanded_labels(self, inputs, outputs, report: ForwardReport) -> torch.Tensor | None:
        labels = outputs.expanded_labels
        length = outputs.logits.shape[1]
        if labels is None:
            report.path = "re-expanded"
            try:
                labels = self._re_expand(inputs, length)
            except AlignmentError as error:
                report.problems.append(("expanded_labels", str(error)))
                return None
        report.expanded_labels_shape = tuple(labels.shape)
        if labels.shape != outputs.logits.shape[:2]:
            found = f"expanded labels have shape {tuple(labels.shape)}, the logits {tuple(outputs.logits.shape)}"
            report.problems.append(("expanded_labels", found))
        return labels

    def _re_expand(self, inputs, length: int) -> torch.Tensor:
        def lengths(kind: str) -> torch.Tensor:
            starts, codes = inputs.get(f"{kind}_ids_start"), inputs.get(f"{kind}_ids")
            if starts is None or codes is None:
                return torch.zeros(0, dtype=torch.long)
            return clip_lengths(starts, codes.shape[-1])

        return expand_labels(
            inputs["label_ids"],
            inputs["input_ids"],
            inputs["attention_mask"],
            audio_out_token=self.audio_out_token,
            audio_in_token=self.audio_in_token,
            out_lengths=lengths("audio_out"),
            in_lengths=lengths("audio_in"),
            length=length,
        )
