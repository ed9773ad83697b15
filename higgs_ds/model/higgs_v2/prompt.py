"""Rows in Higgs Audio v2's format: Boson's ChatML, and clips as delayed streams of codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...data.chatml import AudioRef, Turn
from ...loss import IGNORE


def tokenize(
    messages: Sequence[Turn], start_index: int | None, tokenizer
) -> tuple[list[int], list[int], list[AudioRef]]:
    """Token ids, label ids (-100 for no label) and clips in reading order, as Boson's ChatML.

    A clip is three tokens, the middle one a placeholder for its frames: `<|audio_bos|><|AUDIO|><|audio_eos|>` in a
    user or system turn, `<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>` in an assistant turn. Assistant turns from
    `start_index` on have labels, their end token included.
    """
    input_ids: list[int] = []
    label_ids: list[int] = []
    clips: list[AudioRef] = []

    def add(text: str, learned: bool) -> None:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        input_ids.extend(tokens)
        label_ids.extend(tokens if learned else [IGNORE] * len(tokens))

    for index, turn in enumerate(messages):
        learned = turn.role == "assistant" and (start_index is None or index >= start_index)
        begin = "<|begin_of_text|>" if index == 0 else ""
        add(f"{begin}<|start_header_id|>{turn.role}<|end_header_id|>\n\n", False)
        if turn.recipient:
            # Upstream trains the recipient in every assistant turn, even in the context.
            add(f"{turn.recipient}<|recipient|>", True)
        for piece in turn.content:
            if isinstance(piece, str):
                add(piece, learned)
                continue
            clips.append(piece)
            if turn.role == "assistant":
                add("<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>", learned)
            else:
                add("<|audio_bos|><|AUDIO|><|audio_eos|>", False)
        follows = messages[index + 1] if index + 1 < len(messages) else None
        more = turn.role == "assistant" and follows is not None and follows.role == "assistant"
        add("<|eom_id|>" if more else "<|eot_id|>", learned)
    return input_ids, label_ids, clips


def delay(codes: torch.Tensor, bos: int, eos: int) -> torch.Tensor:
    """The delay pattern: codebook k starts k frames later, BOS before its codes and EOS after.

    [codebooks, frames] -> [codebooks, frames + codebooks - 1]
    """
    num_codebooks, frames = codes.shape
    out = torch.full((num_codebooks, frames + num_codebooks - 1), eos, dtype=torch.long)
    for k in range(num_codebooks):
        out[k, :k] = bos
        out[k, k : k + frames] = codes[k]
    return out
