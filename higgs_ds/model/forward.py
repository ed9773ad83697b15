"""From a batch to sums of loss: the model that drops only `labels`, and the modules that the engine runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from torch import nn

from ..batching.layout import Layout
from ..config import HEADS
from ..errors import ConfigError
from ..loss import IGNORE, audio_targets, head_sums, scaled_loss, text_targets
from ..step_stats import MicroBatchStats
from .fused_head import FusedHead
from .fused_mlp import FusedRmsNorm, adopt
from .padding_free import (
    DecoderLayer,
    Objective,
    PaddingFreeOutput,
    check_supported,
    padding_free_forward,
)

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


class AlignmentError(ValueError):
    """Text labels and the model's sequence, or clips and placeholders, do not have the same length."""


def clip_lengths(starts: torch.Tensor, total_frames: int) -> torch.Tensor:
    """Frames of each clip, from where each starts in the concatenation. [clips]"""
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
    """The tensor that the model returns as `expanded_labels`, from the batch alone.

    Each placeholder becomes as many -100 as its clip has frames. Upstream pads on the left when the batch holds one
    row and on the right otherwise, up to a multiple of 8, and trims whole multiples of 8 of common padding.

    Args:
        label_ids, input_ids, attention_mask: [batch, tokens].
        out_lengths, in_lengths: frames of the clips at `<|AUDIO_OUT|>` and `<|AUDIO|>`, in reading order.
        length: the model's sequence length, checked where it is known.

    Raises:
        AlignmentError: clips and placeholders, or the two lengths, differ; with both numbers.
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


@dataclass
class ForwardReport:
    """What one micro-batch's forward saw, on the host, known without reading a value from the device."""

    expanded_labels_shape: tuple[int, ...] | None = None
    audio_logits_shape: tuple[int, ...] | None = None
    text_logits_shape: tuple[int, ...] | None = None
    path: str = "expanded_labels"  # or "re-expanded", or "collator" with the padding-free forward
    problems: list[tuple[str, str]] = field(default_factory=list)  # (check, what was found)


def training_forward(
    model: nn.Module,
    config,
    *,
    forward_impl: str = "padding_free",
    loss_impl: str = "fused",
    checkpoint_every: int = 0,
) -> nn.Module:
    """What the engine runs, for a model with this `HiggsAudioConfig`; see the options of the same names.

    Raises:
        ConfigError: a head is trained where the loss would give it no gradient.
    """
    if forward_impl == "upstream":
        return TrainingForward.from_config(model, config)
    check_supported(config)
    if loss_impl == "fused":
        heads = {name: m for name, m in model.named_modules() if name.endswith(HEADS)}
        trained = [
            name for name, head in heads.items() if any(parameter.requires_grad for parameter in head.parameters())
        ]
        if trained:
            raise ConfigError(
                [
                    f"--loss_impl fused: {name} is trained and would get no gradient; use --loss_impl reference"
                    for name in trained
                ]
            )
    adopt(model, FusedRmsNorm)
    adopt(model, DecoderLayer)
    return PaddingFreeForward(
        model,
        num_codebooks=config.audio_num_codebooks,
        classes=config.audio_codebook_size + 2,
        loss_impl=loss_impl,
        checkpoint_every=checkpoint_every,
    )


