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
from ...data.texts import read_transcript
from .parts import SPLIT_COLUMNS, part_of

SPEAKER_COLUMNS = ("speaker", *SYNONYMS["speaker"].split(), "client_id", "reader_id", "reader", "narrator", "voice_id")
REF_AUDIO_COLUMNS = ("ref_audio", *SYNONYMS["ref_audio"].split())
REF_TEXT_COLUMNS = ("ref_text", *SYNONYMS["ref_text"].split())
_SYNONYMS = (FILE_COLUMNS, TEXT_COLUMNS, SPEAKER_COLUMNS, REF_AUDIO_COLUMNS, REF_TEXT_COLUMNS)
_SINGLE = ("scene", "offset", "duration", "id")  # of which `id` is known and not read
_SPLITS = frozenset(SPLIT_COLUMNS)
TWICE = "rows that have a column twice"
_FOLDERS = ("", "wavs", "wav", "audio", "clips")
_COMMON_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
_SURROGATE = re.compile("[\ud800-\udfff]")
_FILE_NAME = re.compile(
    rf"\S{{1,200}}\.(?:txt|lab|srt|vtt|lrc|ctm|textgrid|json|{'|'.join(s[1:] for s in AUDIO_SUFFIXES)})", re.IGNORECASE
)


class Found:
    """Rows so far; counts and examples of what was left out, by reason; rows of each part of the corpus's own split.

    Rows of a validation part have `split`, which the manifest does not; those of a test part are only counted.

    Args:
        root: folder that is imported; the names of folders below it say a clip's part.
        with_test: whether rows of a test part are rows like any others.
        clips: folder for clips whose sound is not in a file.
    """

    def __init__(self, root: Path, *, with_test: bool = False, clips: Path | None = None) -> None:
        self.root, self.with_test, self.clips = root, with_test, clips
        self.rows: list[dict] = []
        self.parts: Counter[str] = Counter()  # rows by the part's own name
        self._part_of_folder: dict[str, str | None] = {}
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.columns: Counter[str] = Counter()  # that are not read
        self.notes: list[str] = []  # what was taken as what
        self.forms: Counter[str] = Counter()  # of text files of which the words alone were read

    def add(self, origin: str, audio: Path | None, text: Any, *, split: str | None = None, **more: Any) -> None:
        """One speech row; left out where its clip or its text is not there."""
        if not self.has_clip(audio, origin):
            return
        words = self._words(text, audio, origin) if isinstance(text, str) else ""
        if words == "":
            self.leave_out("rows without a text", origin)
        elif words is not None:
            row = {"audio": os.path.abspath(audio), "text": words, **more}
            self.keep({name: value for name, value in row.items() if value not in (None, "")}, audio, split)

    def keep(self, row: dict, clip: Path, split: str | None = None) -> None:
        """A row whose clips are there, unless it is of a test part: by its own word, or else by its clip's folder."""
        name = split or self._folder_part(os.path.dirname(clip))
        if self.takes(name):
            if name is not None:
                self.parts[name] += 1
                if part_of(name) == "val":
                    row["split"] = "val"
            self.rows.append(row)

    def takes(self, split: str | None) -> bool:
        """False, counted, for a row that says that it is of a test part, whose clip then need not be written."""
        if split is None or self.with_test or part_of(split) != "test":
            return True
        self.parts[split] += 1
        return False

    def write_clip(self, name: str, content: bytes) -> Path:
        """A new clip with a file's bytes."""
        if self.clips is None:
            raise ValueError("its clips are bytes, and there is no folder to write them to")
        self.clips.mkdir(parents=True, exist_ok=True)
        path = self.clips / _SURROGATE.sub("", name)
        path.write_bytes(content)
        return path

    def _folder_part(self, folder: str) -> str | None:
        if folder not in self._part_of_folder:
            below = below_root(folder, self.root)
            self._part_of_folder[folder] = next((name for name in below if part_of(name)), None)
        return self._part_of_folder[folder]

    def _words(self, text: str, clip: Path, origin: str) -> str | None:
        """A text's words; those of a file where it is the name of one; None, counted, where that is no transcript."""
        if not _FILE_NAME.fullmatch(text):
            return clean(text)
        if os.path.splitext(text)[1].lower() in AUDIO_SUFFIXES:
            self.leave_out("rows whose text is the name of a clip", f"{origin}: {text}")
            return None
        file = next((file for folder in (self.root, clip.parent) if os.path.isfile(file := folder / text)), None)
        if file is not None:
            return self.transcript(file)
        self.leave_out("rows whose text is the name of a file that is not there", f"{origin}: {text}")
        return None

    def transcript(self, file: Path) -> str | None:
        """The words of a text file, without times and labels; None, counted, for a file that is no transcript."""
        try:
            words, form = read_transcript(file)
        except UnicodeDecodeError:
            self.leave_out("rows whose text file is not UTF-8", str(file))
            return None
        if words is None:
            if form == "no words":
                return ""
            self.leave_out(f"rows whose text file holds {form}", str(file))
        elif form is not None:
            self.forms[form] += 1
            self.examples.setdefault(form, str(file))
        return None if words is None else clean(words)

    def has_clip(self, clip: Path | None, origin: str) -> TypeGuard[Path]:
        """True if a manifest can name the clip; counts it as left out otherwise."""
        if clip is None:
            self.leave_out("rows that name no clip", origin)
            return False
        reason = None
        if not os.path.isfile(clip):
            reason = "clips that do not exist"
        elif _SURROGATE.search(os.path.abspath(clip)):  # bytes that are no UTF-8, as Python escapes them
            reason = "clips whose file name is not UTF-8"
        if reason is not None:
            self.leave_out(reason, origin if origin == str(clip) else f"{origin}: {clip}")
        return reason is None

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
        forms = [
            f"{file}: {count:,} × the words alone of a text file with {form}, e.g. {self.examples[form]}"
            for form, count in self.forms.items()
        ]
        return [*self.notes, *forms, *unread_lines(self.columns, str(file)), *left_out]

    def slice_of(self, origin: str, values: dict[str, Any]) -> dict[str, Any] | None:
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


