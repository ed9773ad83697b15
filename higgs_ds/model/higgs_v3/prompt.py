"""Prompt format of Higgs TTS 3: `<|tts|> [<|ref_text|> …] [<|ref_audio|> …] <|text|> … <|audio|>`, and streams.

A clip of T frames becomes a stream of T + K - 1 rows, for targets and references alike: codebook c is delayed by c
rows, with BOC before its codes and EOC after them. No row has only BOC or only EOC. In batches, the text token before a
stream (`<|audio|>` or `<|ref_audio|>`) is an additional first row with only BOC. That row replaces the clip's
placeholder, and the forward embeds it as the text token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...data.chatml import SYSTEM_PROMPT, AudioRef, Turn
from ...errors import ConfigError
from ...loss import IGNORE

TTS, REF_TEXT, REF_AUDIO, TEXT, AUDIO = PROMPT_TOKENS = (
    *("<|tts|>", "<|ref_text|>", "<|ref_audio|>", "<|text|>", "<|audio|>"),
)
# Tags in a text, one token each, that control the delivery or make a sound.
_TAGS = {
    "emotion": "elation amusement enthusiasm determination pride contentment affection relief contemplation confusion "
    "surprise awe longing arousal anger fear disgust bitterness sadness shame helplessness",
    "style": "singing shouting whispering",
    "sfx": "cough laughter crying screaming burping humming sigh sniff sneeze",
    "prosody": "speed_very_slow speed_slow speed_fast speed_very_fast pitch_low pitch_high pause long_pause "
    "expressive_high expressive_low",
}
CONTROL_TAGS = tuple(f"<|{kind}:{name}|>" for kind, names in _TAGS.items() for name in names.split())


class UnsupportedRowError(ConfigError):
    """The format does not support a row; `problem` describes the reason."""

    def __init__(self, problem: str):
        self.problem = problem
        super().__init__([f"the prompt {problem}"])


class SpeechRow(NamedTuple):
    """A row as this format's parts."""

    text: str
    clip: AudioRef | None  # target; None in a prompt
    ref_text: str | None
    reference: AudioRef | None


def parse_turns(messages: Sequence[Turn], start_index: int | None) -> SpeechRow | None:
    """Parses messages into a row; None for a lone default system turn, which has no tokens in this format.

    Raises:
        UnsupportedRowError: the format does not support the messages.
    """
    turns = [turn for turn in messages if not (turn.role == "system" and turn.content == (SYSTEM_PROMPT,))]
    if not turns:
        return None
    if any(turn.role == "system" for turn in turns):
        raise UnsupportedRowError("has a system turn or a scene; Higgs TTS 3 uses tags in the text instead")
    if any(turn.recipient for turn in turns):
        raise UnsupportedRowError("has a recipient, which Higgs TTS 3 does not support")
    spoken = turns.pop() if turns[-1].role == "assistant" else None
    clip = None if spoken is None else _only_clip(spoken)
    ref_text = reference = None
    if [turn.role for turn in turns] == ["user", "assistant", "user"]:
        ref_text, reference = _text_of(turns[0]), _only_clip(turns[1])
        if clip is not None and (start_index is None or start_index <= messages.index(turns[1])):
            raise UnsupportedRowError("has two clips to learn; Higgs TTS 3 learns only the last (set start_index)")
        turns = turns[2:]
    if [turn.role for turn in turns] != ["user"]:
        raise UnsupportedRowError("is not a text and its clip with at most one reference, as Higgs TTS 3 requires")
    content = turns[0].content
    if reference is None and len(content) == 2 and isinstance(content[0], AudioRef):
        reference, content = content[0], content[1:]
    return SpeechRow(_text_of(Turn("user", content)), clip, ref_text, reference)


def _text_of(turn: Turn) -> str:
    if any(isinstance(piece, AudioRef) for piece in turn.content):
        raise UnsupportedRowError("has a clip in a user turn that is not a single reference before the text")
    return "".join(piece for piece in turn.content if isinstance(piece, str))


def _only_clip(turn: Turn) -> AudioRef:
    clips = [piece for piece in turn.content if isinstance(piece, AudioRef)]
    if len(clips) != 1 or len(turn.content) != 1:
        raise UnsupportedRowError("has an assistant turn that is not one clip; Higgs TTS 3 answers only with speech")
    return clips[0]


def tokenize(
    messages: Sequence[Turn], start_index: int | None, tokenizer: Any
) -> tuple[list[int], list[int], list[AudioRef]]:
    """Returns token ids, label ids and clips in reading order; a label at `<|audio|>` means that its clip is learned.

    Each text is encoded separately and unchanged. Without a target clip the ids end before `<|audio|>`.

    Raises:
        UnsupportedRowError: see `parse_turns`.
    """
    row = parse_turns(messages, start_index)
    if row is None:
        return [], [], []

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    input_ids = ids(TTS)
    if row.ref_text is not None:
        input_ids += ids(REF_TEXT) + ids(row.ref_text)
    if row.reference is not None:
        input_ids += ids(REF_AUDIO)
    input_ids += ids(TEXT) + ids(row.text)
    label_ids = [IGNORE] * len(input_ids)
    if row.clip is not None:
        learned = start_index is None or start_index < len(messages)
        audio = ids(AUDIO)
        input_ids += audio
        label_ids += audio if learned else [IGNORE]
    return input_ids, label_ids, [clip for clip in (row.reference, row.clip) if clip is not None]


def delayed(codes: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    """Delays codebook c by c rows, padded with these ids before and after: [K, T] -> [K, T + K - 1]"""
    late = codes.shape[0] - 1
    padded = [
        F.pad(F.pad(row, (c, 0), value=before), (0, late - c), value=behind) for c, row in enumerate(codes.unbind(0))
    ]
    return torch.stack(padded)


def undelayed(rows: torch.Tensor) -> torch.Tensor:
    """Inverts `delayed`: [K, T + K - 1] -> [K, T]"""
    frames = rows.shape[1] - rows.shape[0] + 1
    return torch.stack([row[c : c + frames] for c, row in enumerate(rows.unbind(0))])


def with_marker(rows: torch.Tensor, marker: int) -> torch.Tensor:
    """Adds a first row for the text token before the stream: [codebooks, R] -> [codebooks, R + 1]"""
    return F.pad(rows, (1, 0), value=marker)
