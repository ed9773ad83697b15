"""Rows found in another tool's data set, columns that are not read, and what is left out with the reason."""

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
TWICE = "rows that have a column twice"
_FOLDERS = ("", "wavs", "wav", "audio", "clips")
_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".ogg", ".m4a", *sorted(AUDIO_SUFFIXES))
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
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.columns: Counter[str] = Counter()  # that are not read
        self.notes: list[str] = []  # what was taken as what
        self.forms: Counter[str] = Counter()  # of text files of which the words alone were read

    def take(
        self, origin: str, row: dict, find: Callable[[Any], Path | None], split: str | None = None, **more: Any
    ) -> None:
        """Adds the speech row that an object or a table's line is, whatever its columns are called.

        Args:
            find: the file of a clip as the row names it; None where it names none.
            split: the part that it belongs to where it does not say so itself.

        Raises:
            ValueError: columns of which it is not clear how they are meant.
        """
        values = named(row)
        if values is None:
            self.leave_out(TWICE, origin)
            return
        filled = {name: value for name, value in values.items() if _holds(value)}
        columns, cuts, splits, unread = _columns_of(tuple(filled))
        words = {name: word for name in splits if (word := word_of(filled[name]))}
        parts = {name: word for name, word in words.items() if name == "split" or part_of(word)}
        self.columns.update((*unread, *(words.keys() - parts.keys())))
        split = next(iter(parts.values()), split)
        audio = filled.get(columns["audio"][0]) if "audio" in columns else None
        if isinstance(audio, bytes) or (isinstance(audio, dict) and audio.get("bytes")):
            # It is cut already: edges under other names are those within a longer recording.
            self.columns.update(column for field, (column, _) in cuts.items() if column != field)
            cuts = {field: cut for field, cut in cuts.items() if cut[0] == field}
        if not self.takes(split) or (cut := self._cut(origin, filled, cuts)) is None:
            return
        texts = {word: name for name in columns.get("text", ()) if (word := word_of(filled[name]))}
        if len(texts) > 1:
            names = ", ".join(f"`{name}`" for name in texts.values())
            raise ValueError(f"{names}: which is the text? rename that to `text`")
        clip, ref_audio = find(audio), find(filled[columns["ref_audio"][0]]) if "ref_audio" in columns else None
        said = {of: word_of(filled[columns[of][0]]) for of in ("speaker", "scene", "ref_text") if of in columns}
        reference = self._reference(origin, ref_audio, said.pop("ref_text", None), clip)
        self.add(origin, clip, next(iter(texts), None), split=split, **said, **reference, **cut, **more)

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
        split = split or _part_below(os.path.dirname(clip), self.root)
        if self.takes(split):
            if split is not None:
                self.parts[split] += 1
            self.rows.append(row | {"split": "val"} if split and part_of(split) == "val" else row)

    def takes(self, split: str | None) -> bool:
        """False, counted, for a row that says that it is of a test part, whose clip then need not be written."""
        if split is None or self.with_test or part_of(split) != "test":
            return True
        self.parts[split] += 1
        return False

    def transcript(self, file: Path) -> str | None:
        """The words of a text file, without times and labels; None, counted, for a file that is no transcript."""
        try:
            words, form = read_transcript(file)
        except UnicodeDecodeError:
            self.leave_out("rows whose text file is not UTF-8", str(file))
            return None
        if words is None and form == "no words":
            return ""
        if words is None:
            self.leave_out(f"rows whose text file holds {form}", str(file))
        elif form is not None:
            self.forms[form] += 1
            self.examples.setdefault(form, str(file))
        return words and clean(words)

    def has_clip(self, clip: Path | None, origin: str) -> TypeGuard[Path]:
        """True if a manifest can name the clip; counts it as left out otherwise."""
        if clip is None:
            self.leave_out("rows that name no clip", origin)
            return False
        is_named = not _SURROGATE.search(os.path.abspath(clip))  # bytes that are no UTF-8, as Python escapes them
        if is_named and os.path.isfile(clip):
            return True
        reason = "clips that do not exist" if is_named else "clips whose file name is not UTF-8"
        self.leave_out(reason, origin if origin == str(clip) else f"{origin}: {clip}")
        return False

    def leave_out(self, reason: str, example: str) -> None:
        """Counts something that does not become a row."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example.encode("utf-8", "backslashreplace").decode("utf-8"))

    def lines(self, file: Path) -> list[str]:
        """Notes, columns that are not read, and one line for each reason to leave rows out."""
        forms = {f"{file}: {n:,} × the words alone of a text file with {form}": form for form, n in self.forms.items()}
        left_out = {f"left out: {n:,} × {reason}": reason for reason, n in self.left_out.items()}
        said, left = ([f"{line}, e.g. {self.examples[key]}" for line, key in of.items()] for of in (forms, left_out))
        return [*self.notes, *said, *unread_lines(self.columns, str(file)), *left]

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

    def _cut(self, origin: str, values: dict[str, Any], cuts: dict[str, tuple[str, float]]) -> dict[str, Any] | None:
        """The part of its clip that a row is, as a manifest has it; None, counted, where that cannot be told."""
        cut = {field: _number(field, values[column], unit) for field, (column, unit) in cuts.items()}
        edges = {"offset", "end"} & cut.keys()
        for field in [field for field, value in cut.items() if value is None and field not in edges]:
            if field != "duration" or not edges:  # it cuts nothing, or is the name of a channel
                self.columns[cuts[field][0]] += 1
                del cut[field]
        start, end = cut.get("offset") or 0.0, cut.pop("end", 0.0)
        if end is None or None in cut.values() or 0 < end <= start:
            names = ", ".join(f"`{column}`" for column, _ in cuts.values())
            self.leave_out(f"rows with a slice that cannot be ({names})", origin)
            return None
        if end:
            cut |= {"offset": start, "duration": round(end - start, 6)}
        return {field: value for field, value in cut.items() if value or field != "duration"}

    def _reference(self, origin: str, clip: Path | None, text: str | None, audio: Path | None) -> dict[str, str]:
        """`ref_audio` and `ref_text` of a row with this clip; nothing, counted, where they cannot be used."""
        if clip is None and not text:
            return {}
        if clip is None or not text or not os.path.isfile(clip) or _SURROGATE.search(str(clip)):
            self.leave_out("references whose clip or text is not there (their rows are kept)", origin)
        elif audio is not None and os.path.abspath(clip) == os.path.abspath(audio):
            self.leave_out("references that are the spoken clip itself (their rows are kept)", origin)
        else:
            return {"ref_audio": os.path.abspath(clip), "ref_text": clean(text)}
        return {}


class _Columns(NamedTuple):
    """Meaning of the columns that a row fills."""

    columns: dict[str, tuple[str, ...]]  # of each field; of several texts all, of other synonyms the first
    cuts: dict[str, tuple[str, float]]  # column and seconds of its unit, of each field that cuts the clip
    splits: tuple[str, ...]
    unread: tuple[str, ...]


@functools.lru_cache(1024)
def _columns_of(names: tuple[str, ...]) -> _Columns:
    """Raises ValueError for a column that would change what is trained, and is not understood."""
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
    """Finds clips as a table names them, by path or id: beside it, or in a folder that such a corpus has."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, value: Any) -> Path | None:
        """The clip's path, or the path it should have; None for a value that names none."""
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
        """Names of a folder's clips, each also by its small composed letters."""
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
    """Names of a folder and those above it, down from the root; none for a folder that is not below it."""
    below = os.path.relpath(folder, root)
    return () if below.startswith(os.pardir) or below == os.curdir else Path(below).parts


