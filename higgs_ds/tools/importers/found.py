"""Rows imported from another tool's data set, unread columns, and what was left out with the reason."""

from __future__ import annotations

import functools
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ...data.columns import CUT_FIELDS, SYNONYMS, member, plain, reading, unread_lines
from ...data.foreign import AUDIO_SUFFIXES, FILE_COLUMNS, TEXT_COLUMNS
from ...data.texts import read_transcript
from .parts import SPLIT_COLUMNS, part_of

SPEAKER_COLUMNS = ("speaker", *SYNONYMS["speaker"].split(), "client_id", "reader_id", "reader", "narrator", "voice_id")
REF_AUDIO_COLUMNS = ("ref_audio", *SYNONYMS["ref_audio"].split())
_COLUMNS = {
    "audio": FILE_COLUMNS,
    "text": TEXT_COLUMNS,
    "speaker": SPEAKER_COLUMNS,
    "scene": ("scene",),
    "ref_audio": REF_AUDIO_COLUMNS,
    "ref_text": ("ref_text", *SYNONYMS["ref_text"].split()),
}
_KNOWN = frozenset((*SPLIT_COLUMNS, *(name for names in _COLUMNS.values() for name in names)))
DUPLICATE = "rows with a duplicate column"
_FOLDERS = ("", "wavs", "wav", "audio", "clips")
_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".ogg", ".m4a", *sorted(AUDIO_SUFFIXES))
_SURROGATE = re.compile("[\ud800-\udfff]")
_FILE_NAME = re.compile(
    rf"\S{{1,200}}\.(?:txt|lab|srt|vtt|lrc|ctm|textgrid|json|{'|'.join(s[1:] for s in AUDIO_SUFFIXES)})", re.IGNORECASE
)


