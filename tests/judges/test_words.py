"""Word counts against jiwer and Whisper's normaliser, in scripts with and without spaces."""

from __future__ import annotations

import jiwer
import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from higgs_ds.errors import ConfigError
from higgs_ds.judges.recognisers import language_code
from higgs_ds.judges.words import compare, repeats


@pytest.mark.parametrize(
    ("text", "heard", "counts"),
    [
        ("All circuits are busy.", "all circuits are busy", (0, 0, 0, 0)),
        ("I'm sorry, it's twenty dollars.", "I am sorry it is $20", (0, 0, 0, 0)),
        ("All circuits are busy.", "all circuits busy", (1, 0, 0, 0)),
        ("All circuits are busy.", "all the circuits are lazy", (0, 1, 1, 0)),
        ("All circuits are busy.", "all circuits are busy all circuits are busy", (0, 4, 0, 4)),
        ("All circuits are busy.", "all circuits are busy busy busy busy", (0, 3, 0, 3)),
        ("It is very very good.", "it is very very good", (0, 0, 0, 0)),
        ("It is very very good.", "it is very very very good", (0, 1, 0, 1)),
        ("All circuits are busy.", "", (4, 0, 0, 0)),
    ],
)
def test_words_are_counted_as_jiwer_counts_them(text, heard, counts):
    found = compare(text, heard, "en", {})
    assert (found.dropped, found.inserted, found.replaced, found.looped) == counts
    wanted, said = (EnglishTextNormalizer({})(side) for side in (text, heard))
    assert found.wer == jiwer.wer(wanted, said) and found.cer == jiwer.cer(wanted, said)
    assert found.units == len(wanted.split()) and found.characters == len(wanted)


@pytest.mark.parametrize("language", ["zh", "yue", None])
def test_a_script_without_spaces_has_a_character_error_rate_only(language):
    found = compare("今天天气很好。", "今天 天气好", language, {})
    assert found.wer is None and found.cer == jiwer.cer("今天天气很好", "今天天气好") == pytest.approx(1 / 6)
    assert (found.units, found.dropped, found.looped) == (6, 1, 0)
    assert compare("今天天气很好。", "今天天气很好天气很好", language, {}).looped == 4


def test_another_language_keeps_its_letters_and_has_no_english_spellings():
    found = compare("Wie geht's? Grüße!", "wie geht s grüße", "de", {})
    assert found.wer == jiwer.wer(*(BasicTextNormalizer()(side) for side in ("Wie geht's? Grüße!", "wie geht s grüße")))
    assert compare("The colour", "the color", "en", {"colour": "color"}).wer == 0
    assert compare("The colour", "the color", "de", {"colour": "color"}).wer == 0.5


def test_a_text_without_words_is_refused():
    with pytest.raises(ConfigError, match="no word"):
        compare("...", "hello", "en", {})


def test_only_adjacent_repeats_count_and_the_longest_phrase_first():
    assert repeats("a b c a b c".split()) == 3 and repeats("a b x a b".split()) == 0
    assert repeats("a a a a".split()) == 3 and repeats([]) == 0
    assert repeats("aab", 2) == 0 and repeats("abab", 2) == 2


def test_language_codes_are_normalised_to_whispers():
    names = ("en-US", "EN_us", " de ", "english", "portuguese", "", None)
    assert [language_code(name) for name in names] == ["en", "en", "de", "english", "portuguese", None, None]
