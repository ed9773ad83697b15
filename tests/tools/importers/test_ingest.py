"""Imports of users' files, written as by their tools; the result is read as a manifest."""

import csv
import json
import shlex

import numpy as np
import pyloudnorm
import pytest
import soundfile

from higgs_ds.data.chatml import AudioRef, Turn
from higgs_ds.data.manifest import read_manifest
from higgs_ds.tools.cli import main
from higgs_ds.tools.importers.ingest import split, text_keys

TEXTS = ["One.", "Two, three.", "Four five six.", "Seven.", "Eight, nine.", "Ten."]


@pytest.fixture
def corpus(tmp_path):
    """Six clips in `corpus/wavs`, named a0 to b5, by two speakers."""
    folder = tmp_path / "corpus"
    (folder / "wavs").mkdir(parents=True)
    for i in range(6):
        write_clip(folder / "wavs" / f"{'aabbbb'[i]}{i}.wav", i)
    return folder


def write_clip(path, seed, sample_rate=16000):
    clip = np.random.default_rng(seed).normal(0, 0.02, 2 * sample_rate)
    clip[: sample_rate // 2] = clip[-sample_rate // 2 :] = 0
    soundfile.write(path, clip, sample_rate)


def names(folder):
    return sorted(path.stem for path in (folder / "wavs").iterdir())


def imported(capsys, path, output, *flags):
    """Runs `python -m higgs_ds import`; returns (training rows, validation rows, output)."""
    assert main(["import", str(path), "--output", str(output), *flags]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    sides = []
    for name in ("train.jsonl", "val.jsonl"):
        rows, faults = read_manifest(output / name) if (output / name).exists() else ([], [])
        assert faults == []
        sides.append(rows)
    return *sides, said


def texts_of(rows):
    return [row.messages[-2].content[0] for row in rows]


def ljspeech(columns):
    def write(folder):
        lines = []
        for name, text in zip(names(folder), TEXTS, strict=True):
            parts = {2: [name, text], 3: [name, f"{text} etc.", text], "speaker": [name, name[0], text]}[columns]
            lines.append("|".join(parts))
        lines.append("gone|Not there." if columns == 2 else "gone|Not|there.")
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")

    return write


def train_higgs_audio(folder):
    samples = []
    for name, text in zip(names(folder), TEXTS, strict=True):
        (folder / f"{name}.txt").write_text(f"{text}\n")
        sample = {"id": name, "audio_file": f"wavs/{name}.wav", "transcript_file": f"{name}.txt", "speaker_id": name[0]}
        samples.append(sample | {"scene": "quiet_room", "emotion": "neutral", "duration": 2.0})
    samples[0] |= {"ref_audio_file": "wavs/a1.wav", "ref_transcript_file": "a1.txt"}
    info = {"total_samples": 6, "speakers": ["a", "b"]}
    (folder / "metadata.json").write_text(json.dumps({"dataset_info": info, "samples": samples}, indent=2))


def ms_swift(folder):
    rows = []
    for i, (name, text) in enumerate(zip(names(folder), TEXTS, strict=True)):
        pair = ["<audio> /transcribe", text] if i % 2 else [text, "<audio>"]
        messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant"), pair, strict=True)]
        rows.append({"messages": messages, "audios": [f"{folder}/wavs/{name}.wav"]})
    (folder / "swift.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "swift.jsonl"


def audiofolder_csv(folder):
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription", "speaker_id"])
        writer.writerows([f"wavs/{n}.wav", text, n[0]] for n, text in zip(names(folder), TEXTS, strict=True))


def audiofolder_jsonl(folder):
    rows = [{"file_name": f"{n}.wav", "text": text} for n, text in zip(names(folder), TEXTS, strict=True)]
    (folder / "wavs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def plain_folder(folder):
    for name, text in zip(names(folder), TEXTS, strict=True):
        (folder / name[0]).mkdir(exist_ok=True)
        (folder / "wavs" / f"{name}.wav").rename(folder / name[0] / f"{name}.wav")
        (folder / name[0] / f"{name}.txt").write_text(text)


FORMATS = [
    ("ljspeech", ljspeech(2), False),
    ("ljspeech", ljspeech(3), False),
    ("ljspeech", ljspeech("speaker"), True),
    ("train-higgs-audio", train_higgs_audio, True),
    ("ms-swift", ms_swift, False),
    ("audiofolder", audiofolder_csv, True),
    ("audiofolder", audiofolder_jsonl, False),
    ("folder", plain_folder, True),
]


@pytest.mark.parametrize("guessed", [True, False])
@pytest.mark.parametrize(("kind", "write", "with_speaker"), FORMATS)
def test_every_format_becomes_a_manifest(corpus, tmp_path, capsys, kind, write, with_speaker, guessed):
    path = write(corpus) or corpus
    flags = [] if guessed else ["--from", kind]
    train, val, said = imported(capsys, path, tmp_path / "out", "--val_share", "0", *flags)
    assert texts_of(train) == TEXTS and val == []
    assert f"{path}: read as {kind}" in said and f"{tmp_path}/out/train.jsonl: 6 rows" in said
    assert [row.audio_refs[-1][1].path.stem for row in train] == ["a0", "a1", "b2", "b3", "b4", "b5"]
    assert all(row.audio_refs[-1][1].path.is_relative_to(corpus) for row in train)
    assert [row.speaker for row in train] == (["a", "a", "b", "b", "b", "b"] if with_speaker else [None] * 6)
    if write.__qualname__.startswith("ljspeech"):
        assert "left out: 1 × clips that do not exist, e.g. " in said and "metadata.csv:7" in said
    if kind == "train-higgs-audio":
        assert train[0].messages[1:3] == (
            Turn("user", ("Two, three.",)),
            Turn("assistant", (train[1].audio_refs[0][1],)),
        )
        assert "quiet room" in train[0].messages[0].content[0]


@pytest.mark.parametrize(("kind", "write", "_"), FORMATS[:-1])
def test_training_refuses_the_format_with_the_import_command(corpus, tmp_path, capsys, kind, write, _):
    path = write(corpus) or next(p for p in corpus.rglob("metadata.*"))
    _, [fault] = read_manifest(path)
    command = fault.problem[fault.problem.index("python -m higgs_ds ") :].replace("DIR", str(tmp_path / "out"))
    assert main(shlex.split(command)[3:]) == 0
    assert len(read_manifest(tmp_path / "out" / "train.jsonl")[0]) == 5


def test_conversation_with_several_clips_stays_one(corpus, tmp_path, capsys):
    talk = [("system", "You speak."), ("user", "Hello <audio> there."), ("assistant", "<audio>"), ("user", "So?")]
    messages = [{"role": role, "content": content} for role, content in [*talk, ("assistant", "Well: <audio>")]]
    audios = [f"wavs/{name}.wav" for name in names(corpus)[:3]]
    (corpus / "s.jsonl").write_text(json.dumps({"messages": messages, "audios": audios}))
    [row], _, _ = imported(capsys, corpus / "s.jsonl", tmp_path / "out")
    clips = [AudioRef(corpus / audio) for audio in audios]
    assert row.messages == (
        Turn("system", ("You speak.",)),
        Turn("user", ("Hello", clips[0], "there.")),
        Turn("assistant", (clips[1],)),
        Turn("user", ("So?",)),
        Turn("assistant", ("Well:", clips[2])),
    )


def test_no_text_is_on_both_sides_and_the_split_is_seeded(corpus, tmp_path, capsys):
    rows = [f"{names(corpus)[i % 6]}|{'Same TEXT' if i % 2 else 'same text!'} {i // 4}" for i in range(200)]
    (corpus / "metadata.csv").write_text("\n".join(rows))
    sides = [
        imported(capsys, corpus, tmp_path / f"{i}", "--val_share", "0.1", "--seed", seed)
        for i, seed in enumerate("112")
    ]
    for train, val, _ in sides:
        assert len(train) + len(val) == 200 and 16 <= len(val) <= 20
        plain = [{t.lower().replace("!", "") for t in texts_of(side)} for side in (train, val)]
        assert not plain[0] & plain[1]
    assert texts_of(sides[0][1]) == texts_of(sides[1][1]) != texts_of(sides[2][1])


def said(user, clip, answer=""):
    """A ChatML row with a clip as the answer to a user's words."""
    content = [{"type": "audio", "audio_url": clip}, *([{"type": "text", "text": answer}] if answer else [])]
    user = [{"type": "text", "text": user}] if isinstance(user, str) else user
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": content}]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": "Hello there."}, {"text": "hello  there"}),
        ({"text": "caf\u00e9"}, {"text": "cafe\u0301"}),
        ({"text": "[laugh] Hi"}, {"text": "<SE>[Music]</SE> hi!"}),
        ({"text": "So."}, said("So", "a.wav")),
        (said("Say it.", "a.wav", "So."), said("Now you.", "b.wav", "so")),
    ],
)
def test_equal_texts_in_other_spelling_are_on_one_side(one, other):
    assert len(set(text_keys([one, other]))) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": "की"}, {"text": "का"}),
        ({"text": "มี"}, {"text": "มา"}),
        ({"text": "[laugh]"}, {"text": "[sigh]"}),
        ({"text": "😀"}, {"text": "😁"}),
        (said("Say it.", "a.wav", "So."), said("Say it.", "b.wav", "Well.")),
        tuple(said([{"type": "audio", "audio_url": q}, {"type": "text", "text": "Go on."}], "a.wav") for q in "qr"),
    ],
)
def test_different_words_are_different_texts(one, other):
    assert len(set(text_keys([one, other]))) == 2


