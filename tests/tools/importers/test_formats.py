"""train-higgs-audio's samples and folders of clips with texts, in their usual forms."""

import json
import os

import pytest

from higgs_ds.data.chatml import SYSTEM_PROMPT, AudioRef, Turn
from higgs_ds.data.manifest import read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.tools.importers.formats import read_foreign


def samples(folder, value):
    (folder / "metadata.json").write_text(json.dumps(value, indent=1))
    return read_foreign(folder / "metadata.json", "train-higgs-audio")[1]


def sample(**more):
    return {"id": "a", "audio_file": "a.wav", "transcript_file": "a.txt", **more}


SPEAKERS = [
    {"speaker_tag": "[SPEAKER0]", "ref_audio_file": "b.wav", "ref_transcript": "I am b."},
    {"ref_audio_file": "c.wav", "ref_transcript_file": "c.txt"},
]


@pytest.mark.parametrize("scene", [None, "quiet_room"])
def test_reference_speakers_become_turns_before_the_trained_one(clips, scene):
    text = "[SPEAKER0] So.\n[SPEAKER1] Well."
    found = samples(clips, {"samples": [sample(transcript=text, ref_speakers=SPEAKERS, scene=scene, speaker_id="x")]})
    assert found.left_out == {} and not found.columns
    (clips / "m.jsonl").write_text("\n".join(map(json.dumps, found.rows)))
    [row], faults = read_manifest(clips / "m.jsonl")
    assert faults == [] and row.start_index == 5 and row.speaker == "x"
    scene = f"{SYSTEM_PROMPT}\n\n<|scene_desc_start|>\nquiet room\n<|scene_desc_end|>" if scene else SYSTEM_PROMPT
    said = ["[SPEAKER0] I am b.", "[SPEAKER1] Text c.", "[SPEAKER0] So. [SPEAKER1] Well."]
    turns = [
        [Turn("user", (text,)), Turn("assistant", (AudioRef(clips / f"{name}.wav"),))]
        for text, name in zip(said, "bca", strict=True)
    ]
    assert row.messages == (Turn("system", (scene,)), *turns[0], *turns[1], *turns[2])


@pytest.mark.parametrize(
    ("speakers", "reason"),
    [
        (
            [*SPEAKERS, {"ref_transcript": "No clip."}],
            "rows with `ref_speakers` where a clip or transcript is missing",
        ),
        ([{"ref_audio_file": "b.wav"}], "rows with `ref_speakers` where a clip or transcript is missing"),
        ("b.wav", "rows with `ref_speakers` where a clip or transcript is missing"),
        ([{"ref_audio_file": "gone.wav", "ref_transcript": "So."}], "clips that do not exist"),
    ],
)
def test_row_with_a_missing_reference_speaker_is_left_out(clips, speakers, reason):
    found = samples(clips, {"samples": [sample(ref_speakers=speakers), sample()]})
    assert len(found.rows) == 1 and dict(found.left_out) == {reason: 1}


def test_lengths_and_references_are_kept_and_other_columns_reported(clips):
    row = sample(duration=2.5, emotion="neutral", language="en", ref_audio_file="b.wav", ref_transcript_file="b.txt")
    own = sample(ref_audio_file="a.wav", ref_transcript_file="a.txt", emotion="")
    found = samples(clips, {"samples": [row, own]})
    speech = {"audio": f"{clips}/a.wav", "text": "Text a."}
    assert found.rows == [{**speech, "ref_audio": f"{clips}/b.wav", "ref_text": "Text b.", "duration": 2.5}, speech]
    assert found.lines(clips) == [
        f"{clips}: emotion, language: not read, in 1 row",
        "left out: 1 × references that are the row's own clip (their rows are kept), e.g. "
        f"{clips}/metadata.json: samples[1]",
    ]


def test_samples_as_a_list_and_one_per_line(clips):
    text = {"audio": f"{clips}/a.wav", "text": "Text a."}
    assert samples(clips, [sample(), 5]).rows == [text]
    assert read_foreign(clips, None)[0] == "train-higgs-audio"
    (clips / "metadata.json").write_text(f"{json.dumps(sample())}\nno JSON\n{json.dumps(sample())}")
    kind, found = read_foreign(clips, None)
    assert (
        kind == "train-higgs-audio" and found.rows == [text, text] and found.left_out == {"lines that are not JSON": 1}
    )
    (clips / "metadata.json").write_text(json.dumps(sample()))
    assert read_foreign(clips, None)[1].rows == [text]
    for value in ("x", 5, {"samples": 5}, {"a": []}, None):
        with pytest.raises(ConfigError, match="it has no list `samples`"):
            samples(clips, value)


def folder(tmp_path, *names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "words" if path.stem[0].isdigit() else path.stem  # an id alone is not a text
        path.write_bytes(b"RIFF" if path.suffix.lower() in (".wav", ".flac") else text.encode())
    kind, found = read_foreign(tmp_path, None)
    assert kind == "folder"
    return [(row["audio"].removeprefix(f"{tmp_path}/"), row["text"], row.get("speaker")) for row in found.rows]


def test_texts_with_other_suffixes(tmp_path):
    names = "a.wav a.normalized.txt a.original.txt b.WAV b.TXT c.flac c.Lab d.wav d.original.txt d.txt .e.wav .e.txt"
    names += " f.original.wav f.original.txt g.wav g.original.txt"
    assert folder(tmp_path, *names.split(), ".cache/f.wav", ".cache/f.txt") == [
        ("a.wav", "a.normalized", None),
        ("b.WAV", "b", None),
        ("c.flac", "c", None),
        ("d.wav", "d", None),
        ("f.original.wav", "f.original", None),
        ("g.wav", "g.original", None),
    ]


@pytest.mark.parametrize(
    ("clips", "speakers"),
    [
        ("train-clean-100/84/121/84-121-0 dev-clean/85/1/85-1-0 dev-clean/84/2/84_2_0", "84 85 84"),
        ("84/121/84_121_0 85/121/85_121_0", "84 85"),
        ("wav48/p225/c wav48/p226/c", "p225 p226"),
        ("train/c dev/c", "- -"),
        ("anna/c bert/train/c", "anna bert"),
        ("anna/wavs/c anna/happy/c", "- -"),
        ("anna/x/c anna/y/c", "x y"),  # may split one speaker, but never merges two
        ("en/anna/c en/bob/c de_DE/female/carla/c", "carla anna bob"),
        ("s1/anna/c s1/bob/c s2/anna/c", "s1/anna bob s2/anna"),
        ("book/anna/c diary/bob/c", "anna bob"),
        ("en/c de/c", "- -"),
    ],
)
def test_folder_is_a_speaker_if_it_distinguishes_clips(tmp_path, clips, speakers):
    rows = folder(tmp_path, *(f"{clip}{suffix}" for clip in clips.split() for suffix in (".wav", ".txt")))
    assert [speaker or "-" for *_, speaker in rows] == speakers.split()


def test_file_name_that_is_not_utf8_is_left_out(tmp_path):
    for name in (b"\xff\xe9.wav", b"\xff\xe9.txt", b"b.wav", b"b.txt"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(b"Text.")
    _, found = read_foreign(tmp_path, None)
    assert [row["audio"] for row in found.rows] == [f"{tmp_path}/b.wav"]
    [line] = found.lines(tmp_path)
    assert line == f"left out: 1 × clips whose file name is not UTF-8, e.g. {tmp_path}/\\udcff\\udce9.wav"