def named(row: dict) -> dict[str, Any] | None:
    """A row by its columns' plain names, without pandas' NaN; None where it has a column twice, in whatever letters."""
    values = {plain(str(name)): None if value != value else value for name, value in row.items()}
    return values if len(values) == len(row) and not getattr(row, "repeated", ()) else None


def beside(folder: Path, name: str) -> Path:
    """A path as another tool wrote it: beside its table, else below the working folder."""
    path = folder / os.path.expanduser(name)
    return path if os.path.exists(path) or not os.path.exists(name) else Path(name)


def _holds(value: Any) -> bool:
    return any(value.values()) if isinstance(value, dict) else value not in (None, "", [])


def first(values: dict[str, Any], *names: str) -> str | None:
    """The first of these that is filled, as text."""
    return next((word for name in names if (word := word_of(values.get(name)))), None)


def word_of(value: Any) -> str | None:
    """A value as text without blanks around it; of Hugging Face's `{"path", "bytes"}` the path; None for any other."""
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        return None
    return _SURROGATE.sub("", str(value)).strip() or None


def clean(text: str) -> str:
    """One line, as a transcript is; half surrogates, which are no characters, are left out."""
    return _SURROGATE.sub("", " ".join(text.split()))


def _number(field: str, value: Any, unit: float) -> float | None:
    """Seconds of a slice; a count, or -1 for a mix, of other fields; None for anything else."""
    try:
        number = float(value) * unit if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -2.0
    except (ValueError, OverflowError):
        return None
    if field in ("offset", "end", "duration"):
        return number if math.isfinite(number) and number >= 0 else None
    return int(number) if number >= -1 and number.is_integer() else None
