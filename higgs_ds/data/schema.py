"""A row's schema: turns one JSON object into a `Row` or a list of its faults. Decodes nothing.

`columns` first maps other tools' column names to our fields. Then one pydantic model checks types, values, texts and
clips; pydantic's own messages are used where there is no better one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from ..errors import shown
from . import columns
from .chatml import MIX, SERVED, AudioRef, Row, Turn, speech_messages
from .clip_paths import URL, ClipPaths
from .columns import Reading, member, reading, unread_name
from .controls import DEFAULT_CONTROLS, find_control, without_tags
from .faults import Fault
from .foreign import import_command
from .text_findings import TextFindings
from .texts import PLAIN, composed, holds_times, is_visible, with_plain_letters

_A_FILE = re.compile(r"[^\n]{0,400}\.[A-Za-z]\w{1,8}|[./~][^\s]{1,400}")
NO_CLIP = ("", "placeholder", None)  # upstream's values for a missing clip
_AN_OBJECT = re.compile(r"a valid dictionary( or instance of \w+)?")
OWN_REFERENCE = "the row's target clip; give another clip of the voice, or none"


@dataclass
class Rules:
    """Rules for checking the rows of a manifest, and counts over these rows."""

    file: str
    paths: ClipPaths
    controls: re.Pattern[str] = DEFAULT_CONTROLS
    prompt_style: str = SERVED  # of speech rows
    channel: int | None = None  # default for rows that name none
    audio_track: int | None = None
    trains: bool | None = None  # True: training manifest, False: validation manifest, None: unknown
    checked: bool = False  # True: the rows have passed, so nothing is counted and clips are not checked for existence
    unread: Counter[str] = field(default_factory=Counter)  # unread columns and fields, with their number of rows
    scenes: int = 0  # valid rows with a scene
    texts: TextFindings = field(default_factory=TextFindings)


def read_row(value: Any, rules: Rules, line: int, element: int = -1) -> tuple[Row | None, list[Fault]]:
    """Parses a JSON value into a row, or returns its faults."""
    if not isinstance(value, dict):
        return None, [Fault(rules.file, line, "row", f"must be a JSON object, found {shown(value)}", element=element)]
    read = reading(tuple(value))
    found, unread, row = [*read.faults], dict.fromkeys(read.unread), None
    if read.suspects:
        found += columns.suspicions(value, read.suspects, rules.trains)
    try:
        if read.kind == "speech":
            speech = SpeechRow.model_validate(_by_field(value, read), context=rules)
            row = _speech_row(speech, read.column, rules, line, element)
        elif read.kind == "chatml":
            if value.get("audios"):  # otherwise the clips would be ignored and their tags trained as text
                command = import_command("ms-swift", rules.file)
                found.append(("audios", f"is a field of ms-swift; convert the file with: {command}"))
            talk = TalkRow.model_validate(value | {n: value[c] for n, c in read.column.items()}, context=rules)
            row = _talk_row(talk, rules, line, element)
            if not rules.checked:
                found += [*_unknown_fields(talk, unread), *_transcript_faults(row, rules)]
    except ValidationError as error:
        found += _problems(error, read)
    if rules.checked:
        return row, []
    for name in unread:
        rules.unread[name] += 1
    if row is not None and (not row.is_speech or row.start_index is not None):
        found += _own_reference(row)
    if found:
        return None, [Fault(rules.file, line, name, problem, element=element) for name, problem in found]
    if row is not None and (said := row.target()) is not None:
        text, given = said[0], value[read.column["text"]] if row.is_speech else said[0]
        if "<|" in given:
            text, given = without_tags(text, rules.controls), without_tags(given, rules.controls)
        rules.texts.count(text, given, (line, element))
    return row, []


def fault(problem: str) -> PydanticCustomError:
    """Returns an error for a validator to raise."""
    return PydanticCustomError("fault", "{problem}", {"problem": problem})


def _given(value: Any) -> Any:
    """Returns None for an empty value: null, blanks, or the NaN that pandas writes for either."""
    if isinstance(value, str):
        return value if value and not value.isspace() else None
    return None if value != value else value


def _name(value: Any) -> Any:
    """Returns a speaker's name as text. Tables store a column of integers with gaps as floats."""
    value = _given(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _text(value: str, info: ValidationInfo[Rules]) -> str:
    if value.isspace() or not value:
        raise fault("is empty")
    value = with_plain_letters(value)
    if problem := find_control(value, info.context.controls):
        raise fault(problem)
    return value


def _transcript(value: str, info: ValidationInfo[Rules]) -> str:
    """Validates and normalises the transcript of a clip."""
    value = _text(value, info)
    if not info.context.checked and (problem := _unspeakable(value, info.context)):
        raise fault(problem)
    return composed(value)


def _unspeakable(text: str, rules: Rules) -> str | None:
    """Returns the problem of a text that cannot be a transcript, or None."""
    if not is_visible(text):
        return f"contains no letter or digit, found {shown(text)}"
    if PLAIN.fullmatch(text) is None and (form := holds_times(text)):
        return f"contains times or data ({form}); give only the spoken words"
    suffix = text.rpartition(".")[2]
    if (
        (text[0] in "./~" or (suffix.isalnum() and len(suffix) < 10))
        and _A_FILE.fullmatch(text)
        and rules.paths.holds(text)
    ):
        return f"{shown(text)} is the path of an existing file; give the file's text instead"
    return None


def _transcript_faults(row: Row, rules: Rules) -> Iterator[tuple[str, str]]:
    """Yields the fault in the transcript of a conversation's target clip."""
    said = row.target()
    if said is not None and (problem := _unspeakable(said[0], rules)):
        yield "messages", problem


def _bytes(value: Any) -> AudioRef:
    """Wraps a clip in base64; it is decoded when the clip is read."""
    if not isinstance(value, str):
        raise fault(f"must be an audio file in base64, found {shown(value)}")
    return AudioRef(raw_audio=value)


def _clip(value: Any, info: ValidationInfo[Rules]) -> AudioRef:
    """Reads a path, or Hugging Face's `{"path", "bytes"}`, where bytes take precedence as in `datasets`."""
    if isinstance(value, dict):
        if value.get("bytes"):
            return _bytes(value["bytes"])
        value = value.get("path") or value
    if not isinstance(value, str):
        raise fault(f"must be the path of an audio file, found {shown(value)}" if value is not None else "is missing")
    if URL.match(value):
        raise fault(f"URLs are not fetched; give a local path instead of {shown(value)}")
    paths = info.context.paths
    if info.context.checked:
        return AudioRef(paths.path(value))
    if (path := paths.find(value)) is None:
        given = repr(value if len(value) <= 200 else f"{value[:200]}...")
        where = "paths are relative to the manifest's folder, --audio_root or the working directory"
        raise fault(f"{given} does not exist or is not a file; {where}")
    return AudioRef(path)


def _integer(value: Any) -> Any:
    """Turns an integral float into an int; tables store a column of counts with gaps as floats."""
    value = _given(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _channel(value: Any) -> Any:
    """Reads a channel number, also in a list of one (lhotse, NeMo); NeMo's `average` means all channels mixed."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return MIX if value in ("average", "mix") else _integer(value)


def _split(value: Any, info: ValidationInfo[Rules]) -> Any:
    """Rejects a row in a manifest that contradicts the row's own split."""
    trains = info.context.trains
    if (
        isinstance(value, str)
        and trains is not None
        and (columns.HELD_OUT if trains else columns.TRAINED).fullmatch(value.strip())
    ):
        side, other = ("training", "--val_manifest") if trains else ("validation", "--train_manifest")
        raise fault(f"is {shown(value)}, which excludes the row from {side}; move such rows to a file for {other}")
    return value


Text = Annotated[str, AfterValidator(_text)]
Transcript = Annotated[str, AfterValidator(_transcript)]
Maybe = BeforeValidator(_given)
Seconds = Annotated[float | None, Field(allow_inf_nan=False), Maybe]
Offset = Annotated[float | None, Field(ge=0, allow_inf_nan=False), Maybe]
Channel = Annotated[int | None, Field(ge=MIX), BeforeValidator(_channel)]
Count = Annotated[int | None, Field(ge=0), BeforeValidator(_integer)]
Split = Annotated[Any, AfterValidator(_split)]
Speaker = Annotated[str | None, BeforeValidator(_name)]
Clip = Annotated[AudioRef, PlainValidator(_clip)]


class _Slice(BaseModel):
    """Fields that select a part of a clip.

    A duration without an offset cuts nothing; as in upstream's files it only states the clip's length. Tables without
    nulls write zeros for missing values.
    """

    offset: Offset = None
    end: Offset = None
    duration: Seconds = None
    channel: Channel = None
    audio_track: Count = None
    sampling_rate: Count = None

    @field_validator("end")
    @classmethod
    def _end_after_start(cls, value: float | None, info: ValidationInfo[Rules]) -> float | None:
        start = info.data.get("offset") or 0.0
        if value and value <= start:
            raise fault(f"must be after the start at {start:g} s, found {value:g} s")
        return value or None

    @field_validator("duration")
    @classmethod
    def _positive_duration(cls, value: float | None, info: ValidationInfo[Rules]) -> float | None:
        if value is not None and value <= 0:
            if info.data.get("offset"):
                raise fault(f"must be above 0 s, found {value}")
            return None
        return value

    @property
    def seconds(self) -> float | None:
        """Stated length, or None."""
        return self.duration if self.end is None else self.end - (self.offset or 0.0)

    def of(self, clip: AudioRef, name: str, rules: Rules) -> AudioRef:
        """Returns this part of `clip`; its faults are reported under the field `name`."""
        offset = 0.0 if self.offset is None and self.end is not None else self.offset
        seconds = self.seconds
        if offset is None or (offset == 0 and seconds is None):
            offset = seconds = None
        channel = rules.channel if self.channel is None else self.channel
        track = rules.audio_track if self.audio_track is None else self.audio_track
        return AudioRef(
            clip.path, clip.raw_audio, offset, seconds, name, None, channel, track, self.sampling_rate or None
        )


class SpeechRow(_Slice):
    """A clip and its transcript."""

    audio: Clip
    text: Transcript
    speaker: Speaker = None
    split: Split = None
    scene: Text | None = None
    ref_audio: Clip | None = None
    ref_text: Annotated[Transcript | None, Field(validate_default=True)] = None

    @field_validator("ref_text")
    @classmethod
    def _complete_reference(cls, value: str | None, info: ValidationInfo[Rules]) -> str | None:
        if "ref_audio" in info.data and (info.data["ref_audio"] is None) != (value is None):
            raise fault(
                "is missing; it is the transcript of ref_audio" if value is None else "is given without ref_audio"
            )
        return value


class _Part(BaseModel):
    """A part of a conversation. Unknown fields are counted, or reported as faults."""

    model_config = ConfigDict(extra="allow")


class TextPiece(_Part):
    """A text in a turn."""

    type: Literal["text"]
    text: str


class AudioPiece(_Part, _Slice):
    """A clip in the format of upstream's `AudioContent`. An existing `audio_url` takes precedence over `raw_audio`."""

    type: Literal["audio"]
    raw_audio: Any = None
    audio_url: Annotated[Any, Field(validate_default=True)] = None
    row_id: Any = None

    @field_validator("audio_url", mode="plain")
    @classmethod
    def _chosen_source(cls, url: Any, info: ValidationInfo[Rules]) -> AudioRef:
        raw_audio = _given(info.data.get("raw_audio"))
        if isinstance(url, dict) or raw_audio in NO_CLIP:
            return _clip(None if url in NO_CLIP else url, info)
        is_file = isinstance(url, str) and url not in NO_CLIP and not URL.match(url)
        return _clip(url, info) if is_file and info.context.paths.holds(url) else _bytes(raw_audio)


def _kind_of(value: Any) -> str | None:
    if isinstance(value, str):
        return "#str"
    if isinstance(value, dict):
        return {"text": "#text", "audio": "#audio"}.get(str(value.get("type")))
    return {list: "#list", type(None): "#none"}.get(type(value))


_A_PIECE = Annotated[str, Tag("#str")] | Annotated[TextPiece, Tag("#text")] | Annotated[AudioPiece, Tag("#audio")]
_KIND = Discriminator(
    _kind_of,
    custom_error_type="piece",
    custom_error_message="must be text, an object with `type` text or audio, or a list of these",
)
Piece = Annotated[_A_PIECE, _KIND]
Content = Annotated[_A_PIECE | Annotated[list[Piece], Tag("#list")] | Annotated[None, Tag("#none")], _KIND]


class TurnPart(_Part):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content
    recipient: Annotated[Text | None, Maybe] = None

    @field_validator("content")
    @classmethod
    def _checked_content(cls, content: Any, info: ValidationInfo[Rules]) -> Any:
        role = info.data.get("role")
        pieces = content if isinstance(content, list) else [content]
        texts = [piece.text if isinstance(piece, TextPiece) else piece for piece in pieces]
        texts = [text for text in texts if isinstance(text, str)]
        if role != "system" and not any(isinstance(p, AudioPiece) for p in pieces) and not "".join(texts).strip():
            raise fault("is empty; give text or audio")
        for text in texts:
            if problem := find_control(with_plain_letters(text), info.context.controls, markup=role != "assistant"):
                raise fault(problem)
        return content

    @field_validator("recipient")
    @classmethod
    def _only_for_assistant(cls, value: str | None, info: ValidationInfo[Rules]) -> str | None:
        if value and (role := info.data.get("role")) in ("system", "user"):
            raise fault(f"is only allowed in an assistant turn, found role {role}")
        return value


class TalkRow(BaseModel):
    """A conversation in the format of upstream's `ChatMLSample`."""

    messages: Annotated[list[TurnPart], Field(min_length=1)]
    start_index: Annotated[int | None, Field(ge=0, strict=True), Maybe] = None
    speaker: Speaker = None
    split: Split = None
    misc: Any = None

    @field_validator("messages")
    @classmethod
    def _has_assistant(cls, messages: list[TurnPart]) -> list[TurnPart]:
        if all(turn.role != "assistant" for turn in messages):
            raise fault("has no assistant turn, so there is nothing to train on")
        return messages

    @field_validator("start_index")
    @classmethod
    def _leaves_assistant(cls, start: int | None, info: ValidationInfo[Rules]) -> int | None:
        answers = [i for i, turn in enumerate(info.data.get("messages", ())) if turn.role == "assistant"]
        if start is not None and answers and start > answers[-1]:
            raise fault(f"leaves nothing to train on: the last assistant turn is {answers[-1]}, found {start}")
        return start


def _by_field(value: dict[str, Any], read: Reading) -> dict[str, Any]:
    """Renames a speech row's columns to our fields and drops empty ones."""
    named = {}
    for name, column in read.column.items():
        found = value[column]
        if found is not None and found == found and (name in ("audio", "text") or _given(found) is not None):
            named[name] = _in_seconds(found, read.scale[name]) if name in read.scale else found
    return named


def _in_seconds(value: Any, unit: float) -> Any:
    try:
        return value if isinstance(value, bool) else float(value) * unit
    except (TypeError, ValueError, OverflowError):
        return value


def _speech_row(speech: SpeechRow, column: dict[str, str], rules: Rules, line: int, element: int) -> Row:
    reference = speech.ref_audio
    if reference is not None:
        reference = _Slice().of(reference, column["ref_audio"], rules)
    turns, start_index = speech_messages(
        speech.text,
        speech.of(speech.audio, column["audio"], rules),
        scene=speech.scene,
        ref_text=speech.ref_text,
        ref_audio=reference,
        prompt_style=rules.prompt_style,
    )
    scene = speech.scene and speech.scene.strip()
    place = (rules.file, line, speech.seconds)
    return Row(turns, start_index, speech.speaker, *place, True, scene, rules.prompt_style, element)


def _talk_row(talk: TalkRow, rules: Rules, line: int, element: int) -> Row:
    turns = []
    stated_sec: float | None = None  # of the last turn's clip
    for i, turn in enumerate(talk.messages):
        pieces: list[str | AudioRef] = []
        clips = []
        for where, piece in _pieces(turn, f"messages[{i}].content"):
            if isinstance(piece, AudioPiece):
                pieces.append(piece.of(piece.audio_url, where, rules))
                clips.append(piece)
            else:
                text = piece.text if isinstance(piece, TextPiece) else piece or ""
                read = with_plain_letters(text) if turn.role == "system" else composed(text)
                pieces.append(read)
                if not rules.checked and read.strip() != text.strip():
                    rules.texts.note_composed(read, (line, element))
        turns.append(Turn(turn.role, _without_blanks(pieces) or ("",), turn.recipient))
        stated_sec = clips[0].seconds if turn.role == "assistant" and len(clips) == 1 else None
    speaker = talk.speaker
    if speaker is None and isinstance(talk.misc, dict) and isinstance(named := talk.misc.get("speaker"), str):
        speaker = _given(named)
    return Row(tuple(turns), talk.start_index, speaker, rules.file, line, stated_sec, element=element)


def _pieces(turn: TurnPart, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(turn.content, list):
        yield from ((f"{where}[{i}]", piece) for i, piece in enumerate(turn.content))
    else:
        yield where, turn.content


def _without_blanks(pieces: list[str | AudioRef]) -> tuple[str | AudioRef, ...]:
    """Strips blanks at both ends of a turn, as servers do; inner blanks stay."""
    for end, trimmed in ((0, str.lstrip), (-1, str.rstrip)):
        while pieces and isinstance(text := pieces[end], str):
            pieces[end] = trimmed(text)
            if pieces[end]:
                break
            del pieces[end]
    return tuple(piece for piece in pieces if piece != "")


def _unknown_fields(talk: TalkRow, unread: dict[str, None]) -> Iterator[tuple[str, str]]:
    """Yields faults of unknown fields that may affect training; adds the others to `unread`."""
    for i, turn in enumerate(talk.messages):
        for where, part in ((f"messages[{i}]", turn), *_pieces(turn, f"messages[{i}].content")):
            for key, value in (getattr(part, "__pydantic_extra__", None) or {}).items():
                if not value and key in columns.ITEM_FIELDS:  # tables give every item all fields
                    continue
                problem = columns.weighty_misspelling(key, tuple(type(part).model_fields))
                if problem or (
                    problem := dict(columns.suspicions({key: value}, columns.suspects_of((key,)), None)).get(key)
                ):
                    yield member(where, key), problem
                else:
                    unread[unread_name(where, key)] = None


def _own_reference(row: Row) -> Iterator[tuple[str, str]]:
    """Yields faults of earlier clips that contain the target clip; copies of it are found later, by content."""
    if not row.target_clip():
        return
    *earlier, (_, spoken) = row.audio_refs
    for where, ref in earlier:
        if ref.holds(spoken):
            yield where, f"{'is' if ref == spoken else 'contains'} {OWN_REFERENCE}"


def _problems(error: ValidationError, read: Reading) -> Iterator[tuple[str, str]]:
    """Yields (field, problem) of each error; fields have the row's own column names."""
    for found in error.errors(include_url=False):
        name = ""
        for part in found["loc"]:
            if isinstance(part, int):
                name += f"[{part}]"
            elif not part.startswith("#"):
                name += f".{part}" if name else read.column.get(part, part)
        yield name, _message(found)


def _message(found: ErrorDetails) -> str:
    if found["type"] == "fault":
        return found["msg"]
    if found["type"] == "missing":
        return "is missing"
    wanted = found["msg"].replace("Input should be", "must be").replace("a valid string", "text")
    return f"{_AN_OBJECT.sub('an object', wanted)}, found {shown(found['input'])}"
