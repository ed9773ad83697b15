"""What the values of a row mean: not given in any spelling, numbers given as text, blanks, what nobody reads."""

import dataclasses
import json

import pytest

from higgs_ds.data.chatml import AudioRef, Turn
from tests.data.test_reading import checked, dumped


@pytest.fixture
def write(tmp_path):
    """Writes rows to m.jsonl beside a.wav, and gives its path."""
    (tmp_path / "a.wav").write_bytes(b"RIFF")

    def write(rows):
        path = tmp_path / "m.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


NAN = float("nan")
NOTHING = [  # ways to say that a field of a speech row is not given
    *({name: value} for name in ("scene", "speaker", "offset", "duration") for value in ("", " ", None, NAN)),
    *({"ref_audio": value, "ref_text": value} for value in ("", None, NAN)),
    *({"duration": value} for value in (0, -1, "-1", 0.0)),
    {"offset": 0.0, "duration": 0.0},
    {"offset": "0", "duration": ""},
    {"offset": 0},
]


@pytest.mark.parametrize("more", NOTHING)
def test_what_says_nothing_is_not_given(write, more):
    rows, faults, notes = checked(write([{"audio": "a.wav", "text": "Hi.", **more}, {"audio": "a.wav", "text": "Hi."}]))
    assert faults == notes == [] and rows[0] == dataclasses.replace(rows[1], line=1)


def test_numbers_as_tables_hold_them(write):
    values = [{"speaker": 7, "duration": "1.5"}, {"speaker": 7.0, "offset": "1", "duration": " 0.5"}, {"speaker": 7.5}]
    rows, faults, _ = checked(write([{"audio": "a.wav", "text": "Hi.", **more} for more in values]))
    assert faults == [] and [row.speaker for row in rows] == ["7", "7", "7.5"]
    assert [row.stated_sec for row in rows] == [1.5, 0.5, None]
    spans = [(row.audio_refs[0][1].offset_sec, row.audio_refs[0][1].duration_sec) for row in rows]
    assert spans == [(None, None), (1.0, 0.5), (None, None)]


def test_a_speaker_that_no_model_sees_may_be_called_anything(write):
    [row], faults, _ = checked(write([{"audio": "a.wav", "text": "Hi.", "speaker": "<|eot_id|>"}]))
    assert faults == [] and row.speaker == "<|eot_id|>"


def test_a_table_without_nulls_gives_each_item_every_field(write, tmp_path):
    """As Arrow's conversions leave it: zeros and empty texts for what is not there."""
    empty = {"text": "", "audio_url": "", "raw_audio": "", "duration": 0.0, "offset": 0.0, "row_id": 0}
    talk = {
        "messages": [
            {"role": "system", "content": [{"type": "text", **empty}], "recipient": ""},
            {"role": "user", "content": [{"type": "text", **empty, "text": "Say it."}], "recipient": ""},
            {"role": "assistant", "content": [{"type": "audio", **empty, "audio_url": "a.wav"}], "recipient": ""},
        ],
        "misc": [],
        "start_index": NAN,
        "speaker": NAN,
    }
    [row], faults, notes = checked(write([talk]))
    assert faults == notes == []
    clip = AudioRef(tmp_path / "a.wav")
    assert row.messages == (Turn("system", ("",)), Turn("user", ("Say it.",)), Turn("assistant", (clip,)))
    assert (row.start_index, row.speaker, row.stated_sec) == (None, None, None)


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        (" Say it.\n", ("Say it.",)),
        ({"type": "text", "text": "\tSay it. "}, ("Say it.",)),
        ([" Say", " ", " it. "], ("Say", " ", " it.")),
        ([" ", " One ", {"type": "audio", "audio_url": "a.wav"}, " two ", "", " "], ("One ", "CLIP", " two")),
        (["", {"type": "audio", "audio_url": "a.wav"}], ("CLIP",)),
        (["One  two\u3000"], ("One  two",)),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_blanks_around_a_turn_are_trimmed_as_servers_do(write, tmp_path, content, pieces, role):
    talk = [{"role": role, "content": content}, {"role": "assistant", "content": "Hi."}]
    [row], faults, _ = checked(write([{"messages": talk}]))
    clip = AudioRef(tmp_path / "a.wav")
    assert faults == [] and row.messages[0].content == tuple(clip if piece == "CLIP" else piece for piece in pieces)


@pytest.mark.parametrize("content", ["", "  ", [], None, [""], {"type": "text", "text": " "}, [" ", ""]])
def test_a_system_turn_may_say_nothing(write, content):
    talk = [{"role": "system", "content": content}, {"role": "assistant", "content": "Hi."}]
    [row], faults, _ = checked(write([{"messages": talk}]))
    assert faults == [] and row.messages[0] == Turn("system", ("",))


UNREAD = ["NaN", "-Infinity", "1" * 400, r'"\ud83d"', '{"a": 1, "a": [NaN]}', "[" * 40 + "]" * 40]


@pytest.mark.parametrize("value", UNREAD)
def test_what_stands_in_a_column_that_nobody_reads_is_never_a_fault(write, value):
    """pandas writes NaN for a value that is missing."""
    path = write([])
    talk = json.dumps(dumped()).replace('"misc": {', f'"emotion": {value}, "emotion": 1, "misc": {{"x": {value}, ')
    talk = talk.replace('"recipient"', f'"note": {value}, "recipient"').replace('"row_id": null', f'"row_id": {value}')
    path.write_text(f'{{"audio": "a.wav", "text": "Hi.", "id": {value}, "emotion": {value}}}\n{talk}\n')
    rows, faults, notes = checked(path)
    assert len(rows) == 2 and faults == []
    assert f"{path}: emotion: not read, in 2 rows" in notes
