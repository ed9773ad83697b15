"""Manifests: positions of rows, valid rows, and faults with their messages."""

import base64
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from higgs_ds.data.manifest import AudioRef, Fault, Manifest, Turn, read_manifest, speech_messages

EXAMPLES = Path(__file__).parents[2] / "examples" / "speech"
CLIP = {"type": "audio", "audio_url": "a.wav"}
RAW = base64.b64encode(b"RIFF").decode()
SPEECH = {"audio": "a.wav", "text": "Hello."}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chatml(content, **more):
    """A valid ChatML row, with the assistant's `content` and the fields `more`."""
    return {"messages": [turn("user", "Say it."), turn("assistant", content)], **more}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Writes text, bytes or rows (one per line, strings unchanged) to m.jsonl beside a.wav, and reads it."""
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)

    def read(content, **options):
        if isinstance(content, list):
            content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content)
        Path("m.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
        rows, faults = read_manifest("m.jsonl", **options)
        assert faults == sorted(faults)
        return rows, [str(fault) for fault in faults]

    return read


BAD_ROWS = json.loads((Path(__file__).parent / "bad_rows.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_fault_names_line_and_field_and_other_rows_survive(manifest, row, words):
    row = row if isinstance(row, str) and row.startswith("{") else json.dumps(row)
    rows, faults = manifest([SPEECH, "", row, chatml(CLIP)])
    assert len(faults) == 1 and faults[0].startswith(f"m.jsonl:3: {words}")
    assert faults[0].isprintable() and len(faults[0]) < 300
    assert [row.origin for row in rows] == ["m.jsonl:1", "m.jsonl:4"]


def test_corrupt_manifest_gives_faults_without_traceback(manifest):
    rng = np.random.default_rng(0)
    whole = "\n".join(map(json.dumps, [SPEECH, chatml([CLIP, "So."], start_index=0, misc={"speaker": "x"})] * 3))
    for text in (whole, f"[{whole}]".replace("\n", ",")):
        for _ in range(300):
            content = bytearray(text.encode())
            for place in rng.integers(len(content), size=3):
                content[place : place + rng.integers(3)] = rng.choice([b"", b'"', b"{", b"[", b"1", b"\xff", b"null"])
            manifest(bytes(content))
    for value in ("[" * 10_000, '{"audio": ' * 10_000, "9" * 5000, r'{"text": "\ud83d"}', '{"audio": "\\u0000"}'):
        rows, faults = manifest(f"{json.dumps(SPEECH)}\n{value}\n")
        assert len(rows) == 1 and len(faults) >= 1


def test_all_faults_are_listed_together_and_sorted(manifest):
    clips = [{**CLIP, "offset": -1, "duration": -2}, {"type": "audio", "audio_url": "http://x/y"}]
    rows, faults = manifest([SPEECH, "{", {"audio": "b.wav", "text": "", "extra": 1}, chatml(clips, start_index="x")])
    assert len(rows) == 1
    assert [fault if "fetched" in fault else fault.split(" ")[:2] for fault in faults] == [
        ["m.jsonl:2:", "row:"],
        ["m.jsonl:3:", "audio:"],
        ["m.jsonl:3:", "text:"],
        ["m.jsonl:4:", "messages[1].content[0].offset:"],
        "m.jsonl:4: messages[1].content[1].audio_url: URLs are not fetched; give a local path instead of 'http://x/y'",
        ["m.jsonl:4:", "start_index:"],
    ]
    assert Fault("m", 9, "z", "z") < Fault("m", 10, "a", "a")  # by number, not as text


def test_both_kinds_of_rows(manifest, tmp_path):
    (tmp_path / "ä.wav").write_bytes(b"RIFF")
    system_clip = {**CLIP, "audio_url": str(tmp_path / "a.wav")}
    dialogue = {
        "messages": [
            turn("system", ["Voice:", system_clip]),
            turn("user", {"type": "text", "text": "One\u2028two."}),
            turn("assistant", [{**CLIP, "raw_audio": RAW, "audio_url": "http://x", "row_id": 3}, "So."], recipient="x"),
            turn("assistant", {"type": "audio", "audio_url": "ä.wav", "raw_audio": None, "offset": 0, "duration": 2}),
        ],
        "start_index": 3,
        "speaker": None,
        "misc": {"speaker": "ann", "anything": [None]},
        "id": {"any": 1},
    }
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in (dialogue, SPEECH)).replace("\n", "\r\n")
    rows, faults = manifest(b"\xef\xbb\xbf" + text.encode())  # a BOM, CRLF, and U+2028 inside a string
    assert faults == []
    chat, speech = rows
    clip, raw = AudioRef(tmp_path / "a.wav"), AudioRef(raw_audio=RAW)
    piece = AudioRef(tmp_path / "ä.wav", offset_sec=0.0, duration_sec=2.0)
    assert chat.messages == (
        Turn("system", ("Voice:", clip)),
        Turn("user", ("One two.",)),
        Turn("assistant", (raw, "So."), "x"),
        Turn("assistant", (piece,)),
    )
    assert (chat.start_index, chat.speaker, chat.origin) == (3, "ann", "m.jsonl:1")
    assert chat.audio_refs == (
        ("messages[0].content[1]", clip),
        ("messages[2].content[0]", raw),
        ("messages[3].content", piece),
    )
    assert speech.messages == (
        Turn("system", ("Generate audio following instruction.",)),
        Turn("user", ("Hello.",)),
        Turn("assistant", (clip,)),
    )
    assert (speech.start_index, speech.speaker, speech.origin) == (None, None, "m.jsonl:2")
    assert speech.audio_refs == (("audio", clip),)


SCENE = "Generate audio following instruction.\n\n<|scene_desc_start|>\nA quiet room.\n<|scene_desc_end|>"


@pytest.mark.parametrize(
    ("more", "before", "start_index", "fields"),
    [
        ({"duration": 1.5, "speaker": "x"}, [("system", SCENE.split("\n")[0])], None, ["audio"]),
        ({"scene": "A quiet room."}, [("system", SCENE)], None, ["audio"]),
        (
            {"ref_audio": "ref.wav", "ref_text": " So.\n"},
            [("system", SCENE.split("\n")[0]), ("user", "So."), ("assistant", "ref.wav")],
            3,
            ["ref_audio", "audio"],
        ),
        (
            {"ref_audio": "ref.wav", "ref_text": "So.", "scene": "A quiet room."},
            [("system", SCENE), ("user", "So."), ("assistant", "ref.wav")],
            3,
            ["ref_audio", "audio"],
        ),
    ],
)
def test_speech_rows_become_the_prompt_of_the_servers(manifest, tmp_path, more, before, start_index, fields):
    (tmp_path / "ref.wav").write_bytes(b"RIFF")
    clips = {name: AudioRef(tmp_path / name) for name in ("a.wav", "ref.wav")}
    prompt = tuple(Turn(role, (clips.get(content, content),)) for role, content in [*before, ("user", "Hello.")])
    [row], faults = manifest([{**SPEECH, **more}])
    assert faults == []
    assert row.messages == (*prompt, Turn("assistant", (clips["a.wav"],)))
    assert row.start_index == start_index
    assert [field for field, _ in row.audio_refs] == fields

    reference = {"ref_text": "So.", "ref_audio": clips["ref.wav"]} if "ref_text" in more else {}
    assert speech_messages(" Hello.", None, scene=more.get("scene"), **reference) == (prompt, start_index)


def test_boson_style_has_no_system_turn_before_a_reference(manifest, tmp_path):
    (tmp_path / "ref.wav").write_bytes(b"RIFF")
    reference = {"ref_audio": "ref.wav", "ref_text": "So."}
    rows = [SPEECH, {**SPEECH, **reference}, {**SPEECH, **reference, "scene": "A quiet room."}]
    served, _ = manifest(rows)
    boson, _ = manifest(rows, prompt_style="boson")
    assert [row.messages[0].role for row in boson] == ["system", "user", "system"]
    assert boson[1].messages == served[1].messages[1:] and (boson[1].start_index, served[1].start_index) == (2, 3)
    assert all(boson[i].messages == served[i].messages for i in (0, 2))
    assert {row.prompt_style for row in boson} == {"boson"}


def test_rows_with_a_scene_are_one_note(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    talk = chatml(CLIP)
    talk["messages"].insert(0, turn("system", SCENE))
    rows = [SPEECH, {**SPEECH, "scene": "A quiet room."}, talk, {"scene": "No clip.", "text": "x"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = Manifest(tmp_path / "m.jsonl")
    assert [bool(manifest.check(number)[1]) for number in range(4)] == [False, False, False, True]
    (note,) = manifest.notes()
    assert note == f"{tmp_path / 'm.jsonl'}: 2 rows have a scene; vllm-omni serves no scene, the other stacks do"
    other = Manifest(tmp_path / "m.jsonl")
    other.set_seen([manifest.seen(), manifest.seen()])
    assert "4 rows" in other.notes()[0]


@pytest.mark.parametrize("half", [{"ref_text": "So."}, {"ref_audio": AudioRef(Path("ref.wav"))}])
def test_incomplete_reference_is_refused(half):
    with pytest.raises(ValueError, match="ref_text and ref_audio belong together"):
        speech_messages("Hello.", None, **half)


def flac_seconds(path):
    """Length from STREAMINFO (https://www.rfc-editor.org/rfc/rfc9639#section-8.2): 20 bits of rate, 36 of samples."""
    header = path.read_bytes()[:26]
    assert header[:4] == b"fLaC"
    bits = int.from_bytes(header[18:26], "big")
    return (bits & (1 << 36) - 1) / (bits >> 44)


def test_shipped_speech_is_valid():
    train, train_faults = read_manifest(EXAMPLES / "manifest.jsonl")
    val, val_faults = read_manifest(EXAMPLES / "val.jsonl")
    assert train_faults == val_faults == []
    assert (len(train), len(val)) == (32, 4)
    texts = [re.sub(r"\W+", " ", row.messages[1].content[0].lower()).strip() for row in train + val]
    assert len(set(texts)) == 36
    clips = [row.audio_refs[0][1].path for row in train + val]
    assert sorted(clips) == sorted((EXAMPLES / "audio").iterdir())
    assert sum(clip.stat().st_size for clip in clips) < 3_000_000
    seconds = [flac_seconds(clip) for clip in clips]
    assert all(1.0 <= length <= 3.5 for length in seconds[:24] + seconds[32:])
    stated = [
        json.loads(line)["duration"]
        for name in ("manifest.jsonl", "val.jsonl")
        for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    ]
    assert stated == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("", 1, "contains no rows"),
        (" \r\n\n", 1, "contains no rows"),
        ("[ ]", 1, "contains no rows"),
        (b'{"audio": "a.wav", "text": "Hi."}\n\n{"text": "caf\xe9"}', 3, "is not UTF-8 (byte 0xe9"),
        (gzip.compress(json.dumps(SPEECH).encode()), 1, "is compressed with gzip"),
        (b"PAR1\x15\x04\x15\xff", 1, "is Parquet"),
    ],
)
def test_file_without_rows_is_a_fault(manifest, content, line, words):
    rows, faults = manifest(content)
    assert rows == [] and len(faults) == 1
    assert faults[0].startswith(f"m.jsonl:{line}: manifest: {words}")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.jsonl", "cannot be read (No such file or directory)"),
        ("folder", "cannot be read (Is a directory)"),
    ],
)
def test_unreadable_manifest_is_a_fault(manifest, path, words):
    rows, [fault] = read_manifest(path)
    assert rows == []
    assert str(fault).startswith(f"{path}:1: manifest: {words}")


