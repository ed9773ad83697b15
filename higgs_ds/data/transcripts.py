"""Plausibility checks of texts against their clips: characters per second, stated lengths and duplicates.

They use only metadata, not the sound. A transcript on the wrong line shows as an implausible speaking rate, a wrong
sample rate as a clip length that differs from the row's.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .chatml import Row
from .faults import Fault, origin, plural

# Per row: hash of the target text (0: none), its characters, script, stated seconds (0: none), bytes of all texts,
# index of the target clip (-1: none), and 1 if this clip is a slice with a duration.
TEXT_STATS = np.dtype(
    [
        ("text", "<u8"),
        ("chars", "<i4"),
        ("script", "u1"),
        ("stated", "<f4"),
        ("bytes", "<i8"),
        ("clip", "<i4"),
        ("slice", "u1"),
    ]
)
# Per row: hash of a speech row's speaker (0: none), and 1 if it has a reference of its own.
VOICE = np.dtype([("speaker", "<u8"), ("referenced", "u1")])
SCRIPTS = ("Latin", "Han and kana", "Hangul", "Cyrillic", "Arabic", "Devanagari", "Thai", "Greek", "Hebrew", "other")
_RANGES = (  # Unicode blocks, in the order of SCRIPTS from the second
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff",
    r"\u1100-\u11ff\uac00-\ud7a3",
    r"\u0400-\u052f",
    r"\u0600-\u06ff\u0750-\u077f",
    r"\u0900-\u097f",
    r"\u0e00-\u0e7f",
    r"\u0370-\u03ff",
    r"\u0590-\u05ff",
)
_OF_SCRIPT = [re.compile(f"[{letters}]") for letters in _RANGES]
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_TAG = re.compile(r"</?SE(_[a-z]+)?>|\[[^\[\]]*\]")

# Added to characters and seconds: evens out the pauses around short clips and spelt-out letters in short texts.
EVEN_CHARS, EVEN_SEC = 5, 0.5
OUTLIER_DEVIATIONS = 3.0
OUTLIER_FACTOR = 2.0
MANY_CLIPS = 5  # rarely have the same text by chance
LEAST_ROWS = 20  # of a script, for statistics
USUAL_RATES = (8000, 16000, 22050, 24000, 44100, 48000)
RATE_TOLERANCE, FRAME_SEC = 0.01, 0.04  # FRAME_SEC: a clip's length is known to one codec frame
# Smaller differences are rounding, or silence that was trimmed.
LENGTH_SHARE, LENGTH_SEC = 0.2, 0.5
SLICE_SEC = 0.1
LONGEST_SEC = 1e9  # larger stated lengths are clamped to this
TURN_BYTES = 64  # upper bound of the tokens around a turn, and around a clip


def text_stats_of(row: Row) -> tuple:
    """Returns one row's TEXT_STATS, within microseconds."""
    size = 0
    for turn in row.messages:
        size += TURN_BYTES + len(turn.recipient or "")
        for piece in turn.content:
            if isinstance(piece, str):
                size += len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
            else:
                size += TURN_BYTES
    speech = row.target()
    if speech is None:
        return 0, 0, 0, 0.0, size, -1, False
    text, clip = speech
    said = _without_tags(text)
    words = " ".join(said.casefold().split())
    stated_sec = min(row.stated_sec or 0.0, LONGEST_SEC)
    sliced = stated_sec > 0 and row.audio_refs[clip][1].duration_sec is not None
    return _hash(text_key(text)), len(words), script_of(said), stated_sec, size, clip, sliced


def text_key(text: str) -> str:
    """Returns a key that ignores case, blanks, punctuation, sound tags and composition (NFC or NFD).

    Only letters, marks and numbers count. A text without any, such as a lone tag, is its own key.
    """
    plain = unicodedata.normalize("NFC", _without_tags(text).casefold())
    return " ".join(plain.translate(_WORDS).split()) or " ".join(text.casefold().split())


def _without_tags(text: str) -> str:
    return _TAG.sub("", text) if "<" in text or "[" in text else text


class _Words(dict):
    """Table for `str.translate` that replaces all but letters, marks and numbers by blanks."""

    def __missing__(self, char: int) -> int:
        self[char] = char if unicodedata.category(chr(char))[0] in "LMN" else ord(" ")
        return self[char]


_WORDS = _Words()


def voice_of(row: Row) -> tuple[int, bool]:
    """Returns one row's VOICE."""
    if not row.is_speech:
        return 0, False
    return 0 if row.speaker is None else _hash(row.speaker), row.start_index is not None


