"""Manifests: what a training row may say, checked before anything is decoded or tokenized.

A manifest is JSONL or a JSON array, decided by its content. Two kinds of rows mix freely:

- ChatML, as upstream's `ChatMLSample`: `messages`, and optionally `start_index`, `speaker`, `misc`;
- speech: `audio`, `text`, and optionally `speaker`, `ref_audio` + `ref_text`, `scene`, `duration`.

Paths are relative to the manifest's folder. Both kinds may carry an `id`, which is not read.
"""

import base64
import codecs
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROLES = ("system", "user", "assistant")
CHATML_FIELDS = ("messages", "start_index", "speaker", "misc", "id")
SPEECH_FIELDS = ("audio", "text", "speaker", "ref_audio", "ref_text", "scene", "duration", "id")
TURN_FIELDS = ("role", "content", "recipient")
TEXT_FIELDS = ("type", "text")
AUDIO_FIELDS = ("type", "audio_url", "raw_audio", "offset", "duration", "row_id")

# The collator finds clips by these tokens, so one inside a text would be taken for a clip that is not there.
AUDIO_PLACEHOLDERS = ("<|AUDIO|>", "<|AUDIO_OUT|>")
# A row needs 5 levels; `misc` may hold anything, but not so deep that reading it overflows the stack.
MAX_DEPTH = 32
SYSTEM_PROMPT = "Generate audio following instruction."

_BLANKS = b" \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class AudioRef:
    """One clip that a message points at: a file, or the bytes of one in base64; never both."""

    path: Path | None = None  # absolute
    raw_audio: str | None = None
    offset_sec: float | None = None  # None: from the start
    duration_sec: float | None = None  # None: to the end
    # Where the row names it. Not part of its identity: the same clip in two rows is one clip.
    field: str = dataclasses.field(default="audio", compare=False)
    # Key of its codes once they are made, which then need no look at the file; see `codes`.
    key: bytes | None = dataclasses.field(default=None, compare=False)


@dataclass(frozen=True)
class Turn:
    """One message; text pieces and clips in the order given."""

    role: str
    content: tuple[str | AudioRef, ...]
    recipient: str | None = None


@dataclass(frozen=True)
class Row:
    """One training sample without faults."""

    messages: tuple[Turn, ...]
    start_index: int | None  # messages before it are context and are not trained
    speaker: str | None
    file: str  # the manifest as the user named it
    line: int  # 1-based, where the row starts

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def audio_refs(self) -> tuple[tuple[str, AudioRef], ...]:
        """The row's clips in message order, each with the field that a fault in it is reported under."""
        pieces = (piece for turn in self.messages for piece in turn.content)
        return tuple((piece.field, piece) for piece in pieces if isinstance(piece, AudioRef))

    def with_keys(self, keys: np.ndarray) -> "Row":
        """The same row whose clips, in the order of `audio_refs`, carry these keys, uint8 [clips, 32]."""
        following = iter(keys)

        def with_key(piece: str | AudioRef) -> str | AudioRef:
            if isinstance(piece, str):
                return piece
            key = next(following).tobytes()
            return AudioRef(piece.path, piece.raw_audio, piece.offset_sec, piece.duration_sec, piece.field, key)

        turns = tuple(Turn(t.role, tuple(map(with_key, t.content)), t.recipient) for t in self.messages)
        return Row(turns, self.start_index, self.speaker, self.file, self.line)


@dataclass(frozen=True, order=True)
class Fault:
    """One thing to correct in a manifest."""

    file: str
    line: int
    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.problem}"


