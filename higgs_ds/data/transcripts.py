"""Check that texts can belong to their clips: characters a second, stated lengths, and duplicates.

Nothing is heard here. A transcript that slipped to the wrong line shows in how fast it would have to be speech, a clip
of a wrong sample rate in a length that its row knows better.
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

# Of each row: a hash of its text (0: none), characters speech, script, stated seconds (0: none), bytes of all texts,
# which of the row's clips speaks the text (-1: none), and whether that is a slice of so many seconds.
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
# Of each row: a hash of a speech row's speaker (0: none), and whether it has a reference of its own.
VOICE = np.dtype([("speaker", "<u8"), ("referenced", "u1")])
SCRIPTS = ("Latin", "Han and kana", "Hangul", "Cyrillic", "Arabic", "Devanagari", "Thai", "Greek", "Hebrew", "other")
_RANGES = (  # of Unicode's blocks, in the order of SCRIPTS from the second on
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

# Short clips have pauses around them, and short texts letters that are spelt: both are evened out.
EVEN_CHARS, EVEN_SEC = 5, 0.5
OUTLIER_DEVIATIONS = 3.0
OUTLIER_FACTOR = 2.0
MANY_CLIPS = 5  # under which nobody has one text by chance
LEAST_ROWS = 20  # of a script, below which nothing is usual
USUAL_RATES = (8000, 16000, 22050, 24000, 44100, 48000)
RATE_TOLERANCE, FRAME_SEC = 0.01, 0.04  # a clip's length is known to a frame of the codec
# A length that differs by less is rounded, or counts silence that was cut.
LENGTH_SHARE, LENGTH_SEC = 0.2, 0.5
SLICE_SEC = 0.1
LONGEST_SEC = 1e9  # that a row may state; more is compared as so much
TURN_BYTES = 64  # more than the tokens of a turn's header and end, and of a clip's


def text_stats_of(row: Row) -> tuple:
    """One row's TEXT_STATS; costs some microseconds."""
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
    """The same for texts that differ only in case, blanks, punctuation, sound tags, or how a letter is composed.

    Letters, marks and numbers of every script count; a text without any, such as a lone tag, is told by all of it.
    """
    plain = unicodedata.normalize("NFC", _without_tags(text).casefold())
    return " ".join(plain.translate(_WORDS).split()) or " ".join(text.casefold().split())


def _without_tags(text: str) -> str:
    return _TAG.sub("", text) if "<" in text or "[" in text else text


class _Words(dict):
    """For `str.translate`: a blank for every character that is no letter, mark or number."""

    def __missing__(self, char: int) -> int:
        self[char] = char if unicodedata.category(chr(char))[0] in "LMN" else ord(" ")
        return self[char]


_WORDS = _Words()


def voice_of(row: Row) -> tuple[int, bool]:
    """One row's VOICE."""
    if not row.is_speech:
        return 0, False
    return 0 if row.speaker is None else _hash(row.speaker), row.start_index is not None