def test_shared_prompt_is_not_a_spoken_text():
    rows = [said("Tell me something.", f"{i}.wav") for i in range(20)]
    train, val, notes = split(rows, val_share=0.2, val_speakers=None, seed=0)
    assert len(train) == 16 and len(val) == 4 and notes == []
    same = [{"audio": f"{i}.wav", "text": "The same."} for i in range(20)]
    train, val, notes = split(same, val_share=0.2, val_speakers=None, seed=0)
    assert len(train) == 20 and val == [] and notes[0].startswith("no validation rows: ")


def test_split_by_speaker(corpus, tmp_path, capsys):
    ljspeech("speaker")(corpus)
    with (corpus / "metadata.csv").open("a") as file:
        file.write("\na0|a|Ten.")  # b has this text too
    train, val, said = imported(capsys, corpus, tmp_path / "1", "--val_speakers", "a")
    assert {row.speaker for row in train} == {"b"} and texts_of(val) == TEXTS[:2]
    assert "left out of validation: 1 row with a text that is also trained on" in said
    train, val, _ = imported(capsys, corpus, tmp_path / "2", "--val_speakers", "1")
    assert len({row.speaker for row in val}) == 1 and not {r.speaker for r in val} & {r.speaker for r in train}
    for named, words in (("c", "c: not found; the speakers are a, b"), ("2", "no rows left to train on")):
        assert main(["import", str(corpus), "--output", str(tmp_path / "3"), "--val_speakers", named]) == 2
        assert f"--val_speakers: {words}" in capsys.readouterr().err