def _hash(text: str) -> int:
    """Returns a 64-bit hash that is never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def script_of(text: str) -> int:
    """Returns the index in SCRIPTS of the script with most letters in a text."""
    if text.isascii() or max(text) < "\u0250":
        return 0
    counts = [len(_LATIN.findall(text)), *(len(letters.findall(text)) for letters in _OF_SCRIPT)]
    best = int(np.argmax(counts))
    return best if counts[best] else len(SCRIPTS) - 1


@dataclass
class SpeechStats:
    """Statistics of a manifest's usable rows and their target clips, one entry per row."""

    file: str
    lines: np.ndarray  # int64 [rows]
    elements: np.ndarray  # int64 [rows], index in a JSON array, or -1; see `faults.origin`
    stats: np.ndarray  # TEXT_STATS [rows]
    clips: np.ndarray  # uint64 [rows], equal for the same clip; 0 without a target clip
    seconds: np.ndarray  # float64 [rows], 0 without a target clip

    def at(self, i: int) -> str:
        """Returns the location of row `i`, see `faults.origin`."""
        return origin(self.file, int(self.lines[i]), int(self.elements[i]))

    def fault(self, i: int, field: str, problem: str, warning: bool = False) -> Fault:
        return Fault(self.file, int(self.lines[i]), field, problem, warning, element=int(self.elements[i]))

    def only(self, kept: np.ndarray) -> SpeechStats:
        """Returns only the rows marked in `kept`, bool [rows]."""
        arrays = (self.lines, self.elements, self.stats, self.clips, self.seconds)
        return SpeechStats(self.file, *(array[kept] for array in arrays))


def wrong_lengths(speech: SpeechStats) -> Iterator[Fault]:
    """Yields warnings about clips with another length than their row states, with a hint at a wrong sample rate.

    Not faults: the number is not trained on, and often includes silence that was trimmed later. A slice that extends
    past its file's end is reported from a tenth of a second, since its text is then incomplete in the clip.
    """
    stated, seconds = speech.stats["stated"].astype(np.float64), speech.seconds
    sliced = speech.stats["slice"] != 0
    far = abs(seconds - stated) > np.maximum(LENGTH_SEC, LENGTH_SHARE * stated)
    off = np.where(sliced, stated - seconds > SLICE_SEC, far)
    for i in np.flatnonzero((stated > 0) & (seconds > 0) & off).tolist():
        if sliced[i]:
            problem = f"is {stated[i]:.2f} s, but the file ends {seconds[i]:.2f} s after the offset"
        else:
            other_rate = _is_ratio_of_rates(seconds[i] / stated[i], seconds[i])
            hint = "; its sample rate may be wrong" if other_rate else ""
            problem = f"says {stated[i]:.2f} s, the clip lasts {seconds[i]:.2f} s{hint}"
        yield speech.fault(i, "duration", problem, warning=True)


def _is_ratio_of_rates(ratio: float, seconds: float) -> bool:
    tolerance = RATE_TOLERANCE + FRAME_SEC / seconds
    return any(a != b and abs(ratio * b / a - 1) < tolerance for a in USUAL_RATES for b in USUAL_RATES)


def outliers(speech: SpeechStats) -> Iterator[Fault]:
    """Yields warnings about texts spoken far faster or slower than is usual for their script in this corpus."""
    for script, rows, off, deviation in _by_script(speech):
        usual = float(np.median(speech.stats["chars"][rows] / speech.seconds[rows]))
        for i in rows[abs(off) > max(OUTLIER_DEVIATIONS * deviation, math.log(OUTLIER_FACTOR))].tolist():
            chars, seconds = int(speech.stats["chars"][i]), speech.seconds[i]
            problem = (
                f"{chars} characters in {seconds:.2f} s are {chars / seconds:.1f} per second, "
                f"usual for {SCRIPTS[script]} text here is {usual:.1f}: does the text belong to this clip?"
            )
            yield speech.fault(i, "text", problem, warning=True)


def oddness(speech: SpeechStats) -> np.ndarray:
    """Returns how many deviations a row's pace is off its script's median, float64 [rows]; 0 if unknown."""
    result = np.zeros(len(speech.lines))
    for _, rows, off, deviation in _by_script(speech):
        result[rows] = off / deviation
    return result