class Found:
    """Rows so far, counts and examples of what was left out by reason, and counts per part of the corpus's split.

    Rows of a validation part have a field `split`, which is not written; those of a test part are only counted.

    Args:
        root: imported folder; names of folders below it determine a clip's part.
        with_test: True to use rows of a test part like any others.
        clips: folder for clips given as bytes.
    """

    def __init__(self, root: Path, *, with_test: bool = False, clips: Path | None = None) -> None:
        self.root, self.with_test, self.clips = root, with_test, clips
        self.rows: list[dict] = []
        self.parts: Counter[str] = Counter()  # rows by the corpus's name of the part
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.columns: Counter[str] = Counter()  # unread
        self.notes: list[str] = []  # on interpretations of columns and folders
        self.forms: Counter[str] = Counter()  # formats of text files with more than words

    def take(
        self, origin: str, row: dict, find: Callable[[Any], Path | None], split: str | None = None, **more: Any
    ) -> None:
        """Adds a speech row from an object or a table's line, with any known column names.

        Args:
            find: maps a row's clip to its file; None if the row has none.
            split: default part of rows that name none.

        Raises:
            ValueError: ambiguous columns.
        """
        values = named(row)
        if values is None:
            self.leave_out(DUPLICATE, origin)
            return
        filled = {name: value for name, value in values.items() if _holds(value)}
        columns, cuts, splits, unread = _columns_of(tuple(filled))
        words = {name: word for name in splits if (word := word_of(filled[name]))}
        parts = {name: word for name, word in words.items() if name == "split" or part_of(word)}
        self.columns.update((*unread, *(words.keys() - parts.keys())))
        split = next(iter(parts.values()), split)
        audio = filled.get(columns["audio"][0]) if "audio" in columns else None
        if isinstance(audio, bytes) or (isinstance(audio, dict) and audio.get("bytes")):
            # The bytes are already cut: edges under other names refer to the longer recording.
            self.columns.update(column for field, (column, _) in cuts.items() if column != field)
            cuts = {field: cut for field, cut in cuts.items() if cut[0] == field}
        if not self.takes(split) or (cut := self._cut(origin, filled, cuts)) is None:
            return
        texts = {word: name for name in columns.get("text", ()) if (word := word_of(filled[name]))}
        if len(texts) > 1:
            names = ", ".join(f"`{name}`" for name in texts.values())
            raise ValueError(f"{names}: which one is the text? rename it to `text`")
        clip, ref_audio = find(audio), find(filled[columns["ref_audio"][0]]) if "ref_audio" in columns else None
        said = {of: word_of(filled[columns[of][0]]) for of in ("speaker", "scene", "ref_text") if of in columns}
        reference = self._reference(origin, ref_audio, said.pop("ref_text", None), clip)
        self.add(origin, clip, next(iter(texts), None), split=split, **said, **reference, **cut, **more)

    def add(self, origin: str, audio: Path | None, text: Any, *, split: str | None = None, **more: Any) -> None:
        """Adds a speech row, or leaves it out if its clip or text is missing."""
        if not self.has_clip(audio, origin):
            return
        words = self._words(text, audio, origin) if isinstance(text, str) else ""
        if words == "":
            self.leave_out("rows without a text", origin)
        elif words is not None:
            row = {"audio": os.path.abspath(audio), "text": words, **more}
            self.keep({name: value for name, value in row.items() if value not in (None, "")}, audio, split)

    def keep(self, row: dict, clip: Path, split: str | None = None) -> None:
        """Adds a row with existing clips unless it is in a test part, by its `split` or else by its clip's folder."""
        split = split or _part_below(os.path.dirname(clip), self.root)
        if self.takes(split):
            if split is not None:
                self.parts[split] += 1
            self.rows.append(row | {"split": "val"} if split and part_of(split) == "val" else row)

    def takes(self, split: str | None) -> bool:
        """Returns False, and counts the row, if `split` is a test part; its clip then need not be written."""
        if split is None or self.with_test or part_of(split) != "test":
            return True
        self.parts[split] += 1
        return False

    def transcript(self, file: Path) -> str | None:
        """Returns the words of a text file, without times and labels; counts other files and returns None."""
        try:
            words, form = read_transcript(file)
        except UnicodeDecodeError:
            self.leave_out("rows whose text file is not UTF-8", str(file))
            return None
        if words is None and form == "no words":
            return ""
        if words is None:
            self.leave_out(f"rows whose text file contains {form}", str(file))
        elif form is not None:
            self.forms[form] += 1
            self.examples.setdefault(form, str(file))
        return words and clean(words)

    def has_clip(self, clip: Path | None, origin: str) -> TypeGuard[Path]:
        """Returns True if the clip is usable in a manifest; otherwise counts it as left out."""
        if clip is None:
            self.leave_out("rows without a clip", origin)
            return False
        is_named = not _SURROGATE.search(os.path.abspath(clip))  # surrogates escape bytes that are not UTF-8
        if is_named and os.path.isfile(clip):
            return True
        reason = "clips that do not exist" if is_named else "clips whose file name is not UTF-8"
        self.leave_out(reason, origin if origin == str(clip) else f"{origin}: {clip}")
        return False

    def leave_out(self, reason: str, example: str) -> None:
        """Counts a row or file that is left out."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example.encode("utf-8", "backslashreplace").decode("utf-8"))

    def lines(self, file: Path) -> list[str]:
        """Returns the notes, unread columns, and one line for each reason for leaving rows out."""
        forms = {f"{file}: {n:,} × only words read from a text file: {form}": form for form, n in self.forms.items()}
        left_out = {f"left out: {n:,} × {reason}": reason for reason, n in self.left_out.items()}
        said, left = ([f"{line}, e.g. {self.examples[key]}" for line, key in of.items()] for of in (forms, left_out))
        return [*self.notes, *said, *unread_lines(self.columns, str(file)), *left]

    def _words(self, text: str, clip: Path, origin: str) -> str | None:
        """Returns a text's words, read from a file if the text is a file name; counts failures and returns None."""
        if not _FILE_NAME.fullmatch(text):
            return clean(text)
        if os.path.splitext(text)[1].lower() in AUDIO_SUFFIXES:
            self.leave_out("rows whose text is the name of a clip", f"{origin}: {text}")
            return None
        file = next((file for folder in (self.root, clip.parent) if os.path.isfile(file := folder / text)), None)
        if file is not None:
            return self.transcript(file)
        self.leave_out("rows whose text is the name of a missing file", f"{origin}: {text}")
        return None

    def _cut(self, origin: str, values: dict[str, Any], cuts: dict[str, tuple[str, float]]) -> dict[str, Any] | None:
        """Returns the fields of a row's slice for the manifest; counts an invalid slice and returns None."""
        cut = {field: _number(field, values[column], unit) for field, (column, unit) in cuts.items()}
        edges = {"offset", "end"} & cut.keys()
        for field in [field for field, value in cut.items() if value is None and field not in edges]:
            if field != "duration" or not edges:  # a length that cuts nothing, or a channel's name
                self.columns[cuts[field][0]] += 1
                del cut[field]
        start, end = cut.get("offset") or 0.0, cut.pop("end", 0.0)
        if end is None or None in cut.values() or 0 < end <= start:
            names = ", ".join(f"`{column}`" for column, _ in cuts.values())
            self.leave_out(f"rows with an invalid slice ({names})", origin)
            return None
        if end:
            cut |= {"offset": start, "duration": round(end - start, 6)}
        return {field: value for field, value in cut.items() if value or field != "duration"}

    def _reference(self, origin: str, clip: Path | None, text: str | None, audio: Path | None) -> dict[str, str]:
        """Returns `ref_audio` and `ref_text` of a row with clip `audio`; counts an unusable one and returns {}."""
        if clip is None and not text:
            return {}
        if clip is None or not text or not os.path.isfile(clip) or _SURROGATE.search(str(clip)):
            self.leave_out("references without a clip or text (their rows are kept)", origin)
        elif audio is not None and os.path.abspath(clip) == os.path.abspath(audio):
            self.leave_out("references that are the row's own clip (their rows are kept)", origin)
        else:
            return {"ref_audio": os.path.abspath(clip), "ref_text": clean(text)}
        return {}


