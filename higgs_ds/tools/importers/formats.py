"""Readers of other tools' formats. Each yields manifest rows and leaves the clips in place."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...data.chatml import speech_messages
from ...data.foreign import FORMATS, TABLE_NAMES, guess, lines_in, with_texts
from ...errors import ConfigError, reading
from .found import DUPLICATE, REF_AUDIO_COLUMNS, ClipFinder, Found, below_root, beside, clean, first, named
from .libraries import read_datasets, read_lhotse
from .ms_swift import read_ms_swift
from .parts import one_format_each, speakers_in
from .tables import DECODER, json_rows, table_rows

_TABLES = (*TABLE_NAMES, "metadata.txt", "metadata.list", "filelist.txt")


def read_foreign(
    path: Path, source: str | None, *, with_test: bool = False, clips: Path | None = None
) -> tuple[str, Found]:
    """Reads a file or folder and returns (format, rows). Detects the format if `source` is None.

    Args:
        source: one of `FORMATS`, `lhotse:RECIPE` or `datasets:CONFIG`.
        with_test: True to use rows of a corpus's test part like any others.
        clips: folder for clips given as bytes.

    Raises:
        ConfigError: a file or folder that cannot be read.
    """
    kind, _, detail = (source or "").partition(":")
    if kind != "datasets" and not os.path.exists(path):
        raise ConfigError([f"{path}: not found; give a file or folder in one of the formats {', '.join(FORMATS)}"])
    kind = kind or guess(path) or ""
    if not kind:
        recipe = "lhotse:RECIPE for a corpus with a lhotse recipe, such as lhotse:libritts"
        raise ConfigError([f"{path}: unknown format; give --from {'|'.join(FORMATS)}, or {recipe}"])
    found = Found(path if path.is_dir() else path.parent, with_test=with_test, clips=clips)
    with reading(f"{path}: cannot be read as {FORMATS[kind]}"):
        READERS[kind](path, found, *([detail] if detail else []))
    found.rows, others = one_format_each(found.rows)
    for row in others:
        found.leave_out("clips also present in a better format", row["audio"])
    return kind, found


def read_tables(path: Path, found: Found, *, kind: str) -> None:
    """Reads a table of clips and texts (LJSpeech, audiofolder and similar), or one table per folder below."""
    for table in [path] if path.is_file() else _tables(path, found, kind):
        clips = ClipFinder(table.parent)
        rows = json_rows if table.suffix.lower() in (".jsonl", ".json") else table_rows
        for origin, row in rows(table, found):
            found.take(origin, row, clips.find)


def _tables(folder: Path, found: Found, kind: str) -> list[Path]:
    """Chooses one table per folder, without hidden folders; a second table would give the same rows again."""
    of_folder: dict[Path, list[Path]] = {}
    for table in (table for name in _TABLES for table in sorted(folder.rglob(name))):
        if not any(part.startswith(".") for part in table.relative_to(folder).parts):
            of_folder.setdefault(table.parent, []).append(table)
    if not of_folder:
        raise ValueError(f"the folder has none of {', '.join(_TABLES)}")
    chosen = []
    for tables in of_folder.values():
        chosen.append(next((table for table in tables if guess(table) == kind), tables[0]))
        for table in tables:
            if table != chosen[-1]:
                found.leave_out(f"further tables in a folder with a {chosen[-1].name}", str(table))
    return chosen


def read_train_higgs_audio(path: Path, found: Found) -> None:
    """Reads `metadata.json`: samples with a clip, a text file and references, in `samples` or at the top level."""
    names = (path, path / "metadata.json", path / "metadata.jsonl")
    file = next((file for file in names if file.is_file()), None)
    if file is None:
        raise ValueError("the folder has no metadata.json")
    clips = ClipFinder(file.parent)
    for origin, sample in _samples(file, found):
        if (values := named(sample)) is None:
            found.leave_out(DUPLICATE, origin)
            continue
        speakers = values.pop("ref_speakers", None)
        if (row := _with_texts(values, clips, found)) is None:
            continue
        turns = _turns_of(found, origin, clips, speakers) if speakers else []
        before = len(found.rows)
        if turns is not None:
            found.take(origin, row, clips.find)
        if turns and len(found.rows) > before:
            _put_before(found, origin, turns)


def _samples(file: Path, found: Found) -> Iterator[tuple[str, dict]]:
    try:
        whole = DECODER.decode(file.read_text(encoding="utf-8-sig").strip())
    except json.JSONDecodeError:
        yield from json_rows(file, found)  # one sample per line
        return
    samples = whole.get("samples", [whole]) if isinstance(whole, dict) else whole
    if not isinstance(samples, list) or (isinstance(whole, dict) and not {"samples", "transcript_file"} & whole.keys()):
        raise ValueError("it has no list `samples`")
    for number, sample in enumerate(samples):
        origin = f"{file}: samples[{number}]"
        if isinstance(sample, dict):
            yield origin, sample
        else:
            found.leave_out("samples that are not objects", origin)


def _with_texts(sample: dict, clips: ClipFinder, found: Found) -> dict | None:
    """Loads the text files of a sample; counts it and returns None if its own text is not a transcript."""
    row = {"ref_audio": sample.pop("reference_audio_file", None), **sample, "audio_id": None}
    for of in ("", "ref_", "reference_"):
        text = first(row, f"{of}transcript", f"{of}text")
        file = first(row, *(files := (f"{of}transcript_file", f"{of}text_file")))
        if text is None and file and os.path.isfile(place := beside(clips.folder, file)):
            text = found.transcript(place)
            if text is None and not of:
                return None
        row |= {f"{of}text": text} | dict.fromkeys((f"{of}transcript", *files))
    return row | {"scene": (first(row, "scene") or "").replace("_", " ")}


def _turns_of(found: Found, origin: str, clips: ClipFinder, speakers: Any) -> list[tuple[str, Path]] | None:
    """Returns (tag and transcript, clip) of each reference speaker; counts it and returns None if one is missing."""
    turns: list[tuple[str, Path]] = []
    for number, speaker in enumerate(speakers if isinstance(speakers, list) else [None]):
        values = (_with_texts(named(speaker) or {}, clips, found) if isinstance(speaker, dict) else None) or {}
        clip = clips.find(first(values, "ref_audio_file", *REF_AUDIO_COLUMNS, "audio_file"))
        said = clean(first(values, "ref_text", "reference_text", "text") or "")
        if clip is None or not said:
            found.leave_out("rows with `ref_speakers` where a clip or transcript is missing", origin)
            return None
        if not found.has_clip(clip, origin):
            return None
        tag = first(values, "speaker_tag") or f"[SPEAKER{number}]"
        turns.append((said if said.startswith(tag) else f"{tag} {said}", clip))
    return turns


def _put_before(found: Found, origin: str, turns: list[tuple[str, Path]]) -> None:
    """Turns the last row into a conversation: these turns, each followed by its clip, then the trained turn."""
    row = found.rows.pop()
    if "offset" in row:
        found.leave_out("rows with `ref_speakers` and an `offset`", origin)
        return
    [(system, *_), _] = speech_messages("-", None, scene=row.get("scene"))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system.content[0]}]
    for said, clip in [*turns, (row["text"], row["audio"])]:
        answer = [{"type": "audio", "audio_url": os.path.abspath(clip)}]
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    more = {name: row[name] for name in ("speaker", "split") if name in row}
    found.rows.append({"messages": messages, "start_index": len(messages) - 2, **more})


def read_folder(path: Path, found: Found) -> None:
    """Reads all clips with a text file of the same name beside them; speakers are recognised by folder."""
    if not path.is_dir():
        raise ValueError("it is a file; give the folder")
    clips: list[tuple[Path, Path]] = []
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for clip, text in with_texts(names):
            if text is not None:
                clips.append((Path(parent, clip), Path(parent, text)))
            else:
                found.leave_out("clips without a text file of the same name", os.path.join(parent, clip))
    of_folder = {str(clip.parent): below_root(clip.parent, path) for clip, _ in clips}
    speakers = speakers_in(of_folder, (str(clip) for clip, _ in clips))
    transcript = functools.cache(found.transcript)  # several clips may share a text file
    for clip_file, file in sorted(clips):
        if (words := transcript(file)) is not None:
            found.add(str(clip_file), clip_file, words, speaker=speakers[str(clip_file.parent)])
    if named := {label: folder for folder, label in speakers.items() if label}:
        label, folder = next(iter(named.items()))
        found.notes.append(f"{path}: speakers are named by folder, e.g. `{label}` for {os.path.relpath(folder, path)}")


def read_kaldi(path: Path, found: Found) -> None:
    """Reads `wav.scp` and `text`, with `utt2spk` and `segments` if present; refuses commands in `wav.scp`."""
    folder = path if path.is_dir() else path.parent
    clips, texts, speakers, segments = (_kaldi_table(folder / n) for n in ("wav.scp", "text", "utt2spk", "segments"))
    for number, (key, place) in enumerate(clips.items(), start=1):
        if "|" in (place[:1], place[-1:]):
            advice = "a command, which is never run; write its output to files and give their paths"
            raise ConfigError([f"{folder / 'wav.scp'}:{number}: {key} is {place!r}: {advice}"])
    if not texts:
        raise ValueError("the folder has no file `text`")
    for utterance, place in (segments or {key: key for key in clips}).items():
        recording, *span = place.split()
        clip = beside(folder, clips[recording]) if recording in clips else None
        start, end, *channel = map(float, span or (0, -1))
        cut: dict[str, Any] = (
            {"offset": start} | ({"duration": round(end - start, 6)} if end >= 0 else {}) if span else {}
        )
        cut |= {"channel": int(channel[0])} if channel else {}
        found.add(f"{folder}: {utterance}", clip, texts.get(utterance), speaker=speakers.get(utterance), **cut)


def _kaldi_table(file: Path) -> dict[str, str]:
    lines = lines_in(file.read_text(encoding="utf-8")) if file.is_file() else []
    return {words[0]: " ".join(words[1:]).strip() for line in lines if (words := line.split(maxsplit=1))}


READERS: dict[str, Callable[..., None]] = {
    "ljspeech": functools.partial(read_tables, kind="ljspeech"),
    "audiofolder": functools.partial(read_tables, kind="audiofolder"),
    "train-higgs-audio": read_train_higgs_audio,
    "ms-swift": read_ms_swift,
    "folder": read_folder,
    "kaldi": read_kaldi,
    "lhotse": read_lhotse,
    "datasets": read_datasets,
}
