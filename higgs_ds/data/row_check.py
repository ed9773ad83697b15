"""One row of a manifest: a JSON value in, a `Row` or all that is wrong with it out; nothing is decoded."""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import foreign
from .chatml import ROLES, SERVED, AudioRef, Row, Turn, speech_messages
from .clip_paths import MISSING, URL, ClipPaths
from .columns import (
    AUDIO_FIELDS,
    ITEM_FIELDS,
    TEXT_FIELDS,
    TURN_FIELDS,
    Columns,
    Reading,
    member,
    reading,
    unread_name,
    weighty_misspelling,
)
from .controls import DEFAULT_CONTROLS, find_control
from .faults import Fault
from .json_values import given, number, shown, without_blanks

NOT_THERE = ("", "placeholder")  # what upstream's dataclasses hold where there is no clip
OWN_REFERENCE = "the clip that is to be spoken; give another clip of the voice, or none"
LARGEST_WHOLE = 2**53  # up to which a float is one whole number and no other
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Rules:
    """What all rows of a manifest are checked by, and what is counted over them."""

    file: str
    paths: ClipPaths
    controls: re.Pattern[str] = DEFAULT_CONTROLS
    prompt_style: str = SERVED  # of speech rows
    columns: Columns = field(default_factory=Columns)
    scenes: int = 0  # rows without faults that have one


