"""Normalisation of texts, and extraction of the words from transcript files with times, labels or ids."""

from __future__ import annotations

import csv
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple


class Transcript(NamedTuple):
    """The words of a text and its format (None: plain words). Without words, `form` is the reason."""

    words: str | None
    form: str | None = None


_LINE_BREAK = re.compile(r"[ \t]*[\n\r\x0b\x0c\x85\u2028\u2029]\s*")
_UNBROKEN = re.compile(r"[\u00a0\u2007\u202f]")
_VISIBLE = re.compile(r"[^\W_\u115f\u1160\u3164\uffa0]")  # a letter or a digit; without Hangul's empty fillers
# Plain words, as in most texts: no digits, no markup, no letters that may need composing.
PLAIN = re.compile(r"[A-Za-z ,.'\"!?;-]*")
_DIGIT = re.compile(r"\d")
_MAY_BE_TIMES, _TWO_NUMBERS = re.compile(r"[\d.][.,:]\d"), re.compile(r"\W*\d\S*[\s|;,]+\.?\d")

# Cells of a line: a number, a number with decimals, a clock time, a separator, an id.
N, D = r"[-+]?(?:\d+(?:[.,]\d*)?|\.\d+)(?:[eE][-+]?\d+)?", r"[-+]?\d*[.,]\d+"
CLOCK = r"(?:\d{1,3}:)?\d{1,3}:\d{2}(?:[.,]\d{1,6})?"
S = r"(?:\s*[\t|;,]\s*| +)"
ID = r"[^\s,]*\d[^\s,]*"
_TIME = rf"(?:{CLOCK}|\d+(?:\.\d+)?\s?s?)"
_SPAN = rf"{_TIME}\s*-+>\s*{_TIME}|\d+\.\d+\s?s?\s*[-–,]\s*\d+\.\d+\s?s?"
_BRACKET = re.compile(
    rf"[\[(<]\s*(?:{CLOCK}(?:\s*(?:-|–|,|:|to)\s*{CLOCK})?|{_SPAN})\s*[\])>]\s*:?|\{{\d+\}}\{{\d+\}}|\[\d+\]\[\d+\]"
)
_CUE = re.compile(rf"\s*{CLOCK}(?:\s*-->\s*|,){CLOCK}(?:\s.*)?")
_MARKUP = re.compile(r"</?[^<>]{0,80}>|\{\\[^{}]*\}")
_LABEL = re.compile(r"^(?:\[?(?:SPEAKER|Speaker|spk)[ _]?\d+(?:\]:?|:)\s*|[A-Z]:\s+)")
_CLOCK_FIRST = re.compile(rf"{CLOCK}(?:\s*[-–|,;]+\s*{CLOCK})?(?:\s*[-–|,;:]+|\b)\s*(.*)")
_NUMBER_FIRST = re.compile(r"#?(\d{1,5})(?:[.):]\s*|\s+|$)(.*)")
_SILENCE = re.compile(r"<?(?:eps|sil|silB|silE|sp|spn|pau|unk|p:|silence)>?|\[silence\]|#|h#", re.IGNORECASE)
_SENTENCE = re.compile(r"</?s>|<eps>|<sil>")
# Lines outside the transcript: a recogniser's log, comments, headers of MLF, spectral labels of Audacity.
_ASIDE = re.compile(
    r"Detect(?:ing|ed) language\b.*|.*\b(?:UserWarning|INFO|WARNING)\s*[:\]].*|whisper_\w+:.*|(?:main|system_info): .*"
    r'|#!MLF!#|"\*?/[^"]*"|;;.*|\\\t.*|\[[A-Za-z#]+:[^\]]*\]|\.'
)
_NUMBERED, _IN_DOUBT = "numbered lines", "numbers that may be times"

