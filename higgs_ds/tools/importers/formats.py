"""Readers of other tools' formats, one each, which make manifest rows; clips stay where they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...data.chatml import speech_messages
from ...data.foreign import FILE_COLUMNS, FORMATS, TABLE_NAMES, TEXT_COLUMNS, guess, with_texts
from ...errors import ConfigError, reading
from .found import (
    REF_AUDIO_COLUMNS,
    REF_TEXT_COLUMNS,
    SPEAKER_COLUMNS,
    TWICE,
    ClipFinder,
    Found,
    beside,
    clean,
    first,
    named,
    read_of,
)
from .ljspeech import read_ljspeech, table_of
from .ms_swift import read_ms_swift
from .tables import DECODER, json_rows, table_rows

# Of a corpus's folders those that hold a part of it, or all of one kind of file, and not a speaker.
_NO_SPEAKER = re.compile(
    r"(train|dev|test|valid|val|validation|eval)([-_.].*)?|wavs?\d*|audios?|clips?|data|flac|mp3|speech|txt|corpus",
    re.IGNORECASE,
)
_OF_REFERENCE = ("ref_", "reference_")
_TEXTS = tuple(
    f"{of}{name}" for of in ("", *_OF_REFERENCE) for name in "transcript text transcript_file text_file".split()
)
# Of a sample of train-higgs-audio's, beside those of any speech row.
SAMPLE_COLUMNS = frozenset(
    ("ref_speakers", "audio_id", "audio_file", "ref_audio_file", "reference_audio_file", *_TEXTS)
)


def read_foreign(path: Path, kind: str | None) -> tuple[str, Found]:
    """(format, rows) of a file or folder; the format is detected where none is given. Raises ConfigError."""
    if not os.path.exists(path):
        raise ConfigError([f"{path}: does not exist; give a file or folder in one of {', '.join(FORMATS)}"])
    kind = kind or guess(path)
    if kind is None:
        raise ConfigError([f"{path}: its format is not known; give --from {'|'.join(FORMATS)}"])
    with reading(f"{path}: cannot be read as {FORMATS[kind]}"):
        return kind, READERS[kind](path)


def read_train_higgs_audio(path: Path) -> Found:
    """`metadata.json` with `samples`, or these alone: each names its clip, its text's file and its references."""
    file = table_of(path, ("metadata.json", "metadata.jsonl"))
    found = Found()
    for origin, sample in _samples(file, found):
        values = named(sample)
        if values is None:
            found.leave_out(TWICE, origin)
            continue
        found.count_unread(values, SAMPLE_COLUMNS | read_of(values))
        try:
            _add_sample(found, origin, file.parent, values)
        except UnicodeDecodeError:
            found.leave_out("rows whose text file is not UTF-8", origin)
    return found


def _samples(file: Path, found: Found) -> Iterator[tuple[str, dict]]:
    try:
        whole = DECODER.decode(file.read_text(encoding="utf-8-sig").strip())
    except json.JSONDecodeError:
        yield from json_rows(file, found)  # a sample a line
        return
    samples = whole.get("samples", [whole]) if isinstance(whole, dict) else whole
    if not isinstance(samples, list) or (isinstance(whole, dict) and not {"samples", "transcript_file"} & whole.keys()):
        raise ValueError("it has no list of `samples`")
    for number, sample in enumerate(samples):
        origin = f"{file}: samples[{number}]"
        if isinstance(sample, dict):
            yield origin, sample
        else:
            found.leave_out("samples that are no objects", origin)


def _add_sample(found: Found, origin: str, folder: Path, sample: dict[str, Any]) -> None:
    name = first(sample, "audio_file", *FILE_COLUMNS)
    audio = beside(folder, name) if name else None
    ref_name = first(sample, "ref_audio_file", "reference_audio_file", *REF_AUDIO_COLUMNS)
    ref_text, text = _text_of(folder, sample, _OF_REFERENCE), _text_of(folder, sample, ("",))
    scene, speakers = (first(sample, "scene") or "").replace("_", " ").strip() or None, sample.get("ref_speakers")
    more = {"speaker": first(sample, "speaker_id", "speaker_name", *SPEAKER_COLUMNS)}
    stated = found.slice_of(origin, sample)
    if stated is None:
        return
    if speakers and "offset" in stated:
        found.leave_out("rows with `ref_speakers` and an `offset`", origin)
    elif speakers:
        _add_dialogue(found, origin, folder, speakers, audio, text, more | {"scene": scene})
    else:
        more |= found.reference(origin, beside(folder, ref_name) if ref_name else None, ref_text, audio)
        found.add(origin, audio, text, scene=scene, **more, **stated)


