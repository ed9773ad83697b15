"""ms-swift's `messages`, whose `<audio>` tags stand for the clips in `audios`, as speech rows and ChatML rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data.chatml import ROLES
from ...data.foreign import AUDIO_TAG
from .found import SPEAKER_COLUMNS, TWICE, Found, beside, clean, first, named
from .tables import json_rows

COLUMNS = frozenset(("messages", "audios", "id", *SPEAKER_COLUMNS))
OTHER_TAGS = ("<image>", "<video>")
CLIP_KEYS = ("audio", "audio_url", "path", "url")  # of a piece of content
OF_MANIFEST = "rows that are a manifest's already, and say more than is imported"
NO_CONVERSATION = "rows without `messages` and `audios`"


class _LeftOut(Exception):
    """The reason to leave a row out, as it is counted."""


def read_ms_swift(path: Path, found: Found) -> None:
    """`messages` whose `<audio>` tags stand for the `audios` in order, or whose contents are lists with the clips.

    A clip that the user gives and the assistant writes down becomes a speech row, and so does a text that the
    assistant speaks; any other conversation in which the assistant speaks becomes a ChatML row, which trains from
    behind the last turn whose `loss` is false.
    """
    written_down, unsaid = 0, 0
    for origin, row in json_rows(path, found):
        try:
            values = named(row)
            if values is None:
                raise _LeftOut(TWICE)
            messages, start_index, names = _conversation(values)
            clips = [beside(path.parent, name) for name in names]
            before = len(found.rows)
            is_written = _add_talk(found, origin, messages, clips, start_index, first(values, *SPEAKER_COLUMNS))
        except _LeftOut as reason:
            found.leave_out(str(reason), origin)
            continue
        found.count_unread(values, COLUMNS)
        written_down += is_written
        if "text" in (found.rows[before:] or [{}])[0]:
            unsaid += any(message["role"] == "system" and clean(message["content"]) for message in messages)
    if written_down:
        said = f"{written_down:,} × a user's clip with the assistant's text as its transcript"
        found.notes.append(f"{path}: {said}; leave such rows out if the text is a reply instead")
    if unsaid:
        found.notes.append(f"{path}: {unsaid:,} × a system turn of a single text and clip: not read")


def _conversation(row: dict) -> tuple[list[dict], int | None, list[str]]:
    """(messages of role and text with tags, start_index, names of the clips); raises _LeftOut."""
    given, audios = row.get("messages"), row.get("audios")
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise _LeftOut(NO_CONVERSATION)
    if any(named(message) is None for message in given):
        raise _LeftOut(TWICE)
    if any(message.get("role") not in ROLES for message in given):
        raise _LeftOut("conversations with roles other than system, user and assistant")
    if row.get("start_index") is not None:
        raise _LeftOut(OF_MANIFEST)
    messages: list[dict] = []
    within: list[str | None] = []
    for message in given:
        content, held = _flat(message.get("content"))
        messages.append({"role": message["role"], "content": content})
        within += held
    if row.get("images") or row.get("videos") or any(t in m["content"] for m in messages for t in OTHER_TAGS):
        raise _LeftOut("rows with images or videos")
    names = [first({"clip": clip}, "clip") for clip in (audios if isinstance(audios, list) else [audios])]
    tags = sum(message["content"].count(AUDIO_TAG) for message in messages)
    if inner := [clip for clip in within if clip]:
        if len(within) != tags or len(inner) != tags or (audios and sorted(map(str, names)) != sorted(inner)):
            raise _LeftOut("rows whose messages hold other clips than `audios`")
        names = [*inner]
    clips = [name for name in names if name]
    if len(clips) < len(names):
        raise _LeftOut(NO_CONVERSATION)
    if tags == 0 and len(clips) == 1:
        messages[0]["content"] = AUDIO_TAG + messages[0]["content"]
    elif tags != len(clips):
        raise _LeftOut("rows with another number of `<audio>` tags than `audios`")
    return messages, _start_index(given), clips


def _flat(content: Any) -> tuple[str, list[str | None]]:
    """(a content as text with tags, the clips that stand in it, None for one that stands elsewhere)."""
    if isinstance(content, str):
        return content, []
    texts, clips = [], []
    pieces: list[Any] = content if isinstance(content, list) else [None]
    for piece in pieces:
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind == "text" and isinstance(piece.get("text"), str):
            texts.append(piece["text"])
        elif kind in ("audio", "audio_url"):
            if any(piece.get(name) not in (None, "") for name in ("raw_audio", "offset", "duration")):
                raise _LeftOut(OF_MANIFEST)
            url = piece.get("audio_url")
            texts.append(AUDIO_TAG)
            clips.append(first({**piece, "audio_url": url.get("url") if isinstance(url, dict) else url}, *CLIP_KEYS))
        elif kind in ("image", "image_url", "video", "video_url"):
            raise _LeftOut("rows with images or videos")
        else:
            raise _LeftOut("conversations whose `content` is neither text nor a list of texts and clips")
    return "".join(texts), clips


def _start_index(messages: list[dict]) -> int | None:
    """Behind the last assistant turn whose `loss` is false, all after it being trained on; None where all are."""
    trained = [(i, message.get("loss")) for i, message in enumerate(messages) if message["role"] == "assistant"]
    off = [i for i, loss in trained if loss is not None and not loss]
    if not off:
        return None
    if off != [i for i, _ in trained[: len(off)]]:
        raise _LeftOut("conversations whose `loss` is false behind a turn that is trained on")
    if len(off) == len(trained):
        raise _LeftOut("conversations whose `loss` is false everywhere")
    return off[-1] + 1


def _add_talk(
    found: Found, origin: str, messages: list[dict], clips: list[Path], start_index: int | None, speaker: str | None
) -> bool:
    """Adds a row; True if it is a speech row with the assistant's transcript as its text."""
    tags = [message["content"].count(AUDIO_TAG) for message in messages]
    texts = [message["content"].replace(AUDIO_TAG, "").strip() for message in messages]
    roles = [message["role"] for message in messages]
    turns = [i for i, role in enumerate(roles) if role != "system"]
    speaks = sum(count for role, count in zip(roles, tags, strict=True) if role == "assistant")
    is_pair = [roles[i] for i in turns] == ["user", "assistant"] and len(clips) == 1
    if is_pair and not speaks:
        before = len(found.rows)
        found.add(origin, clips[0], texts[-1], speaker=speaker)
        return len(found.rows) > before
    if is_pair and not texts[turns[1]]:
        found.add(origin, clips[0], texts[turns[0]], speaker=speaker)
    elif not speaks:
        raise _LeftOut("conversations in which the assistant has no clip")
    elif not all(texts[i] or tags[i] for i in turns):
        raise _LeftOut("conversations with an empty turn")
    elif all(found.has_clip(clip, origin) for clip in clips):
        left = iter(clips)
        row: dict[str, Any] = {"messages": [_chatml(message, left) for message in messages]}
        if start_index is not None:
            row["start_index"] = start_index
        found.keep(row | ({"speaker": speaker} if speaker else {}), clips[-1])
    return False


def _chatml(message: dict, clips: Iterator[Path]) -> dict:
    pieces: list[Any] = []
    for index, text in enumerate(message["content"].split(AUDIO_TAG)):
        if index:
            pieces.append({"type": "audio", "audio_url": os.path.abspath(next(clips))})
        if clean(text):
            pieces.append({"type": "text", "text": clean(text)})
    return {"role": message["role"], "content": pieces if message["role"] != "system" or pieces else ""}
