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
from ...data.texts import spelled_by_sound
from .found import SPEAKER_COLUMNS, ClipFinder, Found
from .parts import LANGUAGES, SHARED, SPLIT_COLUMNS, part_of

ID_COLUMNS = (*FILE_COLUMNS, "id", "name", "file_id", "wav_id", "utt_id", "utterance_id")
FEW_ROWS = 10  # below which a value that is there twice is enough for a column of labels
MOST_ROWS = 10_000  # that are looked at, to tell columns apart
MOST_LABEL_CHARS, MOST_LABEL_WORDS = 40, 3
_LETTERS = r"[A-Za-z\u00c0-\u024f0-9_.'\-]+"
_NAME = re.compile(rf"{_LETTERS}( {_LETTERS}){{0,2}}")  # of a speaker, an utterance, a file; or a few words of a text
_ID = re.compile(r"(?=\S*[\d_])[A-Za-z0-9_.\-]+")
_ASKED = "so the text column is ambiguous; add a header line, such as `id|speaker|text`"
_NUMBERS = re.compile(r"-?\d+(?:[ ,]+-?\d+)+")
_SECONDS = re.compile(r"\d+\.\d+")
_END = tuple(".!?…。！？،।")
# Words, and of scripts that put no blanks between them each sign.
_SIGNS = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


@dataclass(frozen=True)
class Layout:
    """Meaning of a table's columns, counted from 0."""

    width: int
    text: int
    clip: int = 0
    speaker: int | None = None
    raw: int | None = None  # the text before it was normalised, taken where `text` is empty
    split: int | None = None

    def told(self) -> str:
        """One line on the meaning of each column."""
        taken = {self.clip: "clip", self.text: "text"}
        if self.speaker is not None:
            taken[self.speaker] = "speaker"
        if self.split is not None:
            taken[self.split] = "part"
        if self.raw is not None:
            taken[self.raw] = "text where the other is empty"
        columns = [f"{i + 1} {taken.get(i, 'not read')}" for i in range(self.width)]
        return f"columns: {', '.join(columns)}"


def read_ljspeech(path: Path, found: Found) -> None:
    """`id|text`, `id|text|normalised text`, `id|speaker|text`, `path|text|speaker` and the like.

    By its header, or else by what the columns hold: a speaker is said often, a text is long.

    Raises:
        ValueError: columns that cannot be told apart.
    """
    table = table_of(path, ("metadata.csv", "metadata.txt", "metadata.list", "filelist.txt"))
    clips = ClipFinder(table.parent)
    rows = []
    for number, line in enumerate(lines_in(table.read_text(encoding="utf-8-sig")), start=1):
        if "|" in line:
            rows.append((number, [part.strip() for part in line.split("|")]))
        elif line.strip():
            found.leave_out("lines without `|`", f"{table}:{number}")
    if not rows:
        return
    layout, hint = _of_header(rows[0][1], clips), ""
    if layout is None:
        layout = layout_of([parts for _, parts in rows[:MOST_ROWS]])
        hint = "; if that is wrong, add a header line, such as `id|text|speaker`"
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
        split = None if layout.split is None else parts[layout.split]
        found.add(origin, clips.find(parts[layout.clip] or None), text, speaker=speaker, split=split)


def _of_header(parts: list[str], clips: ClipFinder) -> Layout | None:
    """The layout that a first line names; None where it is a row."""
    names = [plain(part) for part in parts]

    def place(known: tuple[str, ...]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    text, clip = place(TEXT_COLUMNS), place(ID_COLUMNS)
    if text is None or clip is None or os.path.isfile(clips.find(parts[0] or None) or ""):
        return None
    if doubled := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"its header has the column `{doubled}` twice; rename or remove one")
    if names[text] != "text" and len(several := [f"`{name}`" for name in names if name in TEXT_COLUMNS]) > 1:
        raise ValueError(f"its header has {', '.join(several)}: which is the text? rename that to `text`")
    return Layout(len(parts), text, clip, place(SPEAKER_COLUMNS), split=place(SPLIT_COLUMNS))


