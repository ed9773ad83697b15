"""Statistics of a manifest's texts: content that is not spoken, openings shared by most rows, normalised texts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .faults import Fault, plural
from .texts import PINYIN, PLAIN, spelled_by_sound

COMPOSED = "composed"
LOST = "U+FFFD, a lost letter"
PHONEMES = "phonemes"
# Patterns for content that is not spoken. A cheap search for suspect characters comes first.
_FOREIGN = re.compile(
    r"<\|[^|<>]{0,60}\|>|<(?:COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT|SIL|MUSIC|NOISE|OTHER|UNK|unk|pad|PAD|eps|s|/s"
    r"|bos|eos|mask|blank|sil|spn|noise|laughter|strong|/strong|breath|spk\d*|zh|en|ja|ko|yue)>|\[SPEAKER_\d+\]"
    r"|\[(?:UNK|PAD|CLS|SEP|MASK|UV_BREAK|uv_break|lbreak|laugh|S\d|oral_\d|INST|/INST)\]"
)
_ODD = {
    name: re.compile(pattern)
    for name, pattern in {
        "markup or entities": r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>|&(?:#\d+|#x[0-9a-fA-F]+|[A-Za-z]{2,8});|\*\*",
        "URL encoding": r"(?:\w%[0-9A-Fa-f]{2}){2}|%[0-9A-Fa-f]{2}%[0-9A-Fa-f]{2}|\w%(?:20|2C|27|3F|22|3A)\w",
        "written-out escapes": r"\\(?:[nrt\"'/]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2})",
        LOST: "\ufffd",
        "mojibake": "[\u00c2\u00c3][\u0080-\u00bf\u2018-\u201e\u20ac\u0152\u0153\u0160\u0161\u017d\u017e\u0178"
        "\u2020-\u2022\u2026\u2030\u2122\u02c6]|\u00e2\u20ac|\u00e2\u0080|\u00f0\u0178|\u00ef\u00bb\u00bf|[\u00d0\u00d1][\u0080-\u00bf\u2018-\u201e]"
        "|[\u00e3-\u00e9][\u0080-\u00bf\u20ac\u201a-\u2122]{2}|[\u0080-\u009f]|[\u7e3a\u7e67\u7e5d].?[\u7e3a\u7e67\u7e5d]"
        "|(?:[\u0420\u0421][\u0401-\u040f\u0451-\u045f\u00a0-\u00bf\u2018-\u2122]){2}",
        "scripts mixed within a word": "[A-Za-z\u00c0-\u024f][\u0370-\u03ff\u0400-\u04ff]"
        "|[\u0370-\u03ff\u0400-\u04ff][A-Za-z\u00c0-\u024f]",
        "invisible characters": "[\u200b\u200e\u200f\u2060-\u2064\u202a-\u202e\ufeff\u00ad\x00-\x08\x0e-\x1f\x7f]",
        "a sound or a note in brackets": r"\[(?!SPEAKER\d)[^\W\d][^\[\]]*\](?!</SE>|<SE_e>)|[{*]+\w+[}*]+"
        r"|[\u266a\u266b]|\((?:laugh|cough|sigh|applause|inaudible|music|noise)\w*\)",
        "an address": r"https?://\S+",
        "an id, or cells of a table": r"\w_\w|\A(?:[A-Za-z]+\d+-\d{3,}|utt\w*\d)\b|\t|\w\|\w| \| |\(\w+-\w*\d\)\Z",
        "prosody marks": r"\w#[1-4]",
        "times": r"[\[(<]\d?\d:\d\d[^\[\]()<>]*[\])>]|\A(?:\d*\.\d+ [^\W\d]\w* ?){2,}\Z",
    }.items()
}
_SOUND_TAG = re.compile(r"</?SE(_[A-Za-z]+)?>|\[SPEAKER\d+\]")
_SUSPECT_ASCII = re.compile(r"[<\[&%\\_|*{#/(\x00-\x09\x0e-\x1f\x7f]")
_FIRST = re.compile(r"[A-Za-z]*\d")
PLACEHOLDERS = frozenset(("null", "nan", "NaN", "None", "N/A", "n/a", "undefined"))
_SUSPECT = re.compile(
    r"[<\[&%\\_|*{#/(\x00-\x09\x0e-\x1f\x7f-\x9f\u00ad\u00c2\u00c3\u00d0\u00d1\u00e2-\u00e9\u00ef\u00f0\u0250-\u02af\u02c8"
    r"\u0370-\u04ff\u200b\u200e\u200f\u2060-\u2064\u202a-\u202e\u266a\u266b\u7e3a\u7e67\u7e5d\ufeff\ufffd]"
)
MOST_OPENINGS = 4096  # kept at a time; those that occurred once are dropped first
LEAST_ROWS, LEAST_LABELLED = 20, 3  # for an opening, and for one that looks like a label
_SENTENCE_ENDS = tuple(".!?…。！？")
_LABEL_ENDS = tuple(":|>])}")

_DIGIT, _DIGIT_SOON = re.compile(r"\d"), re.compile(r"[^\W\d]\D{0,19}\d")
_ZEROS = str.maketrans("123456789", 9 * "0")  # so that `Speaker 1:` and `Speaker 0:` count as one opening

Place = tuple[int, int]  # line and element of a row


def oddities(text: str) -> Iterator[tuple[str, str]]:
    """Yields (kind, example) of unspoken content in a text, one per kind."""
    if text in PLACEHOLDERS:
        yield "no text but a placeholder", text
    suspect = _SUSPECT_ASCII if text.isascii() else _SUSPECT
    if not (
        suspect.search(text) or PINYIN.match(text) or _FIRST.match(text) or (text.isupper() and _DIGIT.search(text))
    ):
        return
    if found := next((f for f in _FOREIGN.finditer(text) if not _SOUND_TAG.fullmatch(f[0])), None):
        yield "control tokens of another system", text[max(0, found.start() - 12) : found.end() + 12]
    plain = _FOREIGN.sub("", text) if "<" in text or "[" in text else text
    for kind, pattern in _ODD.items():
        if found := next((f for f in pattern.finditer(plain) if not _SOUND_TAG.fullmatch(f[0])), None):
            yield kind, plain[max(0, found.start() - 12) : found.end() + 12]
    if spelled_by_sound(plain):
        yield PHONEMES, text[:40]


@dataclass
class _Seen:
    count: int
    place: Place
    example: str


@dataclass
class TextFindings:
    """Findings of one process; `merged` combines those of all ranks."""

    rows: int = 0
    kinds: dict[str, _Seen] = field(default_factory=dict)
    openings: dict[str, _Seen] = field(default_factory=dict)  # by first word; the example is the common prefix

    def count(self, text: str, given: str, place: Place) -> None:
        """Counts one row's text, both normalised and as given."""
        self.rows += 1
        if PLAIN.fullmatch(given) is None or given in PLACEHOLDERS:
            for kind, example in oddities(given):
                _count(self.kinds, kind, _Seen(1, place, example))
            if text != given and text != given.strip():
                self.note_composed(text, place)
            if _DIGIT_SOON.match(text):
                text = text.translate(_ZEROS)
        word = text.partition(" ")[0]
        if (seen := self.openings.get(word)) is not None and text.startswith(seen.example):
            seen.count += 1  # by far the most common case
            return
        _count(self.openings, word, _Seen(1, place, text), common=True)
        if len(self.openings) > MOST_OPENINGS:
            self.openings = {word: seen for word, seen in self.openings.items() if seen.count > 1}

    def note_composed(self, text: str, place: Place) -> None:
        """Counts a text that was changed by normalisation."""
        _count(self.kinds, COMPOSED, _Seen(1, place, text[:40]))

    @classmethod
    def merged(cls, of_ranks: list[TextFindings]) -> TextFindings:
        """Combines the findings of all ranks."""
        whole = cls(sum(findings.rows for findings in of_ranks))
        for findings in of_ranks:
            for key, seen in findings.kinds.items():
                _count(whole.kinds, key, seen)
            for key, seen in findings.openings.items():
                _count(whole.openings, key, seen, common=True)
        return whole

    def warnings(self, file: str) -> list[Fault]:
        """Returns one warning per kind, with count and example."""
        said = {
            f"{plural(seen.count, 'row')} with {kind}, e.g. {seen.example!r}: is it spoken?": seen.place
            for kind, seen in self.kinds.items()
            if kind != COMPOSED
        }
        for word, seen in self.openings.items():
            if opening := self._opening(word, seen):
                said[f"{seen.count:,} of {self.rows:,} texts begin with {opening!r}: is it spoken?"] = seen.place
        return [Fault(file, line, "text", what, True, element=element) for what, (line, element) in said.items()]

    def faults(self, file: str) -> list[Fault]:
        """Returns faults of the manifest as a whole: lost letters in most rows."""
        lost = self.kinds.get(LOST)
        if lost is None or 2 * lost.count <= self.rows:
            return []
        problem = (
            f"{lost.count:,} of {self.rows:,} texts contain U+FFFD, e.g. {lost.example!r}: "
            "they were decoded with the wrong encoding; export them again as UTF-8"
        )
        return [Fault(file, lost.place[0], "text", problem, element=lost.place[1])]

    def notes(self, file: str) -> list[str]:
        """Returns one line on texts changed by normalisation."""
        if (seen := self.kinds.get(COMPOSED)) is None:
            return []
        texts = f"{seen.count:,} text{' is' if seen.count == 1 else 's are'}"
        return [
            f"{file}: {texts} normalised to NFC, with blanks for line breaks and no-break blanks, "
            f"as `generate` does, e.g. line {seen.place[0]}"
        ]

    def _opening(self, word: str, seen: _Seen) -> str | None:
        """Returns the common opening of these texts if most texts have it and differ after it."""
        is_label = word.endswith(_LABEL_ENDS) or ":" in seen.example
        if 2 * seen.count <= self.rows or seen.count < (LEAST_LABELLED if is_label else LEAST_ROWS):
            return None
        opening = seen.example[: seen.example.rfind(" ") + 1]
        is_all = seen.example.endswith(_SENTENCE_ENDS)  # a repeated text, not an opening
        return None if opening == "" or is_all or word.startswith(("[SPEAKER", "<SE")) else opening


def _count(counts: dict[str, _Seen], key: str, more: _Seen, *, common: bool = False) -> None:
    """Adds to a key's count; the example is the earliest row's, or with `common` the common prefix."""
    seen = counts.get(key)
    if seen is None:
        counts[key] = more
        return
    example = os.path.commonprefix([seen.example, more.example]) if common else min(seen, more, key=_place).example
    counts[key] = _Seen(seen.count + more.count, min(seen.place, more.place), example)


def _place(seen: _Seen) -> Place:
    return seen.place