class Manifest:
    """A manifest's text and where its rows stand in it; a row is parsed when it is asked for.

    Takes the bytes of the file and 24 more a row, whatever a row would take as objects, and processes forked from this
    one share them. What happens to the file later changes nothing.
    """

    def __init__(self, path: str | Path):
        """Raises nothing for what the file holds, nor when it cannot be read: that is in `faults`."""
        self.file = str(path)
        self.faults: list[Fault] = []  # of the file as a whole; those of rows come from `check`
        self._folder = Path(path).absolute().parent
        self._content = b""
        self._spans = np.zeros((0, 2), np.int64)  # bytes of `_content`, first and behind the last
        self._lines = np.zeros(0, np.int64)  # 1-based
        try:
            content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            problem = f"is not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); save it as UTF-8"
            self._fault(line, "manifest", problem)
            return
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            reason = getattr(error, "strerror", None) or error
            self._fault(1, "manifest", f"cannot be read ({reason}); name a JSONL file or a JSON array")
            return
        self._content = content
        if text.startswith("[", _after_space(text, 0)):
            self._find_array_elements(text)
        else:
            self._find_lines()
        if not len(self) and not self.faults:
            self._fault(1, "manifest", "holds no rows; put one JSON object on each line")

    def __len__(self) -> int:
        """How many rows there are, those with faults included."""
        return len(self._lines)

    def digest(self) -> bytes:
        """SHA-256 of what the file held."""
        return hashlib.sha256(self._content).digest()

    def check(self, number: int) -> tuple[Row | None, list[Fault]]:
        """A row, or all that is wrong with it. Its clips are looked for (a file with bytes in it), not decoded."""
        line = int(self._lines[number])
        try:
            value = _DECODER.decode(self._text(number))
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg}, column {error.colno}); write one whole object on each line"
            return None, [Fault(self.file, line, "row", problem)]
        except RecursionError:
            return None, [Fault(self.file, line, "row", f"nested deeper than {MAX_DEPTH} levels")]
        check = _RowCheck(self.file, line, self._folder)
        row = check.row(value)
        return (None, check.faults) if check.faults else (row, [])

    def row(self, number: int) -> Row:
        """A row that `check` found no fault in; its clips are not looked for again."""
        check = _RowCheck(self.file, int(self._lines[number]), self._folder, look_for_clips=False)
        row = check.row(_DECODER.decode(self._text(number)))
        assert not check.faults, check.faults
        return row

    def _text(self, number: int) -> str:
        first, behind = self._spans[number]
        return self._content[first:behind].decode("utf-8")

    def _fault(self, line: int, field: str, problem: str) -> None:
        self.faults.append(Fault(self.file, line, field, problem))

    def _find_lines(self) -> None:
        # Not splitlines(): it also splits at U+2028 and the like, which may stand inside a JSON string.
        content = np.frombuffer(self._content, np.uint8)
        breaks = np.flatnonzero(content == ord("\n"))
        spans = np.stack([np.r_[0, breaks + 1], np.r_[breaks, len(content)]], axis=1)
        filled = spans[:, 0] < spans[:, 1]
        starts_blank = np.flatnonzero(filled)[np.isin(content[spans[filled, 0]], list(_BLANKS))]
        for i in starts_blank.tolist():
            first, behind = spans[i]
            filled[i] = bool(self._content[first:behind].strip(_BLANKS))
        self._lines = np.flatnonzero(filled) + 1
        self._spans = spans[filled]

    def _find_array_elements(self, text: str) -> None:
        """Up to the first that is not JSON, which becomes a fault."""
        spans: list[tuple[int, int]] = []
        lines: list[int] = []
        line, counted = 1, 0
        at = _after_space(text, text.index("[") + 1)
        more = not text.startswith("]", at)
        try:
            while more:
                line += text.count("\n", counted, at)
                counted = at
                _, behind = _SCANNER.raw_decode(text, at)
                spans.append((at, behind))
                lines.append(line)
                at = _after_space(text, behind)
                more = text.startswith(",", at)
                if more:
                    at = _after_space(text, at + 1)
            if not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _after_space(text, at + 1)
            if at < len(text):
                raise json.JSONDecodeError("Extra data after the array", text, at)
        except json.JSONDecodeError as error:
            self._fault(error.lineno, "row", f"not JSON ({error.msg}, column {error.colno}); nothing after it was read")
        except RecursionError:
            self._fault(line, "row", f"nested deeper than {MAX_DEPTH} levels; nothing after it was read")
        self._spans = _in_bytes(text, np.array(spans, np.int64).reshape(-1, 2))
        self._lines = np.array(lines, np.int64)


def _in_bytes(text: str, spans: np.ndarray) -> np.ndarray:
    """Spans of characters, in order, as spans of the bytes of UTF-8."""
    if text.isascii():
        return spans
    places, at, counted = np.zeros(spans.size, np.int64), 0, 0
    for i, place in enumerate(spans.flatten().tolist()):
        at += len(text[counted:place].encode("utf-8"))
        counted = place
        places[i] = at
    return places.reshape(spans.shape)


