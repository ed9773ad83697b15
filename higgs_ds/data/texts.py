"""Texts that are not speech: transcript files with times and labels, and parts of a text that nobody says."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple


class Transcript(NamedTuple):
    """Words that a text holds, and the form that it has (None: plain words); without words, the reason."""

    words: str | None
    form: str | None = None


_LINE_BREAK = re.compile(r"[ \t]*[\n\r\x0b\x0c\x85\u2028\u2029]\s*")
_UNBROKEN = re.compile(r"[\u00a0\u2007\u202f]")
_VISIBLE = re.compile(r"[^\W_\u115f\u1160\u3164\uffa0]")  # a letter or a digit; not Hangul's empty fillers

_CLOCK = r"(?:\d{1,3}:)?\d{1,3}:\d{2}(?:[.,]\d{1,6})?"
_TIME = rf"(?:{_CLOCK}|\d+(?:\.\d+)?\s?s?)"
_ARROW = re.compile(rf"{_TIME}\s*-+>\s*{_TIME}")
_TIMING_LINE = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}.*")
_SEP = r"\s*(?:-|–|,|:|to)\s*"
_EXACT = r"\d+\.\d+\s?s?"
_BRACKET = re.compile(
    rf"[\[(<]\s*(?:{_CLOCK}(?:{_SEP}{_CLOCK})?|{_TIME}\s*-+>\s*{_TIME}|{_EXACT}{_SEP}{_EXACT})\s*[\])>]\s*:?"
)
_LRC_TAG = re.compile(r"\[[a-z#]+:[^\]]*\]", re.IGNORECASE)
_CUE_MARKUP = re.compile(r"</?[^<>]{0,80}>|\{\\[^{}]*\}")
_CLOCK_FIRST = re.compile(rf"{_CLOCK}(?:\s*[-–|,;]+\s*{_CLOCK})?(?:\s*[-–|,;:]+|\b)\s*(.*)")
_EXACT_CLOCK = re.compile(r"\d{1,2}:\d{2}:\d{2}[.,]\d")
_NUMBER_FIRST = re.compile(r"#?(\d{1,5})(?:[.):]\s*|\s+|$)(.*)")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_PRAAT_PHONES = re.compile(r"phone|phon|segment|ipa|mau|sampa", re.IGNORECASE)
_SILENCE = re.compile(r"<?(?:eps|sil|silB|silE|sp|spn|pau|unk|p:)>?|#|h#", re.IGNORECASE)  # as a label
_SENTENCE = re.compile(r"</?s>|<eps>|<sil>")
_CONSOLE = re.compile(
    r"Detect(?:ing|ed) language\b.*|.*\b(?:UserWarning|INFO|WARNING)\s*[:\]].*|(?:ph|w)seq\d+:.*|.*score\d+:.*"
)
_JULIUS = re.compile(r"^sentence\d+:(.*)$", re.MULTILINE)

# HTS: the phone within its neighbours, as `xx^sil-m+i=z`; ARPAbet with stress; TIMIT's and Kaldi's phones.
_FULL_CONTEXT = re.compile(r"\S+[-^]\S*\+\S+[=/@]\S*")
_ARPABET = frozenset(
    "AA AE AH AO AW AX AXR AY B BCL CH D DCL DH DX EH EL EM EN ENG EPI ER EY F G GCL HH HV IH IX IY JH K KCL L M N NG "
    "NX OW OY P PCL PAU Q R S SH T TCL TH UH UW UX V W Y Z ZH SIL SP SPN H#".split()
)
_STRESSED = re.compile(r"[A-Z]{2}[0-2]")
_PINYIN = re.compile(r"[a-zü:]{1,6}[1-5]")
_IPA = re.compile(r"[\u0250-\u02af\u02c8\u02cc\u02d0]")
_PHONE_LENGTH = 1.6  # letters of a label on average, up to which labels are phones: words are longer


def composed(text: str) -> str:
    """The text as it is trained on and spoken: composed (NFC), without line breaks, no-break blanks as blanks."""
    return with_plain_letters(_LINE_BREAK.sub(" ", text) if len(text.splitlines()) > 1 else text)


def with_plain_letters(text: str) -> str:
    """The text composed (NFC), no-break blanks as blanks; its lines stay."""
    return text if text.isascii() else unicodedata.normalize("NFC", _UNBROKEN.sub(" ", text))


def is_visible(text: str) -> bool:
    """True if the text has a letter or a digit that a reader can see."""
    return _VISIBLE.search(text) is not None


def read_transcript(source: Path | str) -> Transcript:
    """The words alone of a text, or of the file at a path, whatever form it has; None for its words where it has none.

    Raises OSError, and UnicodeDecodeError for a file that is not UTF-8, nor UTF-16 with its mark.
    """
    if isinstance(source, Path):
        content = source.read_bytes()
        is_wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        text, stem = content.decode("utf-16" if is_wide else "utf-8-sig"), source.name.split(".")[0]
    else:
        text, stem = source, ""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line and not _CONSOLE.fullmatch(line)]
    found = next(((name, said) for name, read in _FORMS.items() if (said := read(text, lines)) is not None), None)
    form, said = found or (None, lines)
    labels = [label for label in said if label.strip()]
    said = labels
    if form is not None:
        said = [_SENTENCE.sub("", label).strip() for label in labels if not _SILENCE.fullmatch(label.strip())]
    if _is_id(stem):
        said, form = _without_id(said, stem, form)
    if are_phones(labels) or (form is None and spelled_by_sound(" ".join(said))):
        return Transcript(None, "phone labels")
    if form is None and (_ARROW.search(text) or any(map(_is_timed, lines))):
        return Transcript(None, "times in a form that is not known")
    words = composed(" ".join(said)).strip()
    if not is_visible(words):
        return Transcript(None, f"no words ({form})" if form else "no words")
    return Transcript(words, form)


def are_phones(labels: list[str]) -> bool:
    """True if labels are phones: HTS's full context, or one short sound each."""
    if not labels or any(" " in label for label in labels):
        return bool(labels) and all(_FULL_CONTEXT.match(label) for label in labels)
    if all(map(_FULL_CONTEXT.match, labels)):
        return True
    latin = [label for label in labels if label[0] < "\u02ff"]
    if len(latin) < len(labels) or len(labels) < 2:
        return False
    known = sum(label.rstrip("012").upper() in _ARPABET for label in labels)
    sounds = [label for label in labels if not _SILENCE.fullmatch(label)]
    longest = _PHONE_LENGTH + 0.6 * (len(sounds) < len(labels))
    return known > 0.8 * len(labels) or (len(labels) > 3 and mean(map(len, sounds or labels)) <= longest)


