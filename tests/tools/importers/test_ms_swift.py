"""Rows of ms-swift, as in its documentation and from users; the result is read as a manifest."""

import json
from pathlib import Path

import pytest

from higgs_ds.data.manifest import read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.tools.importers.formats import read_foreign


@pytest.fixture
def read(tmp_path, clips):
    """Reads rows beside clips a.wav to c.wav; returns rows and the reasons for leaving others out."""

    def read(*rows):
        (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
        _, found = read_foreign(tmp_path / "s.jsonl", "ms-swift")
        (tmp_path / "out.jsonl").write_text("\n".join(map(json.dumps, found.rows)))
        if found.rows:
            assert read_manifest(tmp_path / "out.jsonl")[1] == []
        for row in found.rows:
            row |= {"audio": row["audio"].removeprefix(f"{tmp_path}/")} if "audio" in row else {}
        return found.rows, list(found.left_out), found

    return read


def talk(*turns, **more):
    """Returns a row of (role, content) or complete messages."""
    messages = [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]
    return {"messages": messages, "audios": ["a.wav"]} | more


ASK, ANSWER = ("user", "Hi."), ("assistant", "<audio>")
SPEECH = {"audio": "a.wav", "text": "Hi."}


@pytest.mark.parametrize(("row", "outcome"), json.loads(Path(__file__).with_name("ms_swift.json").read_text()))
def test_pair_becomes_a_speech_row_and_unsuitable_rows_are_left_out(read, row, outcome):
    rows, left_out, found = read(row)
    if isinstance(outcome, str):
        assert rows == [] and [reason.startswith(outcome) for reason in left_out] == [True]
    else:
        assert rows == [SPEECH | outcome] and left_out == [] and not found.columns


def test_turns_without_loss_are_context(read):
    without = {"role": "assistant", "content": "<audio>", "loss": False}
    rows, _, found = read(talk(ASK, without, ("user", "So?"), ANSWER, audios=["a.wav", "b.wav"], speaker="anna", x=1))
    assert rows[0]["start_index"] == 2 and rows[0]["speaker"] == "anna" and len(rows[0]["messages"]) == 4
    assert dict(found.columns) == {"x": 1}


def test_assumed_transcripts_and_unread_turns_are_reported(read, tmp_path):
    _, _, found = read(talk(("user", "<audio>"), ("assistant", "Hi.")), talk(("system", "Low."), ASK, ANSWER))
    notes = found.lines(tmp_path)
    assert "s.jsonl: 1 × user's clip, with the assistant's text" in notes[0]
    assert "s.jsonl: 1 × system turn" in notes[1] and len(notes) == 2


def test_row_with_a_duplicate_key_is_left_out(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    row = json.dumps(talk(ASK, ANSWER))
    rows = [row, row.replace('"audios"', '"audios": [], "audios"'), row.replace('"content"', '"content": 1, "content"')]
    (tmp_path / "s.jsonl").write_text("\n".join(rows))
    _, found = read_foreign(tmp_path / "s.jsonl", None)
    assert len(found.rows) == 1 and found.left_out == {"rows with a duplicate column": 2}


def test_row_in_a_manifest_is_a_fault_with_the_import_command(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    plain = talk(ASK, ("assistant", [{"type": "audio", "audio_url": "a.wav"}]), audios=[])
    untagged = talk(ASK, ("assistant", "So."))
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": plain["messages"]}, talk(ASK, ANSWER), untagged])))
    rows, faults = read_manifest(path)
    assert [row.line for row in rows] == [1]
    command = f"python -m higgs_ds import --from ms-swift {path} --output DIR"
    assert [(fault.line, fault.field) for fault in faults] == [(2, "audios"), (3, "audios")]
    assert all(command in fault.problem for fault in faults)
    kind, found = read_foreign(path, None)  # although its first row is a manifest's
    assert kind == "ms-swift" and len(found.rows) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_first_rows_of_an_array_determine_the_format(tmp_path, whole):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    plain = {"messages": talk(ASK, ("assistant", "So."))["messages"]}
    text = json.dumps([5, *[plain] * 15, talk(ASK, ANSWER)], indent=1)
    (tmp_path / "s.json").write_text(text if whole else text[:-1])
    if whole:
        kind, found = read_foreign(tmp_path / "s.json", None)
        assert kind == "ms-swift" and len(found.rows) == 1
    else:
        with pytest.raises(ConfigError, match="line .* column"):
            read_foreign(tmp_path / "s.json", None)