class TrainingForward(nn.Module):
    """Upstream's forward: model, then loss sums, then one scalar scaled for the whole optimizer step."""

    def __init__(
        self, model: nn.Module, *, audio_out_token: int, audio_in_token: int, num_codebooks: int, classes: int
    ):
        """`classes` is what a codebook's head tells apart: its codes, BOS and EOS (1026)."""
        super().__init__()
        self.model = model
        self.audio_out_token = audio_out_token
        self.audio_in_token = audio_in_token
        self.num_codebooks = num_codebooks
        self.classes = classes

    @classmethod
    def from_config(cls, model: nn.Module, config) -> TrainingForward:
        """For a model with this `HiggsAudioConfig`."""
        return cls(
            model,
            audio_out_token=config.audio_out_token_idx,
            audio_in_token=config.audio_in_token_idx,
            num_codebooks=config.audio_num_codebooks,
            classes=config.audio_codebook_size + 2,
        )

    def forward(
        self, inputs: dict[str, torch.Tensor | None], text_scale: float, codebook_scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ForwardReport]:
        """One micro-batch.

        Returns:
            the loss for backward ([], float32); the flat values of `MicroBatchStats` (float32, detached); the report.
        """
        report = ForwardReport()
        outputs = self.model(**inputs)
        audio_logits = outputs.audio_logits
        report.text_logits_shape = tuple(outputs.logits.shape)
        report.audio_logits_shape = None if audio_logits is None else tuple(audio_logits.shape)
        labels = self._expanded_labels(inputs, outputs, report)
        frames = self._frames(inputs)
        if report.audio_logits_shape != (frames, self.num_codebooks, self.classes):
            report.problems.append(
                (
                    "audio_logits",
                    f"audio logits have shape {report.audio_logits_shape}, expected "
                    f"({frames}, {self.num_codebooks}, {self.classes})",
                )
            )
        if report.problems:
            # The step will not be taken (guard); this keeps every collective of backward in step with other ranks.
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
            report.problems.append(
                (
                    "expanded_labels",
                    f"expanded labels have shape {tuple(labels.shape)}, the logits {tuple(outputs.logits.shape)}",
                )
            )
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


class PaddingFreeForward(nn.Module):
    """The same from the same batch, on flat rows and with indices from the collator; see `padding_free`."""

    # Modules that use their parts' weights at once: ZeRO-3 must gather them whole, and then needs `input_gradient`.
    gathered_whole = (DecoderLayer,)
    input_gradient = False

    def __init__(
        self, model: nn.Module, *, num_codebooks: int, classes: int, loss_impl: str = "fused", checkpoint_every: int = 0
    ):
        """`classes` as in `TrainingForward`; `loss_impl` "fused" or "reference"."""
        super().__init__()
        self.model = model
        self.num_codebooks = num_codebooks
        self.classes = classes
        self.loss_impl = loss_impl
        self.checkpoint_every = checkpoint_every

    def forward(
        self, inputs: dict[str, torch.Tensor | Layout | None], text_scale: float, codebook_scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ForwardReport]:
        """One micro-batch; returns what `TrainingForward` returns."""
        layout: Layout = inputs["layout"]
        objective = Objective(self.loss_impl, text_scale, codebook_scales)
        outputs: PaddingFreeOutput = self.model(
            **inputs,
            objective=objective,
            checkpoint_every=self.checkpoint_every,
            input_gradient=self.input_gradient,
        )
        report = ForwardReport(
            expanded_labels_shape=(layout.num_sequences, layout.longest),
            audio_logits_shape=outputs.audio_shape,
            text_logits_shape=outputs.text_shape,
            path="collator",
        )
        if layout.num_labels != outputs.num_rows:
            report.problems.append(
                (
                    "expanded_labels",
                    f"text labels expand to {layout.num_labels} positions, {outputs.num_rows} were computed",
                )
            )
        expected = (layout.audio_targets.shape[0], self.num_codebooks, self.classes)
        if outputs.audio_shape != expected or outputs.num_frames != layout.num_frames:
            report.problems.append(
                (
                    "audio_logits",
                    f"audio logits have shape {outputs.audio_shape}, expected {expected}; {outputs.num_frames} audio "
                    f"frames reached the model, expected {layout.num_frames}",
                )
            )
        if report.problems:
            # As in `TrainingForward`: every rank runs the same backward, and the step will not be taken.
            loss = outputs.loss * 0
            return loss, MicroBatchStats.unknown(loss, self.num_codebooks), report
        return outputs.loss, MicroBatchStats.on_device(outputs.sums, outputs.loss), report
