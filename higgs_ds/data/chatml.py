"""A training row as a conversation: its turns, its clips, and the prompt of a speech row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .faults import Fault, origin
from .texts import composed, with_plain_letters

ROLES = ("system", "user", "assistant")
SYSTEM_PROMPT = "Generate audio following instruction."
SCENE_START, SCENE_END = "<|scene_desc_start|>", "<|scene_desc_end|>"
# served: as in transformers' processor and vllm-omni. boson: as in upstream's `examples/generation.py`.
SERVED, BOSON_EXAMPLE = PROMPT_STYLES = ("served", "boson")


MIX = -1  # channel number for the mean of all channels


@dataclass(frozen=True)
class AudioRef:
    """A clip in a message: either a file, or the bytes of one in base64."""

    path: Path | None = None  # absolute
    raw_audio: str | None = None
    offset_sec: float | None = None  # None: from the start
    duration_sec: float | None = None  # None: to the end
    # The row's field. Not part of the identity: the same clip in two rows is one clip.
    field: str = dataclasses.field(default="audio", compare=False)
    # Key of its codes once they exist; the file is then no longer needed. See `code_cache`.
    key: bytes | None = dataclasses.field(default=None, compare=False)
    channel: int | None = None  # from 0; MIX for the mean, even of channels that differ
    audio_track: int | None = None  # of a container, from 0
    sample_rate: int | None = None  # stated by the row; the clip must have it

    @property
    def span(self) -> str:
        """Slice, channel and track, as text."""
        part = f"{self.offset_sec or 0.0} {self.duration_sec}"
        if self.channel is None and self.audio_track is None:
            return part
        return f"{part} channel {self.channel} track {self.audio_track}"

    def holds(self, other: AudioRef) -> bool:
        """Returns True if this clip's part of the same file includes the other's."""
        if (self.path, self.raw_audio, self.channel) != (other.path, other.raw_audio, other.channel):
            return False
        start, other_start = self.offset_sec or 0.0, other.offset_sec or 0.0
        ends = [
            None if ref.duration_sec is None else (ref.offset_sec or 0.0) + ref.duration_sec for ref in (self, other)
        ]
        return start <= other_start and (ends[0] is None or (ends[1] is not None and ends[0] >= ends[1]))


@dataclass(frozen=True)
class Turn:
    """One message, with texts and clips in the given order."""

    role: str
    content: tuple[str | AudioRef, ...]
    recipient: str | None = None


@dataclass(frozen=True)
class Row:
    """One valid training sample."""

    messages: tuple[Turn, ...]
    start_index: int | None  # messages before it are context, not trained on
    speaker: str | None
    file: str  # the manifest as the user named it
    line: int  # 1-based, where the row starts
    stated_sec: float | None = None  # the target clip's length by the row; only compared
    is_speech: bool = False  # given as text and clip instead of messages
    scene: str | None = None  # of a speech row
    prompt_style: str = "served"  # of a speech row, see `speech_messages`
    element: int = -1  # index in a JSON array if several share the line; see `faults.origin`

    @property
    def origin(self) -> str:
        return origin(self.file, self.line, self.element)

    def fault(self, field: str, problem: str) -> Fault:
        return Fault(self.file, self.line, field, problem, element=self.element)

    @property
    def audio_refs(self) -> tuple[tuple[str, AudioRef], ...]:
        """The row's clips in message order, each with the field for reporting its faults."""
        pieces = (piece for turn in self.messages for piece in turn.content)
        return tuple((piece.field, piece) for piece in pieces if isinstance(piece, AudioRef))

    @property
    def has_scene(self) -> bool:
        """True if the first turn describes a scene."""
        return any(isinstance(piece, str) and SCENE_START in piece for piece in self.messages[0].content)

    def with_keys(self, keys: np.ndarray) -> Row:
        """Returns the row with these keys, uint8 [clips, 32], set on its clips in the order of `audio_refs`."""
        following = iter(keys)

        def with_key(piece: str | AudioRef) -> str | AudioRef:
            if isinstance(piece, str):
                return piece
            key = next(following).tobytes()
            cut = (piece.offset_sec, piece.duration_sec, piece.field, key)
            return AudioRef(piece.path, piece.raw_audio, *cut, piece.channel, piece.audio_track, piece.sample_rate)

        turns = tuple(Turn(t.role, tuple(map(with_key, t.content)), t.recipient) for t in self.messages)
        return dataclasses.replace(self, messages=turns)

    def with_reference(self, reference: tuple[str, AudioRef] | None) -> Row:
        """Returns the speech row with this reference (transcript, clip) in its earlier turns, or with none."""
        text, clip = self.messages[-2].content[0], self.messages[-1].content[0]
        assert self.is_speech and isinstance(text, str) and isinstance(clip, AudioRef)
        ref_text, ref_audio = reference or (None, None)
        turns, start_index = speech_messages(
            text,
            clip,
            scene=self.scene,
            ref_text=ref_text,
            ref_audio=ref_audio,
            prompt_style=self.prompt_style,
        )
        return dataclasses.replace(self, messages=turns, start_index=start_index)

    def target_clip(self) -> int | None:
        """Returns the index in `audio_refs` of the last turn's only clip; None if it has none or several."""
        if self.is_speech:
            return 0 if self.start_index is None else 1
        last = self.messages[-1]
        if last.role != "assistant" or sum(isinstance(piece, AudioRef) for piece in last.content) != 1:
            return None
        return sum(isinstance(piece, AudioRef) for turn in self.messages for piece in turn.content) - 1

    def target(self) -> tuple[str, int] | None:
        """Returns the target clip's text and its index in `audio_refs`.

        The text is that of the clip's own turn or, if this has none, of the turn before. Returns None if there is no
        text, or no single clip in the last turn.
        """
        clip = self.target_clip()
        if clip is None:
            return None
        if self.is_speech and isinstance(text := self.messages[-2].content[0], str):
            return text, clip
        for turn in reversed(self.messages[-2:]):
            if text := " ".join(piece for piece in turn.content if isinstance(piece, str)):
                return text, clip
        return None


