"""Meaning of columns in a table without a header, guessed from their values: speakers repeat, texts are long."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from ...data.texts import spelled_by_sound
from .parts import LANGUAGES, SHARED, part_of

FEW_ROWS = 10  # below this, one repeated value makes a column of labels
MOST_LABEL_CHARS, MOST_LABEL_WORDS = 40, 3
# Names of columns, and their descriptions in notes.
MEANINGS = {
    "audio": "clip",
    "speaker": "speaker",
    "split": "part",
    "text": "text",
    "raw_text": "text if the other is empty",
    "": "not read",
}
_LETTERS = r"[A-Za-z\u00c0-\u024f0-9_.'\-]+"
_NAME = re.compile(rf"{_LETTERS}( {_LETTERS}){{0,2}}")  # a speaker, an utterance, a file, or a few words of text
_ID = re.compile(r"(?=\S*[\d_])[A-Za-z0-9_.\-]+")
_ASKED = "so the text column is ambiguous; add a header line, such as `id|speaker|text`"
_NUMBERS = re.compile(r"-?\d+(?:[ ,]+-?\d+)+")
_SECONDS = re.compile(r"\d+\.\d+")
_END = tuple(".!?…。！？،।")
# Words; in scripts without blanks between words, single characters.
_SIGNS = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


def guess_columns(rows: list[list[str]]) -> list[str]:
    """Guesses a name of `MEANINGS` for each column; the first has the clips.

    Raises:
        ValueError: several columns may be the text or the speaker, or none has words.
    """
    [(width, _)] = Counter(map(len, rows)).most_common(1) or [(0, 0)]
    if width < 2:
        raise ValueError("it has no header with a clip and a text, and no rows with several columns")
    columns = {i: [parts[i] for parts in rows if len(parts) == width] for i in range(1, width)}
    columns = {i: values for i, values in columns.items() if any(values)}
    found = {0: "audio"} | ({1: "text"} if width == 2 else _texts_and_labels(columns, width))
    if width == 2 and 1 in columns and _are_phones(columns[1]):
        raise ValueError(_phones_in(1))
    return [found.get(i, "") for i in range(width)]


def _texts_and_labels(columns: dict[int, list[str]], width: int) -> dict[int, str]:
    labels = [i for i, values in columns.items() if _are_labels(values)]
    others = [i for i in columns if i not in labels]
    if not others and len({tuple(frozenset(_words(text)) for text in columns[i]) for i in labels}) == 1:
        return {labels[-1]: "text"}  # one-word commands, raw and normalised
    worded = [i for i in others if not _are(_ID, columns[i])] or others
    if not worded:
        raise ValueError(f"it has no header, and every column repeats its values, {_ASKED}")
    texts = [i for i in worded if not _are_phones(columns[i])]
    if not texts:
        raise ValueError(_phones_in(worded[0]))
    found = {i: "split" for i in labels if all(part_of(value) for value in columns[i] if value)}
    speaker = _speaker_of({i: columns[i] for i in labels if i not in found}, width, texts[0])
    found |= {} if speaker is None else {speaker: "speaker"}
    text, *more = texts
    if not more:
        return found | {text: "text"}
    if all(_is_normalised(columns[text], columns[i]) for i in more):
        return found | {text: "raw_text", more[0]: "text"}
    if _are(_NAME, columns[text]) and not any(value.endswith(_END) for value in columns[text]):
        raise ValueError(f"it has no header, and column {text + 1} may contain names or short texts, {_ASKED}")
    raise ValueError(_undecided("text", texts, width, {0: "id"}))


def _speaker_of(labels: dict[int, list[str]], width: int, text: int) -> int | None:
    """Returns the column of speakers: the only label that varies, unless it has languages, genders or moods."""
    names = {i: values for i, values in labels.items() if _are_speakers(values)}
    varied = {i: values for i, values in names.items() if len({*values} - {""}) > 1} or dict([*names.items()][:1])
    if not varied:
        return None
    kinds = [{*values} for values in varied.values()]
    together = {*zip(*varied.values(), strict=True)}
    if any(len(together) != len(kind) for kind in kinds):  # unless they name the same speakers
        raise ValueError(_undecided("speaker", [*varied], width, {0: "id", text: "text"}))
    return None if {kind.lower() for kind in kinds[0]} - {""} <= SHARED else next(iter(varied))


def _undecided(what: str, columns: list[int], width: int, known: dict[int, str]) -> str:
    header = [known.get(i, what if i == columns[-1] else f"other{i}") for i in range(width)]
    places = " and ".join(str(i + 1) for i in columns)
    asked = f"add a header line that names the {what}, such as `{'|'.join(header)}`"
    return f"it has no header, and each of columns {places} may be the {what}; {asked}"


def _phones_in(column: int) -> str:
    asked = "to train on these, add a header line that names the text, such as `id|text`"
    return f"column {column + 1} contains phonemes or numbers, not words; {asked}"


def _are_phones(values: list[str]) -> bool:
    """Returns True if most values are phonemes, pinyin or numbers of phonemes."""
    filled = [value for value in values if value]
    return sum(map(spelled_by_sound, filled)) > 0.8 * len(filled) or _are(_NUMBERS, values)


def _are_labels(values: list[str]) -> bool:
    """Returns True for few short, repeated values: speakers, languages, moods."""
    filled = [value for value in values if value]
    kinds = set(filled)
    short = sum(len(v) <= MOST_LABEL_CHARS and len(v.split()) <= MOST_LABEL_WORDS for v in kinds)
    ended = sum(value.endswith(_END) for value in kinds)
    if short < 0.95 * len(kinds) or ended > 0.05 * len(kinds):
        return False
    return len(kinds) <= len(filled) / 2 or (len(kinds) < len(filled) < FEW_ROWS and _are(_NAME, filled))


def _are_speakers(labels: list[str]) -> bool:
    """Returns True unless the labels are languages or lengths in seconds."""
    kinds = {re.split("[-_]", label.lower())[0] for label in labels if label}
    return not kinds <= LANGUAGES and not all(_SECONDS.fullmatch(kind) for kind in kinds)


def _are(kind: re.Pattern[str], values: list[str]) -> bool:
    filled = [value for value in values if value]
    return sum(bool(kind.fullmatch(value)) for value in filled) >= 0.95 * len(filled)


def _is_normalised(raw: list[str], other: list[str]) -> bool:
    """Returns True if column `other` has the words of `raw`, not its phonemes or pinyin.

    Ignores words with digits, since normalisation spells out numbers.
    """
    shares = []
    for text, said in zip(raw, other, strict=True):
        words = {word for word in _words(text) if not any(char.isdigit() for char in word)}
        if words and said:
            shares.append(len(words & _words(said)) / len(words))
    return not shares or sum(shares) >= 0.5 * len(shares)


def _words(text: str) -> set[str]:
    """Returns the words without accents and vowel signs, which normalisation may add."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return set(_WORD.findall("".join(c for c in letters if not unicodedata.combining(c))))
