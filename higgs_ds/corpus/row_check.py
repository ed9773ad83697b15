"""One row of a manifest: a JSON value in, a `Row` or all that is wrong with it out; nothing is decoded."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import foreign
from .chatml import ROLES, SERVED, AudioRef, Row, Turn, speech_messages
from .clip_paths import MISSING, URL, ClipPaths
from .columns import AUDIO_FIELDS, TEXT_FIELDS, TURN_FIELDS, Columns, Reading, member, reading, weighty_misspelling
from .controls import DEFAULT_CONTROLS, find_control
from .faults import Fault

# A row needs 5 levels; `misc` may hold anything, but not so deep that reading it overflows the stack.
MAX_DEPTH = 32
NOT_THERE = ("", "placeholder")  # what upstream's dataclasses hold where there is no clip

_SURROGATE = re.compile("[\ud800-\udfff]")


class _Object(dict):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


def parse_int(digits: str) -> int | float:
    """int() raises on 4300 digits and float() on an int past 1e308; read as a float, both end as a plain infinity."""
    return int(digits) if len(digits) <= 18 else float(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_int=parse_int)


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

    def __init__(self, rules: Rules, line: int, *, again: bool = False, elsewhere: bool = False):
        """`again`: a row without faults; nothing is counted, and clips are only looked for if they are `elsewhere`."""
        self.rules, self.line = rules, line
        self.again = again
        self.found_elsewhere = elsewhere
        self.faults: list[Fault] = []

    def fault(self, field_name: str, problem: str, missing: str | None = None) -> None:
        self.faults.append(Fault(self.rules.file, self.line, field_name, problem, missing=missing))

    def row(self, value: Any) -> Row | None:
        """The row, usable only if `faults` stays empty."""
        if not isinstance(value, dict):
            self.fault("row", f"must be a JSON object, found {_shown(value)}")
            return None
        read = reading(tuple(value))
        if not self.again:
            self.plain_json(value, "")
            for column, problem in read.faults:
                self.fault(column, problem)
            for column in read.unread:
                self.rules.columns.count("", column)
        if read.kind == "chatml":
            return self.chatml(value)
        return self.speech(value, read) if read.kind == "speech" else None

    def chatml(self, row: dict) -> Row:
        misc = row.get("misc")
        if not isinstance(misc, dict | None):
            self.fault("misc", f"must be an object, found {_shown(misc)}")
        speaker = self.speaker(row.get("speaker"), "speaker")
        if speaker is None and isinstance(misc, dict) and isinstance(misc.get("speaker"), str):
            speaker = misc["speaker"] or None

        messages = row["messages"]
        if not self.again and (problem := foreign.swift_audios(row, self.rules.file)):
            self.fault("audios", problem)
        if not isinstance(messages, list) or not messages:
            found = "an empty list" if messages == [] else _shown(messages)
            self.fault("messages", f"must be a list of at least one message, found {found}")
            messages = []
        turns = tuple(self.turn(message, f"messages[{index}]") for index, message in enumerate(messages))
        return Row(turns, self.start_index(row, messages), speaker, self.rules.file, self.line)

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

    def turn(self, message: Any, where: str) -> Turn | None:
        if not isinstance(message, dict):
            self.fault(where, f"must be an object with `role` and `content`, found {_shown(message)}")
            return None
        self.known_fields(message, where, TURN_FIELDS)
        role = message.get("role")
        if role not in ROLES:
            problem = "is missing" if role is None else f"found {_shown(role)}"
            self.fault(f"{where}.role", f"{problem}; must be system, user or assistant")
        recipient = message.get("recipient")
        if recipient is not None and recipient != "":
            recipient = self.text(recipient, f"{where}.recipient", optional=True)
        if recipient and role in ("system", "user"):
            self.fault(f"{where}.recipient", f"only an assistant turn has a recipient, this one is {role}")

        content, where = message.get("content"), f"{where}.content"
        if role == "system" and (content in ("", []) or (content is None and "content" in message)):
            return Turn(role, ("",))  # as upstream reads it: a system turn that says nothing
        if content == []:
            self.fault(where, "is an empty list; give text or audio")
        markup = role != "assistant"
        if isinstance(content, list):
            pieces = tuple(self.piece(item, f"{where}[{index}]", markup) for index, item in enumerate(content))
        else:
            pieces = (self.piece(content, where, markup),)
        return Turn(role, pieces, recipient or None)

    def piece(self, value: Any, where: str, markup: bool) -> str | AudioRef | None:
        if value is None or isinstance(value, str):
            return self.text(value, where, markup=markup)
        if not isinstance(value, dict):
            self.fault(where, f"must be text or an object of type text or audio, found {_shown(value)}")
            return None
        kind = value.get("type")
        if kind == "text":
            self.known_fields(value, where, TEXT_FIELDS)
            return self.text(value.get("text"), f"{where}.text", markup=markup)
        if kind == "audio":
            self.known_fields(value, where, AUDIO_FIELDS)
            return self.audio(value, where)
        problem = "is missing" if kind is None else f"found {_shown(kind)}"
        self.fault(f"{where}.type", f"{problem}; must be text or audio")
        return None

    def audio(self, value: dict, where: str) -> AudioRef:
        """A clip as upstream's `AudioContent`: an `audio_url` that is there wins over `raw_audio`, as in its engine."""
        row_id = value.get("row_id")
        if row_id is not None and type(row_id) is not int:
            self.fault(f"{where}.row_id", f"must be a whole number, found {_shown(row_id)}")
        url, raw_audio = value.get("audio_url"), value.get("raw_audio")
        if isinstance(url, dict):
            ref = self.clip(url, f"{where}.audio_url")
        elif raw_audio not in (None, "") and not self.is_file(url):
            ref = AudioRef(raw_audio=self.base64(raw_audio, f"{where}.raw_audio"))
        else:
            if url == "placeholder" or (url == "" and raw_audio == ""):
                self.fault(where, f"audio_url is {_shown(url)} and there is no raw_audio; give one of the two")
                url = None
            else:
                url = self.clip_path(url, f"{where}.audio_url")
            ref = AudioRef(url)
        offset_sec = self.seconds(value.get("offset"), f"{where}.offset", zero=True)
        duration_sec = self.seconds(value.get("duration"), f"{where}.duration")
        return AudioRef(ref.path, ref.raw_audio, offset_sec, duration_sec, where)

    def is_file(self, url: Any) -> bool:
        """Whether an audio_url names a clip, so that the bytes beside it are not needed; a URL is not fetched."""
        if not isinstance(url, str) or url in NOT_THERE or URL.match(url) or "\0" in url:
            return False
        return os.path.exists(self.rules.paths.path(url, elsewhere=True))

    def speech(self, row: dict, read: Reading) -> Row | None:
        of = read.column
        stated_sec = self.seconds(row.get("duration"), "duration")
        speaker = self.speaker(row.get(of["speaker"]), of["speaker"])
        scene = self.text(row.get("scene"), "scene", optional=True)
        text = self.text(row.get(of["text"]), of["text"], missing=read.missing["text"])
        audio = self.clip(row.get(of["audio"]), of["audio"], missing=read.missing["audio"])
        if row.get("offset") is not None:
            offset_sec = self.seconds(row["offset"], "offset", zero=True)
            audio = AudioRef(audio.path, audio.raw_audio, offset_sec, stated_sec, audio.field)

        ref_text, ref_audio = row.get(of["ref_text"]), row.get(of["ref_audio"])
        if ref_text in (None, "") and ref_audio in (None, ""):
            ref_text = ref_audio = None
        else:
            ref_text = self.text(ref_text, of["ref_text"], missing="is missing; it is the transcript of ref_audio")
            ref_audio = self.clip(ref_audio, of["ref_audio"], missing="is missing; ref_text is its transcript")
            if ref_audio == audio and not self.faults:
                self.fault(of["ref_audio"], "is the clip that is to be spoken; give another clip of the voice, or none")
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
        of_row["prompt_style"] = self.rules.prompt_style
        return Row(turns, start_index, speaker, self.rules.file, self.line, **of_row)

    def clip(self, value: Any, where: str, missing: str = "is missing") -> AudioRef:
        """A path, or Hugging Face's `{"path", "bytes"}`, of which the bytes win as they do there."""
        if not isinstance(value, dict):
            return AudioRef(self.clip_path(value, where, missing), field=where)
        if value.get("bytes"):
            return AudioRef(raw_audio=self.base64(value["bytes"], f"{where}.bytes"), field=where)
        if isinstance(value.get("path"), str) and value["path"]:
            return AudioRef(self.clip_path(value["path"], f"{where}.path"), field=where)
        self.fault(where, "must be the path of an audio file, found an object without `path` or `bytes`")
        return AudioRef(field=where)

    def plain_json(self, value: Any, where: str, depth: int = 1) -> None:
        """What Python's parser lets through anywhere in a row and JSON, or whoever reads the row, does not."""
        if depth > MAX_DEPTH:
            self.fault(where, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(value, _Object):
            for key in value.repeated:
                self.fault(member(where, key), "is given more than once in the same object; keep one")
            for key, item in value.items():
                self.plain_json(item, member(where, key), depth + 1)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self.plain_json(item, f"{where}[{index}]", depth + 1)
        elif isinstance(value, float) and not math.isfinite(value):
            self.fault(where, f"must be a finite number, found {_shown(value)}")
        elif isinstance(value, str) and (surrogate := _SURROGATE.search(value)):
            self.fault(where, f"holds half a surrogate pair ({_shown(surrogate[0])}), which is not a character")

    def known_fields(self, owner: dict, where: str, names: tuple[str, ...]) -> None:
        """Within a message: others are counted; one that looks like a field which changes the training is a fault."""
        for key in owner:
            if key in names:
                continue
            if problem := weighty_misspelling(key, names):
                self.fault(member(where, key), problem)
            elif not self.again:
                self.rules.columns.count(where, key)

    def speaker(self, value: Any, where: str) -> str | None:
        if type(value) is int:
            return str(value)
        return None if value == "" else self.text(value, where, optional=True)

    def text(
        self, value: Any, where: str, *, optional: bool = False, missing: str = "is missing", markup: bool = False
    ) -> str | None:
        if value is None:
            if not optional:
                self.fault(where, missing)
        elif not isinstance(value, str):
            self.fault(where, f"must be text, found {_shown(value)}")
        elif not value.strip():
            self.fault(where, "is empty" + ("; leave it out" if optional else ""))
        else:
            if not self.again and (problem := find_control(value, self.rules.controls, markup=markup)):
                self.fault(where, problem)
            return value
        return None

    def seconds(self, value: Any, where: str, *, zero: bool = False) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(where, f"must be a number of seconds, found {_shown(value)}")
            return None
        if value < 0 or (value == 0 and not zero):
            self.fault(where, f"must be {'0 or more' if zero else 'above 0'} seconds, found {_shown(value)}")
        return float(value)

    def base64(self, value: Any, where: str) -> str | None:
        if not isinstance(value, str):
            self.fault(where, f"must be text in base64, found {_shown(value)}")
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
            self.fault(where, f"must be the path of an audio file, found {_shown(value)}")
        elif not value.strip():
            self.fault(where, "is empty; give the path of an audio file")
        elif URL.match(value):
            self.fault(where, f"nothing is fetched from a manifest: give a path instead of {_shown(value)}")
        elif "\0" in value:
            self.fault(where, f"holds a NUL byte: {_shown(value)}")
        else:
            if self.again:
                return self.rules.paths.path(value, elsewhere=self.found_elsewhere)
            path, problem, elsewhere = self.rules.paths.find(value)
            self.found_elsewhere |= elsewhere
            if problem:
                self.fault(where, f"{_shown(value)} {problem}", value if problem.startswith(MISSING) else None)
            return path
        return None


def _shown(value: Any) -> str:
    """A JSON value in a few printable characters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    return json.dumps(value)
