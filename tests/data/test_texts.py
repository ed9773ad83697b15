"""Text files with times or labels, and unspoken content in texts."""

import unicodedata

import pytest

from higgs_ds.data.text_findings import oddities
from higgs_ds.data.texts import composed, holds_times, read_transcript

SAID = "Followed by the pound key."
PRAAT = 'File type = "ooTextFile"\nObject class = "TextGrid"\n'
HTS = "0 3125000 xx^xx-sil+m=i/A:xx+xx+xx\n3125000 3525000 xx^sil-m+i=z/A:-3+1+7\n"
TIMED = {
    "Audacity": "0.000000\t0.700000\tFollowed\n0.700000\t1.500000\tby the pound key.\n",
    "TIMIT": "0 24320 Followed by the pound key.\n",
    "HTK words": '#!MLF!#\n"*/1.lab"\n0 7000 Followed\n7000 9000 by the pound key.\n.\n',
    "CTM": "c 1 0.00 0.30 Followed\nc 1 0.30 0.20 by 0.99\nc 1 0.5 0.2 the\nc 1 0.7 0.2 pound\nc 1 1.0 0.4 key.\n",
    "STM": "c 1 anna 0.00 1.52 <o,f0,female> Followed by the pound key.\n",
    "SRT": "1\n00:00:00,000 --> 00:00:01,000\n<i>Followed</i> by\n\n2\n00:00:01,000 --> 00:00:01,520\nthe pound key.\n",
    "VTT": "WEBVTT\n\nNOTE of it\n\n00:00.000 --> 00:01.520 \n<v Bob>Followed <00:00.700>by the pound key.\n",
    "ASS": "[Script Info]\nTitle: x\n\n[Events]\nFormat: Layer, Start, End, Style, Name, L, R, V, Effect, Text\n"
    "Dialogue: 0,0:00:00.00,0:00:01.52,Default,,0,0,0,,Followed by {\\i1}the{\\i0}\\Npound key.\n",
    "ELAN's table": "anna\t00:00:00.000\t00:00:01.520\t00:00:01.520\tFollowed by the pound key.\n",
    "LRC": "[ar:Somebody]\n[00:00.00]Followed by\n[00:01.20]the <00:01.30>pound key.\n",
    "Whisper": "Detected language: English\n[00:00.000 --> 00:01.520]  Followed by the pound key.\n",
    "Whisper TSV": "start\tend\ttext\n0\t1520\tFollowed by the pound key.\n",
    "MFA": "Begin,End,Label,Type,Speaker\n0,0.7,Followed by,words,a\n0.7,1.5,the pound key.,words,a\n0,0.1,F,phones,a",
    "words first": "Followed 0.00 0.70\nby 0.70 0.80\nthe 0.80 0.90\npound 0.9 1.1\nkey. 1.1 1.5\n",
    "scores": "Followed 0.98\nby 0.97\nthe 0.55\npound 0.9\nkey. 0.91\n",
    "a clock a line": "0:00\nFollowed by\n0:05\nthe pound key.\n",
    "TextGrid": PRAAT + 'class = "IntervalTier"\nname = "phones"\ntext = "F"\nclass = "IntervalTier"\nname = "words"\n'
    'text = ""\ntext = "Followed by"\ntext = "the pound key."\n',
    "short TextGrid": PRAAT + f'0\n1.5\n<exists>\n1\n"IntervalTier"\n"words"\n0\n1.5\n1\n0\n1.5\n"{SAID}"\n',
    "numbers by turns": "0.0 Followed 0.2 by 0.4 the 0.6 pound 0.8 key.\n",
    "words with times": "Followed/0.0 by/0.2 the/0.4 pound/0.6 key./0.8",
    "whisper.cpp": f"whisper_model_load: x\n[00:00:00.000 --> 00:00:02.000]   [SPEAKER_00]: {SAID}\n",
    "Vosk": '{\n "text" : "Followed by"\n}\n{\n "text" : "the pound key."\n}\n',
    "nested JSON": '{"results": [{"alternatives": [{"transcript": "' + SAID + '"}, {"transcript": "x"}]}]}',
    "NeMo's CTM": "c 1 0.00 0.30 Followed NA lex NA\nc 1 0.3 0.4 by NA lex NA\nc 1 0.7 0.2 the NA lex NA\n"
    "c 1 0.9 0.2 pound NA lex NA\nc 1 1.1 0.2 key. NA lex NA\n",
    "aeneas": 'f1,0.000,1.500,"Followed by"\nf2,1.500,2.000,"the pound key."\n',
    "Switchboard": "sw2-A-0001 0.000000 0.977625 [silence]\nsw2-A-0002 0.977625 11.561375 Followed by the pound key.\n",
    "MicroDVD": "{0}{25}Followed by|the pound key.\n",
    "SBV": "0:00:00.000,0:00:01.000\nFollowed by\n\n0:00:01.000,0:00:02.000\nthe pound key.\n",
    "rolling VTT": "WEBVTT\n\n00:00.000 --> 00:02.000\nFollowed<00:00.500><c> by</c>\n\n"
    "00:02.000 --> 00:02.010\nFollowed by\n\n00:02.010 --> 00:04.000\nFollowed by\nthe<00:03.000><c> pound key.</c>\n",
    "decimal commas": "0,000000\t0,700000\tFollowed by\n0,700000\t1,500000\tthe pound key.\n",
    "Julius": f"STAT: ok\nsentence1: <s> {SAID} </s>\nwseq1: <s> a </s>\ncmscore1: 1.0 0.5\n",
}