# Formats by line, with the words `w`, a start `a`, and an end `b` or a length `d`; times must be ascending.
_LINES = {
    name: re.compile(pattern)
    for name, pattern in {
        "speakers and their times": r"(?:SPEAKER|SPKR-INFO|NON-LEX) \S+ \d(?P<w>) .*",
        "times and labels": rf"(?P<a>{N}){S}(?P<b>{N})(?:{S}(?P<w>.*?)(?:{S}[-+]?\d*\.\d+|{S}-\d+)?)?",
        "CTM": rf"(?=.*\.\d)\S+ [1-9A-Z] (?P<a>{N}) (?P<d>{N}) (?P<w>\S+)(?: \S+){{0,3}}",
        "STM": rf"\S+ \w \S+ (?P<a>{D}) (?P<b>{D})(?: <[^<>]*>)? (?P<w>.*)",
        "ids, times and words": rf"(?:\w*\t+)?{ID}{S}(?P<a>{D}){S}(?P<b>{D}){S}(?P<w>.*)",
        "words and times": rf"(?=.*\.\d)(?P<w>[^\W\d]\S*(?: [^\W\d]\S*)?){S}(?P<a>{N}){S}(?P<b>{N})(?:{S}{N})?",
        "ELAN's table": rf"\S+\t+(?:{N}\t|{CLOCK}\t){{2,}}(?P<w>[^\t]*)",
    }.items()
}
_NUMBER_BESIDE = re.compile(rf"(?=.*\d\.\d|.* \.\d)(?:{N}{S}(?P<w>(?!{N}$)\S+)|(?P<v>(?!{N}[\s,;|])\S+?){S}{N})")
# Formats where a pattern finds all words.
_FOUND = {
    "SubStation Alpha": re.compile(r"^Dialogue:(?:[^,\n]*,){9}(.*)$", re.MULTILINE),
    "a recogniser's output": re.compile(r"^sentence\d+:(.*)$", re.MULTILINE),
}
# Content that is not read as words, detected in a file's text or in lines of unknown format.
_WIDE = "control characters (wrong encoding?)"
_OTHER = {
    name: re.compile(pattern, re.DOTALL | re.IGNORECASE | re.MULTILINE)
    for name, pattern in {
        _WIDE: r"[\x00-\x08\x0e-\x1f]",
        "a Git LFS pointer": r"\Aversion https://git-lfs",
        "markup": r"\A(?!</?s>|<se)<[?!a-z][^<>]*>.*>\s*\Z|\A<(?:sami|tt|\?xml|!doctype)\b",
        "data": r"\A(?:\{\\rtf|[\[{(]+\s*[\"'][^\n]*:|\[\s*[\"{'\[])",
        "cells of a table": r"\t|\w ?\| ?\w",
        "times in an unknown format": rf"{_TIME}\s*-+>\s*{_TIME}|[\[<][^\[\]<>\n]*\d:\d\d[^\[\]<>\n]*[\]>]"
        rf"|\b\d?\d:\d\d:\d\d\b|\S\s\s+{CLOCK}$|^\s*[\[(]\s*{D}\s*[-,]\s*{D}\s*[\])]",
    }.items()
}
# Formats allowed in a row's text; some cause warnings, see `text_findings.oddities`.
_ALLOWED_IN_ROWS = ("phone labels", "markup", "cells of a table", _WIDE, _NUMBERED, f"no words ({_IN_DOUBT})")
_CLIP_ID = re.compile(
    r"[\"'(]*(?=\S*\d)(?:\w*[^\W_]_\w+|[a-z]\w*(?:-\w+)*-\d{3,}\w?|(?:utt|spk|sent|seg|rec|wav)\w*\d)(?=[\s|:,]|$)",
    re.I,
)
_ID_LAST = re.compile(r"\(\S*[-_]\S*\d\S*\)$")

# Phones: HTS's full context, as `xx^sil-m+i=z`; ARPAbet with stress; those of TIMIT and Kaldi.
_FULL_CONTEXT = re.compile(r"\S+[-^]\S*\+\S+[=/@]\S*")
_ARPABET = frozenset(
    "AA AE AH AO AW AX AXR AY B BCL CH D DCL DH DX EH EL EM EN ENG EPI ER EY F G GCL HH HV IH IX IY JH K KCL L M N NG "
    "NX OW OY P PCL PAU Q R S SH T TCL TH UH UW UX V W Y Z ZH SIL SP SPN H#".split()
)
_STRESSED = re.compile(r"[A-Z]{2}[0-2](?:_[BIES])?")
PINYIN = re.compile(r"[a-zü:]{1,6}[1-5]")
_HAN = re.compile("[\u3400-\u9fff]")
_IPA = re.compile(r"[\u0250-\u02af\u02c8\u02cc\u02d0]")
_PHONE_LENGTH = 1.6  # mean letters per label, up to which labels are phones; words are longer


def composed(text: str) -> str:
    """Normalises a text for training and generation: NFC, line breaks and no-break blanks as blanks."""
    if text.isascii() and text.isprintable():
        return text
    return with_plain_letters(_LINE_BREAK.sub(" ", text))