def below_root(folder: str | Path, root: Path) -> tuple[str, ...]:
    """Names of a folder and those above it, down from the root; none for a folder that is not below it."""
    below = os.path.relpath(folder, root)
    return () if below.startswith(os.pardir) or below == os.curdir else Path(below).parts


def split_of(values: dict[str, Any]) -> str | None:
    """A row's part by its own word: `split`, or another such column if its word is a part's."""
    if _SPLITS.isdisjoint(values):
        return None
    for name in SPLIT_COLUMNS:
        if (word := first(values, name)) and (name == "split" or part_of(word)):
            return word
    return None


def read_of(values: dict[str, Any]) -> set[str]:
    """The columns of a speech row that are read: of synonyms the first that is filled."""
    read = {*_SINGLE, *(next((n for n in names if values.get(n) not in (None, "")), "") for names in _SYNONYMS)}
    if split_of(values):
        read.update(name for name in SPLIT_COLUMNS if name == "split" or part_of(str(values.get(name) or "")))
    return read


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


def text_of(values: dict[str, Any]) -> str | None:
    """A row's text; raises ValueError where two columns hold different ones and none is called `text`."""
    if (text := first(values, "text")) is not None:
        return text
    held = {name: text for name in TEXT_COLUMNS if values.get(name) and (text := first(values, name)) is not None}
    if len({*held.values()}) > 1:
        names = ", ".join(f"`{name}`" for name in held)
        raise ValueError(f"{names}: which is the text? rename that to `text`")
    return next(iter(held.values()), None)


def clean(text: str) -> str:
    """One line, as a transcript is; half surrogates, which are no characters, are left out."""
    return _SURROGATE.sub("", " ".join(text.split()))


def _seconds(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
