"""Contradictions between a manifest's texts, lengths and clips, as `load_rows` reports them."""

import json
import os

import numpy as np
import pytest
import soundfile

from higgs_ds.batching.collate import Collator
from higgs_ds.batching.token_counts import LengthIndex
from higgs_ds.codec.load import load_codec
from higgs_ds.data import transcripts
from higgs_ds.data.chatml import AudioRef, Row, Turn, speech_messages
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.faults import Fault, grouped, write_faults
from higgs_ds.data.rows import RowOptions, load_rows
from higgs_ds.distributed.ranks import Ranks
from higgs_ds.errors import ConfigError
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()


class Keeping(Ranks):
    """One rank, which records its output."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "said", [])

    def say(self, text):
        self.said.append(text)


def noise(path, seconds: float, seed: int, sample_rate: int = 16000) -> str:
    clip = np.random.default_rng(seed).normal(0, 0.1, round(seconds * sample_rate))
    soundfile.write(path, clip, sample_rate)
    os.utime(path, (1e9, 1e9))
    return path.name


@pytest.fixture
def corpus(tmp_path):
    """30 rows with clips of plausible length, in a folder that takes more."""
    rows = []
    for i in range(30):
        text = f"{i} " + " ".join(WORDS[: 3 + i % 8])
        seconds = len(text) / 15 + 0.1 * (i % 3)
        rows.append({"audio": noise(tmp_path / f"{i}.wav", seconds, i), "text": text, "duration": round(seconds, 2)})
    return rows


@pytest.fixture
def load(tmp_path, codec_dir, tokenizer, tiny_config):
    def load(rows, val=None, array=False, trained=1, **options):
        paths = []
        for name, part in (("train.jsonl", rows), ("val.jsonl", val)):
            if part is not None:
                lines = "".join(json.dumps(row) + "\n" for row in part)
                (tmp_path / name).write_text(json.dumps(part) if array else lines)
                paths.append(str(tmp_path / name))
        cache = CodeCache(tmp_path / "codes", load_codec(str(codec_dir)))
        ranks = Keeping()
        options = {"count_tokens": False, "faults_dir": tmp_path / "out"} | options
        lengths = LengthIndex(cache, tokenizer, Collator(HiggsV2Spec.from_config(tiny_config)))
        sets = load_rows(paths, RowOptions(30.0, **options), trained=trained, cache=cache, ranks=ranks, lengths=lengths)
        return sets, "\n".join(ranks.said)

    return load


def left(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "faults.jsonl").read_text().splitlines()]


def test_valid_corpus_loads_without_messages(load, corpus, tmp_path):
    (train, _), said = load(corpus)
    assert len(train) == 30 and said == "" and train.tokens is None
    assert not (tmp_path / "out").exists()


def test_implausible_transcript_is_reported_with_its_rate_and_the_usual_one(load, corpus, tmp_path):
    corpus[4]["text"], corpus[5]["text"] = "Oh.", "a very long text " * 30
    (train, _), said = load(corpus)
    assert len(train) == 30
    lines = [line for line in said.splitlines() if ": text: " in line]
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/train.jsonl:{n}" for n in (5, 6)]
    assert "3 characters in 2.4" in lines[0] and "per second, usual for Latin text here is 1" in lines[0]
    assert said.startswith("2 rows with warnings, used as they are:")
    found = [(row["line"], row["field"], row["level"]) for row in left(tmp_path)]
    assert found == [(5, "text", "warning"), (6, "text", "warning")]


def test_speaking_rates_are_compared_within_a_script(load, corpus, tmp_path):
    for i in range(30, 60):  # four characters per second, which would be slow for Latin letters
        text = "語" * (10 + i % 5)
        corpus.append(
            {"audio": noise(tmp_path / f"{i}.wav", len(text) / 4, i), "text": text + "一二三四五六七八九十"[i % 10]}
        )
    assert load(corpus)[1] == ""
    corpus[40]["text"] = "語" * 100
    said = load(corpus)[1]
    assert said.count(": text: ") == 1 and "train.jsonl:41: text: 100 characters in" in said
    assert "usual for Han and kana text here is 4" in said
    for number, text in enumerate(
        ["Zoë", "カタカナ語", "한국어", "Кириллица", "العربية", "हिन्दी", "ภาษาไทย", "Ελλάδα", "עברית"]
    ):
        assert transcripts.script_of(f"a {text}") == number
    assert transcripts.script_of("∀∃") == len(transcripts.SCRIPTS) - 1


def test_clip_with_two_texts_and_text_on_both_sides(load, corpus, tmp_path):
    corpus[7]["audio"] = corpus[3]["audio"]
    del corpus[7]["duration"]
    copy = {"audio": noise(tmp_path / "v.wav", 1.0, 99), "text": f"  {corpus[2]['text'].upper()} "}
    (train, val), said = load(corpus, val=[copy])
    assert len(train) == 30 and len(val) == 1
    assert said.count(": audio: ") == 1
    assert f"train.jsonl:8: audio: the same clip has another text in {tmp_path}/train.jsonl:4; one of them is" in said
    assert "val.jsonl:1: text: is also trained on, in " in said and "train.jsonl:3" in said
    assert len(left(tmp_path)) == 2
    other = [{"audio": corpus[3]["audio"], "text": "Of another manifest."}]
    for trained in (1, 2):  # also on the validation side
        said = load(corpus, val=other, trained=trained)[1]
        assert f"val.jsonl:1: audio: the same clip has another text in {tmp_path}/train.jsonl:4; one of" in said


def test_rows_of_an_array_on_one_line_are_counted_and_named(load, corpus, tmp_path):
    corpus[4]["text"], corpus[7]["audio"] = "Oh.", corpus[3]["audio"]
    for row in corpus[10:17]:
        row["text"] = ""
    said = load(corpus, array=True, skip_bad_rows=True)[1]
    assert "training without 7 bad rows:" in said and "train.jsonl:1[16]: text: is empty" in said
    assert "2 rows with warnings" in said
    assert "train.jsonl:1[7]: audio: the same clip has another text in " in said and "train.jsonl:1[3]; one of" in said
    found = [(row["line"], row["element"], row["field"]) for row in left(tmp_path) if row["level"] == "warning"]
    assert found == [(1, 4, "text"), (1, 7, "audio"), (1, 7, "duration")]


def test_texts_are_compared_without_punctuation_and_composition(load, corpus, tmp_path):
    corpus[2]["text"], corpus[3]["text"] = "Un caf\u00e9, so long as that.", "की की की की"
    texts = ["[laugh] un cafe\u0301 so long as that", "का का का का", "Nothing like it."]
    val = [{"audio": noise(tmp_path / f"v{i}.wav", 1.0, 90 + i), "text": text} for i, text in enumerate(texts)]
    _, said = load(corpus, val=val)
    assert said.count(": text: is also trained on, in ") == 1 and "val.jsonl:1: text: is also trained on" in said


def test_stated_length_that_differs_from_the_clips(load, corpus, tmp_path):
    corpus[0]["duration"] += 0.3  # rounding, or trimmed silence
    corpus[1]["duration"] += 9.3
    clip, _ = soundfile.read(tmp_path / "9.wav")
    soundfile.write(tmp_path / "wrong.wav", clip, 8000)
    corpus[9]["audio"] = "wrong.wav"
    for i, span in ((20, {"duration": 30.0}), (21, {"offset": 0.5, "duration": 30.0}), (22, {"duration": 0.3})):
        content = [corpus[i]["text"], {"type": "audio", "audio_url": corpus[i]["audio"], **span}]
        corpus[i] = {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": content}]}
    seconds = soundfile.info(tmp_path / "23.wav").duration
    corpus[23] |= {"offset": 0.2, "duration": seconds}  # a fifth of a second past the end
    corpus[24] |= {"offset": 0.2, "duration": soundfile.info(tmp_path / "24.wav").duration - 0.2}
    (train, _), said = load(corpus)
    lines = [line for line in said.splitlines() if ": duration: " in line]
    assert "train.jsonl:2: duration: says 10.73 s, the clip lasts 1.4" in lines[0] and "sample rate" not in lines[0]
    assert "train.jsonl:10: duration: says 1.33 s" in lines[1]
    assert lines[1].endswith("; its sample rate may be wrong")
    for line, words in zip(
        lines[2:5], ("says 30.00 s, the", "is 30.00 s, but the file ends 2.32 s", "says 0.30 s, the"), strict=True
    ):
        assert f" duration: {words}" in line
    assert lines[5].endswith("after the offset") and len(lines) == 6
    assert [train[i].audio_refs[0][1].duration_sec for i in (20, 21, 22)] == [None, 30.0, None]


@pytest.mark.parametrize("counted", [False, True])
def test_row_over_the_token_limit_is_a_fault(load, corpus, counted):
    corpus[11]["text"] = "word " * 100
    with pytest.raises(ConfigError, match=r"train.jsonl:12: row: takes 6\d\d tokens, over --max_row_tokens 600"):
        load(corpus, max_row_tokens=600, count_tokens=counted)
    (train, _), _ = load(corpus, max_row_tokens=600, count_tokens=counted, skip_bad_rows=True)
    assert len(train) == 29 and (train.tokens is not None) == counted
    assert len(load(corpus, max_row_tokens=800, count_tokens=counted)[0][0]) == 30


def test_estimate_of_tokens_is_an_upper_bound(tokenizer, tiny_config):
    """Rows below the limit by this estimate are not counted, so it must not be too low for any kind of row."""
    clip = AudioRef(raw_audio="x")
    talk = (
        Turn("system", ("",)),
        Turn("user", ("語 é", clip, "a")),
        Turn("assistant", ("Hi.", clip), "someone"),
        Turn("assistant", (clip,)),
    )
    index = LengthIndex(None, tokenizer, Collator(HiggsV2Spec.from_config(tiny_config)))
    index._cache = type("Frames", (), {"frames": staticmethod(lambda ref: 50)})()
    prompt, start = speech_messages("So.", clip, scene="A room.", ref_text="Well.", ref_audio=clip)
    for messages, start_index in ((talk, None), (prompt, start)):
        row = Row(messages, start_index, None, "m", 1)
        bound = transcripts.text_stats_of(row)[4] + 50 * len(row.audio_refs)
        assert index.tokens(row) <= bound < index.tokens(row) + 128 * (len(messages) + len(row.audio_refs))


def test_hundred_thousand_bad_rows_print_one_screen(load, tmp_path):
    rows = [{"audio": "a.wav", "text": ""} for _ in range(60_000)] + [
        {"audio": 7, "text": f"{i}"} for i in range(40_000)
    ]
    noise(tmp_path / "a.wav", 1.0, 0)
    with pytest.raises(ConfigError) as caught:
        load(rows)
    lines = caught.value.problems
    assert len(lines) == 2 * 22 + 2
    assert lines[0] == "60,000 × text: is empty" and lines[1] == f"{tmp_path}/train.jsonl:1: text: is empty"
    assert lines[21] == "… and 59,980 more of this kind"
    assert lines[22] == "40,000 × audio: must be the path of an audio file, found N"
    assert lines[-2] == f"complete list: {tmp_path}/out/faults.jsonl"
    assert lines[-1].startswith("100,000 bad rows; nothing was trained")
    all_of_them = left(tmp_path)
    assert len(all_of_them) == 100_000 and [row["line"] for row in all_of_them] == list(range(1, 100_001))
    assert all_of_them[0] == {
        "file": f"{tmp_path}/train.jsonl",
        "line": 1,
        "field": "text",
        "problem": "is empty",
        "kind": "text: is empty",
        "level": "fault",
    }


def test_kinds_omit_names_and_numbers_and_are_limited_in_number():
    faults = [Fault("m", i, f"messages[{i}].content", f"'{i}\\'x' lasts {i}.5 s, over -1e3") for i in range(30)]
    assert {fault.kind for fault in faults} == {"messages[].content: … lasts N s, over N"}
    many = [Fault("m", i, "row", "is bad " + "x" * (i % 50)) for i in range(5000)]
    lines = grouped(many)
    assert len(lines) == 20 * 22 + 1 and lines[-1] == "… and 3,000 more, of 30 other kinds"


def test_faults_are_reported_even_if_the_folder_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    assert write_faults(tmp_path / "file", [Fault("m", 1, "row", "is bad")]) is None
    assert write_faults(tmp_path, [Fault("m", 1, "row", "is bad")]) == tmp_path / "faults.jsonl"
    assert write_faults(tmp_path, []) is None and not (tmp_path / "faults.jsonl").exists()
