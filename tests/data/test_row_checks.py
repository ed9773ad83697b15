"""Rows that would silently train something wrong: fields that select part of a clip, unspoken texts, other files."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from higgs_ds.data.chatml import AudioRef
from higgs_ds.data.manifest import Manifest

SPEECH = Path(__file__).parents[2] / "examples/speech/audio"
CLIPS = sorted(SPEECH.glob("*.flac"))
SAID = "Followed by the pound key."
ROW = {"audio": "0.flac", "text": SAID}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Writes rows beside clips 0.flac … 3.flac; returns (rows, faults, notes, findings over all texts)."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        shutil.copy(CLIPS[i], tmp_path / f"{i}.flac")

    def check(rows, **options):
        path = tmp_path / "m.jsonl"
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        manifest = Manifest(path, **options)
        found = [manifest.check(number) for number in range(len(manifest))]
        faults = [*manifest.faults, *(fault for _, faults in found for fault in faults)]
        whole, warnings = manifest.of_texts()
        usable = [row for row, _ in found if row is not None]
        assert all(manifest.row(number) == row for number, (row, _) in enumerate(found) if row is not None)
        said = [str(fault).split(": ", 1)[1] for fault in (*whole, *warnings)]
        return usable, [str(fault).split(": ", 1)[1] for fault in faults], manifest.notes(), said

    return check


@pytest.mark.parametrize(
    ("fields", "offset", "duration"),
    [
        ({"start": 0.0, "end": 1.5}, 0.0, 1.5),
        ({"start": "0.5", "end": "1.5", "duration": 1.0}, 0.5, 1.0),
        ({"begin_time": 0.5, "end_time": 1.5}, 0.5, 1.0),
        ({"start_sec": 0.5, "end_sec": 1.5}, 0.5, 1.0),
        ({"startTime": 0.5, "endTime": 1.5}, 0.5, 1.0),
        ({"segment_start": 0.5, "segment_end": 1.5}, 0.5, 1.0),
        ({"start_ms": 500, "end_ms": 1500}, 0.5, 1.0),
        ({"offset_ms": 500, "duration_ms": 1000}, 0.5, 1.0),
        ({"start": 0.5}, 0.5, None),
        ({"end": 1.5}, 0.0, 1.5),
        ({"start": 0, "end": 0}, None, None),
        ({"start": None, "end": None, "duration": 1.5}, None, None),
    ],
)
def test_slice_fields_are_read_under_any_known_name(check, fields, offset, duration):
    [row], faults, notes, _ = check([ROW | fields])
    assert faults == notes == []
    [(_, ref)] = row.audio_refs
    assert (ref.offset_sec, ref.duration_sec) == (offset, duration)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"start": 1.5, "end": 0.5}, "end: must be after the start"),
        ({"start": "0:01.5"}, "start: must be a valid number"),
        ({"start": 1, "begin_time": 1}, "which one is the offset?"),
        ({"offset": 1, "start": 1}, "which one is the offset?"),
        ({"start_sample": 16000}, "start_sample: is not in seconds"),
        ({"end_frame": 16000}, "end_frame: is not in seconds"),
        ({"ref_start": 1.0}, "ref_start: a reference cannot be cut"),
        ({"timestamp": [0.5, 1.5]}, "timestamp: may cut the clip"),
        ({"tmin": 0.5}, "tmin: may cut the clip"),
        ({"frame_offset": 8000}, "frame_offset: may cut the clip"),
        ({"start": 500, "unit": "ms"}, "unit: is not supported; slices are in seconds"),
        ({"side": "left"}, "side: may choose a channel; give `channel`"),
        ({"is_test": True}, "is_test: excludes the row from training"),
        ({"fold": "test"}, "fold: excludes the row from training"),
        ({"channel": "left"}, "channel: must be a valid integer"),
        ({"channel_selector": [0, 1]}, "channel_selector: must be a valid integer"),
        ({"text": "0.txt"}, "text: '0.txt' is the path of an existing file"),
        ({"text": "\u200b\u200b"}, "text: contains no letter or digit"),
        ({"text": "\ufeff"}, "text: contains no letter or digit"),
        ({"text": "\u3164 ... !"}, "text: contains no letter or digit"),
        ({"text": "1\n00:00:00,000 --> 00:00:01,520\nHi."}, "text: contains times or data (SRT or VTT)"),
        ({"text": "[00:00.000 --> 00:01.520] Hi."}, "text: contains times or data (times in brackets)"),
    ],
)
def test_field_that_would_train_something_wrong_is_a_fault(check, tmp_path, fields, problem):
    (tmp_path / "0.txt").write_text(SAID)
    rows, [fault], _, _ = check([ROW | fields], trains=True)
    assert rows == [] and problem in fault


@pytest.mark.parametrize("fields", [{"channel": 1}, {"channel_selector": [1]}, {"channel": 1.0}, {"ch": 1}])
def test_channel_of_the_row_overrides_the_flag(check, fields):
    rows, faults, notes, _ = check([ROW | fields, ROW], channel=0)
    assert faults == notes == []
    assert [row.audio_refs[0][1].channel for row in rows] == [1, 0]


def test_clips_of_conversations_are_checked_alike(check):
    clip = {"type": "audio", "audio_url": "0.flac", "offset": 0.5, "end": 1.5, "channel": 0, "audio_track": 1}
    talk = {"messages": [{"role": "user", "content": SAID}, {"role": "assistant", "content": clip}]}
    [row], faults, _, _ = check([talk])
    assert faults == []
    assert row.audio_refs[0][1] == AudioRef(Path.cwd() / "0.flac", None, 0.5, 1.0, channel=0, audio_track=1)
    clip["start"] = clip.pop("end")
    assert "cuts a clip" in check([talk])[1][0]
    assert "cuts a clip" in check([talk | {"end": 1.5}])[1][0]
    del clip["start"]
    for more, problem in (
        ({"subset": "test"}, "subset: is 'test'"),
        (
            {"messages": [{"role": "assistant", "content": "No.", "loss": False}, *talk["messages"]]},
            "messages[0].loss: ",
        ),
    ):
        assert problem in check([talk | more], trains=True)[1][0]
    talk["messages"][0]["content"] = "0.flac"
    assert "is the path of an existing file" in check([talk])[1][0]
    talk["messages"][0]["content"] = "One\ntwo\u2028three."
    [row], _, [note], _ = check([talk])
    assert row.messages[0].content == ("One two three.",) and "1 text is normalised to NFC" in note


@pytest.mark.parametrize(
    ("split", "trains", "is_fault"),
    [("test", True, True), ("dev-clean", True, True), ("validation", True, True), ("train", False, True)]
    + [("train-other", True, False), ("test", False, False), ("XL", True, False), ("test", None, False)],
)
def test_rows_of_another_split_are_faults(check, split, trains, is_fault):
    rows, faults, _, _ = check([ROW | {"split": split}], trains=trains)
    assert (len(faults), len(rows)) == (is_fault, not is_fault)
    assert all(fault.startswith(f"split: is '{split}'") for fault in faults)


@pytest.mark.parametrize("opening", ["Speaker 0: ", "tara: ", "<en> "])
def test_common_opening_is_one_warning(check, opening):
    texts = ["Followed by the key.", "You are now muted.", "To leave it.", "That is full."]
    labelled = [ROW | {"text": f"Speaker {i % 2}: {text}"} for i, text in enumerate(texts)]
    assert "4 of 4 texts begin with" in check(labelled)[3][0]
    *_, said = check([{"audio": f"{i}.flac", "text": f"{opening}{text}"} for i, text in enumerate(texts)])
    [line] = [line for line in said if "begin with" in line]
    assert f"4 of 4 texts begin with {opening!r}" in line
    assert check([ROW | {"text": text} for text in texts])[3] == check(25 * [ROW])[3] == []


def test_unspoken_content_is_one_warning_per_kind_and_lost_letters_in_most_rows_are_a_fault(check):
    rows = [ROW | {"text": f"R&amp;D {i}<br>"} for i in range(3)] + [ROW | {"text": "caf\ufffd"}, ROW]
    usable, faults, _, said = check(rows)
    assert len(usable) == 5 and faults == []
    assert [line.split(", ")[0] for line in said] == ["text: 3 rows with markup or entities", "text: 1 row with U+FFFD"]
    *_, (whole, *_) = check([ROW | {"text": "caf\ufffd"}, ROW | {"text": "\ufffdber"}, ROW])
    assert "2 of 3 texts contain U+FFFD" in whole and "UTF-8" in whole


def test_normalised_texts_are_one_note(check):
    text = "Xin chào các bạn."
    rows, faults, notes, _ = check(
        [ROW | {"text": unicodedata.normalize("NFD", text)}, ROW | {"text": "Xin\u00a0chào\ncác bạn."}]
    )
    assert faults == [] and {row.messages[-2].content for row in rows} == {(text,)}
    [note] = notes
    assert "2 texts are normalised to NFC" in note


def test_file_names_are_found_composed_or_decomposed(check, tmp_path):
    names = ["été/ü.flac", "Việt.flac"]
    for name, form in zip(names, ("NFD", "NFC"), strict=True):
        path = tmp_path / unicodedata.normalize(form, name)
        path.parent.mkdir(exist_ok=True)
        shutil.copy(CLIPS[0], path)
    rows, faults, notes, _ = check(
        [ROW | {"audio": unicodedata.normalize(f, n)} for n in names for f in ("NFC", "NFD")]
    )
    assert len(rows) == 4 and faults == notes == []
    assert all(row.audio_refs[0][1].path.is_file() for row in rows)


def test_audio_root_takes_precedence(check, tmp_path):
    (tmp_path / "clean").mkdir()
    shutil.copy(CLIPS[3], tmp_path / "clean/0.flac")
    rows, _, [note], _ = check([ROW, ROW | {"audio": "1.flac"}], audio_root=tmp_path / "clean")
    assert [row.audio_refs[0][1].path.parent.name for row in rows] == ["clean", tmp_path.name]
    assert f"1 path found in {tmp_path / 'clean'}" in note
    (tmp_path / "clean/0.flac").unlink()
    assert "no clip found under --audio_root" in check([ROW], audio_root=tmp_path / "clean")[2][0]


LINE = json.dumps(ROW)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n", "is a Git LFS pointer"),
        (f"{LINE},\n{LINE},\n", "has a comma after each line"),
        (f"{ROW}\n{ROW}\n", "contains Python objects (from str())"),
        (f"{json.dumps(ROW, indent=1)}\n{json.dumps(ROW, indent=1)}\n", "has objects that span several lines"),
        (f"{LINE}{LINE}\n", "has several objects on one line"),
        (json.dumps({"train": [ROW], "validation": [ROW]}), "is one object with lists of rows (`train`, `validation`)"),
        (json.dumps({"utt0": {"wav": "0.flac", "words": "Hi."}}), "is one object that maps ids to rows (`utt0`)"),
        (json.dumps({"audio_codes": [[1]], "text": SAID}), "codes (`audio_codes`) are not read"),
        ("<!DOCTYPE html><html></html>", "is a web page"),
    ],
)
def test_unusable_file_is_one_specific_fault(check, content, problem):
    rows, [fault], _, _ = check(content)
    assert rows == [] and problem in fault


def test_sampling_rate_of_the_row_must_match_the_clip(check, tmp_path):
    from higgs_ds.data.audio import AudioError, duration_sec

    rate = soundfile.info(tmp_path / "0.flac").samplerate
    rows, faults, notes, _ = check([ROW | {"sampling_rate": rate}, ROW | {"sample_rate": 2 * rate}])
    assert faults == notes == []
    assert duration_sec(rows[0].audio_refs[0][1]) > 1
    with pytest.raises(AudioError, match=f"{rate} Hz, but the row says {2 * rate}"):
        duration_sec(rows[1].audio_refs[0][1])


def test_git_lfs_pointer_is_named(tmp_path):
    from higgs_ds.data.audio import AudioError, read_audio

    (tmp_path / "c.flac").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n")
    with pytest.raises(AudioError, match="Git LFS pointer"):
        read_audio(AudioRef(tmp_path / "c.flac"))
    assert np.size(read_audio(AudioRef(CLIPS[0]))[0]) and os.path.getsize(tmp_path / "c.flac") < 200