def read_manifest(path: str | Path) -> tuple[list[Row], list[Fault]]:
    """Every row without faults, in file order, and every fault of the others, sorted: all of a small manifest."""
    manifest = Manifest(path)
    rows: list[Row] = []
    faults = list(manifest.faults)
    for number in range(len(manifest)):
        row, found = manifest.check(number)
        faults += found
        if row is not None:
            rows.append(row)
    return rows, sorted(faults)


def speech_messages(
    text: str,
    audio: AudioRef | None,
    *,
    scene: str | None = None,
    ref_text: str | None = None,
    ref_audio: AudioRef | None = None,
) -> tuple[tuple[Turn, ...], int | None]:
    """The prompt of upstream's `examples/generation.py` for one speaker, and its `start_index`.

    `audio` None leaves the last assistant turn out: the prompt to generate from. With a reference clip the system
    turn stands only if there is a scene, and training starts at the last user turn.
    Raises ValueError when `ref_text` and `ref_audio` are not given together.
    """
    if (ref_text is None) != (ref_audio is None):
        raise ValueError("ref_text and ref_audio belong together: give the reference clip and its transcript, or none")
    turns = []
    if scene:
        scene_block = f"<|scene_desc_start|>\n{scene}\n<|scene_desc_end|>"
        turns.append(Turn("system", (f"{SYSTEM_PROMPT}\n\n{scene_block}",)))
    elif ref_audio is None:
        turns.append(Turn("system", (SYSTEM_PROMPT,)))
    start_index = None
    if ref_audio is not None:
        turns += [Turn("user", (ref_text,)), Turn("assistant", (ref_audio,))]
        start_index = len(turns)
    turns.append(Turn("user", (text,)))
    if audio is not None:
        turns.append(Turn("assistant", (audio,)))
    return tuple(turns), start_index


class _Object(dict):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


def _parse_int(digits: str) -> int | float:
    # int() raises on 4300 digits and float() on an int past 1e308; read as a float, both end as a plain infinity.
    return int(digits) if len(digits) <= 18 else float(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_int=_parse_int)
_SCANNER = json.JSONDecoder(parse_int=_parse_int)  # finds where a value ends


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