def with_plain_letters(text: str) -> str:
    """Normalises a text to NFC, with no-break blanks as blanks; keeps line breaks, which scenes need."""
    return text if text.isascii() else unicodedata.normalize("NFC", _UNBROKEN.sub(" ", text))


def is_visible(text: str) -> bool:
    """Returns True if the text has a visible letter or digit."""
    return _VISIBLE.search(text) is not None


def holds_times(text: str) -> str | None:
    """Returns the format of times in a row's text, such as subtitles; None if there are none."""
    has_numbers = _DIGIT.search(text) and (_MAY_BE_TIMES.search(text) or _TWO_NUMBERS.match(text))
    if not has_numbers and text[:1] not in "<{[" and "\n" not in text and "->" not in text:
        return None
    form = read_transcript(text).form
    return None if form is None or form.startswith(_ALLOWED_IN_ROWS) else form


def read_transcript(source: Path | str) -> Transcript:
    """Returns the words of a text, or of the file at a path, in any known format.

    In a file, ids of other clips and cells of tables are not words.
    Raises OSError, and UnicodeDecodeError for a file that is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    text, stem = source if isinstance(source, str) else "", ""
    if isinstance(source, Path):
        content, stem = source.read_bytes(), source.name.split(".")[0]
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    lines = [line for raw in text.split("\n") if (line := raw.strip()) and not _ASIDE.fullmatch(line)]
    form, said = next(((name, said) for name, said in _readings(text, lines) if said is not None), (None, lines))
    labels = [label for label in said if label.strip()]
    if form is not None:
        said = [_LABEL.sub("", _SENTENCE.sub("", x).strip()) for x in labels if not _SILENCE.fullmatch(x.strip())]
    elif len(lines) > 1 and not spelled_by_sound(lines[0]):  # a text and its pinyin below
        said = [line for line in lines if not spelled_by_sound(line)]
    said, form, problem = _without_id(said, stem, form) if stem else (said, form, None)
    if are_phones(labels) or (form is None and spelled_by_sound(" ".join(said))):
        return Transcript(None, "phone labels")
    words = composed(" ".join(" ".join(said).split()))
    if not is_visible(words):
        return Transcript(None, f"no words ({form})" if form else "no words")
    whole = "\n".join(said)
    if form is None and isinstance(source, str):
        problem = next((name for name, other in _OTHER.items() if other.search(text)), None)
    elif problem is None:
        problem = next((name for name, other in _OTHER.items() if other.search(whole)), None)
    return Transcript(None, problem) if problem else Transcript(words, form)


def _without_id(said: list[str], stem: str, form: str | None) -> tuple[list[str], str | None, str | None]:
    """Strips the clip's id; of lines with several ids, keeps the clip's own. Returns (lines, format, problem)."""
    loose = (
        rf"|^{re.escape(stem)}(?:\.\w+)?[\s:,]+"
        if len(stem) >= (6 if stem.isdigit() else 3) and _DIGIT.search(stem)
        else ""
    )
    own = re.compile(rf"^{re.escape(stem)}\s*\||\s*\({re.escape(stem)}\)$|^\(\s*{re.escape(stem)}\s(?=.*\)$){loose}")
    ours = [own.sub("", line).strip('")( ' if line[0] == "(" else None) for line in said if own.search(line)]
    if ours and all(own.search(line) or _CLIP_ID.match(line) or _same_shape(line, stem) for line in said):
        return [_SENTENCE.sub("", line).strip() for line in ours], form or "an id and its text", None
    if any(_CLIP_ID.match(line) or _ID_LAST.search(line) for line in said):
        return said, form, "an id that is not its clip's"
    return said, form, None


def _same_shape(line: str, stem: str) -> bool:
    return re.sub(r"\d", "0", line).startswith(re.sub(r"\d", "0", stem))


def are_phones(labels: list[str]) -> bool:
    """Returns True if the labels are phones: HTS's full context, or one short sound each."""
    if labels and all(map(_FULL_CONTEXT.match, labels)):
        return True
    if len(labels) < 2 or any(" " in label or label[0] >= "\u02ff" for label in labels):
        return False
    known = sum(label.rstrip("012").upper() in _ARPABET for label in labels)
    sounds = [label for label in labels if not _SILENCE.fullmatch(label)]
    longest = _PHONE_LENGTH + 0.6 * (len(sounds) < len(labels))
    return known > 0.8 * len(labels) or (len(labels) > 3 and mean(map(len, sounds or labels)) <= longest)