def layout_of(rows: list[list[str]]) -> Layout:
    """Layout of rows without a header, from their values; the clip comes first.

    Raises:
        ValueError: several columns of which each might be the text or the speaker, or none that holds words.
    """
    [(width, _)] = Counter(map(len, rows)).most_common(1)
    columns = {i: [parts[i] for parts in rows if len(parts) == width] for i in range(1, width)}
    columns = {i: values for i, values in columns.items() if any(values)}
    if width == 2:
        _refuse_phones(columns, [1])
        return Layout(2, 1)
    labels = [i for i, values in columns.items() if _are_labels(values)]
    others = [i for i in columns if i not in labels]
    if not others and labels and all(_same_words(columns[i], columns[labels[0]]) for i in labels):
        return Layout(width, labels[-1])  # one-word commands, twice
    texts = [i for i in others if not _are(_ID, columns[i])] or others
    if not texts:
        raise ValueError(f"it has no header, and every column repeats its values, {_ASKED}")
    texts = [i for i in texts if not _are_phones(columns[i])] or _refuse_phones(columns, texts)
    split = next((i for i in labels if all(part_of(value) for value in columns[i] if value)), None)
    speaker = _speaker_of({i: columns[i] for i in labels if i != split}, width, texts[0])
    text, *more = texts
    if more and all(_is_normalised(columns[text], columns[i]) for i in more):
        return Layout(width, more[0], speaker=speaker, raw=text, split=split)
    if more and _are(_NAME, columns[text]) and not any(value.endswith(_END) for value in columns[text]):
        raise ValueError(f"it has no header, and column {text + 1} may hold names or a few words each, {_ASKED}")
    if more:
        raise ValueError(_undecided("text", texts, width, {0: "id"}))
    return Layout(width, text, speaker=speaker, split=split)


def _speaker_of(labels: dict[int, list[str]], width: int, text: int) -> int | None:
    """The column of speakers: of labels the only one that varies, unless it holds languages, genders or moods."""
    names = {i: values for i, values in labels.items() if _are_speakers(values)}
    varied = {i: values for i, values in names.items() if len({*values} - {""}) > 1} or dict([*names.items()][:1])
    if not varied:
        return None
    speaker, *more = varied
    kinds = [{*values} for values in varied.values()]
    together = {*zip(*varied.values(), strict=True)}
    if any(len(together) != len(kind) for kind in kinds):  # unless they name the same speakers
        raise ValueError(_undecided("speaker", [speaker, *more], width, {0: "id", text: "text"}))
    return None if {kind.lower() for kind in kinds[0]} - {""} <= SHARED else speaker


def _undecided(what: str, columns: list[int], width: int, known: dict[int, str]) -> str:
    header = [known.get(i, what if i == columns[-1] else f"other{i}") for i in range(width)]
    places = " and ".join(str(i + 1) for i in columns)
    asked = f"add a header line that names the {what}, such as `{'|'.join(header)}`"
    return f"it has no header, and each of columns {places} may be the {what}; {asked}"


def _are_phones(values: list[str]) -> bool:
    """Phonemes, pinyin or their numbers, of most texts."""
    filled = [value for value in values if value]
    return sum(map(spelled_by_sound, filled)) > 0.8 * len(filled) or _are(_NUMBERS, values)


def _refuse_phones(columns: dict[int, list[str]], texts: list[int]) -> list[int]:
    if columns and any(_are_phones(columns[i]) for i in texts if i in columns):
        raise ValueError(
            f"column {texts[0] + 1} holds phonemes or numbers, not words; add a header line that names the text, "
            "such as `id|text`, if they are what is to be trained on"
        )
    return texts


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
    """True if a column has the words of the one before, rather than its phonemes or its pinyin.

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
