"""Tables with `|` between columns and mostly without a header: LJSpeech's, and those of trainers that follow it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...data.columns import plain
from ...data.foreign import FILE_COLUMNS, TEXT_COLUMNS, lines_in
from .found import SPEAKER_COLUMNS, ClipFinder, Found

ID_COLUMNS = (*FILE_COLUMNS, "id", "name", "file_id", "wav_id", "utt_id", "utterance_id")
LANGUAGES = frozenset("ar auto de en es fr hi it ja jp ko kr nl pl pt ru th tr vi yue zh".split())
FEW_ROWS = 10  # below which a value that is there twice is enough for a column of labels
MOST_ROWS = 10_000  # that are looked at, to tell columns apart
MOST_LABEL_CHARS, MOST_LABEL_WORDS = 40, 3
_LETTERS = r"[A-Za-z\u00c0-\u024f0-9_.'\-]+"
_NAME = re.compile(rf"{_LETTERS}( {_LETTERS}){{0,2}}")  # of a speaker, an utterance, a file; or a few words of a text
_ID = re.compile(r"(?=\S*[\d_])[A-Za-z0-9_.\-]+")
_ASKED = "so that none is clearly the text; put a first line on top that names the columns, such as `id|speaker|text`"
_SECONDS = re.compile(r"\d+\.\d+")
_END = tuple(".!?…。！？،।")
# Words, and of scripts that put no blanks between them each sign.
_SIGNS = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


@dataclass(frozen=True)
class Layout:
    """The columns of a table by their meaning, counted from 0."""

    width: int
    text: int
    clip: int = 0
    speaker: int | None = None
    raw: int | None = None  # the text before it was normalised, taken where `text` is empty

    def told(self) -> str:
        """One line that says which column was taken as what."""
        taken = {self.clip: "clip", self.text: "text"}
        if self.speaker is not None:
            taken[self.speaker] = "speaker"
        if self.raw is not None:
            taken[self.raw] = "text where the other is empty"
        columns = [f"{i + 1} {taken.get(i, 'not read')}" for i in range(self.width)]
        return f"columns: {', '.join(columns)}"


def read_ljspeech(path: Path) -> Found:
    """`id|text`, `id|text|normalised text`, `id|speaker|text`, `path|text|speaker` and the like.

    By its header, or else by what the columns hold: a speaker is said often, a text is long.

    Raises:
        ValueError: columns that cannot be told apart.
    """
    table = table_of(path, ("metadata.csv", "metadata.txt", "metadata.list", "filelist.txt"))
    found, clips = Found(), ClipFinder(table.parent)
    rows = []
    for number, line in enumerate(lines_in(table.read_text(encoding="utf-8-sig")), start=1):
        if "|" in line:
            rows.append((number, [part.strip() for part in line.split("|")]))
        elif line.strip():
            found.leave_out("lines without `|`", f"{table}:{number}")
    if not rows:
        return found
    layout, hint = _of_header(rows[0][1], clips), ""
    if layout is None:
        layout = layout_of([parts for _, parts in rows[:MOST_ROWS]])
        hint = "; where that is wrong, put a header on top, as `id|text|speaker`"
    else:
        del rows[0]
    if layout.width > 2:
        found.notes.append(f"{table}: {layout.told()}{hint}")
    for number, parts in rows:
        origin = f"{table}:{number}"
        if len(parts) != layout.width:
            reason = "lines with another number of columns than most"
            found.leave_out(reason, f"{origin}: {len(parts)} instead of {layout.width}")
            continue
        text = parts[layout.text] or ("" if layout.raw is None else parts[layout.raw])
        speaker = None if layout.speaker is None else parts[layout.speaker]
        found.add(origin, clips.find(parts[layout.clip] or None), text, speaker=speaker)
    return found


def _of_header(parts: list[str], clips: ClipFinder) -> Layout | None:
    """The layout that a first line names; None where it is a row."""
    names = [plain(part) for part in parts]

    def place(known: tuple[str, ...]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    text, clip = place(TEXT_COLUMNS), place(ID_COLUMNS)
    if text is None or clip is None or os.path.isfile(clips.find(parts[0] or None) or ""):
        return None
    if doubled := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"its header has the column `{doubled[:80]}` twice; rename or remove one")
    return Layout(len(parts), text, clip, place(SPEAKER_COLUMNS))


def layout_of(rows: list[list[str]]) -> Layout:
    """The meaning of the columns of rows without a header, the clip standing first.

    Raises:
        ValueError: several columns of which each might be the text.
    """
    [(width, _)] = Counter(map(len, rows)).most_common(1)
    if width == 2:
        return Layout(2, 1)
    columns = {i: [parts[i] for parts in rows if len(parts) == width] for i in range(1, width)}
    columns = {i: values for i, values in columns.items() if any(values)}
    labels = [i for i, values in columns.items() if _are_labels(values)]
    others = [i for i in columns if i not in labels]
    if not others and labels and all(_same_words(columns[i], columns[labels[0]]) for i in labels):
        return Layout(width, labels[-1])  # one-word commands, twice
    texts = [i for i in others if not _are(_ID, columns[i])] or others
    if not texts:
        raise ValueError(f"it has no header, and every column repeats its values, {_ASKED}")
    speaker = next((i for i in labels if _are_speakers(columns[i])), None)
    text, *more = texts
    if more and _is_normalised(columns[text], columns[more[0]]):
        return Layout(width, more[0], speaker=speaker, raw=text)
    if more and _are(_NAME, columns[text]) and not any(value.endswith(_END) for value in columns[text]):
        raise ValueError(f"it has no header, and column {text + 1} may hold names or a few words each, {_ASKED}")
    return Layout(width, text, speaker=speaker)


def _are_labels(values: list[str]) -> bool:
    """A few short values that come again and again: speakers, languages, moods."""
    filled = [value for value in values if value]
    kinds = set(filled)
    short = sum(len(v) <= MOST_LABEL_CHARS and len(v.split()) <= MOST_LABEL_WORDS for v in kinds)
    ended = sum(value.endswith(_END) for value in kinds)
    if short < 0.95 * len(kinds) or ended > 0.05 * len(kinds):
        return False
    return len(kinds) <= len(filled) / 2 or (len(kinds) < len(filled) < FEW_ROWS and _are(_NAME, filled))


def _are_speakers(labels: list[str]) -> bool:
    """Rather than languages, or lengths in seconds."""
    kinds = {re.split("[-_]", label.lower())[0] for label in labels if label}
    return not kinds <= LANGUAGES and not all(_SECONDS.fullmatch(kind) for kind in kinds)


def _are(kind: re.Pattern[str], values: list[str]) -> bool:
    filled = [value for value in values if value]
    return sum(bool(kind.fullmatch(value)) for value in filled) >= 0.95 * len(filled)


def _is_normalised(raw: list[str], other: list[str]) -> bool:
    """True if a column says in the same words what the one before says, rather than in phonemes or in pinyin.

    Numbers become words when a text is normalised, so that the others decide.
    """
    shares = []
    for text, said in zip(raw, other, strict=True):
        words = {word for word in _words(text) if not any(char.isdigit() for char in word)}
        if words and said:
            shares.append(len(words & _words(said)) / len(words))
    return not shares or sum(shares) >= 0.5 * len(shares)


def _same_words(one: list[str], other: list[str]) -> bool:
    return [_words(text) for text in one] == [_words(text) for text in other]


def _words(text: str) -> set[str]:
    """Its words without accents and vowel signs, which are added when a text is normalised."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return set(_WORD.findall("".join(c for c in letters if not unicodedata.combining(c))))


def table_of(path: Path, names: tuple[str, ...]) -> Path:
    """The file itself, or the first of these names in a folder.

    Raises:
        ValueError: none of them is there.
    """
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"it holds no {names[0]}")