@pytest.mark.parametrize("form", TIMED)
def test_words_are_read_from_files_with_times(form, tmp_path):
    path = tmp_path / "c.txt"
    path.write_text(TIMED[form], encoding="utf-16" if form == "TextGrid" else "utf-8")
    words, found = read_transcript(path)
    assert (words, found is not None) == (SAID, True)
    assert holds_times(TIMED[form])


@pytest.mark.parametrize(
    "text",
    [
        HTS,
        '<tt xmlns="http://www.w3.org/ns/ttml"><body><p begin="00:00:01" end="00:00:02">Hi</p></body></tt>',
        "xx^xx-sil+m=i/A:xx+xx+xx\nxx^sil-m+i=z/A:-3+1+7\n",
        "0 100 sil -1.2\n100 200 f -44.0\n200 300 o -3.2\n300 400 l -1\n",
        "0 2000 h#\n2000 4000 f\n4000 5000 aa\n",
        "signal x\nnfields 1\n#\n0.12 125 pau\n0.24 125 f\n0.3 125 aa\n",
        "silB\nk\no\nN\nn\ni\nch\ni\nsilE\n",
        "HH AH0 L OW1",
        "ni3 hao3 ma5",
        PRAAT + '"IntervalTier"\n"phones"\n0\n1\n1\n0\n1\n"AA1"\n',
        "\u200b\n",
        "said from 0.5 --> 1.5 or so",
        "1.0 hello 0.2 world",
        "utt1 hello there\nutt2 good bye",
        "hello there (spk-utt1)",
        "SPEAKER c 1 0.00 1.50 <NA> <NA> anna <NA> <NA>",
        "Speaker 1  0:00\nHello.\nSpeaker 2  0:05\nYes.",
        "<!DOCTYPE Trans>\n<Trans>Hi</Trans>",
        "{'text': 'Hi.', 'chunks': []}",
        "{\\rtf1 Hi.}",
        "one\ttwo",
        "O\0n\0e\0",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d\n",
    ],
)
def test_phone_labels_and_unknown_times_are_not_words(text, tmp_path):
    (tmp_path / "c.txt").write_text(text)
    words, reason = read_transcript(tmp_path / "c.txt")
    assert words is None and reason


@pytest.mark.parametrize(
    "text",
    [
        SAID,
        "WARNING SIGNS WERE UP",
        "(5-6) people",
        "10:30 is when we meet.",
        "1 2 3 4 5",
        "John 3:16",
        "It ended 3:2.",
        "I am so",
        "555 1234 is mine",
        "你 好 吗",
    ],
)
def test_plain_words_are_unchanged(text):
    assert read_transcript(text) == (text, None)
    assert holds_times(text) is None and list(oddities(text)) == []


def test_id_before_a_text_is_not_a_word(tmp_path):
    path = tmp_path / "84-121-0001.txt"
    for line in ("{} {}", "{}|{}", '( {} "{}" )', "<s> {1} </s> ({0})", "84-121-0000 No.\n{} {}"):
        path.write_text(line.format(path.stem, SAID))
        assert read_transcript(path).words == SAID


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<|0.00|> Hi.<|1.52|>", "control tokens"),
        ("Happily<|endofprompt|>Hi.", "control tokens"),
        ("HI <COMMA> AND BYE <PERIOD>", "control tokens"),
        ("R&amp;D said hi.<br>", "markup"),
        ("don\u00e2\u20ac\u2122t", "mojibake"),
        ("Ã¼ber", "mojibake"),
        ("caf\ufffd", "U+FFFD"),
        ("Followed%20by%20the%20key.", "URL"),
        ("Followed\\nby", "escapes"),
        ("F\u043ell\u043ewed", "scripts mixed"),
        ("F\u200bollowed", "invisible"),
        ("HH AH0 L OW1", "phonemes"),
        ("[laughter] Hi.", "brackets"),
        ("(laughs) Hi.", "brackets"),
        ("see https://x.org", "address"),
        ("LJ001-0001 Hi.", "an id"),
        ("p225 | Hi.", "cells"),
        ("今天#1天气#3很好", "prosody"),
        ("null", "placeholder"),
        ("1.0 hello 0.2 world", "times"),
        ("\u0420\u045f\u0421\u0402\u0420\u0451\u0420\u0406\u0420\u00b5\u0421\u201a", "mojibake"),
    ],
)
def test_unspoken_content_is_reported_with_an_example(text, kind):
    [(found, example)] = oddities(text)
    assert kind in found and example in text


@pytest.mark.parametrize(
    "text",
    [
        "Café déjà vu – “quoted” …",
        "Привет, мир!",
        "iPhone用户",
        "日本語",
        "Đây là một câu",
        "5 < 6 & 7 > 3",
        "AT&T, R&D, 100%",
    ]
    + ["[SPEAKER0] hi <SE>[Laughter]</SE>", "mp3 and h264", "Ångström, São Paulo, ÄÖÜ"],
)
def test_ordinary_text_is_not_reported(text):
    assert list(oddities(text)) == []


def test_texts_are_normalised_to_one_line():
    text = "Xin chào các bạn"
    assert composed(unicodedata.normalize("NFD", text)) == text
    assert composed("one\u00a0two \r\n three\u2028four\n\nfive") == "one two three four five"
