"""Users' manifests: dumps of upstream's dataclasses, other tools' columns, paths in other folders."""

import base64
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from higgs_ds.data.chatml import AudioRef, Turn
from higgs_ds.data.controls import control_tokens
from higgs_ds.data.manifest import Manifest, read_manifest

RAW = base64.b64encode(b"RIFF").decode()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows to data/m.jsonl beside data/a.wav and returns the path; the working directory is elsewhere."""
    (tmp_path / "data").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "data" / "a.wav").write_bytes(b"RIFF")
    monkeypatch.chdir(tmp_path / "work")

    def write(rows, name="m.jsonl"):
        path = tmp_path / "data" / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def checked(path, **options):
    """Returns (rows, faults as text, notes) of a manifest."""
    manifest = Manifest(path, **options)
    found = [manifest.check(number) for number in range(len(manifest))]
    faults = [*manifest.faults, *(fault for _, faults in found for fault in faults)]
    rows = [row for row, _ in found if row is not None]
    for number, (row, _) in enumerate(found):
        assert row is None or manifest.row(number) == row
    return rows, [str(fault) for fault in faults], manifest.notes()


def dumped(**more):
    """Returns a row as dumped by `dataclasses.asdict` from upstream's ChatMLSample."""
    clip = {"audio_url": "a.wav", "raw_audio": "", "offset": None, "duration": None, "row_id": None, "type": "audio"}
    return {
        "messages": [
            {"role": "system", "content": "", "recipient": None},
            {"role": "user", "content": {"text": "Say it.", "type": "text"}, "recipient": None},
            {
                "role": "assistant",
                "content": [{"text": "Here it is.", "type": "text"}, {**clip, **more}],
                "recipient": None,
            },
        ],
        "start_index": None,
        "misc": {"duration": 3.5},
        "speaker": "anna",
    }


def test_dumps_of_upstreams_dataclasses_are_read(write, tmp_path):
    rows, faults, notes = checked(write([dumped(), dumped(audio_url="placeholder", raw_audio=RAW)]))
    assert faults == notes == []
    clips = [AudioRef(tmp_path / "data" / "a.wav"), AudioRef(raw_audio=RAW)]
    for row, clip in zip(rows, clips, strict=True):
        assert row.messages == (
            Turn("system", ("",)),
            Turn("user", ("Say it.",)),
            Turn("assistant", ("Here it is.", clip)),
        )
        assert (row.speaker, row.start_index) == ("anna", None)
        assert row.target() == ("Say it.", 0) or row.target() == ("Here it is.", 0)


@pytest.mark.parametrize("url", ["", "placeholder", None, "https://host/a.wav", "gone.wav"])
def test_bytes_replace_a_missing_audio_url(write, url):
    [row], faults, _ = checked(write([dumped(audio_url=url, raw_audio=RAW)]))
    assert faults == [] and row.audio_refs[0][1] == AudioRef(raw_audio=RAW)


def test_existing_audio_url_takes_precedence_over_bytes(write, tmp_path):
    [row], faults, _ = checked(write([dumped(raw_audio=RAW)]))
    assert faults == [] and row.audio_refs[0][1] == AudioRef(tmp_path / "data" / "a.wav")


def test_unread_columns_are_reported_once_with_count(write):
    rows = [{"audio": "a.wav", "text": f"{i}", "language": "en", "emotion": 1, "a\nb": i} for i in range(100)]
    rows[3]["speeker"] = "x"
    talk = dumped()
    for turn in talk["messages"]:
        turn["name"] = "x"
    usable, faults, notes = checked(write([*rows, talk]))
    assert len(usable) == 101 and faults == []
    assert [note.split(": ", 1)[1] for note in notes] == [
        r"language, emotion, 'a\nb': not read, in 100 rows",
        "speeker, messages[].name: not read, in 1 row",
    ]