def spelled_by_sound(text: str) -> bool:
    """True if a text is phonemes: ARPAbet with stress, pinyin with tones, or IPA."""
    tokens = text.replace("|", " ").split()
    if len(tokens) < 2:
        return False
    if any(map(_STRESSED.fullmatch, tokens)) and all(
        token.rstrip("012") in _ARPABET or not token.isalnum() for token in tokens
    ):
        return True
    words = [token for token in tokens if token.isalnum()]
    return sum(map(bool, map(_PINYIN.fullmatch, words))) > 0.8 * max(2, len(words)) or (
        sum(map(bool, map(_IPA.search, tokens))) > 0.3 * len(tokens)
    )


def holds_times(text: str) -> str | None:
    """Form of the times that a row's text holds, such as cues of subtitles; None for a text without."""
    plain = text[:1] not in _TIMES_START and "\n" not in text and "\t" not in text and "->" not in text
    if plain and text.count(".") < 2 and text.count(":") < 1:
        return None
    words, form = read_transcript(text)
    return form if form not in (None, "phone labels", "no words", _NUMBERED) else None


_TIMES_START = frozenset('0123456789[(<{#WFO;"')  # characters that a text may begin with where times do
_NUMBERED = "numbered lines"


def _subtitles(text: str, lines: list[str]) -> list[str] | None:
    """SRT and VTT, with a header or without."""
    timing = [i for i, line in enumerate(lines) if _TIMING_LINE.fullmatch(line)]
    if not timing:
        return [] if text.lstrip("\ufeff").startswith("WEBVTT") else None
    blocks = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    said: list[str] = []
    for block in blocks:  # what stands before a block's timing is its number or name, or a note
        rows = [row.strip() for row in block.strip().split("\n")]
        at = [i for i, row in enumerate(rows) if _TIMING_LINE.fullmatch(row)]
        for i, place in enumerate(at):
            last = at[i + 1] if i + 1 < len(at) else len(rows)
            cue = rows[place + 1 : last]
            if last < len(rows) and cue and cue[-1].isdigit():
                cue.pop()
            said += cue
    return [html.unescape(_CUE_MARKUP.sub("", row)) for row in said]