def _by_script(speech: SpeechStats) -> Iterator[tuple[int, np.ndarray, np.ndarray, float]]:
    """Yields (script, its rows, log of characters per second relative to the median, standard deviation of that)."""
    for script in np.unique(speech.stats["script"]).tolist():
        rows = np.flatnonzero((speech.stats["script"] == script) & (speech.seconds > 0))
        if len(rows) >= LEAST_ROWS:
            pace = np.log((speech.stats["chars"][rows] + EVEN_CHARS) / (speech.seconds[rows] + EVEN_SEC))
            off = pace - np.median(pace)
            yield script, rows, off, max(1.4826 * float(np.median(abs(off))), 0.05)


def clips_of_two_texts(sides: Sequence[SpeechStats]) -> Iterator[Fault]:
    """Yields warnings for rows whose clip has another text in an earlier row of any manifest."""
    starts = np.cumsum([0, *(len(side.lines) for side in sides)])

    def found(row: int) -> tuple[SpeechStats, int]:
        side = int(np.searchsorted(starts, row, side="right")) - 1
        return sides[side], row - int(starts[side])

    texts = np.concatenate([side.stats["text"] for side in sides])
    rows = np.flatnonzero(texts != 0)
    texts = texts[rows]
    clips = np.concatenate([side.clips for side in sides])[rows]
    _, first, group = np.unique(clips, return_index=True, return_inverse=True)
    first_of = first[group.reshape(-1)]
    for i in np.flatnonzero(texts != texts[first_of]).tolist():
        (side, row), (other, earlier) = found(int(rows[i])), found(int(rows[first_of[i]]))
        problem = f"the same clip has another text in {other.at(earlier)}; one of them is wrong"
        yield side.fault(row, "audio", problem, warning=True)


def texts_of_many_clips(speech: SpeechStats) -> Iterator[Fault]:
    """Yields one warning about texts shared by many clips."""
    pairs = np.stack([speech.stats["text"], speech.clips], axis=1)[speech.stats["text"] != 0]
    texts, clips = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
    many = clips >= MANY_CLIPS
    if many.any():
        i = int(np.flatnonzero(speech.stats["text"] == texts[clips.argmax()])[0])
        others = f", and {plural(int(many.sum()) - 1, 'other text')} of many clips" if many.sum() > 1 else ""
        yield speech.fault(i, "text", f"is the text of {clips.max():,} clips{others}: is that right?", warning=True)


def texts_on_both_sides(train: SpeechStats, val: SpeechStats) -> Iterator[Fault]:
    """Yields warnings for validation rows whose text is also in training."""
    known, first = np.unique(train.stats["text"], return_index=True)
    texts = val.stats["text"]
    found = np.minimum(np.searchsorted(known, texts), max(0, len(known) - 1))
    both = (texts != 0) & (known[found] == texts) if len(known) else np.zeros(len(texts), bool)
    for i in np.flatnonzero(both).tolist():
        problem = f"is also trained on, in {train.at(int(first[found[i]]))}; remove it from one side"
        yield val.fault(i, "text", problem, warning=True)


def first_lines(speech: SpeechStats) -> list[str]:
    """Returns a summary in two lines: rows, hours, clip lengths, scripts and characters per second."""
    seconds = speech.seconds[speech.seconds > 0]
    if not len(seconds):
        return [f"{speech.file}: {plural(len(speech.lines), 'row')}, none with a target clip and text"]
    scripts = Counter(speech.stats["script"][speech.seconds > 0].tolist())
    shares = ", ".join(f"{SCRIPTS[script]} {100 * n / len(seconds):.4g} %" for script, n in scripts.most_common())
    pace = float(np.median(speech.stats["chars"][speech.seconds > 0] / seconds))
    return [
        f"{speech.file}: {plural(len(speech.lines), 'row')}, {seconds.sum() / 3600:.4g} hours of speech, clips of "
        f"{seconds.min():.2f} to {seconds.max():.2f} s (median {np.median(seconds):.2f})",
        f"script: {shares}; {pace:.1f} characters per second (median)",
    ]


def warnings_of(sides: Sequence[SpeechStats], trained: int = 1) -> list[Fault]:
    """Returns all warnings about the rows; the first `trained` sides are training manifests, the rest validation."""
    found = [
        fault for side in sides for check in (wrong_lengths, outliers, texts_of_many_clips) for fault in check(side)
    ]
    found += clips_of_two_texts(sides)
    for val in sides[trained:]:
        for train in sides[:trained]:
            found += texts_on_both_sides(train, val)
    return found
