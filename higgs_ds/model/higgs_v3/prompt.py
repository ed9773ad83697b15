"""Rows as Higgs TTS 3 reads them: `<|tts|> [<|ref_text|> …] [<|ref_audio|> …] <|text|> … <|audio|>`, and streams.

A clip of T frames is a stream of T + K - 1 rows, the same for a target and for a reference: codebook c begins c rows
late, BOC before its codes and EOC behind them; there is no row of BOC alone, and none of EOC alone. The text token
before a stream, `<|audio|>` or `<|ref_audio|>`, stands in batches as one more row in front, whose codes are all BOC:
it takes the place of the clip's placeholder, and the forward embeds it as the token that it is.
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
# Put straight into a text, each is one token that steers the delivery or makes a sound.
_TAGS = {
    "emotion": "elation amusement enthusiasm determination pride contentment affection relief contemplation confusion "
    "surprise awe longing arousal anger fear disgust bitterness sadness shame helplessness",
    "style": "singing shouting whispering",
    "sfx": "cough laughter crying screaming burping humming sigh sniff sneeze",
    "prosody": "speed_very_slow speed_slow speed_fast speed_very_fast pitch_low pitch_high pause long_pause "
    "expressive_high expressive_low",
}
CONTROL_TAGS = tuple(f"<|{kind}:{name}|>" for kind, names in _TAGS.items() for name in names.split())


class UnsayableError(ConfigError):
    """This format has no words for a row; `problem` says for what of it."""

    def __init__(self, problem: str):
        self.problem = problem
        super().__init__([f"the prompt {problem}"])


class Said(NamedTuple):
    """A row in this family's words."""

    text: str
    clip: AudioRef | None  # that speaks it; None in a prompt
    ref_text: str | None
    reference: AudioRef | None


def said_in(messages: Sequence[Turn], start_index: int | None) -> Said | None:
    """The row that messages are; None for a system turn alone, which has no tokens here.

    Raises:
        UnsayableError: there are no words for them.
    """
    turns = [turn for turn in messages if not (turn.role == "system" and turn.content == (SYSTEM_PROMPT,))]
    if not turns:
        return None
    if any(turn.role == "system" for turn in turns):
        raise UnsayableError("holds a system turn or a scene; Higgs TTS 3 has tags in the text instead")
    if any(turn.recipient for turn in turns):
        raise UnsayableError("names a recipient, which Higgs TTS 3 has not")
    spoken = turns.pop() if turns[-1].role == "assistant" else None
    clip = None if spoken is None else _only_clip(spoken)
    ref_text = reference = None
    if [turn.role for turn in turns] == ["user", "assistant", "user"]:
        ref_text, reference = _text_of(turns[0]), _only_clip(turns[1])
        if clip is not None and (start_index is None or start_index <= messages.index(turns[1])):
            raise UnsayableError("has two clips to learn; Higgs TTS 3 learns the last (start_index says from where on)")
        turns = turns[2:]
    if [turn.role for turn in turns] != ["user"]:
        raise UnsayableError(
            "is no text and its clip with at most one reference, all that Higgs TTS 3 has a prompt for"
        )
    content = turns[0].content
    if reference is None and len(content) == 2 and isinstance(content[0], AudioRef):
        reference, content = content[0], content[1:]
    return Said(_text_of(Turn("user", content)), clip, ref_text, reference)


def _text_of(turn: Turn) -> str:
    if any(isinstance(piece, AudioRef) for piece in turn.content):
        raise UnsayableError("has a clip in a user turn that is not a single reference before the text")
    return "".join(piece for piece in turn.content if isinstance(piece, str))


def _only_clip(turn: Turn) -> AudioRef:
    clips = [piece for piece in turn.content if isinstance(piece, AudioRef)]
    if len(clips) != 1 or len(turn.content) != 1:
        raise UnsayableError("has an assistant turn that is not one clip; Higgs TTS 3 answers with speech alone")
    return clips[0]


def tokenize(
    messages: Sequence[Turn], start_index: int | None, tokenizer: Any
) -> tuple[list[int], list[int], list[AudioRef]]:
    """Token ids, label ids and clips in reading order; a label at `<|audio|>` says that its clip is learned.

    Every text is encoded by itself and as it is. Without a clip to speak the ids end before `<|audio|>`.

    Raises:
        UnsayableError: see `said_in`.
    """
    said = said_in(messages, start_index)
    if said is None:
        return [], [], []

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    input_ids = ids(TTS)
    if said.ref_text is not None:
        input_ids += ids(REF_TEXT) + ids(said.ref_text)
    if said.reference is not None:
        input_ids += ids(REF_AUDIO)
    input_ids += ids(TEXT) + ids(said.text)
    label_ids = [IGNORE] * len(input_ids)
    if said.clip is not None:
        learned = start_index is None or start_index < len(messages)
        audio = ids(AUDIO)
        input_ids += audio
        label_ids += audio if learned else [IGNORE]
    return input_ids, label_ids, [clip for clip in (said.reference, said.clip) if clip is not None]


def delayed(codes: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    """Codebook c begins c rows late, with these ids before and behind: [K, T] -> [K, T + K - 1]"""
    late = codes.shape[0] - 1
    padded = [
        F.pad(F.pad(row, (c, 0), value=before), (0, late - c), value=behind) for c, row in enumerate(codes.unbind(0))
    ]
    return torch.stack(padded)


def undelayed(rows: torch.Tensor) -> torch.Tensor:
    """Inverse of `delayed`: [K, T + K - 1] -> [K, T]"""
    frames = rows.shape[1] - rows.shape[0] + 1
    return torch.stack([row[c : c + frames] for c, row in enumerate(rows.unbind(0))])


def with_marker(rows: torch.Tensor, marker: int) -> torch.Tensor:
    """The stream behind a row of its own for the text token before it. [codebooks, R] -> [codebooks, R + 1]"""
    return F.pad(rows, (1, 0), value=marker)