class _Columns(NamedTuple):
    """Meaning of a row's filled columns."""

    columns: dict[str, tuple[str, ...]]  # by field: all text columns, otherwise the first synonym
    cuts: dict[str, tuple[str, float]]  # (column, seconds per unit) of each field that cuts the clip
    splits: tuple[str, ...]
    unread: tuple[str, ...]


@functools.lru_cache(1024)
def _columns_of(names: tuple[str, ...]) -> _Columns:
    """Assigns columns to fields. Raises ValueError for an unknown column that may affect training."""
    held = {field: tuple(name for name in known if name in names) for field, known in _COLUMNS.items()}
    columns = {field: of if field == "text" and of[0] != "text" else of[:1] for field, of in held.items() if of}
    read = reading(("audio", "text", *(name for name in names if name not in _KNOWN)))
    if read.faults:
        raise ValueError("; ".join(f"column `{name}`: {problem}" for name, problem in read.faults))
    cuts = {field: (of, read.scale.get(field, 1.0)) for field, of in read.column.items() if field in CUT_FIELDS}
    unread = (*read.unread, *(name for of in held.values() for name in of[1:]))
    return _Columns(
        columns,
        cuts,
        tuple(name for name in SPLIT_COLUMNS if name in names),
        tuple(member("", name) for name in unread),
    )


class ClipFinder:
    """Finds a table's clips by path or id, beside the table or in a usual folder for clips."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, value: Any) -> Path | None:
        """Returns the clip's path, or the expected path if it is missing; None for an empty value."""
        if (name := word_of(value)) is None:
            return None
        path = beside(self.folder, name) if os.path.splitext(name)[1] else Path()
        if os.path.isfile(path):
            return path
        wholes = [self.folder / parent / name for parent in _FOLDERS]
        for spelt in (str, _folded):
            for whole in wholes:
                listed = self._clips_in(whole.parent)
                if found := next((n for s in _SUFFIXES if (n := listed.get(spelt(f"{whole.name}{s}")))), None):
                    return whole.parent / found
        return path if path.suffix.lower() in AUDIO_SUFFIXES else self.folder / "wavs" / f"{name}.wav"

    def _clips_in(self, folder: Path) -> dict[str, str]:
        """Returns a folder's clips by name, and also by lower-case NFC name."""
        if folder not in self._listed:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            names = [name for name in names if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES]
            self._listed[folder] = {_folded(name): name for name in names} | dict(zip(names, names, strict=True))
        return self._listed[folder]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.lower())


@functools.lru_cache(100_000)
def _part_below(folder: str, root: Path) -> str | None:
    return next((name for name in below_root(folder, root) if part_of(name)), None)


def below_root(folder: str | Path, root: Path) -> tuple[str, ...]:
    """Returns the names of a folder and its parents below the root, outermost first; () if it is not below."""
    below = os.path.relpath(folder, root)
    return () if below.startswith(os.pardir) or below == os.curdir else Path(below).parts


def named(row: dict) -> dict[str, Any] | None:
    """Returns a row by normalised column names, with None for pandas' NaN; None if a column is duplicate."""
    values = {plain(str(name)): None if value != value else value for name, value in row.items()}
    return values if len(values) == len(row) and not getattr(row, "repeated", ()) else None


def beside(folder: Path, name: str) -> Path:
    """Resolves another tool's path: relative to its table, or else to the working directory."""
    path = folder / os.path.expanduser(name)
    return path if os.path.exists(path) or not os.path.exists(name) else Path(name)


def _holds(value: Any) -> bool:
    return any(value.values()) if isinstance(value, dict) else value not in (None, "", [])


def first(values: dict[str, Any], *names: str) -> str | None:
    """Returns the first non-empty value among these names, as text."""
    return next((word for name in names if (word := word_of(values.get(name)))), None)


def word_of(value: Any) -> str | None:
    """Returns text or an integer as stripped text; of Hugging Face's `{"path", "bytes"}` the path; otherwise None."""
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        return None
    return _SURROGATE.sub("", str(value)).strip() or None


def clean(text: str) -> str:
    """Joins a transcript's lines into one and removes lone surrogates."""
    return _SURROGATE.sub("", " ".join(text.split()))


def _number(field: str, value: Any, unit: float) -> float | None:
    """Returns seconds for a field of a slice, a count (or -1 for a mix) for others; None for invalid values."""
    try:
        number = float(value) * unit if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -2.0
    except (ValueError, OverflowError):
        return None
    if field in ("offset", "end", "duration"):
        return number if math.isfinite(number) and number >= 0 else None
    return int(number) if number >= -1 and number.is_integer() else None
