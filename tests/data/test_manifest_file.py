"""A manifest as a file: where its rows stand in it, and what is no manifest at all."""

import gzip
import json
from pathlib import Path

import pytest

from higgs_ds.data.manifest import Manifest, read_manifest

SPEECH = {"audio": "a.wav", "text": "Hello."}
TALK = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Hi."}]}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Writes text or bytes to m.jsonl beside a.wav, and reads it."""
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)

    def read(content):
        Path("m.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
        rows, faults = read_manifest("m.jsonl")
        return rows, [str(fault) for fault in faults]

    return read


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("", 1, "holds no rows"),
        (" \r\n\n", 1, "holds no rows"),
        ("[ ]", 1, "holds no rows"),
        (b'{"audio": "a.wav", "text": "Hi."}\n\n{"text": "caf\xe9"}', 3, "is not UTF-8 (byte 0xe9"),
        (json.dumps(SPEECH).encode("utf-16"), 1, "is UTF-16, not a manifest; save it as UTF-8"),
        (b"RIFF\x24\0\0\0WAVEfmt ", 1, "is a WAV file, not a manifest; name the manifest that lists the clips"),
        (gzip.compress(json.dumps(SPEECH).encode()), 1, "is packed by gzip, not a manifest; unpack it"),
        (b"PAR1\x15\x04\x15", 1, "is a Parquet file, not a manifest; export it as JSONL"),
        (b"ARROW1\0\0\xff\xff\xff\xff", 1, "is an Arrow file, not a manifest; export it as JSONL"),
        (b"a.wav" + bytes(252) + b"ustar\x0000", 1, "is a TAR file, not a manifest; unpack it"),
        (b"\x80\x81", 1, "is not UTF-8 (byte 0x80"),
    ],
)
def test_a_file_without_rows(manifest, content, line, words):
    rows, faults = manifest(content)
    assert rows == [] and len(faults) == 1
    assert faults[0].startswith(f"m.jsonl:{line}: manifest: {words}")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.jsonl", "cannot be read (No such file or directory)"),
        ("folder", "cannot be read (Is a directory)"),
        ("a\0b", "cannot be read (embedded null byte)"),
    ],
)
def test_a_manifest_that_cannot_be_read(manifest, path, words):
    rows, [fault] = read_manifest(path)
    assert rows == []
    assert str(fault).startswith(f"{path}:1: manifest: {words}")


def test_what_stands_further_on_in_a_manifest_is_no_sign_of_another_file(manifest):
    rows, faults = manifest('{"wav":"WAVE.wav", "text": "' + "x" * 229 + 'ustar"}')
    assert rows == [] and faults == [
        "m.jsonl:1: wav: 'WAVE.wav' does not exist; paths are relative to the manifest's folder"
    ]


def test_line_numbers_in_a_pretty_printed_array(manifest):
    rows, faults = manifest("\n" + json.dumps([SPEECH, {**SPEECH, "text": ""}, TALK, 5], indent=2))
    assert [row.line for row in rows] == [3, 11]
    assert faults == ["m.jsonl:7: text: is empty", "m.jsonl:23: row: must be a JSON object, found 5"]


def test_rows_that_share_a_line_are_told_apart_by_their_number(manifest):
    """json.dump writes an array on one line."""
    broken = {**TALK, "start_index": 9}
    rows, faults = manifest(json.dumps([SPEECH, {**SPEECH, "text": ""}, TALK, 5, broken]))
    assert [row.origin for row in rows] == ["m.jsonl:1[0]", "m.jsonl:1[2]"]
    assert faults == [
        "m.jsonl:1[1]: text: is empty",
        "m.jsonl:1[3]: row: must be a JSON object, found 5",
        "m.jsonl:1[4]: start_index: must be 0 to 1 (the index of a message), found 9",
    ]
    assert Manifest("m.jsonl").row(2) == rows[1]


def test_an_array_on_one_line_whose_clips_all_miss_is_one_sentence(manifest):
    rows, faults = manifest(json.dumps([{**SPEECH, "audio": f"{i}.wav"} for i in range(30)]))
    assert rows == [] and len(faults) == 1 and "none of the 30 rows' clips exists" in faults[0]


@pytest.mark.parametrize(
    ("tail", "line", "words"),
    [
        (",\n {'a': 1}]", 3, "Expecting property name enclosed in double quotes, column 3"),
        (",\n]", 3, "column 1"),
        ("\n {}]", 3, "Expecting ',' or ']', column 2"),
        ("", 2, "Expecting ',' or ']', column 38"),
        ("]\n\n[]", 4, "Extra data after the array, column 1"),
    ],
)
def test_a_broken_array_keeps_what_stands_before(manifest, tail, line, words):
    rows, faults = manifest("[\n " + json.dumps(SPEECH) + tail)
    assert [row.line for row in rows] == [2]
    [fault] = faults
    assert fault.startswith(f"m.jsonl:{line}: row: not JSON (") and words in fault
    assert fault.endswith("nothing after it was read")


def test_an_array_nested_too_deeply_to_parse(manifest):
    rows, faults = manifest("[" + json.dumps(SPEECH) + ",\n" + "[" * 200_000)
    assert len(rows) == 1
    assert faults == ["m.jsonl:2: row: nested too deeply to be read; nothing after it was read"]
