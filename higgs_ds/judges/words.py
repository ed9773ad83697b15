"""Intelligibility: error rates of a recogniser's transcript, and the words dropped, inserted and looped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .clips import Clip, library
from .recognisers import Recogniser, language_code, open_recogniser

NO_BLANKS = ("zh", "yue", "ja", "th", "lo", "km", "my", "bo")
# Han, kana, Thai, Lao, Tibetan, Myanmar, Khmer: scripts that are written without blanks between words.
_NO_BLANKS = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
LONGEST_LOOP = 200  # words or characters


@dataclass(frozen=True)
class Heard:
    """Comparison of a text with what was heard; counts are of words, or of characters in a script without blanks."""

    wer: float | None  # None in a script without blanks
    cer: float
    units: int  # in the text
    characters: int  # in the text
    dropped: int
    inserted: int
    replaced: int
    looped: int  # heard once more directly behind themselves, alone or as a phrase, beyond what the text repeats


class Words:
    """The judge of the words."""

    def __init__(self, name: str, device: str):
        """Raises ConfigError as `open_recogniser`, and where jiwer is missing."""
        library("jiwer", "--words", "jiwer")
        self._recogniser: Recogniser = open_recogniser(name, device)

    def judge(self, clip: Clip) -> dict[str, object]:
        """Fields of a clip's line. Raises whatever the recogniser does, and ConfigError for a text without words."""
        sentence = clip.sentence
        language, heard = language_code(sentence.language), ""
        if not clip.is_silent:
            heard, told = self._recogniser.hear(clip.for_judges(), language)
            language = sentence.language = language or told
        found = compare(sentence.text, heard, language, self._recogniser.spellings)
        return {"heard": heard, "language": language, **vars(found)}


def normalised(text: str, language: str | None, spellings: dict[str, str]) -> str:
    """A text as Whisper's own evaluation compares it: small letters, no punctuation, English numbers and spellings."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language in (None, "en", "english"):
        return EnglishTextNormalizer(spellings)(text).strip()
    return BasicTextNormalizer()(text).strip()


def compare(text: str, heard: str, language: str | None, spellings: dict[str, str]) -> Heard:
    """Counts of jiwer, both sides normalised alike. Raises ConfigError for a text that has no word."""
    import jiwer

    has_blanks = language not in NO_BLANKS and not _NO_BLANKS.search(text)
    if language is None and not has_blanks:
        language = "zh"  # any that is not English
    wanted, heard = (normalised(side, language, spellings) for side in (text, heard))
    if not has_blanks:
        wanted, heard = ("".join(side.split()) for side in (wanted, heard))
    if not any(map(str.isalnum, wanted)):
        raise ConfigError([f"the text {text[:60]!r} has no word"])
    characters = jiwer.process_characters(wanted, heard)
    words = jiwer.process_words(wanted, heard) if has_blanks else None
    counts = words or characters
    units = (wanted.split(), heard.split()) if has_blanks else (wanted, heard)
    loops = [repeats(side, 1 if has_blanks else 2) for side in units]
    return Heard(
        wer=words.wer if words else None,
        cer=characters.cer,
        units=len(units[0]),
        characters=len(wanted),
        dropped=counts.deletions,
        inserted=counts.insertions,
        replaced=counts.substitutions,
        looped=max(0, loops[1] - loops[0]),
    )


def repeats(units: Sequence[str], shortest: int = 1) -> int:
    """Number of units in phrases, of at least `shortest` units, that directly follow the same phrase."""
    at = count = 0
    while at < len(units):
        for size in range(min(at, len(units) - at, LONGEST_LOOP), shortest - 1, -1):
            if units[at - size : at] == units[at : at + size]:
                count, at = count + size, at + size
                break
        else:
            at += 1
    return count
