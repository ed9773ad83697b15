"""Which rows a manifest may hold, and what each faulty one is answered with."""

import base64
import json
import os
import re
from pathlib import Path

import pytest

from higgs_ds.data.manifest import AudioRef, Fault, Manifest, Turn, read_manifest, speech_messages

EXAMPLES = Path(__file__).parents[2] / "examples" / "speech"
CLIP = {"type": "audio", "audio_url": "a.wav"}
NO_URL = {"type": "audio", "audio_url": "placeholder"}
AT = "messages[1].content"
RAW = base64.b64encode(b"RIFF").decode()
SPEECH = {"audio": "a.wav", "text": "Hello."}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chatml(content, **more):
    """A ChatML row without faults, but for what `content` (the assistant's) and `more` bring in."""
    return {"messages": [turn("user", "Say it."), turn("assistant", content)], **more}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Writes text, bytes or rows (one a line; a string as it stands) to m.jsonl beside a.wav, and reads it."""
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "empty.wav").touch()
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


def deep(levels):
    return '{"audio": "a.wav", "text": "Hi.", "id": ' + "[" * levels + "]" * levels + "}"


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


BAD_ROWS = [
    # The row as a whole.
    ('{"audio": "a.wav", "text": }', "row", "not JSON (Expecting value, column 28)"),
    ("{", "row", "not JSON (Expecting property name"),
    (deep(200_000), "row", "nested too deeply to be read"),
    ('"text"', "row", "must be a JSON object, found 'text'"),
    ("null", "row", "must be a JSON object, found null"),
    ('{"id": 1}', "row", "has neither `messages` (a ChatML row) nor `audio` and `text` (a speech row)"),
    ('{"audio": "a.wav", "text": "Hi.", "text": "Ho."}', "text", "given more than once"),
    (json.dumps(chatml("Hi."))[:-1] + ', "misc": {"speaker": "a", "speaker": "b"}}', "misc.speaker", "given more than"),
    (json.dumps(chatml(CLIP)).replace('"type"', '"offset": 1, "offset": 2, "type"'), f"{AT}.offset", "more than once"),
    ('{"audio": {"path": "b.wav", "path": "a.wav"}, "text": "Hi."}', "audio.path", "given more than once"),
    ('{"audio": "a.wav", "text": "Hi.", "duration": 1e999}', "duration", "must be a finite number"),
    ('{"audio": "a.wav", "text": "Hi.", "duration": 1%s}' % ("0" * 5000), "duration", "must be a finite number"),
    ({**SPEECH, "text": "Hi \ud83d"}, "text", r"half a surrogate pair ('\ud83d')"),
    ({**SPEECH, "audio": "\ud83d.wav"}, "audio", r"half a surrogate pair ('\ud83d')"),
    ({**SPEECH, "speaker": "\ud83d"}, "speaker", r"half a surrogate pair ('\ud83d')"),
    (chatml("Hi.", misc={"speaker": "\ud83d"}), "misc.speaker", r"half a surrogate pair ('\ud83d')"),
    # Unknown fields that would change what is trained; others are only counted.
    ({**SPEECH, "ref_txt": "Hi."}, "ref_txt", "unknown field; did you mean `ref_text`?"),
    ({**SPEECH, "ofset": 1}, "ofset", "unknown field; did you mean `offset`?"),
    (chatml("Hi.", startindex=1), "startindex", "did you mean `start_index`?"),
    (chatml([{**CLIP, "raw_adio": RAW}]), "messages[1].content[0].raw_adio", "did you mean `raw_audio`?"),
    # Speech rows.
    (without(SPEECH, "audio"), "audio", "is missing"),
    ({"audo": "a.wav", "text": "Hi."}, "audio", "is missing; did you mean `audio` by `audo`?"),
    ({"audio": "a.wav", "txet": "Hi."}, "text", "is missing; did you mean `text` by `txet`?"),
    (
        {"mesages": []},
        "row",
        "has neither `messages` (a ChatML row) nor `audio` and `text` (a speech row); did you mean",
    ),
    (
        {"audio": "a.wav", "sentence": "Hi.", "transcript": "Ho."},
        "sentence",
        "which is the text? rename that to `text`",
    ),
    ({"path": "b.wav", "text": "Hi."}, "path", "'b.wav' does not exist"),
    (without(SPEECH, "text"), "text", "is missing"),
    ({**SPEECH, "text": None}, "text", "is missing"),
    ({**SPEECH, "text": " \n"}, "text", "is empty"),
    ({**SPEECH, "text": 7}, "text", "must be text, found 7"),
    ({**SPEECH, "text": "a <|AUDIO|>"}, "text", "holds <|AUDIO|>, which stands for a clip"),
    ({**SPEECH, "scene": "<|AUDIO_OUT|>"}, "scene", "holds <|AUDIO_OUT|>"),
    ({**SPEECH, "speaker": ["x"]}, "speaker", "must be text, found a list"),
    ({**SPEECH, "speaker": True}, "speaker", "must be text, found true"),
    ({**SPEECH, "speaker": 1e16}, "speaker", "must be text, found 1e+16"),  # which of two speakers?
    ({**SPEECH, "duration": "1,0"}, "duration", "must be a number of seconds, found '1,0'"),
    ({**SPEECH, "offset": 1, "duration": 0}, "duration", "must be above 0 seconds, found 0"),
    ({**SPEECH, "offset": 1, "duration": "-1"}, "duration", "must be above 0 seconds, found -1.0"),
    ({**SPEECH, "text": float("nan")}, "text", "is missing"),
    ({**SPEECH, "ref_audio": "a.wav"}, "ref_text", "is missing; it is the transcript of ref_audio"),
    ({**SPEECH, "ref_text": "Hi."}, "ref_audio", "is missing; ref_text is its transcript"),
    ({**SPEECH, "ref_audio": "a.wav", "ref_text": "Hi."}, "ref_audio", "is the clip that is to be spoken"),
    ({**SPEECH, "ref_audio": "./a.wav", "ref_text": "Hi.", "offset": 0}, "ref_audio", "is the clip that is to be"),
    ({**SPEECH, "ref_audio": "a.wav", "ref_text": "Hi.", "offset": 1, "duration": 2}, "ref_audio", "holds the clip"),
    ({"messages": [turn("user", [CLIP]), *chatml(CLIP)["messages"]]}, "messages[0].content[0]", "is the clip that"),
    # Clips.
    ({**SPEECH, "audio": "b.wav"}, "audio", "'b.wav' does not exist; paths are relative to the manifest's folder"),
    ({**SPEECH, "audio": "folder"}, "audio", "'folder' is a directory"),
    ({**SPEECH, "audio": "pipe"}, "audio", "'pipe' is not a regular file"),
    ({**SPEECH, "audio": "empty.wav"}, "audio", "'empty.wav' is empty (0 bytes)"),
    ({**SPEECH, "audio": "a.wav/b"}, "audio", "cannot be read (Not a directory)"),
    ({**SPEECH, "audio": "x" * 5000}, "audio", "x...' cannot be read (File name too long)"),
    ({**SPEECH, "audio": ""}, "audio", "is empty; give the path of an audio file"),
    ({**SPEECH, "audio": "a\0.wav"}, "audio", r"holds a NUL byte: 'a\x00.wav'"),
    ({**SPEECH, "audio": {"array": [0.0]}}, "audio", "found an object without `path` or `bytes`"),
    ({**SPEECH, "audio": {"path": "b.wav", "bytes": None}}, "audio.path", "'b.wav' does not exist"),
    ({**SPEECH, "audio": {"bytes": "a-b="}}, "audio.bytes", "is not base64"),
    ({**SPEECH, "audio": "https://host/a.wav"}, "audio", "nothing is fetched from a manifest"),
    ({**SPEECH, "audio": "data:audio/wav;base64,UklG"}, "audio", "nothing is fetched from a manifest"),
    (chatml({**CLIP, "audio_url": "S3://b/a.wav"}), "messages[1].content.audio_url", "nothing is fetched"),
    (chatml({"type": "audio"}), "messages[1].content.audio_url", "is missing"),
    (chatml(NO_URL), "messages[1].content", "audio_url is 'placeholder' and there is no raw_audio"),
    (
        chatml({**CLIP, "audio_url": "", "raw_audio": ""}),
        "messages[1].content",
        "audio_url is '' and there is no raw_au",
    ),
    (chatml([{**NO_URL, "raw_audio": "a-b="}]), "messages[1].content[0].raw_audio", "is not base64"),
    (chatml([{**NO_URL, "raw_audio": "é"}]), "messages[1].content[0].raw_audio", "is not base64"),
    (chatml([{**NO_URL, "raw_audio": 5}]), "messages[1].content[0].raw_audio", "must be text in base64, found 5"),
    (chatml({**CLIP, "offset": -0.5}), "messages[1].content.offset", "must be 0 or more seconds, found -0.5"),
    (chatml({**CLIP, "offset": 0.1, "duration": 0.0}), f"{AT}.duration", "must be above 0 seconds, found 0.0"),
    (chatml({**CLIP, "audio_url": "b.wav", "raw_audio": "placeholder"}), f"{AT}.audio_url", "'b.wav' does not exist"),
    (chatml({**NO_URL, "raw_audio": "placeholder"}), AT, "audio_url is 'placeholder' and there is no raw_audio"),
    (chatml({**CLIP, "duration": True}), "messages[1].content.duration", "must be a number of seconds, found true"),
    # Messages.
    ({"messages": {}}, "messages", "must be a list of at least one message, found an object"),
    ({"messages": [], "start_index": 1}, "messages", "must be a list of at least one message, found an empty list"),
    ({"messages": ["Hi."]}, "messages[0]", "must be an object with `role` and `content`, found 'Hi.'"),
    ({"messages": [turn("bot", "Hi.")]}, "messages[0].role", "found 'bot'; must be system, user or assistant"),
    ({"messages": [{"content": "Hi."}]}, "messages[0].role", "is missing; must be system, user or assistant"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "is missing"),
    (chatml(""), "messages[1].content", "is empty"),
    (chatml([]), "messages[1].content", "is an empty list"),
    (chatml(["", {"type": "text", "text": " \n"}]), "messages[1].content", "is empty"),
    (chatml({"type": "text", "text": {"type": "text", "text": "Hi."}}), f"{AT}.text", "must be text, found an object"),
    (chatml(["Hi.", 5]), "messages[1].content[1]", "must be text or an object of type text or audio, found 5"),
    (chatml([{"text": "Hi."}]), "messages[1].content[0].type", "is missing; must be text or audio"),
    (chatml({"type": "image"}), "messages[1].content.type", "found 'image'; must be text or audio"),
    (chatml({"type": "text"}), "messages[1].content.text", "is missing"),
    (chatml(["Hi.", "<|AUDIO_OUT|>"]), "messages[1].content[1]", "holds <|AUDIO_OUT|>, which stands for a clip"),
    (
        {"messages": [turn("user", "Hi.", recipient="x"), turn("assistant", "Ho.")]},
        "messages[0].recipient",
        "only an assistant turn has a recipient, this one is user",
    ),
    ({"messages": [turn("assistant", "Hi.", recipient="<|AUDIO|>")]}, "messages[0].recipient", "holds <|AUDIO|>"),
    (chatml("Hi.", misc="x"), "misc", "must be an object, found 'x'"),
    # What is trained.
    ({"messages": [turn("user", "Hi.")]}, "messages", "has no assistant turn, so nothing to train on"),
    (chatml("Hi.", start_index=2), "start_index", "must be 0 to 1 (the index of a message), found 2"),
    (chatml("Hi.", start_index=-1), "start_index", "must be 0 to 1 (the index of a message), found -1"),
    (chatml("Hi.", start_index=True), "start_index", "must be a whole number, found true"),
    (chatml("Hi.", start_index=1.0), "start_index", "must be a whole number, found 1.0"),
    (
        {"messages": [turn("assistant", "Hi."), turn("user", "Ho.")], "start_index": 1},
        "start_index",
        "leaves nothing to train on: the last assistant turn is 0, found 1",
    ),
]


@pytest.mark.parametrize(("row", "field", "words"), BAD_ROWS)
def test_a_fault_names_line_and_field_and_other_rows_survive(manifest, row, field, words):
    rows, faults = manifest([SPEECH, "", row, chatml(CLIP)])
    assert len(faults) == 1
    assert faults[0].startswith(f"m.jsonl:3: {field}: ")
    assert words in faults[0]
    assert faults[0].isprintable() and len(faults[0]) < 300
    assert [row.origin for row in rows] == ["m.jsonl:1", "m.jsonl:4"]


def test_all_faults_are_listed_together_and_sorted(manifest):
    clips = [{**CLIP, "offset": -1, "duration": -2}, {"type": "audio", "audio_url": "http://x/y"}]
    rows, faults = manifest(
        [SPEECH, "{", {"audio": "b.wav", "text": "", "extra": 1}, chatml(clips, start_index="0", misc=1)]
    )
    assert len(rows) == 1
    assert [fault.rsplit(": ", 1)[0] if "fetched" in fault else fault.split(" ")[:2] for fault in faults] == [
        ["m.jsonl:2:", "row:"],
        ["m.jsonl:3:", "audio:"],
        ["m.jsonl:3:", "text:"],
        ["m.jsonl:4:", "messages[1].content[0].duration:"],
        ["m.jsonl:4:", "messages[1].content[0].offset:"],
        "m.jsonl:4: messages[1].content[1].audio_url: nothing is fetched from a manifest",
        ["m.jsonl:4:", "misc:"],
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
        Turn("user", ("One\u2028two.",)),
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
def test_speech_rows_become_the_prompt_that_servers_build(manifest, tmp_path, more, before, start_index, fields):
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


def test_bosons_style_has_no_system_turn_before_a_reference(manifest, tmp_path):
    (tmp_path / "ref.wav").write_bytes(b"RIFF")
    reference = {"ref_audio": "ref.wav", "ref_text": "So."}
    rows = [SPEECH, {**SPEECH, **reference}, {**SPEECH, **reference, "scene": "A quiet room."}]
    served, _ = manifest(rows)
    boson, _ = manifest(rows, prompt_style="boson")
    assert [row.messages[0].role for row in boson] == ["system", "user", "system"]
    assert boson[1].messages == served[1].messages[1:] and (boson[1].start_index, served[1].start_index) == (2, 3)
    assert all(boson[i].messages == served[i].messages for i in (0, 2))
    assert {row.prompt_style for row in boson} == {"boson"}


def test_rows_with_a_scene_are_counted_in_a_line(tmp_path):
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
def test_half_a_reference_is_refused(half):
    with pytest.raises(ValueError, match="ref_text and ref_audio belong together"):
        speech_messages("Hello.", None, **half)


def flac_seconds(path):
    """Length from STREAMINFO (https://www.rfc-editor.org/rfc/rfc9639#section-8.2): 20 bits of rate, 36 of samples."""
    header = path.read_bytes()[:26]
    assert header[:4] == b"fLaC"
    bits = int.from_bytes(header[18:26], "big")
    return (bits & (1 << 36) - 1) / (bits >> 44)


def test_the_shipped_speech():
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
