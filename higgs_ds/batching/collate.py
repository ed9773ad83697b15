"""Rows to samples to the batch that upstream's model takes, element for element as upstream's collator makes it.

Differences on purpose: a sample is never written to (upstream masks the sample's own `label_ids`, so that a cached
sample comes back without audio labels in the second epoch), and every batch knows which manifest rows it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..data.manifest import AudioRef, Row
from ..loss import IGNORE, count_audio_labels, count_text_labels
from ..model.spec import ModelSpec
from .batch_index import BatchIndex, make_batch_index

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One row as tokens; `codes` are its clips in reading order, [codebooks, frames] each."""

    input_ids: torch.Tensor  # [tokens]
    label_ids: torch.Tensor  # [tokens], -100 where nothing is learned
    codes: tuple[torch.Tensor, ...]
    origin: str  # manifest:line


@dataclass
class Batch:
    """One micro-batch. Tensor fields carry upstream's names and shapes; `origins` and counts are ours."""

    input_ids: torch.Tensor  # [batch, tokens]
    attention_mask: torch.Tensor  # [batch, tokens]
    audio_out_ids: torch.Tensor  # [codebooks, frames of all clips], delay pattern applied
    audio_out_ids_start: torch.Tensor  # [clips]
    audio_out_ids_start_group_loc: torch.Tensor | None  # as upstream fills it
    audio_in_ids: torch.Tensor | None  # [codebooks, frames], only where the model takes audio-in tokens
    audio_in_ids_start: torch.Tensor | None
    label_ids: torch.Tensor  # [batch, tokens]
    label_audio_ids: torch.Tensor  # [codebooks, frames], -100 where nothing is learned; not shifted
    reward: torch.Tensor  # [0]; upstream's batch has it
    audio_features: torch.Tensor | None = None  # no audio tower
    audio_feature_attention_mask: torch.Tensor | None = None
    origins: list[str] = field(default_factory=list)
    filler: bool = False  # computed so that ranks stay in step; nothing in it is learned
    index: BatchIndex | None = None  # for the padding-free forward

    def upstream_fields(self) -> dict[str, Any]:
        """The fields of upstream's batch by name."""
        return {name: value for name, value in vars(self).items() if name not in ("origins", "filler", "index")}

    def model_inputs(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor | BatchIndex | None]:
        """The fields of upstream's batch, and the index where there is one, on the device."""
        inputs = self.upstream_fields()
        inputs |= {k: v.to(device, non_blocking=True) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        return inputs if self.index is None else {**inputs, "index": self.index.to(device)}

    def pin_memory(self) -> Batch:
        """For the data loader: tensors in page-locked memory, from where a GPU copies without waiting."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, (torch.Tensor, BatchIndex))}
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(self, **pinned)

    @property
    def text_count(self) -> int:
        """Text labels that are predicted: all but those at position 0, which no position precedes."""
        return count_text_labels(self.label_ids)

    @property
    def codebook_counts(self) -> list[int]:
        """Audio labels that are predicted, by codebook; a clip's first frame is never one."""
        return count_audio_labels(self.label_audio_ids)

    @property
    def num_tokens(self) -> int:
        """Positions that are computed and are not padding: text tokens and audio frames."""
        frames = self.audio_out_ids.shape[-1] + (0 if self.audio_in_ids is None else self.audio_in_ids.shape[-1])
        starts = self.audio_in_ids_start
        clips = len(self.audio_out_ids_start) + (0 if starts is None else len(starts))
        return int(self.attention_mask.sum()) - clips + frames


def build_sample(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    codes_of: Callable[[AudioRef], torch.Tensor],
    tokenize: Callable[..., tuple],
) -> Sample:
    """A manifest row as tokens and codes; `tokenize` as of `ModelSpec`."""
    input_ids, label_ids, clips = tokenize(row.messages, row.start_index, tokenizer)
    return Sample(
        input_ids=torch.tensor(input_ids),
        label_ids=torch.tensor(label_ids),
        codes=tuple(codes_of(clip) for clip in clips),
        origin=row.origin,
    )


class Collator:
    """Samples to a `Batch`, as a checkpoint's spec asks for it."""

    def __init__(self, spec: ModelSpec, *, round_to: int = 8, with_index: bool = False):
        """`round_to`: rows are padded to a multiple of so many tokens; `with_index`: for the padding-free forward."""
        self.spec = spec
        self.round_to = round_to
        self.with_index = with_index

    def __call__(self, samples: Sequence[Sample], filler: bool = False) -> Batch:
        """One micro-batch, padded on the right; with `filler` every label is -100."""
        # All rows as wide as the longest, rounded up.
        width = -(-max(len(sample.input_ids) for sample in samples) // self.round_to) * self.round_to
        input_ids, masks, label_ids = [], [], []
        out_codes: list[torch.Tensor] = []
        out_labels: list[torch.Tensor] = []
        in_codes: list[torch.Tensor] = []
        for sample in samples:
            # No text is learned at the placeholder of an assistant's clip: its codes are, by the audio head.
            is_out = sample.input_ids == self.spec.audio_out_token
            is_clip = is_out | (sample.input_ids == self.spec.audio_in_token)
            labels = sample.label_ids.masked_fill(is_out, IGNORE)  # a new tensor: the sample stays as it is
            if filler:
                labels = torch.full_like(labels, IGNORE)
            # Codes to streams, in reading order; the row's own labels say whether a clip is learned.
            learned = (sample.label_ids[is_clip] >= 0).tolist()
            for position_is_out, trained, codes in zip(is_out[is_clip].tolist(), learned, sample.codes, strict=True):
                codes = codes[: self.spec.num_codebooks].long()
                if position_is_out:
                    out_codes.append(self.spec.stream(codes))
                    out_labels.append(self.spec.stream_labels(codes, trained and not filler))
                elif self.spec.audio_in_codes:
                    in_codes.append(self.spec.stream(codes))
            # Padding on the right, as upstream's.
            missing = width - len(sample.input_ids)
            input_ids.append(F.pad(sample.input_ids, (0, missing), value=self.spec.pad_token))
            masks.append(F.pad(torch.ones_like(sample.input_ids), (0, missing), value=0))
            label_ids.append(F.pad(labels, (0, missing), value=IGNORE))
        # Clips of all rows stand in one line, with where each starts.
        audio_out_ids, audio_out_ids_start = self._concatenate(out_codes)
        audio_in_ids, audio_in_ids_start = self._concatenate(in_codes)
        batch = Batch(
            input_ids=torch.stack(input_ids),
            attention_mask=torch.stack(masks),
            audio_out_ids=audio_out_ids,
            audio_out_ids_start=audio_out_ids_start,
            audio_out_ids_start_group_loc=torch.arange(len(samples)) if out_codes else None,
            audio_in_ids=audio_in_ids if self.spec.audio_in_codes else None,
            audio_in_ids_start=audio_in_ids_start if self.spec.audio_in_codes else None,
            label_ids=torch.stack(label_ids),
            label_audio_ids=self._concatenate(out_labels)[0],
            reward=torch.zeros(0),
            origins=[sample.origin for sample in samples],
            filler=filler,
        )
        # The forward's indices are made here, by a data worker, where no device waits.
        if self.with_index:
            batch.index = make_batch_index(
                batch.input_ids,
                batch.attention_mask,
                batch.label_ids,
                batch.label_audio_ids,
                audio_out_token=self.spec.audio_out_token,
                audio_in_token=self.spec.audio_in_token,
                out_lengths=_lengths(out_codes),
                in_lengths=_lengths(in_codes) if self.spec.audio_in_codes else None,
                num_codebooks=self.spec.num_codebooks,
            )
        return batch

    @staticmethod
    def _concatenate(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips one after the other, and where each starts; upstream's empty shapes where there are none."""
        if not clips:
            return torch.zeros((0, 0), dtype=torch.long), torch.zeros(0, dtype=torch.long)
        lengths = _lengths(clips)
        return torch.cat(clips, dim=1), lengths.cumsum(0) - lengths


def _lengths(clips: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([clip.shape[1] for clip in clips], dtype=torch.long)