def test_line_numbers_in_a_pretty_printed_array(manifest):
    rows, faults = manifest("\n" + json.dumps([SPEECH, {**SPEECH, "text": ""}, chatml("Hi."), 5], indent=2))
    assert [row.line for row in rows] == [3, 11]
    assert faults == ["m.jsonl:7: text: is empty", "m.jsonl:23: row: must be a JSON object, found 5"]


def test_rows_on_one_line_are_identified_by_index(manifest):
    """json.dump writes an array on one line."""
    broken = chatml("Hi.", start_index=9)
    rows, faults = manifest(json.dumps([SPEECH, {**SPEECH, "text": ""}, chatml("Hi."), 5, broken]))
    assert [row.origin for row in rows] == ["m.jsonl:1[0]", "m.jsonl:1[2]"]
    assert faults == [
        "m.jsonl:1[1]: text: is empty",
        "m.jsonl:1[3]: row: must be a JSON object, found 5",
        "m.jsonl:1[4]: start_index: leaves nothing to train on: the last assistant turn is 1, found 9",
    ]
    assert Manifest("m.jsonl").row(2) == rows[1]


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
def test_broken_array_keeps_earlier_rows(manifest, tail, line, words):
    rows, faults = manifest("[\n " + json.dumps(SPEECH) + tail)
    assert [row.line for row in rows] == [2]
    [fault] = faults
    assert fault.startswith(f"m.jsonl:{line}: row: not JSON (") and words in fault
    assert fault.endswith("nothing after it was read")


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"audio": "a.wav", "text": "One.", "text": "Two."}', "text"),
        ('{"text": "One.", "audio": "a.wav", "aud\\\\u0069o" : "b.wav"}', "audio"),
        ('{"messages": [{"role": "user", "content": "Hi.", "role": "assistant"}]}', "role"),
    ],
)
def test_duplicate_key_is_a_fault(row, key, tmp_path):
    """JSON readers silently keep the last value."""
    (tmp_path / "m.jsonl").write_text(row.replace("\\\\u", "\\u") + "\n")
    _, faults = read_manifest(tmp_path / "m.jsonl")
    assert [(fault.line, fault.field) for fault in faults] == [(1, key)]
