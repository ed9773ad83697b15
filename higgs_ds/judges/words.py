"""Intelligibility: error rates of a recogniser's transcript, and counts of dropped, inserted and looped words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .clips import Clip, library
from .recognisers import Recogniser, language_code, open_recogniser

UNSPACED = ("zh", "yue", "ja", "th", "lo", "km", "my", "bo")  # languages without spaces between words
# Their scripts: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han.
_UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
LONGEST_LOOP = 200  # words or characters


@dataclass(frozen=True)
class Heard:
    """Comparison of a text with its transcript; counts are of words, or of characters in scripts without spaces."""

    wer: float | None  # None in a script without spaces
    cer: float
    units: int  # in the text
    characters: int  # in the text
    dropped: int
    inserted: int
    replaced: int
    looped: int  # units in immediately repeated words or phrases, beyond the text's own repetitions


class Words:
    """Judges a clip's words."""

    def __init__(self, name: str, device: str):
        """Raises ConfigError as `open_recogniser`, and if jiwer is missing."""
        library("jiwer", "--words", "jiwer")
        self._recogniser: Recogniser = open_recogniser(name, device)

    def judge(self, clip: Clip) -> dict[str, object]:
        """Returns a clip's fields. Raises any error of the recogniser, and ConfigError for a text without words."""
        sentence = clip.sentence
        language, heard = language_code(sentence.language), ""
        if not clip.is_silent:
            heard, detected = self._recogniser.hear(clip.for_judges(), language)
            language = sentence.language = language or detected
        found = compare(sentence.text, heard, language, self._recogniser.spellings)
        return {"heard": heard, "language": language, **vars(found)}


def normalised(text: str, language: str | None, spellings: dict[str, str]) -> str:
    """Normalises a text as Whisper's evaluation does: lower case, no punctuation; English numbers and spellings."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language in (None, "en", "english"):
        return EnglishTextNormalizer(spellings)(text).strip()
    return BasicTextNormalizer()(text).strip()


def compare(text: str, heard: str, language: str | None, spellings: dict[str, str]) -> Heard:
    """Compares a text with its transcript, both normalised, by jiwer. Raises ConfigError for a text without words."""
    import jiwer

    has_spaces = language not in UNSPACED and not _UNSPACED.search(text)
    if language is None and not has_spaces:
        language = "zh"  # any language but English
    wanted, heard = (normalised(side, language, spellings) for side in (text, heard))
    if not has_spaces:
        wanted, heard = ("".join(side.split()) for side in (wanted, heard))
    if not any(map(str.isalnum, wanted)):
        raise ConfigError([f"the text {text[:60]!r} has no word"])
    characters = jiwer.process_characters(wanted, heard)
    words = jiwer.process_words(wanted, heard) if has_spaces else None
    counts = words or characters
    units = (wanted.split(), heard.split()) if has_spaces else (wanted, heard)
    loops = [repeats(side, 1 if has_spaces else 2) for side in units]
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
    """Counts the units in phrases of at least `shortest` units that immediately repeat the phrase before."""
    at = count = 0
    while at < len(units):
        for size in range(min(at, len(units) - at, LONGEST_LOOP), shortest - 1, -1):
            if units[at - size : at] == units[at : at + size]:
                count, at = count + size, at + size
                break
        else:
            at += 1
    return count