def _bracketed(text: str, lines: list[str]) -> list[str] | None:
    """LRC, and what recognisers print: each line behind its time, or two of them, in brackets."""
    body = [line for line in lines if not (_LRC_TAG.fullmatch(line) and not _BRACKET.match(line))]
    if not body or sum(_BRACKET.match(line) is not None for line in body) <= len(body) / 2:
        return None
    return [_BRACKET.sub("", line) for line in body]


def _textgrid(text: str, lines: list[str]) -> list[str] | None:
    """Praat's, long and short: the tier of words."""
    if "ooTextFile" not in text[:200] and "IntervalTier" not in text[:2000]:
        return None
    tiers: dict[str, list[str]] = {}
    strings = iter([found.replace('""', '"') for found in _QUOTED.findall(text)])
    labels: list[str] = []
    for string in strings:
        if string in ("IntervalTier", "TextTier"):
            labels = tiers.setdefault(next(strings, ""), [])
        elif string.strip():
            labels.append(string)
    named = {name: found for name, found in tiers.items() if not _PRAAT_PHONES.search(name) and not are_phones(found)}
    best = [found for name, found in named.items() if re.search(r"word|ort|text|trans|sent|utt", name, re.IGNORECASE)]
    return best[0] if best else next(iter(named.values()), []) if len(named) < 2 else []


def _json(text: str, lines: list[str]) -> list[str] | None:
    """A recogniser's result with its `text`."""
    if not text.lstrip("\ufeff \n\t").startswith(("{", "[{")):
        return None
    try:
        value = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None
    values = value if isinstance(value, list) else value.get("segments", [value]) if "text" not in value else [value]
    said = [part.get("text") if isinstance(part, dict) else None for part in values]
    return [words for words in said if isinstance(words, str)]


def _julius(text: str, lines: list[str]) -> list[str] | None:
    return _JULIUS.findall(text) or None


def _dialogue(text: str, lines: list[str]) -> list[str] | None:
    """SubStation Alpha: the tenth field of each `Dialogue:`."""
    if not text.lstrip("\ufeff").startswith("[Script Info]"):
        return None
    cues = [line.split(",", 9)[9:] for line in lines if line.startswith("Dialogue:")]
    return [_CUE_MARKUP.sub("", words).replace("\\N", " ").replace("\\n", " ") for cue in cues for words in cue]


def _xml(text: str, lines: list[str]) -> list[str] | None:
    """TTML, ELAN and other XML: none of it is taken for words."""
    return [] if re.match(r"\ufeff?\s*<(?:\?xml|tt)\b", text) else None


def _table(text: str, lines: list[str]) -> list[str] | None:
    """Rows with a header that names begin, end and words: Whisper's TSV, an aligner's CSV."""
    if len(lines) < 2:
        return None
    for delimiter in "\t,;":
        names = [name.strip(' "').lower() for name in lines[0].split(delimiter)]
        if not {"start", "begin", "onset", "tmin"} & {*names}:
            continue
        column = next((names.index(n) for n in ("text", "word", "words", "label", "transcript") if n in names), None)
        if column is None:
            return []
        rows = [line.split(delimiter, len(names) - 1) for line in lines[1:]]
        kind = names.index("type") if "type" in names else None
        if kind is not None:
            rows = [row for row in rows if len(row) > kind and row[kind].strip(' "') in ("words", "word")]
        return [row[column].strip(' "') for row in rows if len(row) > column]
    return None


def _rows_with_times(text: str, lines: list[str]) -> list[str] | None:
    """Audacity, TIMIT, HTK and HTS, CTM, STM, aligners: columns of numbers beside one of words."""
    tabs = [line.split("\t") for line in lines]
    if tabs and all(sum(re.fullmatch(_CLOCK, cell) is not None for cell in row) > 1 for row in tabs):
        return [row[-1] for row in tabs if not re.fullmatch(_CLOCK, row[-1])]  # ELAN's export, a tier's name first
    if "#" in lines:  # xwaves: behind a header
        lines = lines[lines.index("#") + 1 :]
    rows = [line for line in lines if line != "." and not re.match(r'#!MLF!#|"[^"]*"$|;;|\\', line)]
    if not rows:
        return None
    for reader in (_behind_two_numbers, _ctm, _before_two_numbers, _beside_one_number):
        said = [reader(_cells(row)) for row in rows]
        found = [part for part in said if part is not None]
        if len(found) == len(rows) and _in_order([numbers for numbers, _ in found], reader is _beside_one_number):
            return [label for _, label in found]
    return None