def test_new_clips_are_trimmed_resampled_and_equally_loud(corpus, tmp_path, capsys):
    ljspeech(2)(corpus)
    before = {path: path.read_bytes() for path in corpus.rglob("*.wav")}
    flags = ("--val_share", "0", "--trim", "--loudness", "-20", "--resample", "24000")
    train, _, _ = imported(capsys, corpus, tmp_path / "out", *flags)
    assert {path: path.read_bytes() for path in corpus.rglob("*.wav")} == before
    for row in train:
        clip = row.audio_refs[0][1].path
        assert clip.parent == tmp_path / "out" / "clips"
        waveform, sample_rate = soundfile.read(clip)
        assert sample_rate == 24000 and len(waveform) / sample_rate == pytest.approx(1.2, abs=0.06)
        assert pyloudnorm.Meter(sample_rate).integrated_loudness(waveform) == pytest.approx(-20, abs=0.5)
    assert len(train) == 6


def test_new_clip_is_the_slice_of_its_row(corpus, tmp_path, capsys):
    lines = ["file_name,text,offset,duration", "a0.wav,One.,0.5,0.25", "a0.wav,Two.,1.0,0.5", "a1.wav,Three.,,2.0"]
    (corpus / "wavs" / "metadata.csv").write_text("\n".join(lines))
    flags = ("--val_share", "0", "--resample", "24000")
    rows, _, _ = imported(capsys, corpus, tmp_path / "1", *flags)
    assert [soundfile.info(row.audio_refs[0][1].path).frames for row in rows] == [6000, 12000, 48000]
    assert all(row.audio_refs[0][1].offset_sec is None for row in rows)
    assert [row.stated_sec for row in rows] == [0.25, 0.5, 2.0]
    rows, _, _ = imported(capsys, corpus, tmp_path / "2", *flags, "--trim")
    assert [row.stated_sec for row in rows] == [None] * 3
    rows, _, _ = imported(capsys, corpus, tmp_path / "3", "--val_share", "0")
    assert [row.audio_refs[0][1].offset_sec for row in rows] == [0.5, 1.0, None]


