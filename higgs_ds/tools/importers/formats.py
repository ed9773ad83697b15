"""Readers of other tools' formats, one each, which make manifest rows; clips stay where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...data.chatml import speech_messages
from ...data.foreign import FILE_COLUMNS, FORMATS, TABLE_NAMES, guess, with_texts
from ...errors import ConfigError, reading
from .found import (
    REF_AUDIO_COLUMNS,
    REF_TEXT_COLUMNS,
    SPEAKER_COLUMNS,
    TWICE,
    ClipFinder,
    Found,
    below_root,
    beside,
    clean,
    first,
    named,
    read_of,
    split_of,
    text_of,
)
from .ljspeech import read_ljspeech, table_of
from .ms_swift import read_ms_swift
from .parts import one_format_each, speakers_in
from .tables import DECODER, json_rows, table_rows

_OF_REFERENCE = ("ref_", "reference_")
_TEXTS = tuple(
    f"{of}{name}" for of in ("", *_OF_REFERENCE) for name in "transcript text transcript_file text_file".split()
)
# Of a sample of train-higgs-audio's, beside those of any speech row.
SAMPLE_COLUMNS = frozenset(
    ("ref_speakers", "audio_id", "audio_file", "ref_audio_file", "reference_audio_file", *_TEXTS)
)


def read_foreign(
    path: Path, source: str | None, *, with_test: bool = False, clips: Path | None = None
) -> tuple[str, Found]:
    """(format, rows) of a file or folder; the format is detected where none is given.

    Args:
        source: one of `FORMATS`, `lhotse:RECIPE` or `datasets:CONFIG`.
        with_test: whether rows of a corpus's test part are rows like any others.
        clips: folder for clips whose sound is not in a file.

    Raises:
        ConfigError: a file or folder that cannot be read.
    """
    kind, _, detail = (source or "").partition(":")
    if kind != "datasets" and not os.path.exists(path):
        raise ConfigError([f"{path}: does not exist; give a file or folder in one of {', '.join(FORMATS)}"])
    kind = kind or guess(path) or ""
    if not kind:
        recipe = "lhotse:RECIPE for a corpus that lhotse prepares, such as lhotse:libritts"
        raise ConfigError([f"{path}: its format is not known; give --from {'|'.join(FORMATS)}, or {recipe}"])
    found = Found(path if path.is_dir() else path.parent, with_test=with_test, clips=clips)
    with reading(f"{path}: cannot be read as {FORMATS[kind]}"):
        READERS[kind](path, found, *([detail] if detail else []))
    found.rows, others = one_format_each(found.rows)
    for row in others:
        found.leave_out("clips of which another format is read", row["audio"])
    return kind, found


def read_train_higgs_audio(path: Path, found: Found) -> None:
    """`metadata.json` with `samples`, or these alone: each names its clip, its text's file and its references."""
    file = table_of(path, ("metadata.json", "metadata.jsonl"))
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
    speaker = first(sample, "speaker_id", "speaker_name", *SPEAKER_COLUMNS)
    more: dict[str, Any] = {"speaker": speaker, "split": split_of(sample)}
    stated = found.slice_of(origin, sample)
    if stated is None:
        return
    if speakers and "offset" in stated:
        found.leave_out("rows with `ref_speakers` and an `offset`", origin)
    elif speakers:
        _add_dialogue(found, origin, folder, speakers, audio, text, more | {"scene": scene})
    else:
        more |= found.reference(origin, beside(folder, ref_name) if ref_name else None, ref_text, audio)
        found.add(origin, audio, text, **more, **stated, scene=scene)


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
        found.keep(row | ({"speaker": more["speaker"]} if more["speaker"] else {}), audio, more["split"])


def _text_of(folder: Path, sample: dict, prefixes: tuple[str, ...]) -> str | None:
    """A text given in place, or in a file."""
    for prefix in prefixes:
        if text := first(sample, f"{prefix}transcript", f"{prefix}text"):
            return text
        name = first(sample, f"{prefix}transcript_file", f"{prefix}text_file")
        if name and os.path.isfile(path := beside(folder, name)):
            return path.read_text(encoding="utf-8-sig")
    return None


def read_audiofolder(path: Path, found: Found) -> None:
    """Hugging Face's metadata.csv or .jsonl, one a folder, or any table whose header names a clip and a text."""
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
            more: dict[str, Any] = {"speaker": first(values, *SPEAKER_COLUMNS), "scene": first(values, "scene")}
            found.add(origin, audio, text_of(values), split=split_of(values), **more, **reference, **stated)


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


def read_folder(path: Path, found: Found) -> None:
    """Every clip that has a text file of its name beside it; speakers are told by the folders."""
    if not path.is_dir():
        raise ValueError("it is a file; name the folder")
    clips: list[tuple[Path, str]] = []
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for clip, text in with_texts(names):
            if text is not None:
                clips.append((Path(parent, clip), text))
            else:
                found.leave_out("clips without a text file of the same name", os.path.join(parent, clip))
    of_folder = {str(clip.parent): below_root(clip.parent, path) for clip, _ in clips}
    speakers = speakers_in(of_folder, (str(clip) for clip, _ in clips))
    texts: dict[Path, str | None] = {}  # of which several clips may be
    for audio, text in sorted(clips):
        file = audio.parent / text
        if file not in texts:
            texts[file] = found.transcript(file)
        if texts[file] is not None:
            found.add(str(audio), audio, texts[file], speaker=speakers[str(audio.parent)])
    if named := {label: folder for folder, label in speakers.items() if label}:
        label, folder = next(iter(named.items()))
        found.notes.append(f"{path}: speakers by their folders, as `{label}` for {os.path.relpath(folder, path)}")


def _read_by_lhotse(path: Path, found: Found, recipe: str | None = None) -> None:
    from .lhotse_corpora import read_lhotse

    read_lhotse(path, found, recipe)


def _read_kaldi(path: Path, found: Found) -> None:
    from .lhotse_corpora import read_kaldi

    read_kaldi(path, found)


def _read_by_datasets(path: Path, found: Found, config: str | None = None) -> None:
    from .hugging_face import read_datasets

    read_datasets(path, found, config)


READERS: dict[str, Callable[..., None]] = {
    "ljspeech": read_ljspeech,
    "train-higgs-audio": read_train_higgs_audio,
    "ms-swift": read_ms_swift,
    "audiofolder": read_audiofolder,
    "folder": read_folder,
    "lhotse": _read_by_lhotse,
    "kaldi": _read_kaldi,
    "datasets": _read_by_datasets,
}