def _add_dialogue(
    found: Found, origin: str, folder: Path, speakers: Any, audio: Path | None, text: str | None, more: dict
) -> None:
    """A ChatML row: each speaker's tag and transcript answered by a clip of theirs, then what is trained on."""
    references = []
    for number, speaker in enumerate(speakers if isinstance(speakers, list) else [None]):
        values = (named(speaker) or {}) if isinstance(speaker, dict) else {}
        name = first(values, "ref_audio_file", "reference_audio_file", *REF_AUDIO_COLUMNS, "audio_file")
        said = _text_of(folder, values, (*_OF_REFERENCE, ""))
        clip = beside(folder, name) if name else None
        if clip is None or not said or not clean(said):
            found.leave_out("rows with `ref_speakers` of which one has no clip or no transcript", origin)
            return
        if not found.has_clip(clip, origin):
            return
        tag = first(values, "speaker_tag") or f"[SPEAKER{number}]"
        references.append((clean(said) if clean(said).startswith(tag) else f"{tag} {clean(said)}", clip))
    if not text or not clean(text):
        found.leave_out("rows without a text", origin)
    elif found.has_clip(audio, origin):
        [(system, *_), _] = speech_messages("-", None, scene=more["scene"])
        messages: list[dict[str, Any]] = [{"role": "system", "content": system.content[0]}]
        for said, clip in [*references, (clean(text), audio)]:
            answer = [{"type": "audio", "audio_url": os.path.abspath(clip)}]
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        row = {"messages": messages, "start_index": len(messages) - 2}
        found.rows.append(row | ({"speaker": more["speaker"]} if more["speaker"] else {}))


def _text_of(folder: Path, sample: dict, prefixes: tuple[str, ...]) -> str | None:
    """A text given in place, or in a file."""
    for prefix in prefixes:
        if text := first(sample, f"{prefix}transcript", f"{prefix}text"):
            return text
        name = first(sample, f"{prefix}transcript_file", f"{prefix}text_file")
        if name and os.path.isfile(path := beside(folder, name)):
            return path.read_text(encoding="utf-8-sig")
    return None


def read_audiofolder(path: Path) -> Found:
    """Hugging Face's metadata.csv or .jsonl, one a folder, or any table whose header names a clip and a text."""
    found = Found()
    for table in [path] if path.is_file() else _tables(path, found):
        clips = ClipFinder(table.parent)
        is_json = table.suffix.lower() in (".jsonl", ".json")
        for origin, row in json_rows(table, found) if is_json else table_rows(table, found):
            values = named(row)
            if values is None:
                found.leave_out(TWICE, origin)
                continue
            found.count_unread(values, read_of(values))
            audio = clips.find(first(values, *FILE_COLUMNS))
            stated = found.slice_of(origin, values)
            if stated is None:
                continue
            ref_name = first(values, *REF_AUDIO_COLUMNS)
            reference = found.reference(origin, clips.find(ref_name), first(values, *REF_TEXT_COLUMNS), audio)
            more = {"speaker": first(values, *SPEAKER_COLUMNS), "scene": first(values, "scene")}
            found.add(origin, audio, first(values, *TEXT_COLUMNS), **more, **reference, **stated)
    return found


def _tables(folder: Path, found: Found) -> list[Path]:
    """One a folder, hidden ones left out; a second one beside it would give the same rows again."""
    of_folder: dict[Path, list[Path]] = {}
    for name in TABLE_NAMES:
        for table in sorted(folder.rglob(name)):
            if not any(part.startswith(".") for part in table.relative_to(folder).parts):
                of_folder.setdefault(table.parent, []).append(table)
    if not of_folder:
        raise ValueError("it holds no metadata.csv or metadata.jsonl")
    chosen = []
    for tables in of_folder.values():
        chosen.append(next((table for table in tables if guess(table) == "audiofolder"), tables[0]))
        for table in tables:
            if table != chosen[-1]:
                found.leave_out(f"tables beside a {chosen[-1].name} that is read", str(table))
    return chosen


def read_folder(path: Path) -> Found:
    """Every clip that has a text file of its name beside it; a folder of folders has a speaker a folder."""
    if not path.is_dir():
        raise ValueError("it is a file; name the folder")
    found = Found()
    clips = []
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        clips += [(Path(parent, clip), text) for clip, text in with_texts(names)]
    of_clip = {clip: _speaker_of(clip.relative_to(path).parts[:-1]) for clip, _ in clips}
    with_speakers = len({speaker for speaker in of_clip.values() if speaker is not None}) > 1
    for clip, text in sorted(clips):
        if text is None:
            found.leave_out("clips without a text file of the same name", str(clip))
            continue
        try:
            said = (clip.parent / text).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            found.leave_out("rows whose text file is not UTF-8", str(clip.parent / text))
            continue
        found.add(str(clip), clip, said, speaker=of_clip[clip] if with_speakers else None)
    return found


def _speaker_of(folders: tuple[str, ...]) -> str | None:
    """The outermost folder that is a speaker's; `train-clean-100/84/121` is 84's."""
    return next((name for name in folders if not _NO_SPEAKER.fullmatch(name)), None)


READERS: dict[str, Callable[[Path], Found]] = {
    "ljspeech": read_ljspeech,
    "train-higgs-audio": read_train_higgs_audio,
    "ms-swift": read_ms_swift,
    "audiofolder": read_audiofolder,
    "folder": read_folder,
}