def spelled_by_sound(text: str) -> bool:
    """Returns True for phonemes: ARPAbet with stress, pinyin with tones, also with its characters, or IPA."""
    tokens = text.replace("|", " ").split()
    if len(tokens) < 2:
        return False
    if any(map(_STRESSED.fullmatch, tokens)) and all(
        token.split("_")[0].rstrip("012") in _ARPABET or not token.isalnum() for token in tokens
    ):
        return True
    words = [token for token in tokens if token.isalnum()]
    share = 0.4 if _HAN.search(text) else 0.8
    return sum(map(bool, map(PINYIN.fullmatch, words))) > share * max(2, len(words)) or (
        sum(map(bool, map(_IPA.search, tokens))) > 0.3 * len(tokens)
    )


def _readings(text: str, lines: list[str]) -> Iterator[tuple[str, list[str] | None]]:
    """Yields (format, its words, or None if the text is not in this format), one format after another."""
    yield "SRT or VTT", _subtitles(text)
    for form, pattern in _FOUND.items():
        yield form, [_MARKUP.sub("", w).replace("\\N", " ") for w in pattern.findall(text)] or None
    yield "TextGrid", _textgrid(text)
    yield "JSON", _json(text)
    if 2 * sum(_BRACKET.match(line) is not None for line in lines) > len(lines):
        yield "times in brackets", [_BRACKET.sub("", line).replace("|", " ") for line in lines]
    yield "a table of times", _table(lines)
    if "#" in lines:  # xwaves: rows follow a header
        lines = lines[lines.index("#") + 1 :]
    for form, pattern in _LINES.items():
        found = [pattern.fullmatch(line) for line in lines] if lines and pattern.fullmatch(lines[0]) else [None]
        rows = [match for match in found if match]
        if len(rows) == len(lines) and _in_order(rows):
            yield form, [" ".join((row["w"] or "").replace('"', "").split()) for row in rows]
    beside = [match for line in lines if (match := _NUMBER_BESIDE.fullmatch(line))]
    yield "numbers and words", [m["w"] or m["v"] for m in beside] if 1 < len(beside) == len(lines) else None
    by_turns = _by_turns(" ".join(lines))
    yield (_IN_DOUBT, []) if by_turns and len(by_turns) < 4 else ("numbers and words", by_turns)
    yield "times", _clocks(lines)
    yield _NUMBERED, _numbers(lines)


def _in_order(rows: list[re.Match[str]]) -> bool:
    """Returns True if the numbers are times, not spoken counts: ascending, and each end after its start."""
    if not rows or "a" not in rows[0].re.groupindex:
        return bool(rows)
    ends = ["d" if "d" in row.re.groupindex else "b" for row in rows]
    pairs = [(row["a"].replace(",", "."), row[end].replace(",", ".")) for row, end in zip(rows, ends, strict=True)]
    times = [(float(a), float(b) + float(a) * (end == "d")) for (a, b), end in zip(pairs, ends, strict=True)]
    if any(start > end for start, end in times) and (len(times) == 1 or len({end for _, end in times}) > 1):
        return False  # unless the number is constant: a colour in xwaves, not an end
    if len(times) == 1:
        return "." in pairs[0][0] + pairs[0][1] or (times[0][0] == 0 and times[0][1] >= 1000)
    return all(a[0] <= b[0] for a, b in pairwise(times)) and times[-1][0] > times[0][0]


def _by_turns(text: str) -> list[str] | None:
    """Reads words alternating with numbers: `0.0 hello 0.2 world` or `hello/0.0 world/0.2`; prose may have up to 3."""
    tokens = [token for token in re.split(r"[\s/|:()]+", text) if token] if "." in text else []
    are_numbers = [re.fullmatch(D, token) is not None for token in tokens]
    if sum(are_numbers) < 2 or any(a == b for a, b in pairwise(are_numbers)):
        return None
    return [token for token, is_number in zip(tokens, are_numbers, strict=True) if not is_number]


