"""Columns of tables without a header, as in published file lists of speech trainers."""

import re

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.tools.importers.formats import read_foreign

CLIPS = [f"c{i:02}" for i in range(12)]
TEXTS = [f"This is what sentence {chr(97 + i)} says, in short." for i in range(12)]
HAN = ["卡尔普陪外孙玩滑梯。", "假语村言别再拥抱我。", "宝马配挂跛骡鞍。"] * 4
PINYIN = ["ka2 er2 pu3 pei2", "jia2 yu3 cun1 yan2", "bao2 ma3 pei4 gua4"] * 4
SPANISH = [f"La casa blanca {chr(97 + i)} está vacía." for i in range(12)]
PHONEMES = [f"la kˈasa βlˈaŋka {chr(97 + i)} estˈa βaθˈia." for i in range(12)]
NUMBERS = [f"I have {i} of them." for i in range(12)]
SPELT = [
    f"I have {'one two three four five six seven eight nine ten eleven none'.split()[i]} of them." for i in range(12)
]
NAMES = ["anna", "bert", "anna", "cleo"] * 3


@pytest.fixture
def table(tmp_path):
    """Returns rows as (text, speaker), and the notes, for columns after that of the clips."""
    (tmp_path / "wavs").mkdir()
    for clip in CLIPS:
        (tmp_path / "wavs" / f"{clip}.wav").write_bytes(b"RIFF")

    def read(*columns, count=12, more=()):
        lines = ["|".join(parts) for parts in list(zip(CLIPS, *columns, strict=True))[:count]]
        (tmp_path / "metadata.csv").write_text("\n".join([*lines, *more]))
        _, found = read_foreign(tmp_path, "ljspeech")
        return [(row["text"], row.get("speaker")) for row in found.rows], found

    return read


def alone(texts):
    return [(text, None) for text in texts]


def by(texts, speakers=NAMES):
    return list(zip(texts, speakers, strict=True))


@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize(
    ("names", "columns"),
    [
        ("text", (TEXTS,)),
        ("raw text", (NUMBERS, SPELT)),
        ("raw text", (TEXTS, [text.lower() for text in TEXTS])),
        ("text pinyin", (HAN, PINYIN)),
        ("text pinyin", ([f"{text}{i}" for i, text in enumerate(HAN)], PINYIN)),
        ("text phones", (SPANISH, PHONEMES)),
        ("id text", (CLIPS, TEXTS)),
        ("raw text", (["Yes.", "5.", "6.", "7."] * 3, ["Yes.", "five.", "six.", "seven."] * 3)),
        ("none text", ([""] * 12, TEXTS)),
        ("text none", (TEXTS, [""] * 12)),
        ("speaker text", (NAMES, TEXTS)),
        ("text speaker", (TEXTS, NAMES)),
        ("text speaker", (TEXTS, ["0"] * 12)),
        ("speaker language text", (NAMES, ["en"] * 12, TEXTS)),
        ("language speaker text", (["ZH", "EN", "ZH"] * 4, NAMES, HAN)),
        ("speaker raw text", (NAMES, NUMBERS, SPELT)),
        ("speaker lang text pinyin x y", (NAMES, ["ZH"] * 12, HAN, PINYIN, ["2 2 3"] * 12, ["1 1 1"] * 12)),
        ("text language", (TEXTS, ["de"] * 12)),
        ("raw text phones seconds", (NUMBERS, SPELT, PHONEMES, ["3.5", "2.25", "3.5"] * 4)),
        ("text speaker split", (TEXTS, NAMES, ["train", "dev", "train"] * 4)),
        ("speaker name text", (NAMES, ["s1", "s2", "s1", "s3"] * 3, TEXTS)),  # an id and a name of each speaker
        ("text gender", (TEXTS, ["M", "F", "F"] * 4)),
    ],
)
def test_text_and_speaker_columns_are_recognised(table, names, columns, count):
    held = dict(zip(names.split(), columns, strict=True))
    assert table(*columns, count=count)[0] == by(held["text"], held.get("speaker", [None] * 12))[:count]


def test_single_row_has_a_text(table):
    assert table(SPANISH, PHONEMES, count=1)[0] == [(SPANISH[0], None)]


def test_speakers_with_blanks_and_shared_sentences(table):
    names = ["Anna Berg", "Bert", "Cleo Dahl"] * 4
    sentences = [text for text in TEXTS[:4] for _ in range(3)]
    assert table(names, sentences)[0] == by(sentences, names)