def _hash(text: str) -> int:
    """Number of 64 bits that tells texts and speakers apart; never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def script_of(text: str) -> int:
    """The number in SCRIPTS of the script that most letters of a text are of."""
    if text.isascii() or max(text) < "\u0250":
        return 0
    counts = [len(_LATIN.findall(text)), *(len(letters.findall(text)) for letters in _OF_SCRIPT)]
    best = int(np.argmax(counts))
    return best if counts[best] else len(SCRIPTS) - 1


@dataclass
class SpeechStats:
    """The usable rows of a manifest and the clips that speak their texts, one entry a row."""

    file: str
    lines: np.ndarray  # int64 [rows]
    elements: np.ndarray  # int64 [rows], of a JSON array, -1 where the line says it; see `faults.origin`
    stats: np.ndarray  # TEXT_STATS [rows]
    clips: np.ndarray  # uint64 [rows], the same for the same clip; 0 where none speaks
    seconds: np.ndarray  # float64 [rows], 0 where no clip speaks

    def at(self, i: int) -> str:
        """Place of a row, see `faults.origin`."""
        return origin(self.file, int(self.lines[i]), int(self.elements[i]))

    def fault(self, i: int, field: str, problem: str, warning: bool = False) -> Fault:
        return Fault(self.file, int(self.lines[i]), field, problem, warning, element=int(self.elements[i]))

    def only(self, kept: np.ndarray) -> SpeechStats:
        """Those rows alone; `kept` bool [rows]."""
        arrays = (self.lines, self.elements, self.stats, self.clips, self.seconds)
        return SpeechStats(self.file, *(array[kept] for array in arrays))


def wrong_lengths(speech: SpeechStats) -> Iterator[Fault]:
    """Warnings where a clip's length is far from what its row says, with a hint where a wrong sample rate explains it.

    Not faults: the number is not trained on, and often counts silence that was cut later. A slice that ends early
    because its file does is told from a tenth of a second on: its text goes on.
    """
    stated, seconds = speech.stats["stated"].astype(np.float64), speech.seconds
    sliced = speech.stats["slice"] != 0
    far = abs(seconds - stated) > np.maximum(LENGTH_SEC, LENGTH_SHARE * stated)
    off = np.where(sliced, stated - seconds > SLICE_SEC, far)
    for i in np.flatnonzero((stated > 0) & (seconds > 0) & off).tolist():
        if sliced[i]:
            problem = f"is {stated[i]:.2f} s, and only {seconds[i]:.2f} s are there from the offset on"
        else:
            other_rate = _is_ratio_of_rates(seconds[i] / stated[i], seconds[i])
            hint = ", as at another sample rate than it was recorded at" if other_rate else ""
            problem = f"says {stated[i]:.2f} s, the clip lasts {seconds[i]:.2f} s{hint}"
        yield speech.fault(i, "duration", problem, warning=True)


def _is_ratio_of_rates(ratio: float, seconds: float) -> bool:
    tolerance = RATE_TOLERANCE + FRAME_SEC / seconds
    return any(a != b and abs(ratio * b / a - 1) < tolerance for a in USUAL_RATES for b in USUAL_RATES)


def outliers(speech: SpeechStats) -> Iterator[Fault]:
    """Warnings where a text is spoken far faster or slower than the corpus speaks that script."""
    for script, rows, off, deviation in _by_script(speech):
        usual = float(np.median(speech.stats["chars"][rows] / speech.seconds[rows]))
        for i in rows[abs(off) > max(OUTLIER_DEVIATIONS * deviation, math.log(OUTLIER_FACTOR))].tolist():
            chars, seconds = int(speech.stats["chars"][i]), speech.seconds[i]
            problem = (
                f"{chars} characters in {seconds:.2f} s are {chars / seconds:.1f} a second, "
                f"where {SCRIPTS[script]} text here has {usual:.1f}: is it the text of this clip?"
            )
            yield speech.fault(i, "text", problem, warning=True)


def oddness(speech: SpeechStats) -> np.ndarray:
    """float64 [rows]: how many deviations a row's characters a second are off its script's median; 0 where unknown."""
    result = np.zeros(len(speech.lines))
    for _, rows, off, deviation in _by_script(speech):
        result[rows] = off / deviation
    return result


def _by_script(speech: SpeechStats) -> Iterator[tuple[int, np.ndarray, np.ndarray, float]]:
    """(script, its rows, how far the log of their characters a second is off its median, deviation of these)."""
    for script in np.unique(speech.stats["script"]).tolist():
        rows = np.flatnonzero((speech.stats["script"] == script) & (speech.seconds > 0))
        if len(rows) >= LEAST_ROWS:
            pace = np.log((speech.stats["chars"][rows] + EVEN_CHARS) / (speech.seconds[rows] + EVEN_SEC))
            off = pace - np.median(pace)
            yield script, rows, off, max(1.4826 * float(np.median(abs(off))), 0.05)


def clips_of_two_texts(sides: Sequence[SpeechStats]) -> Iterator[Fault]:
    """Warnings for rows whose clip stands under another text in an earlier row, of the same manifest or another."""
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
    """One warning about texts that stand under many clips each."""
    pairs = np.stack([speech.stats["text"], speech.clips], axis=1)[speech.stats["text"] != 0]
    texts, clips = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
    many = clips >= MANY_CLIPS
    if many.any():
        i = int(np.flatnonzero(speech.stats["text"] == texts[clips.argmax()])[0])
        others = f", and {plural(int(many.sum()) - 1, 'other text')} under many too" if many.sum() > 1 else ""
        yield speech.fault(i, "text", f"stands under {clips.max():,} clips{others}: is it theirs?", warning=True)


def texts_on_both_sides(train: SpeechStats, val: SpeechStats) -> Iterator[Fault]:
    """Warnings for validation rows whose text is trained on."""
    known, first = np.unique(train.stats["text"], return_index=True)
    texts = val.stats["text"]
    found = np.minimum(np.searchsorted(known, texts), max(0, len(known) - 1))
    both = (texts != 0) & (known[found] == texts) if len(known) else np.zeros(len(texts), bool)
    for i in np.flatnonzero(both).tolist():
        problem = f"is trained on too, in {train.at(int(first[found[i]]))}: validation is no test of it"
        yield val.fault(i, "text", problem, warning=True)


def first_lines(speech: SpeechStats) -> list[str]:
    """Amount, length, script and pace of what there is: two lines, from what `load_rows` knows too."""
    seconds = speech.seconds[speech.seconds > 0]
    if not len(seconds):
        return [f"{speech.file}: {plural(len(speech.lines), 'row')}, none of which speaks a text"]
    scripts = Counter(speech.stats["script"][speech.seconds > 0].tolist())
    shares = ", ".join(f"{SCRIPTS[script]} {100 * n / len(seconds):.4g} %" for script, n in scripts.most_common())
    pace = float(np.median(speech.stats["chars"][speech.seconds > 0] / seconds))
    return [
        f"{speech.file}: {plural(len(speech.lines), 'row')}, {seconds.sum() / 3600:.4g} hours of speech, clips of "
        f"{seconds.min():.2f} to {seconds.max():.2f} s (median {np.median(seconds):.2f})",
        f"script: {shares}; {pace:.1f} characters a second (median)",
    ]


def warnings_of(sides: Sequence[SpeechStats], trained: int = 1) -> list[Fault]:
    """All warnings about the rows of so many training manifests and, where there is one, of the validation manifest."""
    found = [
        fault for side in sides for check in (wrong_lengths, outliers, texts_of_many_clips) for fault in check(side)
    ]
    found += clips_of_two_texts(sides)
    for val in sides[trained:]:
        for train in sides[:trained]:
            found += texts_on_both_sides(train, val)
    return found