def _subtitles(text: str) -> list[str] | None:
    """Reads SRT, VTT and SBV, with or without a header. Lines repeated from the previous cue are read once."""
    if "-->" not in text and not re.search(rf"^{CLOCK},{CLOCK}\s*$", text, re.MULTILINE):
        return [] if text.startswith("WEBVTT") else None
    rolls, is_cue = "<c>" in text, False
    said: list[str] = []
    for block in re.split(r"\n[ \t]*\n", text):  # text before a block's times is its number, name or a note
        rows = [row.strip() for row in block.strip().split("\n")]
        at = [i for i, row in enumerate(rows) if _CUE.fullmatch(row)]
        is_cue = is_cue or bool(at)
        for place, last in pairwise([*at, len(rows)]):
            cue = rows[place + 1 : last]
            if last < len(rows) and cue and cue[-1].isdigit():
                cue.pop()
            plain = [html.unescape(_MARKUP.sub("", row)) for row in cue]
            said += [row for row in plain if not (rolls and row in said[-1:])]
    return said if is_cue else None


def _textgrid(text: str) -> list[str] | None:
    """Reads the tier of words from Praat's TextGrid, long or short."""
    if "ooTextFile" not in text[:200] and "IntervalTier" not in text[:2000]:
        return None
    tiers: dict[str, list[str]] = {}
    strings = iter([found.replace('""', '"') for found in re.findall(r'"((?:[^"]|"")*)"', text)])
    labels: list[str] = []
    for string in strings:
        if string in ("IntervalTier", "TextTier"):
            labels = tiers.setdefault(next(strings, ""), [])
        elif string.strip():
            labels.append(string)
    tiers = {name.lower(): found for name, found in tiers.items() if not are_phones(found)}
    of_words = [found for name, found in tiers.items() if re.search(r"word|ort|text|trans|sent|utt", name)]
    others = [found for name, found in tiers.items() if not re.search(r"phone|phon|segment|ipa|mau|sampa", name)]
    return of_words[0] if of_words else others[0] if len(others) == 1 else []


def _json(text: str) -> list[str] | None:
    """Reads the full text of each result of a recogniser."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    said: list[str] = []
    text = text.strip()
    try:
        while text:
            value, at = json.JSONDecoder().raw_decode(text)
            said += _said(value)
            text = text[at:].lstrip(" \t\r\n,")
    except (ValueError, RecursionError):
        return None
    return said


_SAID = ("text", "transcript", "DisplayText", "punctuated_word", "word", "lines")


def _said(value: Any) -> list[str]:
    """Returns the texts of a JSON value: an object's own text, or else the texts of its first part that has any."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [words for part in value for words in _said(part)]
    if not isinstance(value, dict):
        return []
    name = next((name for name in _SAID if name in value), None)
    if name is not None:
        return _said(value[name])
    parts = (
        part[:1] if key == "alternatives" else part for key, part in value.items() if isinstance(part, dict | list)
    )
    return next(filter(None, map(_said, parts)), [])


def _table(lines: list[str]) -> list[str] | None:
    """Reads a table with columns for times and words: Whisper's TSV, an aligner's CSV."""
    for delimiter in "\t,;" if len(lines) > 1 else "":
        names, *rows = csv.reader(lines, delimiter=delimiter)
        names = [name.strip().lower() for name in names]
        if {"start", "begin", "onset", "tmin", "start time", "start_time", "begin_time"}.isdisjoint(names):
            continue
        column = next((names.index(n) for n in ("text", "word", "words", "label", "transcript") if n in names), None)
        kind = names.index("type") if "type" in names else None
        if column is None:
            return []
        rows = [row for row in rows if len(row) > max(column, kind or 0)]
        last = column == len(names) - 1  # a text may contain the delimiter
        return [
            (delimiter + " ").join(row[column:]) if last else row[column]
            for row in rows
            if kind is None or row[kind] in ("words", "word")
        ]
    return None


def _clocks(lines: list[str]) -> list[str] | None:
    """Reads lines with a clock time before or above them, as in transcripts of video sites."""
    found = [_CLOCK_FIRST.fullmatch(line) for line in lines]
    matches = [match for match in found if match]
    if len(matches) < 2 - (len(lines) == 1 and re.match(r"\d{1,2}:\d{2}:\d{2}[.,]\d", lines[0]) is not None):
        return None
    if len(matches) < len(lines) and any(match[1] for match in matches):
        return None
    return [match[1] if match else line for match, line in zip(found, lines, strict=True)]


def _numbers(lines: list[str]) -> list[str] | None:
    """Reads lines numbered from 0 or 1."""
    found = [match for line in lines if (match := _NUMBER_FIRST.fullmatch(line))]
    counted = [int(match[1]) for match in found]
    if len(found) < 2 or len(found) < len(lines) or counted[0] > 1:
        return None
    return [match[2] for match in found] if counted == [*range(counted[0], counted[0] + len(found))] else None