def test_ambiguous_columns_are_refused(table, tmp_path):
    people = ["Anna Berg", "Bert", "Cleo", "Dora Eck", "Ernst", "Fay", "Gil", "Hal", "Ines", "Jan", "Kit", "Lea Ott"]
    sounds = [name.upper() for name in "ɑnə bɚt klio doɹə ɚnst feɪ gɪl hæl ines jæn kɪt leə".split()]
    for column in (TEXTS, sounds):  # people with one row each, or words with their phonemes
        with pytest.raises(ConfigError, match="column 2 may contain names or short texts"):
            table(people, column)
    words = ["yes", "no"] * 6
    with pytest.raises(ConfigError, match=r"the text column is ambiguous; .* `id\|speaker\|text`"):
        table(NAMES, words)
    path = tmp_path / "metadata.csv"
    path.write_text(f"id|speaker|text\n{path.read_text()}")
    _, found = read_foreign(path, None)
    assert [(row["text"], row["speaker"]) for row in found.rows] == by(words)
    assert table(words, [word.title() for word in words])[0] == alone([word.title() for word in words])


@pytest.mark.parametrize(
    ("columns", "header"),
    [
        ((TEXTS, ["happy", "sad", "happy"] * 4, NAMES), "id|text|other2|speaker"),
        ((["M", "F", "F"] * 4, NAMES, TEXTS), "id|other1|speaker|text"),
        ((["sjp", "mal", "mal"] * 4, NAMES, TEXTS), "id|other1|speaker|text"),
        ((TEXTS, SPANISH), "id|other1|text"),
        ((SPANISH, NUMBERS, SPELT), "id|other1|other2|text"),
    ],
)
def test_competing_columns_are_refused_with_a_header_to_add(table, tmp_path, columns, header):
    with pytest.raises(ConfigError, match=f"such as `{re.escape(header)}`"):
        table(*columns)
    path = tmp_path / "metadata.csv"
    path.write_text(f"{header}\n{path.read_text()}")
    _, found = read_foreign(path, None)
    names = header.split("|")
    assert [row["text"] for row in found.rows] == columns[names.index("text") - 1]
    if "speaker" in names:
        assert [row["speaker"] for row in found.rows] == NAMES


@pytest.mark.parametrize("phones", ["HH AH0 L OW1", "ka2 er2 pu3 pei2", "hɛlˈoʊ wˈɜːld", "12 45 7 8"])
def test_phonemes_are_not_text(table, phones):
    phones = [f"{phones}{'' if phones[-1].isdigit() else chr(97 + i)}" for i in range(12)]
    assert table(phones, TEXTS)[0] == alone(TEXTS)
    with pytest.raises(ConfigError, match="column 2 contains phonemes"):
        table(phones)


def test_lines_with_other_columns_are_left_out_and_columns_reported(table, tmp_path):
    more = ["c00|Hello | world|x", "c01|two", "none at all"]
    rows, found = table(NAMES, TEXTS, more=more)
    assert rows == by(TEXTS)
    where = f"{tmp_path}/metadata.csv"
    assert found.lines(tmp_path) == [
        f"{where}: columns: 1 clip, 2 speaker, 3 text; if that is wrong, add a header line, such as `id|text|speaker`",
        f"left out: 3 × rows with more or fewer cells than columns, e.g. {where}:13: 4 instead of 3",
    ]
    rows, found = table(TEXTS, more=["c00|Hello | world"])
    assert rows == alone(TEXTS) and list(found.left_out.values()) == [1]


@pytest.mark.parametrize("header", ["audio_file|text|speaker_name", "ID|Transcription|Speaker ID", "wav|sentence|spk"])
def test_header_takes_precedence(table, tmp_path, header):
    table(TEXTS, NAMES)
    path = tmp_path / "metadata.csv"
    path.write_text(f"{header}\n{path.read_text()}")
    for kind in (None, "ljspeech"):
        _, found = read_foreign(tmp_path, kind)
        assert [(row["text"], row["speaker"]) for row in found.rows] == by(TEXTS) and not found.left_out
    path.write_text(f"id|text|text\n{path.read_text()}")
    with pytest.raises(ConfigError, match="has a duplicate column `text`"):
        read_foreign(tmp_path, None)


@pytest.mark.parametrize("name", ["a.WAV", "a.opus", "a.Flac", "A.wav"])
def test_clips_in_other_containers_and_letters(tmp_path, name):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / name).write_bytes(b"RIFF")
    (tmp_path / "metadata.csv").write_text("a|One.")
    _, found = read_foreign(tmp_path, None)
    assert found.rows == [{"audio": f"{tmp_path}/wavs/{name}", "text": "One."}]