class _RowCheck:
    """Turns one JSON value into a Row. Problems go to `faults` and the checking goes on; such a row is not usable."""

    def __init__(self, file: str, line: int, folder: Path, *, look_for_clips: bool = True):
        self.file, self.line, self.folder = file, line, folder
        self.look_for_clips = look_for_clips
        self.faults: list[Fault] = []

    def fault(self, field: str, problem: str) -> None:
        self.faults.append(Fault(self.file, self.line, field, problem))

    def row(self, value: Any) -> Row | None:
        if not isinstance(value, dict):
            self.fault("row", f"must be a JSON object, found {_shown(value)}")
            return None
        self.plain_json(value, "")
        if "messages" in value:
            return self.chatml(value)
        if "audio" in value or "text" in value:
            return self.speech(value)
        self.fault("row", "has neither `messages` (a ChatML row) nor `audio` and `text` (a speech row)")
        self.known_fields(value, "", tuple(dict.fromkeys(CHATML_FIELDS + SPEECH_FIELDS)))
        return None

    def chatml(self, row: dict) -> Row:
        self.known_fields(row, "", CHATML_FIELDS)
        misc = row.get("misc")
        if not isinstance(misc, dict | None):
            self.fault("misc", f"must be an object, found {_shown(misc)}")
        speaker = self.text(row.get("speaker"), "speaker", optional=True)
        if speaker is None and isinstance(misc, dict) and isinstance(misc.get("speaker"), str):
            speaker = misc["speaker"] or None

        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            found = "an empty list" if messages == [] else _shown(messages)
            self.fault("messages", f"must be a list of at least one message, found {found}")
            messages = []
        turns = tuple(self.turn(message, f"messages[{index}]") for index, message in enumerate(messages))
        return Row(turns, self.start_index(row, messages), speaker, self.file, self.line)

    def start_index(self, row: dict, messages: list) -> int | None:
        """The row's start_index; a fault also where it, or the roles, leave nothing to train on."""
        start = row.get("start_index")
        if start is not None and type(start) is not int:  # a bool is an int to isinstance
            self.fault("start_index", f"must be a whole number, found {_shown(start)}")
            start = None
        if start is not None and messages and not 0 <= start < len(messages):
            self.fault("start_index", f"must be 0 to {len(messages) - 1} (the index of a message), found {start}")
            start = None

        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        if not roles or any(role not in ROLES for role in roles):  # then the fault is there, and reported there
            return start
        if "assistant" not in roles:
            self.fault("messages", "has no assistant turn, so nothing to train on")
        elif start is not None and "assistant" not in roles[start:]:
            last = max(index for index, role in enumerate(roles) if role == "assistant")
            self.fault("start_index", f"leaves nothing to train on: the last assistant turn is {last}, found {start}")
        return start

    def turn(self, message: Any, field: str) -> Turn | None:
        if not isinstance(message, dict):
            self.fault(field, f"must be an object with `role` and `content`, found {_shown(message)}")
            return None
        self.known_fields(message, field, TURN_FIELDS)
        role = message.get("role")
        if role not in ROLES:
            problem = "is missing" if role is None else f"found {_shown(role)}"
            self.fault(f"{field}.role", f"{problem}; must be system, user or assistant")
        recipient = self.text(message.get("recipient"), f"{field}.recipient", optional=True)
        if recipient is not None and role in ("system", "user"):
            self.fault(f"{field}.recipient", f"only an assistant turn has a recipient, this one is {role}")

        content, field = message.get("content"), f"{field}.content"
        if content == []:
            self.fault(field, "is an empty list; give text or audio")
        if isinstance(content, list):
            pieces = tuple(self.piece(item, f"{field}[{index}]") for index, item in enumerate(content))
        else:
            pieces = (self.piece(content, field),)
        return Turn(role, pieces, recipient)

    def piece(self, value: Any, field: str) -> str | AudioRef | None:
        if value is None or isinstance(value, str):
            return self.text(value, field)
        if not isinstance(value, dict):
            self.fault(field, f"must be text or an object of type text or audio, found {_shown(value)}")
            return None
        kind = value.get("type")
        if kind == "text":
            self.known_fields(value, field, TEXT_FIELDS)
            return self.text(value.get("text"), f"{field}.text")
        if kind == "audio":
            self.known_fields(value, field, AUDIO_FIELDS)
            return self.audio(value, field)
        problem = "is missing" if kind is None else f"found {_shown(kind)}"
        self.fault(f"{field}.type", f"{problem}; must be text or audio")
        return None

    def audio(self, value: dict, field: str) -> AudioRef:
        row_id = value.get("row_id")
        if row_id is not None and type(row_id) is not int:
            self.fault(f"{field}.row_id", f"must be a whole number, found {_shown(row_id)}")
        path, raw_audio = None, value.get("raw_audio")
        if raw_audio is None:
            path = self.clip_path(value.get("audio_url"), f"{field}.audio_url")
        else:  # then audio_url is a mere placeholder, as upstream has it
            self.base64(raw_audio, f"{field}.raw_audio")
        offset_sec = self.seconds(value.get("offset"), f"{field}.offset", zero=True)
        duration_sec = self.seconds(value.get("duration"), f"{field}.duration")
        return AudioRef(path, raw_audio, offset_sec, duration_sec, field)

    def speech(self, row: dict) -> Row | None:
        self.known_fields(row, "", SPEECH_FIELDS)
        self.seconds(row.get("duration"), "duration")
        speaker = self.text(row.get("speaker"), "speaker", optional=True)
        scene = self.text(row.get("scene"), "scene", optional=True)
        text = self.text(row.get("text"), "text")
        audio = AudioRef(self.clip_path(row.get("audio"), "audio"), field="audio")

        ref_text, ref_audio = row.get("ref_text"), row.get("ref_audio")
        if ref_text is not None or ref_audio is not None:
            ref_text = self.text(ref_text, "ref_text", missing="is missing; it is the transcript of ref_audio")
            ref_path = self.clip_path(ref_audio, "ref_audio", missing="is missing; ref_text is its transcript")
            ref_audio = AudioRef(ref_path, field="ref_audio")
        if self.faults:
            return None
        turns, start_index = speech_messages(text, audio, scene=scene, ref_text=ref_text, ref_audio=ref_audio)
        return Row(turns, start_index, speaker, self.file, self.line)

    def plain_json(self, value: Any, field: str, depth: int = 1) -> None:
        """What Python's parser lets through anywhere in a row and JSON, or whoever reads the row, does not."""
        if depth > MAX_DEPTH:
            self.fault(field, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(value, _Object):
            for key in value.repeated:
                self.fault(_member(field, key), "is given more than once in the same object; keep one")
            for key, item in value.items():
                self.plain_json(item, _member(field, key), depth + 1)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self.plain_json(item, f"{field}[{index}]", depth + 1)
        elif isinstance(value, float) and not math.isfinite(value):
            self.fault(field, f"must be a finite number, found {_shown(value)}")
        elif isinstance(value, str) and (surrogate := _SURROGATE.search(value)):
            self.fault(field, f"holds half a surrogate pair ({_shown(surrogate[0])}), which is not a character")

    def known_fields(self, owner: dict, field: str, names: tuple[str, ...]) -> None:
        for key in owner:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"the fields here are {', '.join(names)}"
                self.fault(_member(field, key), f"unknown field; {hint}")

    def text(self, value: Any, field: str, *, optional: bool = False, missing: str = "is missing") -> str | None:
        if value is None:
            if not optional:
                self.fault(field, missing)
        elif not isinstance(value, str):
            self.fault(field, f"must be text, found {_shown(value)}")
        elif not value.strip():
            self.fault(field, "is empty" + ("; leave it out" if optional else ""))
        else:
            for placeholder in AUDIO_PLACEHOLDERS:
                if placeholder in value:
                    self.fault(field, f"holds {placeholder}, which stands for a clip; give clips as audio content")
            return value
        return None

    def seconds(self, value: Any, field: str, *, zero: bool = False) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(field, f"must be a number of seconds, found {_shown(value)}")
            return None
        if value < 0 or (value == 0 and not zero):
            self.fault(field, f"must be {'0 or more' if zero else 'above 0'} seconds, found {_shown(value)}")
        return float(value)

    def base64(self, value: Any, field: str) -> None:
        if not isinstance(value, str):
            self.fault(field, f"must be text in base64, found {_shown(value)}")
            return
        try:
            if not base64.b64decode(value, validate=True):
                self.fault(field, "is empty; give the bytes of an audio file in base64, or leave it out")
        except ValueError as error:  # binascii.Error is one, and so is text beyond ASCII
            self.fault(field, f"is not base64 ({error}); give the bytes of an audio file, without line breaks")

    def clip_path(self, value: Any, field: str, missing: str = "is missing") -> Path | None:
        if value is None:
            self.fault(field, missing)
        elif not isinstance(value, str):
            self.fault(field, f"must be the path of an audio file, found {_shown(value)}")
        elif not value.strip():
            self.fault(field, "is empty; give the path of an audio file")
        elif _URL.match(value):
            self.fault(field, f"nothing is fetched from a manifest: give a path instead of {_shown(value)}")
        elif "\0" in value:
            self.fault(field, f"holds a NUL byte: {_shown(value)}")
        else:
            path = self.folder / value
            if self.look_for_clips and (problem := _file_problem(path)):
                self.fault(field, f"{_shown(value)} {problem}")
            return path
        return None


def _file_problem(path: Path) -> str | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "does not exist; paths are relative to the manifest's folder"
    except (OSError, ValueError) as error:  # ValueError: a character that no file name has here
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISDIR(status.st_mode):
        return "is a directory; give the path of an audio file"
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        return "is not a regular file"
    if status.st_size == 0:
        return "is empty (0 bytes)"
    return None


def _member(field: str, key: str) -> str:
    # Keys are the user's: escaped and cut, so that a fault stays one printable line.
    name = key if _PLAIN_KEY.fullmatch(key) else _shown(key)
    return f"{field}.{name}" if field else name


def _shown(value: Any) -> str:
    """A JSON value in a few printable characters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    return json.dumps(value)