class RowCheck:
    """Turns one JSON value into a Row. Problems go to `faults` and the checking goes on; such a row is not usable."""

    def __init__(self, rules: Rules, line: int, element: int = -1, *, again: bool = False, elsewhere: bool = False):
        """`again`: a row without faults; nothing is counted, and clips are only looked for if they are `elsewhere`."""
        self.rules, self.line, self.element = rules, line, element
        self.again = again
        self.found_elsewhere = elsewhere
        self.faults: list[Fault] = []
        self.unread: dict[str, None] = {}  # what the row has that nobody reads
        self.stated_sec: dict[str, float] = {}  # of the clips of a ChatML row, by field

    def fault(self, field_name: str, problem: str, missing: str | None = None) -> None:
        fault = Fault(self.rules.file, self.line, field_name, problem, missing=missing, element=self.element)
        self.faults.append(fault)

    def row(self, value: Any) -> Row | None:
        """The row, usable only if `faults` stays empty."""
        if not isinstance(value, dict):
            self.fault("row", f"must be a JSON object, found {shown(value)}")
            return None
        read = reading(tuple(value))
        row = self.of_kind(value, read)
        for name in self.unread:
            self.rules.columns.count(name)
        return row

    def of_kind(self, value: dict, read: Reading) -> Row | None:
        if not self.again:
            self.given_once(value, "", read.used)
            for column, problem in read.faults:
                self.fault(column, problem)
            for column in read.unread:
                self.unread[unread_name("", column)] = None
        if read.kind == "chatml":
            return self.chatml(value)
        return self.speech(value, read) if read.kind == "speech" else None

    def chatml(self, row: dict) -> Row:
        misc = given(row.get("misc")) or None
        if not isinstance(misc, dict | None):
            self.fault("misc", f"must be an object, found {shown(misc)}")
        speaker = self.speaker(row.get("speaker"), "speaker")
        if isinstance(misc, dict):
            self.given_once(misc, "misc", ("speaker",))
            if speaker is None and isinstance(misc.get("speaker"), str):
                speaker = self.speaker(misc["speaker"], "misc.speaker")

        messages = row["messages"]
        if not self.again and (problem := foreign.swift_audios(row, self.rules.file)):
            self.fault("audios", problem)
        if not isinstance(messages, list) or not messages:
            found = "an empty list" if messages == [] else shown(messages)
            self.fault("messages", f"must be a list of at least one message, found {found}")
            messages = []
        turns = tuple(self.turn(message, f"messages[{index}]") for index, message in enumerate(messages))
        start_index = self.start_index(row, messages)
        checked = Row(turns, start_index, speaker, self.rules.file, self.line, element=self.element)
        if self.faults or (self.again and not self.stated_sec) or (clip := checked.spoken_clip()) is None:
            return checked
        self.reference(checked)
        stated_sec = self.stated_sec.get(checked.audio_refs[clip][0])
        return checked if stated_sec is None else dataclasses.replace(checked, stated_sec=stated_sec)

    def start_index(self, row: dict, messages: list) -> int | None:
        """The row's start_index; a fault also where it, or the roles, leave nothing to train on."""
        start = given(row.get("start_index"))
        if start is not None and type(start) is not int:  # a bool is an int to isinstance
            self.fault("start_index", f"must be a whole number, found {shown(start)}")
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

    def turn(self, message: Any, where: str) -> Turn | None:
        if not isinstance(message, dict):
            self.fault(where, f"must be an object with `role` and `content`, found {shown(message)}")
            return None
        self.known_fields(message, where, TURN_FIELDS)
        role = message.get("role")
        if role not in ROLES:
            problem = "is missing" if role is None else f"found {shown(role)}"
            self.fault(f"{where}.role", f"{problem}; must be system, user or assistant")
        recipient = self.text(message.get("recipient"), f"{where}.recipient", optional=True)
        if recipient and role in ("system", "user"):
            self.fault(f"{where}.recipient", f"only an assistant turn has a recipient, this one is {role}")

        content, where = message.get("content"), f"{where}.content"
        if role == "system" and content is None and "content" in message:
            content = ""
        markup = role != "assistant"
        if isinstance(content, list):
            pieces = [self.piece(item, f"{where}[{index}]", markup) for index, item in enumerate(content)]
        else:
            pieces = [self.piece(content, where, markup)]
        pieces = without_blanks(pieces)
        if not pieces and role != "system":
            self.fault(where, "is an empty list; give text or audio" if content == [] else "is empty")
        return Turn(role, pieces or ("",), recipient)  # as upstream reads it, a system turn may say nothing

    def piece(self, value: Any, where: str, markup: bool) -> str | AudioRef | None:
        if value is None or isinstance(value, str):
            return self.piece_text(value, where, markup)
        if not isinstance(value, dict):
            self.fault(where, f"must be text or an object of type text or audio, found {shown(value)}")
            return None
        kind = value.get("type")
        if kind == "text":
            self.known_fields(value, where, TEXT_FIELDS)
            return self.piece_text(value.get("text"), f"{where}.text", markup)
        if kind == "audio":
            self.known_fields(value, where, AUDIO_FIELDS)
            return self.audio(value, where)
        problem = "is missing" if kind is None else f"found {shown(kind)}"
        self.fault(f"{where}.type", f"{problem}; must be text or audio")
        return None

    def piece_text(self, value: Any, where: str, markup: bool) -> str | None:
        """A text that may be blank: what stands beside it decides."""
        blank = isinstance(value, str) and not value.strip()
        return value if blank else self.text(value, where, markup=markup)

    def audio(self, value: dict, where: str) -> AudioRef:
        """A clip as upstream's `AudioContent`: an `audio_url` that is there wins over `raw_audio`, as in its engine."""
        url, raw_audio = value.get("audio_url"), value.get("raw_audio")
        has_bytes = given(raw_audio) is not None and raw_audio not in NOT_THERE
        if isinstance(url, dict):
            ref = self.clip(url, f"{where}.audio_url")
        elif has_bytes and not self.is_file(url):
            ref = AudioRef(raw_audio=self.base64(raw_audio, f"{where}.raw_audio"))
        else:
            if url == "placeholder" or (url == "" and raw_audio in NOT_THERE):
                self.fault(where, f"audio_url is {shown(url)} and there is no raw_audio; give one of the two")
                url = None
            else:
                url = self.clip_path(url, f"{where}.audio_url")
            ref = AudioRef(url)
        offset_sec, duration_sec, stated_sec = self.span(value, f"{where}.")
        if stated_sec is not None:
            self.stated_sec[where] = stated_sec
        return AudioRef(ref.path, ref.raw_audio, offset_sec, duration_sec, where)

    def span(self, value: dict, where: str) -> tuple[float | None, float | None, float | None]:
        """(offset, duration, stated duration) of a clip. A duration without an offset cuts nothing: it only states.

        So upstream's training files have it; its own engine reads neither of the two. Zeros for both are how tables
        without nulls write neither.
        """
        offset, duration = value.get("offset"), value.get("duration")
        if offset is None and duration is None:
            return None, None, None
        offset, duration = number(offset), number(duration)
        offset_sec = self.seconds(offset, f"{where}offset", zero=True)
        if offset in (None, 0) and type(duration) in (int, float) and duration <= 0:
            duration = None
        stated_sec = self.seconds(duration, f"{where}duration")
        if offset is None or (offset_sec == 0 and duration is None):
            return None, None, stated_sec
        return offset_sec, stated_sec, stated_sec

    def is_file(self, url: Any) -> bool:
        """Whether an audio_url names a clip, so that the bytes beside it are not needed; a URL is not fetched."""
        if not isinstance(url, str) or url in NOT_THERE or URL.match(url) or "\0" in url:
            return False
        return os.path.exists(self.rules.paths.path(url, elsewhere=True))

    def speech(self, row: dict, read: Reading) -> Row | None:
        of = read.column
        offset_sec, duration_sec, stated_sec = self.span(row, "")
        speaker = self.speaker(row.get(of["speaker"]), of["speaker"])
        scene = self.text(row.get("scene"), "scene", optional=True)
        text = self.text(row.get(of["text"]), of["text"], missing=read.missing["text"])
        audio = self.clip(row.get(of["audio"]), of["audio"], missing=read.missing["audio"])
        if offset_sec is not None:
            audio = AudioRef(audio.path, audio.raw_audio, offset_sec, duration_sec, audio.field)

        ref_text, ref_audio = given(row.get(of["ref_text"])), given(row.get(of["ref_audio"]))
        if ref_text is not None or ref_audio is not None:
            ref_text = self.text(ref_text, of["ref_text"], missing="is missing; it is the transcript of ref_audio")
            ref_audio = self.clip(ref_audio, of["ref_audio"], missing="is missing; ref_text is its transcript")
        if self.faults:
            return None
        turns, start_index = speech_messages(
            text,
            audio,
            scene=scene,
            ref_text=ref_text,
            ref_audio=ref_audio,
            prompt_style=self.rules.prompt_style,
        )
        of_row = {"stated_sec": stated_sec, "is_speech": True, "scene": scene and scene.strip()}
        of_row |= {"prompt_style": self.rules.prompt_style, "element": self.element}
        checked = Row(turns, start_index, speaker, self.rules.file, self.line, **of_row)
        if ref_audio is not None:
            self.reference(checked)
        return checked

    def reference(self, row: Row) -> None:
        """Faults of earlier clips that hold the one to be spoken; that a copy does is known once contents are."""
        if self.again:
            return
        *earlier, (_, spoken) = row.audio_refs
        for where, ref in earlier:
            if ref.holds(spoken):
                self.fault(where, f"{'is' if ref == spoken else 'holds'} {OWN_REFERENCE}")

    def clip(self, value: Any, where: str, missing: str = "is missing") -> AudioRef:
        """A path, or Hugging Face's `{"path", "bytes"}`, of which the bytes win as they do there."""
        if not isinstance(value, dict):
            return AudioRef(self.clip_path(value, where, missing), field=where)
        self.given_once(value, where, ("bytes", "path"))
        if value.get("bytes"):
            return AudioRef(raw_audio=self.base64(value["bytes"], f"{where}.bytes"), field=where)
        if isinstance(value.get("path"), str) and value["path"]:
            return AudioRef(self.clip_path(value["path"], f"{where}.path"), field=where)
        self.fault(where, "must be the path of an audio file, found an object without `path` or `bytes`")
        return AudioRef(field=where)

    def given_once(self, owner: dict, where: str, names: tuple[str, ...]) -> None:
        """A fault for each of these fields that is there twice: Python's parser takes the last without a word."""
        for key in getattr(owner, "repeated", ()):
            if key in names:
                self.fault(member(where, key), "is given more than once in the same object; keep one")

    def characters(self, value: str, where: str) -> bool:
        """Whether a text is one; a fault where JSON's escapes have left half a character in it."""
        if value.isascii() or (surrogate := _SURROGATE.search(value)) is None:
            return True
        self.fault(where, f"holds half a surrogate pair ({shown(surrogate[0])}), which is not a character")
        return False

    def known_fields(self, owner: dict, where: str, names: tuple[str, ...]) -> None:
        """Within a message: others are counted; one that looks like a field which changes the training is a fault."""
        self.given_once(owner, where, names)
        for key in owner:
            if key in names:
                continue
            if problem := weighty_misspelling(key, names):
                self.fault(member(where, key), problem)
            elif not (self.again or (key in ITEM_FIELDS and not owner[key])):  # in a table each item has all of them
                self.unread[unread_name(where, key)] = None

    def speaker(self, value: Any, where: str) -> str | None:
        """What tells voices apart; no model reads it. A number may have become a float beside rows without one."""
        value = given(value)
        if type(value) is float and abs(value) < LARGEST_WHOLE:
            value = int(value) if value.is_integer() else repr(value)
        if type(value) is int:
            return str(value)
        if value is not None and not isinstance(value, str):
            self.fault(where, f"must be text, found {shown(value)}")
            return None
        return value if value is None or self.characters(value, where) else None

    def text(
        self, value: Any, where: str, *, optional: bool = False, missing: str = "is missing", markup: bool = False
    ) -> str | None:
        if given(value) is None:
            if not optional:
                self.fault(where, "is empty" if isinstance(value, str) else missing)
        elif not isinstance(value, str):
            self.fault(where, f"must be text, found {shown(value)}")
        else:
            if self.again or not self.characters(value, where):
                return value
            if problem := find_control(value, self.rules.controls, markup=markup):
                self.fault(where, problem)
            return value
        return None

    def seconds(self, value: Any, where: str, *, zero: bool = False) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(where, f"must be a number of seconds, found {shown(value)}")
            return None
        if not math.isfinite(value):
            self.fault(where, f"must be a finite number, found {shown(value)}")
            return None
        if value < 0 or (value == 0 and not zero):
            self.fault(where, f"must be {'0 or more' if zero else 'above 0'} seconds, found {shown(value)}")
        return float(value)

    def base64(self, value: Any, where: str) -> str | None:
        if not isinstance(value, str):
            self.fault(where, f"must be text in base64, found {shown(value)}")
            return None
        if self.again:
            return value
        try:
            if not base64.b64decode(value, validate=True):
                self.fault(where, "is empty; give the bytes of an audio file in base64, or leave it out")
        except ValueError as error:  # binascii.Error is one, and so is text beyond ASCII
            self.fault(where, f"is not base64 ({error}); give the bytes of an audio file, without line breaks")
        return value

    def clip_path(self, value: Any, where: str, missing: str = "is missing") -> Path | None:
        if value is None:
            self.fault(where, missing)
        elif not isinstance(value, str):
            self.fault(where, f"must be the path of an audio file, found {shown(value)}")
        elif not value.strip():
            self.fault(where, "is empty; give the path of an audio file")
        elif URL.match(value):
            self.fault(where, f"nothing is fetched from a manifest: give a path instead of {shown(value)}")
        elif "\0" in value:
            self.fault(where, f"holds a NUL byte: {shown(value)}")
        elif self.characters(value, where):
            if self.again:
                return self.rules.paths.path(value, elsewhere=self.found_elsewhere)
            path, problem, elsewhere = self.rules.paths.find(value)
            self.found_elsewhere |= elsewhere
            if problem:
                self.fault(where, f"{shown(value)} {problem}", value if problem.startswith(MISSING) else None)
            return path
        return None