def test_unreadable_clip_is_left_out_and_reported(corpus, tmp_path, capsys):
    ljspeech(2)(corpus)
    (corpus / "wavs" / "a1.wav").write_bytes(b"no audio")
    train, _, said = imported(capsys, corpus, tmp_path / "out", "--val_share", "0", "--trim")
    assert len(train) == 5 and "1 × clips that cannot be used, e.g. " in said and "a1.wav: cannot be decoded" in said


def test_only_line_breaks_end_a_line(corpus, tmp_path, capsys):
    texts = ["One\u2028or two.", "Two\x0bor three.", "A\x1cb.", "C\x85d.", "Five.", "Six."]
    lines = [f"{name}|{text}" for name, text in zip(names(corpus), texts, strict=True)]
    (corpus / "metadata.csv").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    train, _, said = imported(capsys, corpus, tmp_path / "out", "--val_share", "0")
    assert texts_of(train) == [" ".join(text.split()) for text in texts] and "left out" not in said


def test_unreadable_texts_and_names_are_left_out(corpus, tmp_path, capsys):
    for name, text in zip(names(corpus), TEXTS, strict=True):
        (corpus / "wavs" / f"{name}.txt").write_text(text)
    (corpus / "wavs" / "a1.txt").write_bytes("Über".encode("latin-1"))
    train, _, said = imported(capsys, corpus / "wavs", tmp_path / "1", "--val_share", "0")
    assert len(train) == 5 and "1 × rows whose text file is not UTF-8, e.g. " in said and "a1.txt" in said
    samples = [{"audio_file": f"wavs/{n}.wav", "transcript_file": f"wavs/{n}.txt"} for n in sorted({*names(corpus)})]
    (corpus / "metadata.json").write_text(json.dumps({"samples": samples}))
    train, _, said = imported(capsys, corpus, tmp_path / "2", "--val_share", "0")
    assert len(train) == 5 and "not UTF-8" in said


def test_clips_of_one_name_get_numbers_and_unknown_speakers_write_nothing(tmp_path, capsys):
    for speaker in ("a", "b", "c"):
        (tmp_path / "in" / speaker).mkdir(parents=True)
        for name in ("x", "x-2"):
            write_clip(tmp_path / "in" / speaker / f"{name}.wav", len(name))
            (tmp_path / "in" / speaker / f"{name}.txt").write_text(f"{speaker} {name}")
    flags = ["import", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--resample", "24000"]
    assert main([*flags, "--val_speakers", "nobody"]) == 2 and not (tmp_path / "out" / "clips").exists()
    capsys.readouterr()
    assert main([*flags, "--val_share", "0"]) == 0
    clips = sorted(path.name for path in (tmp_path / "out" / "clips").iterdir())
    assert clips == ["x-2-2.wav", "x-2-3.wav", "x-2.wav", "x-3.wav", "x-4.wav", "x.wav"]


def test_import_error_is_one_message(corpus, tmp_path, capsys):
    ljspeech(2)(corpus)
    (tmp_path / "x.json").write_text(json.dumps({"a": [1, 2]}, indent=1))
    (tmp_path / "half.csv").write_text("gone|a\ngone2|b\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("")
    for path, output, flags, words in (
        (tmp_path / "none", "o", [], "not found"),
        (tmp_path / "x.json", "o", [], "x.json: unknown format"),
        (
            tmp_path / "x.json",
            "o",
            ["--from", "train-higgs-audio"],
            "x.json: cannot be read as train-higgs-audio's metadata.json",
        ),
        (tmp_path / "half.csv", "o", [], "no rows left, read as ljspeech"),
        (corpus, "out", [], "out already has train.jsonl"),
    ):
        assert main(["import", str(path), "--output", str(tmp_path / output), *flags]) == 2
        assert words in capsys.readouterr().err