@pytest.mark.parametrize(
    "columns",
    [
        ("audio", "text"),
        ("audio_path", "transcript"),
        ("audio_file", "sentence"),
        ("path", "transcription"),
        ("wav", "normalized_text"),
        ("file", "text"),
        ("audio_filepath", "text"),
        ("Audio", "Transcript"),
    ],
)
def test_other_tools_column_names_are_read(write, tmp_path, columns):
    [row], faults, notes = checked(write([{columns[0]: "a.wav", columns[1]: " Hello.\n", "speaker_id": 7}]))
    assert faults == notes == []
    assert row.messages[1:] == (Turn("user", ("Hello.",)), Turn("assistant", (AudioRef(tmp_path / "data/a.wav"),)))
    assert row.speaker == "7"


def test_field_name_takes_precedence_over_synonyms(write):
    [row], faults, notes = checked(write([{"audio": "a.wav", "text": "Two.", "raw_text": "2", "path": "b.wav"}]))
    assert faults == [] and row.messages[1].content == ("Two.",)
    assert [note.split(": ", 1)[1] for note in notes] == ["raw_text, path: not read, in 1 row"]


def test_reference_under_other_names(write, tmp_path):
    (tmp_path / "data" / "r.wav").write_bytes(b"RIFF")
    row = {"audio": "a.wav", "text": "So.", "reference_audio": "r.wav", "reference_text": "Well. "}
    rows, faults, _ = checked(write([row, {"audio": "a.wav", "text": "So.", "ref_audio": None, "ref_text": ""}]))
    assert faults == [] and [row.start_index for row in rows] == [3, None]
    assert rows[0].messages[1] == Turn("user", ("Well.",))
    assert rows[0].audio_refs[0] == ("reference_audio", AudioRef(tmp_path / "data" / "r.wav"))


def test_hugging_face_audio_objects(write, tmp_path):
    audio = [
        {"path": "a.wav", "bytes": None},
        {"path": "in-some-archive.wav", "bytes": RAW},
        {"path": "a.wav", "sampling_rate": 16000},
    ]
    rows, faults, _ = checked(write([{"audio": value, "text": "Hi."} for value in audio]))
    assert faults == []
    beside = AudioRef(tmp_path / "data" / "a.wav")
    assert [row.audio_refs[0][1] for row in rows] == [beside, AudioRef(raw_audio=RAW), beside]


def test_segment_of_a_recording(write, tmp_path):
    [row], faults, _ = checked(write([{"audio_filepath": "a.wav", "text": "Hi.", "offset": 1.5, "duration": 2}]))
    clip = AudioRef(tmp_path / "data" / "a.wav", None, 1.5, 2.0)
    assert faults == [] and row.audio_refs[0][1] == clip and row.stated_sec == 2.0


def test_duration_cuts_a_chatml_clip_only_with_an_offset(write, tmp_path):
    """Upstream's training files state the whole clip's length; its engine cuts nothing."""
    rows, faults, _ = checked(write([dumped(duration=6.3146), dumped(duration=2.0, offset=1.5), dumped()]))
    assert faults == []
    path = tmp_path / "data" / "a.wav"
    assert [row.audio_refs[0][1] for row in rows] == [AudioRef(path), AudioRef(path, None, 1.5, 2.0), AudioRef(path)]
    assert [row.stated_sec for row in rows] == [6.3146, 2.0, None]


def test_stated_length_of_a_context_clip_is_not_the_target_clips(write):
    talk = dumped()
    clip = talk["messages"][2]["content"][1]
    talk["messages"].insert(2, {"role": "user", "content": {**clip, "audio_url": "b.wav", "duration": 5.0}})
    path = write([talk])
    (path.parent / "b.wav").write_bytes(b"RIFF")
    [row], faults, _ = checked(path)
    assert faults == [] and row.stated_sec is None and row.audio_refs[0][1].duration_sec is None