def speech_messages(
    text: str,
    audio: AudioRef | None,
    *,
    scene: str | None = None,
    ref_text: str | None = None,
    ref_audio: AudioRef | None = None,
    prompt_style: str = SERVED,
) -> tuple[tuple[Turn, ...], int | None]:
    """Builds the prompt of one speaker, with every text trimmed and normalised; returns it and its `start_index`.

    `audio` None omits the last assistant turn: the prompt for generation. With a reference clip, training starts at
    the last user turn; the system turn is then present only with a scene in style `boson`, always in style `served`.
    Raises ValueError if only one of `ref_text` and `ref_audio` is given, or for an unknown style.
    """
    if prompt_style not in PROMPT_STYLES:
        raise ValueError(f"prompt_style: {prompt_style!r} is not one of {', '.join(PROMPT_STYLES)}")
    if (ref_text is None) != (ref_audio is None):
        raise ValueError("ref_text and ref_audio belong together: give the reference clip and its transcript, or none")
    turns = []
    text, ref_text = composed(text).strip(), ref_text and composed(ref_text).strip()
    scene = scene and with_plain_letters(scene.strip()).strip()
    if scene:
        scene_block = f"{SCENE_START}\n{scene}\n{SCENE_END}"
        turns.append(Turn("system", (f"{SYSTEM_PROMPT}\n\n{scene_block}",)))
    elif ref_audio is None or prompt_style == SERVED:
        turns.append(Turn("system", (SYSTEM_PROMPT,)))
    start_index = None
    if ref_text is not None and ref_audio is not None:
        turns += [Turn("user", (ref_text,)), Turn("assistant", (ref_audio,))]
        start_index = len(turns)
    turns.append(Turn("user", (text,)))
    if audio is not None:
        turns.append(Turn("assistant", (audio,)))
    return tuple(turns), start_index
