"""The place of every token of a micro-batch, made on the CPU beside the batch, so that the forward asks no tensor.

Hidden states of the padding-free forward are flat, [rows, hidden], without padding: first all text tokens, then all
audio-out frames, then all audio-in frames, each in reading order. A dual-FFN layer splits them in two slices whose
sizes the host knows; attention alone needs sequences, and gets them by an index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..loss import IGNORE, audio_targets, flat_text_targets


@dataclass(frozen=True)
class BatchIndex:
    """Index tensors (int64) and sizes of one micro-batch; N rows in all, in B sequences of at most `longest` rows."""

    text_index: torch.Tensor  # [text tokens], places in input_ids.flatten()
    positions: torch.Tensor  # [N], of each row in its sequence
    pack_index: torch.Tensor  # [B × longest], the row at each padded place; padding repeats the sequence's last row
    unpack_index: torch.Tensor  # [N], the padded place of each row
    output_rows: torch.Tensor  # [K], rows that a head predicts from, ascending: all that the last layer need give
    head_rows: torch.Tensor  # [text labels + labelled frames], of these the text head's, then the audio head's
    text_targets: torch.Tensor  # [text labels]
    audio_targets: torch.Tensor  # [labelled frames, codebooks], -100 in codebooks without a label
    input_shape: tuple[int, int]  # of input_ids
    num_sequences: int
    longest: int
    num_frames: int  # audio-out and audio-in
    num_output_text: int  # how many of the output rows are text tokens
    num_labels: int  # length of the expanded text labels, over all sequences

    @property
    def num_text(self) -> int:
        """Text tokens, which come first."""
        return self.text_index.shape[0]

    @property
    def num_rows(self) -> int:
        """Text tokens and audio frames."""
        return self.positions.shape[0]

    @property
    def num_head_rows(self) -> list[int]:
        """Rows of the text head and of the audio head."""
        return [self.text_targets.shape[0], self.audio_targets.shape[0]]

    def to(self, device: torch.device | str) -> BatchIndex:
        """On the device, by copies that nothing waits for."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> BatchIndex:
        """In page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BatchIndex:
        changed: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **changed)


def make_batch_index(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    label_ids: torch.Tensor,
    label_audio_ids: torch.Tensor,
    *,
    audio_out_token: int,
    audio_in_token: int,
    out_lengths: torch.Tensor,
    in_lengths: torch.Tensor | None,
    num_codebooks: int,
) -> BatchIndex:
    """The index of a batch as the collator makes it.

    Args:
        input_ids, attention_mask, label_ids: [batch, tokens].
        label_audio_ids: [codebooks, audio-out frames].
        out_lengths, in_lengths: frames of the clips at `<|AUDIO_OUT|>` and `<|AUDIO|>`, in reading order; without
            `in_lengths` the model takes no audio-in codes, and `<|AUDIO|>` is no token that anything attends to.
    """
    num_sequences, width = input_ids.shape
    is_out, is_in = input_ids == audio_out_token, input_ids == audio_in_token
    repeats = attention_mask.long().masked_fill(is_in, 0)  # [batch, tokens], rows that each token becomes
    repeats[is_out] = out_lengths
    if in_lengths is not None:
        repeats[is_in] = in_lengths
    lengths = repeats.sum(1)
    longest = int(lengths.max())
    starts = lengths.cumsum(0) - lengths  # [batch], first place of each sequence in reading order

    # In reading order, [N]: the token that a row comes from, its sequence, its position, its kind and label.
    token = torch.arange(input_ids.numel()).repeat_interleave(repeats.flatten())
    sequence = token // width
    position = torch.arange(len(token)) - starts[sequence]
    kind = (is_out.long() + 2 * is_in.long()).flatten()[token]  # 0 text, 1 audio-out, 2 audio-in
    label = label_ids.masked_fill(is_out | is_in, IGNORE).flatten()[token]

    order = torch.argsort(kind, stable=True)  # [N], reading place of each row
    row_of = torch.empty_like(order)  # [N], row of each reading place
    row_of[order] = torch.arange(len(order))
    num_text = int((kind == 0).sum())

    place = starts[:, None] + torch.minimum(torch.arange(longest)[None], lengths[:, None] - 1)  # [batch, longest]
    place_targets = flat_text_targets(label, sequence)  # [N]
    text_places = (place_targets != IGNORE).nonzero().squeeze(1)
    frame_targets = audio_targets(label_audio_ids.view(num_codebooks, -1))  # [frames, codebooks]
    frames = (frame_targets != IGNORE).any(1).nonzero().squeeze(1)
    # A clip's last frame may be both heads': its text label is the token that follows the clip.
    head_rows = torch.cat([row_of[text_places], num_text + frames])
    output_rows, head_rows = torch.unique(head_rows, return_inverse=True)
    return BatchIndex(
        text_index=token[order[:num_text]],
        positions=position[order],
        pack_index=row_of[place.flatten()],
        unpack_index=(sequence * longest + position)[order],
        output_rows=output_rows,
        head_rows=head_rows,
        text_targets=place_targets[text_places],
        audio_targets=frame_targets[frames],
        input_shape=(num_sequences, width),
        num_sequences=num_sequences,
        longest=longest,
        num_frames=len(order) - num_text,
        num_output_text=int((output_rows < num_text).sum()),
        num_labels=len(label),
    )