def test_paths_are_found_beside_the_manifest_or_elsewhere_with_one_note(write, tmp_path, monkeypatch):
    for folder, name in [("work", "w.wav"), ("root", "r.wav"), ("home", "h.wav"), ("work", "a.wav")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(b"RIFF")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = ["a.wav", "w.wav", "w.wav", "r.wav", "~/h.wav"]
    path = write([{"audio": name, "text": "Hi."} for name in names])
    rows, faults, notes = checked(path, audio_root=tmp_path / "root")
    assert faults == []
    folders = [row.audio_refs[0][1].path.parent.name for row in rows]
    assert folders == ["data", "work", "work", "root", "home"]
    assert notes == [
        f"{path}: 2 paths found in {tmp_path / 'work'}, not in the manifest's own folder",
        f"{path}: 1 path found in {tmp_path / 'root'}, not in the manifest's own folder",
    ]


CONTROLS = ["<|eot_id|>", "<|audio_out_bos|>", "<|start_header_id|>", "<|recipient|>", "<|AUDIO|>", "<|end_of_text|>"]


@pytest.mark.parametrize("token", CONTROLS)
def test_control_token_in_a_transcript_is_a_fault(write, tokenizer, token):
    rows = [
        {"audio": "a.wav", "text": f"So.{token}"},
        {"audio": "a.wav", "text": "So.", "ref_audio": "b.wav", "ref_text": token},
        {"audio": "a.wav", "text": "So.", "scene": f"a {token}"},
        {"messages": [{"role": "user", "content": f"{token} Say."}, {"role": "assistant", "content": "Hi."}]},
        {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": f"Hi.{token}"}]},
    ]
    path = write(rows)
    (path.parent / "b.wav").write_bytes(b"RIFF")
    for controls in ({}, {"controls": control_tokens(tokenizer)}):
        usable, faults = read_manifest(path, **controls)
        assert usable == [] and len(faults) == len(rows)
        assert all(f"contains {token}, which" in str(fault) for fault in faults)


def test_sound_tags_and_scene_markup_are_allowed(write, tokenizer):
    scene = "Generate audio.\n<|scene_desc_start|>\nSPEAKER0: deep\n<|scene_desc_end|>"
    texts = ["<SE>[Laughter]</SE> So.", "[SPEAKER0] a < b | c", "[laugh] <SE_s>[Music]<SE_e>"]
    talk = [
        {"role": "system", "content": scene},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<SE>", "</SE>", "<SE_s>", "<SE_e>", "<|odd|>"]})
    controls = control_tokens(tokenizer)
    path = write([*({"audio": "a.wav", "text": text} for text in texts), {"messages": talk}])
    assert read_manifest(path)[1] == read_manifest(path, controls=controls)[1] == []
    path = write([{"audio": "a.wav", "text": "<|odd|>"}, {"audio": "a.wav", "text": scene}])
    assert [fault.line for fault in read_manifest(path, controls=controls)[1]] == [1, 2]


FOREIGN = {
    "ljspeech": ("metadata.csv", "LJ001|Printing, in 1500|Printing, in fifteen hundred\nLJ002|Being.|Being.\n"),
    "train-higgs-audio": (
        "metadata.json",
        json.dumps({"dataset_info": {}, "samples": [{"audio_file": "a"}]}, indent=1),
    ),
    "ms-swift": ("s.jsonl", json.dumps({"messages": [{"role": "user", "content": "<audio>"}], "audios": ["a"]}) + "\n"),
    "audiofolder": ("metadata.jsonl", json.dumps({"file_name": "a.wav", "transcription": "So."}) + "\n"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_tools_files_are_refused_with_the_import_command(tmp_path, kind):
    path = tmp_path / FOREIGN[kind][0]
    path.write_text(FOREIGN[kind][1])
    rows, [fault] = read_manifest(path)
    assert rows == []
    assert f"python -m higgs_ds import --from {kind} {path} --output DIR" in fault.problem
    _, [of_folder] = read_manifest(tmp_path)
    assert f"to convert a corpus: `python -m higgs_ds import {tmp_path} --output DIR`" in of_folder.problem


def test_checked_rows_keep_their_paths(write, tmp_path):
    """Each rank checks a part of the rows and later reads all of them."""
    (tmp_path / "work" / "w.wav").write_bytes(b"RIFF")
    path = write([{"audio": name, "text": "Hi."} for name in ("a.wav", "w.wav")])
    first, second = Manifest(path), Manifest(path)
    one, two = first.check(0)[0], second.check(1)[0]
    seen = [first.seen(), second.seen()]
    for manifest in (first, second):
        manifest.set_seen(seen)
        assert [manifest.row(0), manifest.row(1)] == [one, two]
        assert len(manifest.notes()) == 1 and "1 path found in" in manifest.notes()[0]
    shutil.rmtree(tmp_path / "work")
    os.chdir(tmp_path)
    assert first.row(1).audio_refs[0][1].path == Path(tmp_path / "data" / "w.wav")


def test_generate_checks_texts_like_a_manifest(tiny_dir, tmp_path, capsys):
    from higgs_ds.tools.cli import main

    words = ["generate", "--base_ckpt", str(tiny_dir), "--codec", "none", "--output_file", str(tmp_path / "x.wav")]
    for more, problem in (
        (["--text", "So.<|eot_id|>"], "--text: contains <|eot_id|>, which is a control token of the tokenizer"),
        (["--text", " "], "--text: is empty"),
        (["--text", "So.", "--scene", "<|AUDIO|>"], "--scene: contains <|AUDIO|>"),
        (["--text", "So. " * 100, "--max_row_tokens", "400"], "--text: the prompt takes 4"),
    ):
        assert main([*words, *more]) == 2
        assert problem in capsys.readouterr().err


NAN = float("nan")
NOTHING = [  # values of a missing field in a speech row
    *({name: value} for name in ("scene", "speaker", "offset", "duration") for value in ("", " ", None, NAN)),
    *({"ref_audio": value, "ref_text": value} for value in ("", None, NAN)),
    *({"duration": value} for value in (0, -1, "-1", 0.0)),
    {"offset": 0.0, "duration": 0.0},
    {"offset": "0", "duration": ""},
    {"offset": 0},
]


@pytest.mark.parametrize("more", NOTHING)
def test_empty_values_count_as_missing(write, more):
    rows, faults, notes = checked(write([{"audio": "a.wav", "text": "Hi.", **more}, {"audio": "a.wav", "text": "Hi."}]))
    assert faults == notes == [] and rows[0] == dataclasses.replace(rows[1], line=1)


def test_numbers_from_tables(write):
    values = [{"speaker": 7, "duration": "1.5"}, {"speaker": 7.0, "offset": "1", "duration": " 0.5"}, {"speaker": 7.5}]
    rows, faults, _ = checked(write([{"audio": "a.wav", "text": "Hi.", **more} for more in values]))
    assert faults == [] and [row.speaker for row in rows] == ["7", "7", "7.5"]
    assert [row.stated_sec for row in rows] == [1.5, 0.5, None]
    spans = [(row.audio_refs[0][1].offset_sec, row.audio_refs[0][1].duration_sec) for row in rows]
    assert spans == [(None, None), (1.0, 0.5), (None, None)]


def test_table_without_nulls_gives_each_item_every_field(write, tmp_path):
    """Arrow's conversions write zeros and empty texts for missing values."""
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
    clip = AudioRef(tmp_path / "data/a.wav")
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
    clip = AudioRef(tmp_path / "data/a.wav")
    assert faults == [] and row.messages[0].content == tuple(clip if piece == "CLIP" else piece for piece in pieces)


@pytest.mark.parametrize("content", ["", "  ", [], None, [""], {"type": "text", "text": " "}, [" ", ""]])
def test_system_turn_may_be_empty(write, content):
    talk = [{"role": "system", "content": content}, {"role": "assistant", "content": "Hi."}]
    [row], faults, _ = checked(write([{"messages": talk}]))
    assert faults == [] and row.messages[0] == Turn("system", ("",))


def test_values_of_unread_columns_are_ignored(write):
    """pandas writes NaN for a missing value."""
    talk = dumped() | {"emotion": NAN, "misc": {"x": NAN}}
    talk["messages"][0]["note"] = {"a": [NAN]}
    rows, faults, notes = checked(write([{"audio": "a.wav", "text": "Hi.", "id": NAN, "emotion": NAN}, talk]))
    assert len(rows) == 2 and faults == []
    assert [note.split(": ", 1)[1] for note in notes] == [
        "emotion: not read, in 2 rows",
        "messages[].note: not read, in 1 row",
    ]