def _cells(line: str) -> list[str]:
    delimiter = next(
        (d for d in "\t|;," if d in line and _NUMBER.fullmatch(line.split(d)[-1 - line.count(d)].strip())), None
    )
    if delimiter is None and line.count(",") >= 2 and " " not in line:
        delimiter = ","
    return [cell.strip() for cell in line.split(delimiter)] if delimiter else line.split()


_Part = tuple[list[str], str]


def _behind_two_numbers(cells: list[str]) -> _Part | None:
    if len(cells) < 2 or not _are_numbers(cells[:2]):
        return None
    label = cells[2:]
    if len(label) > 1 and _NUMBER.fullmatch(label[-1]) and ("." in label[-1] or label[-1].startswith("-")):
        label = label[:-1]  # a score
    return cells[:2], " ".join(label)


def _ctm(cells: list[str]) -> _Part | None:
    if (
        len(cells) >= 5
        and _are_numbers(cells[2:4])
        and "." in cells[2] + cells[3]
        and len(cells[1]) <= 2
        and len(cells) <= 7
    ):
        return [cells[2], str(float(cells[2]) + float(cells[3]))], cells[4]
    if len(cells) >= 6 and _are_numbers(cells[3:5]) and "." in cells[3] + cells[4]:  # STM
        return cells[3:5], re.sub(r"^<[^<>]*>\s*", "", " ".join(cells[5:]))
    return None


def _before_two_numbers(cells: list[str]) -> _Part | None:
    numbers = [cell for cell in cells[1:] if _NUMBER.fullmatch(cell)]
    words = cells[: len(cells) - len(numbers)]
    if (
        2 <= len(numbers) <= 3
        and 1 <= len(words) <= 2
        and _are_numbers(cells[len(words) :])
        and "." in "".join(numbers)
    ):
        return numbers[:2], words[0]
    return None


def _beside_one_number(cells: list[str]) -> _Part | None:
    """A word and its time or score, the one before the other or behind it."""
    if len(cells) == 2 and _are_numbers(cells[:1]) != _are_numbers(cells[1:]):
        number, label = cells if _are_numbers(cells[:1]) else cells[::-1]
        if "." in number.strip("."):
            return [number], label
    return None


def _are_numbers(cells: list[str]) -> bool:
    return all(map(_NUMBER.fullmatch, cells))


def _in_order(rows: list[list[str]], one_number: bool) -> bool:
    """True if numbers are times and not counted aloud: they go on from row to row, each to an end behind its start."""
    if one_number:
        return len(rows) > 1
    times = [tuple(map(float, row)) for row in rows]
    if any(start > end for start, end in times) and len({end for _, end in times}) > 1:  # xwaves: a colour, not an end
        return False
    if len(times) == 1:
        return "." in "".join(rows[0]) or (times[0][0] == 0 and times[0][1] >= 1000)
    return all(a[0] <= b[0] for a, b in pairwise(times)) and times[-1][0] > times[0][0]


def _clocks(text: str, lines: list[str]) -> list[str] | None:
    """Lines behind a clock, as video sites show them, the words beside it or below."""
    found = [_CLOCK_FIRST.fullmatch(line) for line in lines]
    count = sum(match is not None for match in found)
    if count < 2 - (len(lines) == 1 and _EXACT_CLOCK.match(lines[0]) is not None):
        return None
    if count < len(lines) and not all(match[1] == "" for match in found if match):
        return None
    return [match[1] if match else line for match, line in zip(found, lines, strict=True)]


def _numbers(text: str, lines: list[str]) -> list[str] | None:
    """Lines that are counted, from 0 or 1 on."""
    found = [match for line in lines if (match := _NUMBER_FIRST.fullmatch(line))]
    first = int(found[0][1]) if found else -1
    if len(found) < 2 or len(found) < len(lines) or first not in (0, 1):
        return None
    return [m[2] for m in found] if [int(m[1]) for m in found] == [*range(first, first + len(found))] else None


def _is_id(stem: str) -> bool:
    """True for a file's name that is no word or number of its text: `84-121-0001`, `SA1`."""
    return len(stem) >= (6 if stem.isdigit() else 3) and any(map(str.isdigit, stem))


def _without_id(said: list[str], stem: str, form: str | None) -> tuple[list[str], str | None]:
    """The lines without the clip's id before them or, in brackets, behind them."""
    kept = [re.sub(rf"^{re.escape(stem)}(?:\.\w+)?[\s|:,]+|\s*\({re.escape(stem)}\)$", "", line) for line in said]
    return kept, form if kept == said else form or "an id and its text"


