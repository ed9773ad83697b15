"""Reader of ms-swift's `messages`, where `<audio>` tags stand for the clips in `audios`."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from ...data.chatml import ROLES
from ...data.columns import member
from ...data.foreign import AUDIO_TAG
from .found import DUPLICATE, SPEAKER_COLUMNS, Found, beside, clean, first, named, word_of
from .tables import json_rows

CLIP_KEYS = ("audio", "audio_url", "path", "url")  # in a part of a message's content
OF_MANIFEST = "rows with manifest fields that ms-swift does not have"
NO_CONVERSATION = "rows without `messages` and `audios`"
OTHER_MEDIA = "rows with images or videos"

Piece = str | Path | None  # a text, a clip, or None for a tag
Turns = list[tuple[str, list[Piece]]]  # role and pieces


class _LeftOut(Exception):
    """The reason for leaving a row out."""


def read_ms_swift(path: Path, found: Found) -> None:
    """Reads `messages` with `<audio>` tags for the `audios` in order, or with clips in lists of content.

    A user's clip with the assistant's transcript becomes a speech row, and so does a user's text with the assistant's
    clip. Any other conversation with a clip of the assistant becomes a ChatML row, trained from the turn after the
    last one with `loss` false.
    """
    notes: Counter[str] = Counter()
    for origin, row in json_rows(path, found):
        try:
            if (values := named(row)) is None:
                raise _LeftOut(DUPLICATE)
            given = _messages(values)
            turns = _with_clips([(m["role"], _pieces(m.get("content"))) for m in given], values.get("audios"), path)
            notes.update(_add(found, origin, values, turns, _start_index(given)))
        except _LeftOut as reason:
            found.leave_out(str(reason), origin)
    found.notes += [f"{path}: {count:,} × {note}" for note, count in notes.items()]


def _messages(values: dict[str, Any]) -> list[dict]:
    given = values.get("messages")
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise _LeftOut(NO_CONVERSATION)
    if any(named(message) is None for message in given):
        raise _LeftOut(DUPLICATE)
    if any(message.get("role") not in ROLES for message in given):
        raise _LeftOut("conversations with roles other than system, user and assistant")
    if values.get("start_index") is not None:
        raise _LeftOut(OF_MANIFEST)
    if values.get("images") or values.get("videos"):
        raise _LeftOut(OTHER_MEDIA)
    return given


def _pieces(content: Any) -> list[Piece]:
    pieces: list[Piece] = []
    for piece in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind == "text" and isinstance(text := piece.get("text"), str):
            if "<image>" in text or "<video>" in text:
                raise _LeftOut(OTHER_MEDIA)
            for number, part in enumerate(text.split(AUDIO_TAG)):
                pieces += [None] * (number > 0) + [clean(part)] * bool(clean(part))
        elif kind in ("audio", "audio_url"):
            if any(piece.get(name) not in (None, "") for name in ("raw_audio", "offset", "duration")):
                raise _LeftOut(OF_MANIFEST)
            url = piece.get("audio_url")
            name = first({**piece, "audio_url": url.get("url") if isinstance(url, dict) else url}, *CLIP_KEYS)
            pieces.append(name and Path(name))
        elif kind in ("image", "image_url", "video", "video_url"):
            raise _LeftOut(OTHER_MEDIA)
        else:
            raise _LeftOut("conversations whose `content` is neither text nor a list of texts and clips")
    return pieces


def _with_clips(turns: Turns, audios: Any, path: Path) -> Turns:
    """Returns the turns with all tags replaced by clips, in order."""
    places = [piece for _, pieces in turns for piece in pieces if not isinstance(piece, str)]
    names = [word_of(audio) for audio in (audios if isinstance(audios, list) else [audios])]
    if any(places):
        if None in places or (
            audios and sorted(str(name and Path(name)) for name in names) != sorted(map(str, places))
        ):
            raise _LeftOut("rows whose messages and `audios` have different clips")
        names = [*map(str, places)]
    elif None in names:
        raise _LeftOut(NO_CONVERSATION)
    elif not places and len(names) == 1:
        turns[0][1].insert(0, None)
    elif len(places) != len(names):
        raise _LeftOut("rows with different numbers of `<audio>` tags and `audios`")
    clips = (beside(path.parent, name) for name in names if name)
    return [(role, [p if isinstance(p, str) else next(clips) for p in pieces]) for role, pieces in turns]


def _start_index(messages: list[dict]) -> int | None:
    """Returns the index after the last assistant turn with `loss` false; None if all turns are trained on."""
    trained = [(i, message.get("loss")) for i, message in enumerate(messages) if message["role"] == "assistant"]
    off = [i for i, loss in trained if loss is not None and not loss]
    if not off:
        return None
    if off != [i for i, _ in trained[: len(off)]]:
        raise _LeftOut("conversations where `loss` is false after a trained turn")
    if len(off) == len(trained):
        raise _LeftOut("conversations where `loss` is false in all turns")
    return off[-1] + 1


def _add(found: Found, origin: str, values: dict, turns: Turns, start_index: int | None) -> list[str]:
    """Adds a row and returns its notes, to be counted."""
    clips = [piece for _, pieces in turns for piece in pieces if isinstance(piece, Path)]
    speaks = any(role == "assistant" and isinstance(piece, Path) for role, pieces in turns for piece in pieces)
    more = {name: value for name, value in values.items() if name not in ("messages", "audios")}
    texts = [(role, " ".join(p for p in pieces if isinstance(p, str))) for role, pieces in turns if role != "system"]
    is_pair = [role for role, _ in texts] == ["user", "assistant"] and len(clips) == 1
    if is_pair and not (speaks and texts[1][1]):
        row = more | {"file_name": str(clips[0]), "text": texts[0 if speaks else 1][1]}
        before = len(found.rows)
        found.take(origin, row, Path)
        if len(found.rows) == before:
            return []
        given = "user's clip, with the assistant's text read as its transcript; remove such rows if it is a reply"
        unsaid = any(role == "system" and isinstance(piece, str) for role, pieces in turns for piece in pieces)
        return [given] * (not speaks) + ["system turn before a single text and clip: not read"] * unsaid
    if not speaks:
        raise _LeftOut("conversations without a clip of the assistant")
    if not all(pieces for role, pieces in turns if role != "system"):
        raise _LeftOut("conversations with an empty turn")
    if all(found.has_clip(clip, origin) for clip in clips):
        read = ("id", "split", *SPEAKER_COLUMNS)
        found.columns.update(member("", name) for name, value in more.items() if value and name not in read)
        talk: dict[str, Any] = {"messages": [_message(role, pieces) for role, pieces in turns]}
        talk |= {"start_index": start_index, "speaker": first(values, *SPEAKER_COLUMNS)}
        found.keep(
            {name: value for name, value in talk.items() if value is not None}, clips[-1], first(values, "split")
        )
    return []


def _message(role: str, pieces: list[Piece]) -> dict:
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "audio", "audio_url": os.path.abspath(str(p))}
        for p in pieces
    ]
    return {"role": role, "content": content or ""}
