"""Results of an importer: rows, columns that are not read, and rows left out with the reason."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeGuard

from ...data.columns import SYNONYMS, member, plain, unread_lines
from ...data.foreign import AUDIO_SUFFIXES, FILE_COLUMNS, TEXT_COLUMNS

SPEAKER_COLUMNS = ("speaker", *SYNONYMS["speaker"].split())
REF_AUDIO_COLUMNS = ("ref_audio", *SYNONYMS["ref_audio"].split())
REF_TEXT_COLUMNS = ("ref_text", *SYNONYMS["ref_text"].split())
_SYNONYMS = (FILE_COLUMNS, TEXT_COLUMNS, SPEAKER_COLUMNS, REF_AUDIO_COLUMNS, REF_TEXT_COLUMNS)
_SINGLE = ("scene", "offset", "duration", "id")  # of which `id` is known and not read
TWICE = "rows that have a column twice"
_FOLDERS = ("", "wavs", "wav", "audio", "clips")
_COMMON_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Found:
    """Rows so far; counts and examples of what was left out, by reason."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.columns: Counter[str] = Counter()  # that are not read
        self.notes: list[str] = []  # what was taken as what

    def add(self, origin: str, audio: Path | None, text: Any, **more: Any) -> None:
        """One speech row; left out where its clip or its text is not there."""
        if not self.has_clip(audio, origin):
            return
        if not isinstance(text, str) or not clean(text):
            self.leave_out("rows without a text", origin)
            return
        row = {"audio": os.path.abspath(audio), "text": clean(text), **more}
        self.rows.append({name: value for name, value in row.items() if value not in (None, "")})

    def has_clip(self, clip: Path | None, origin: str) -> TypeGuard[Path]:
        """True if a manifest can name the clip; counts it as left out otherwise."""
        example = origin if origin == str(clip) else f"{origin}: {clip}"
        if clip is None:
            self.leave_out("rows that name no clip", origin)
        elif not os.path.isfile(clip):
            self.leave_out("clips that do not exist", example)
        elif _SURROGATE.search(os.path.abspath(clip)):  # bytes that are no UTF-8, as Python escapes them
            self.leave_out("clips whose file name is not UTF-8", example)
        else:
            return True
        return False

    def leave_out(self, reason: str, example: str) -> None:
        """Counts something that does not become a row."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example.encode("utf-8", "backslashreplace").decode("utf-8"))

    def count_unread(self, values: dict[str, Any], known: Collection[str]) -> None:
        """Counts the filled columns that are not read."""
        for name, value in values.items():
            if name not in known and value not in (None, "", [], {}):
                self.columns[member("", name)] += 1

    def lines(self, file: Path) -> list[str]:
        """Notes, columns that are not read, and one line for each reason to leave rows out."""
        left_out = [
            f"left out: {count:,} × {reason}, e.g. {self.examples[reason]}" for reason, count in self.left_out.items()
        ]
        return [*self.notes, *unread_lines(self.columns, str(file)), *left_out]

    def slice_of(self, origin: str, values: dict[str, Any]) -> dict[str, float] | None:
        """A row's `offset` and `duration` as a manifest has them; None, counted, for a slice that cannot be told."""
        stated = {name: values[name] for name in ("offset", "duration") if values.get(name) not in (None, "")}
        seconds = {name: number for name, value in stated.items() if (number := _seconds(value)) is not None}
        if seconds.get("duration") == 0:
            del seconds["duration"]
        if len(seconds) < len(stated):
            if "offset" in stated:
                self.leave_out("rows whose `offset` or `duration` is no number of seconds", origin)
                return None
            self.leave_out("durations that are no number of seconds (their rows are kept)", origin)
        return seconds

    def reference(self, origin: str, clip: Path | None, text: str | None, audio: Path | None) -> dict[str, str]:
        """`ref_audio` and `ref_text` of a row with this clip; nothing, counted, where they cannot be used."""
        if clip is None and not text:
            return {}
        if clip is None or not text or not clean(text) or not os.path.isfile(clip) or _SURROGATE.search(str(clip)):
            self.leave_out("references whose clip or text is not there (their rows are kept)", origin)
        elif audio is not None and os.path.abspath(clip) == os.path.abspath(audio):
            self.leave_out("references that are the spoken clip itself (their rows are kept)", origin)
        else:
            return {"ref_audio": os.path.abspath(clip), "ref_text": clean(text)}
        return {}


class ClipFinder:
    """Finds clips as a table names them, by path or id: beside it, or in a folder that such a corpus has."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, name: str | None) -> Path | None:
        """The clip's path, or the path it should have; None for no name."""
        if name is None:
            return None
        path = beside(self.folder, name) if os.path.splitext(name)[1] else Path()
        if os.path.isfile(path):
            return path
        wholes = [self.folder / parent / name for parent in _FOLDERS]
        for whole in wholes:
            for suffix in ("", *_COMMON_SUFFIXES):
                candidate = whole.parent / f"{whole.name}{suffix}"
                if (suffix or candidate.suffix) and os.path.isfile(candidate):
                    return candidate
        for whole in wholes:  # in other containers, or with other letters
            listed = self._clips_in(whole.parent)
            for suffix in ("", *_COMMON_SUFFIXES, *sorted(AUDIO_SUFFIXES)):
                if found := listed.get(f"{whole.name}{suffix}".lower()):
                    return whole.parent / found
        return path if path.suffix.lower() in AUDIO_SUFFIXES else self.folder / "wavs" / f"{name}.wav"

    def _clips_in(self, folder: Path) -> dict[str, str]:
        if folder not in self._listed:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            self._listed[folder] = {n.lower(): n for n in names if os.path.splitext(n)[1].lower() in AUDIO_SUFFIXES}
        return self._listed[folder]


def read_of(values: dict[str, Any]) -> set[str]:
    """The columns of a speech row that are read: of synonyms the first that is filled."""
    return {*_SINGLE, *(next((n for n in names if values.get(n) not in (None, "")), "") for names in _SYNONYMS)}


def named(row: dict) -> dict[str, Any] | None:
    """A row by its columns' plain names, without pandas' NaN; None where it has a column twice, in whatever letters."""
    values = {plain(str(name)): None if value != value else value for name, value in row.items()}
    return values if len(values) == len(row) and not getattr(row, "repeated", ()) else None


def beside(folder: Path, name: str) -> Path:
    """A path as another tool wrote it: beside its table, else below the working folder."""
    path = folder / os.path.expanduser(name)
    return path if os.path.exists(path) or not os.path.exists(name) else Path(name)


def first(values: dict[str, Any], *names: str) -> str | None:
    """The first of these that is filled, as text; of Hugging Face's `{"path", "bytes"}` the path."""
    for name in names:
        value = values.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, dict):
            value = value.get("path")
        is_text = isinstance(value, (str, int)) and not isinstance(value, bool)
        if is_text and (text := _SURROGATE.sub("", str(value)).strip()):
            return text
    return None


def clean(text: str) -> str:
    """One line, as a transcript is; half surrogates, which are no characters, are left out."""
    return _SURROGATE.sub("", " ".join(text.split()))


def _seconds(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