def _is_timed(line: str) -> bool:
    return _BRACKET.match(line) is not None and re.search(r"[.,]\d|->", line) is not None


_FORMS: dict[str, Callable[[str, list[str]], list[str] | None]] = {
    "SRT or VTT": _subtitles,
    "SubStation Alpha": _dialogue,
    "XML": _xml,
    "TextGrid": _textgrid,
    "JSON": _json,
    "a recogniser's output": _julius,
    "times in brackets": _bracketed,
    "a table of times": _table,
    "times and labels": _rows_with_times,
    "times": _clocks,
    _NUMBERED: _numbers,
}


# Kinds of what nobody says, and how each is found; a text that nothing of it is in costs a search or two.
_FOREIGN = "control tokens of another system"
_ODD = {
    _FOREIGN: re.compile(
        r"<\|[^|<>]{0,60}\|>|<(?:COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT|SIL|MUSIC|NOISE|OTHER|UNK|unk|pad|PAD|eps|s|/s"
        r"|bos|eos|mask|blank|sil|spn|noise|laughter|strong|/strong|breath|spk\d*|zh|en|ja|ko|yue)>"
        r"|\[(?:UNK|PAD|CLS|SEP|MASK|UV_BREAK|uv_break|lbreak|laugh|S\d|oral_\d|INST|/INST)\]"
    ),
    "markup or entities": re.compile(
        r"</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>|&(?:#\d+|#x[0-9a-fA-F]+|[A-Za-z]{2,8});"
    ),
    "URL encoding": re.compile(r"(?:\w%[0-9A-Fa-f]{2}){2}|%[0-9A-Fa-f]{2}%[0-9A-Fa-f]{2}|\w%(?:20|2C|27|3F|22|3A)\w"),
    "written-out escapes": re.compile(r"\\(?:[nrt\"'/]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2})"),
    "U+FFFD, a letter that was lost": re.compile("\ufffd"),
    "mojibake": re.compile(
        "[\u00c2\u00c3][\u0080-\u00bf\u2018-\u201e\u20ac\u0152\u0153\u0160\u0161\u017d\u017e\u0178\u2020-\u2022\u2026\u2030\u2122\u02c6]"
        "|\u00e2\u20ac|\u00e2\u0080|\u00f0\u0178|\u00ef\u00bb\u00bf|[\u00d0\u00d1][\u0080-\u00bf\u2018-\u201e]"
        "|[\u00e3-\u00e9][\u0080-\u00bf\u20ac\u201a-\u2122]{2}|[\u0080-\u009f]"
    ),
    "scripts mixed within a word": re.compile(
        "[A-Za-z\u00c0-\u024f][\u0370-\u03ff\u0400-\u04ff]|[\u0370-\u03ff\u0400-\u04ff][A-Za-z\u00c0-\u024f]"
    ),
    "invisible characters": re.compile(
        "[\u200b\u200e\u200f\u2060-\u2064\u202a-\u202e\ufeff\u00ad\x00-\x08\x0e-\x1f\x7f]"
    ),
    "phonemes": re.compile(r"(?!)"),  # see `spelled_by_sound`
}
_SOUND_TAG = re.compile(r"</?SE(_[A-Za-z]+)?>|\[SPEAKER\d+\]")
_SUSPECT_ASCII = re.compile(r"[<\[&%\\\x00-\x08\x0e-\x1f\x7f]")
_SUSPECT = re.compile(
    r"[<\[&%\\\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u00c2\u00c3\u00d0\u00d1\u00e2-\u00e9\u00ef\u00f0\u0250-\u02af\u02c8"
    r"\u0370-\u04ff\u200b\u200e\u200f\u2060-\u2064\u202a-\u202e\ufeff\ufffd]"
)
LOST = "U+FFFD, a letter that was lost"


def oddities(text: str) -> Iterator[tuple[str, str]]:
    """(kind, example) of everything in a text that nobody speaks, one of a kind."""
    suspect = _SUSPECT_ASCII if text.isascii() else _SUSPECT
    if suspect.search(text) is None and not text.isupper() and _PINYIN.match(text) is None:
        return
    for kind, pattern in _ODD.items():
        for found in pattern.finditer(text):
            if not _SOUND_TAG.fullmatch(found[0]) and (kind == _FOREIGN or not _ODD[_FOREIGN].fullmatch(found[0])):
                yield kind, text[max(0, found.start() - 12) : found.end() + 12]
                break
        else:
            if kind == "phonemes" and spelled_by_sound(text):
                yield kind, text[:40]
