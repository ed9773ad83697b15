"""Corpora in their own layouts, by the real lhotse and datasets: the same rows as from a manifest of the clips."""

import csv
import gzip
import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import soundfile

from higgs_ds.codec.sample import SampleCodec
from higgs_ds.data.audio import read_audio
from higgs_ds.data.manifest import read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.tools.cli import main
from higgs_ds.tools.importers.formats import read_foreign
from tests.conftest import SPEECH

CLIPS = [json.loads(line) for line in SPEECH.read_text().splitlines()[:3]]
SPEAKERS = {"p225": 0, "p226": 1, "p227": 2}  # one clip each; the last is in the test part


def write_clip(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples, rate = soundfile.read(SPEECH.parent / CLIPS[number]["audio"], dtype="int16")
    soundfile.write(path, samples, rate)
    return path


def text(number):
    return CLIPS[number]["text"]


def libritts(root):
    (root / "SPEAKERS.txt").write_text(";ID | SEX | SUBSET\n84 | F | dev-clean | 8 | x\n")
    for number, part in enumerate(("train-clean-100", "dev-clean", "test-clean")):
        speaker = str(84 + number)
        name, folder = f"{speaker}_12_000007_00000{number}", root / part / speaker / "12"
        write_clip(folder / f"{name}.wav", number)
        for kind in ("original", "normalized"):
            (folder / f"{name}.{kind}.txt").write_text(text(number))
        (folder / f"{speaker}_12.trans.tsv").write_text(f"{name}\t{text(number)}\t{text(number)}\n")
        (folder / f"{speaker}_12.book.tsv").write_text(f"{name}\t{text(number)}\t{text(number)}\t0\t12.5\n")
    return "lhotse:libritts", ["84", "85"], 1


def vctk(root):
    (root / "speaker-info.txt").write_text(
        "ID AGE GENDER ACCENTS REGION\n" + "".join(f"{s} 23 F E x\n" for s in SPEAKERS)
    )
    for speaker, number in SPEAKERS.items():
        for mic in ("mic1", "mic2"):
            write_clip(root / "wav48_silence_trimmed" / speaker / f"{speaker}_001_{mic}.flac", number)
        (root / "txt" / speaker).mkdir(parents=True)
        (root / "txt" / speaker / f"{speaker}_001.txt").write_text(text(number))
    return "lhotse:vctk", [*SPEAKERS], 0


def aishell3(root):
    (root / "spk-info.txt").write_text("# x\nSSB0005\tB\tfemale\tnorth\nSSB0009\tB\tfemale\tnorth\n")
    for number, (part, speaker) in enumerate((("train", "SSB0005"), ("test", "SSB0009"))):
        name = f"{speaker}000{number}.wav"
        write_clip(root / part / "wav" / speaker / name, number)
        (root / part / "content.txt").write_text(f"{name}\t" + " ".join(f"{c} yi1" for c in "广州女大学生") + "\n")
    (root / "train" / "label_train-set.txt").write_text("# x\n# y\n")
    return "lhotse:aishell3", ["SSB0005"], 0


def kaldi(root):
    names = [f"{speaker}-u{number}" for speaker, number in SPEAKERS.items()]
    clips = [write_clip(root / "audio" / f"{number}.wav", number) for number in range(3)]
    for file, values in (
        ("wav.scp", [f"audio/{clip.name}" for clip in clips]),
        ("text", map(text, range(3))),
        ("utt2spk", SPEAKERS),
    ):
        (root / file).write_text("".join(f"{n} {value}\n" for n, value in zip(names, values, strict=True)))
    return None, [*SPEAKERS], 0


def commonvoice(root):
    header = "client_id path sentence up_votes age gender accents variant locale segment".split()
    for number, part in enumerate(("train", "dev", "test")):
        write_clip(root / "en" / "clips" / f"common_{number}.wav", number)
        with (root / "en" / f"{part}.tsv").open("w") as file:
            file.write("\t".join(header) + "\n")
            values = [f"c{number}", f"common_{number}.wav", text(number), "2", "", "", "", "", "en", ""]
            file.write("\t".join(values) + "\n")
    return "lhotse:commonvoice", ["c0", "c1"], 1


def lhotse_cuts(root):
    from lhotse import CutSet, Recording, SupervisionSegment

    for (speaker, number), part in zip(SPEAKERS.items(), ("train", "dev", "test"), strict=True):
        recording = Recording.from_file(write_clip(root / "audio" / f"{speaker}.wav", number))
        segment = SupervisionSegment(speaker, speaker, 0.0, recording.duration, text=text(number), speaker=speaker)
        segment.custom = {"snr": 12.5}
        cut = recording.to_cut()
        cut.supervisions = [segment]
        CutSet.from_cuts([cut]).to_file(root / f"mine_cuts_{part}.jsonl.gz")
    return None, ["p225", "p226"], 1


def saved(root, *, parquet=False):
    datasets = pytest.importorskip("datasets")
    parts = {}
    for (speaker, number), part in zip(SPEAKERS.items(), ("train", "validation", "test"), strict=True):
        clip = write_clip(root.parent / f"{speaker}.wav", number)
        rows = {"audio": [{"bytes": clip.read_bytes(), "path": clip.name}], "text": [text(number)], "speaker": [number]}
        rows |= {"begin_time": [100.0], "end_time": [101.5]}  # in the recording from which the clip was cut
        data = datasets.Dataset.from_dict(rows).cast_column("speaker", datasets.ClassLabel(names=[*SPEAKERS]))
        parts[part] = data.cast_column("audio", datasets.Audio())
        if parquet:
            parts[part].to_parquet(root / "data" / f"{part}-00000-of-00001.parquet")
    if not parquet:
        datasets.DatasetDict(parts).save_to_disk(root)
    return None, ["p225", "p226"], 1


def as_parquet(root):
    return saved(root, parquet=True)


@pytest.mark.parametrize("write", [libritts, vctk, aishell3, commonvoice, kaldi, lhotse_cuts, saved, as_parquet])
def test_corpus_gives_the_same_rows_as_a_manifest_of_its_clips(tmp_path, capsys, codec_dir, write):
    source, speakers, val = write(tmp_path / "corpus") if (tmp_path / "corpus").mkdir() is None else None
    flags = [*(["--from", source] if source else []), *([] if val else ["--val_share", "0"])]
    code = main(["import", str(tmp_path / "corpus"), "--output", str(tmp_path / "out"), *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    sides = [tmp_path / "out" / f"{side}.jsonl" for side in ("train", "val")]
    rows = [row for side in sides if side.exists() for row in read_manifest(side)[0]]
    assert [row.speaker for row in rows] == speakers
    assert ("in neither file" in said.out) == (len(speakers) == 2 or write is aishell3) and sides[1].exists() == bool(
        val
    )
    codec = SampleCodec.load(codec_dir)
    for number, row in enumerate(rows):
        spoken = "广州女大学生" if write is aishell3 else text(number)
        [(_, clip)] = row.audio_refs
        assert row.messages[-2].content == (spoken,) and clip.offset_sec is None
        given = soundfile.read(SPEECH.parent / CLIPS[number]["audio"], dtype="float32")
        assert (codec.encode(*read_audio(clip)) == codec.encode(*given)).all()


def test_lhotse_slices_channels_commands_and_urls(tmp_path):
    from lhotse import Recording

    recording = Recording.from_file(write_clip(tmp_path / "a.wav", 0)).to_dict()
    both = recording["sources"][0] | {"channels": [0, 1]}
    made = {
        "stereo": [both],
        "run": [{"type": "command", "channels": [0], "source": f"touch {tmp_path}/ran"}],
        "fetched": [{"type": "url", "channels": [0], "source": "http://127.0.0.1:9/a.wav"}],
    }
    recordings = [recording, *({**recording, "id": name, "sources": of} for name, of in made.items())]
    recordings[1]["channel_ids"] = [0, 1]
    segment = {
        "id": "s",
        "recording_id": "a",
        "start": 0.25,
        "duration": 0.5,
        "channel": 0,
        "text": "Hi.",
        "speaker": "x",
    }
    segments = [segment, *({**segment, "recording_id": name, "channel": 1 if name == "stereo" else 0} for name in made)]
    segments.append({**segment, "duration": 99.0})
    with gzip.open(tmp_path / "x_recordings_all.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, recordings)))
    lines = [*map(json.dumps, segments), '{"id": 5}', "no JSON"]
    (tmp_path / "x_supervisions_all.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    kind, found = read_foreign(tmp_path / "x_supervisions_all.jsonl.gz", None)
    row = {"audio": f"{tmp_path}/a.wav", "text": "Hi.", "speaker": "x", "offset": 0.25, "duration": 0.5}
    assert kind == "lhotse" and found.rows == [row, row | {"channel": 1}]
    assert [*found.left_out.values()] == [1, 1, 1, 2] and not (tmp_path / "ran").exists()
    ran, fetched, *_ = found.left_out
    assert "never run" in ran and "never fetched" in fetched


def test_kaldi_segments_are_read_and_commands_refused(tmp_path):
    kaldi(tmp_path)
    (tmp_path / "segments").write_text("p225-u0 p225-u0 0.25 0.5\np226-u1 p226-u1 0.5 -1\np227-u2 gone 0 1\n")
    _, found = read_foreign(tmp_path, None)
    first = {"audio": f"{tmp_path}/audio/0.wav", "text": text(0), "speaker": "p225", "offset": 0.25, "duration": 0.25}
    assert found.rows[0] == first and found.rows[1]["offset"] == 0.5 and "duration" not in found.rows[1]
    assert found.left_out == {"rows without a clip": 1}
    (tmp_path / "wav.scp").write_text(f"p225-u0 touch {tmp_path}/ran |\n")
    with pytest.raises(ConfigError, match=r"wav.scp:1: p225-u0 is 'touch .* \|'"):
        read_foreign(tmp_path, None)
    assert not (tmp_path / "ran").exists()


def in_a_pool(*job):
    """As in Common Voice's recipe, in a separate process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(*job).result()


def test_recipe_cannot_run_programs_or_access_the_network(tmp_path, monkeypatch):
    import subprocess
    import urllib.request

    import lhotse.recipes

    for job in (
        lambda corpus_dir: subprocess.run(["touch", f"{tmp_path}/ran"]),
        lambda corpus_dir: urllib.request.urlopen("http://127.0.0.1:9/x"),
        lambda corpus_dir: in_a_pool(subprocess.run, ["touch", f"{tmp_path}/ran"]),
    ):
        job.__name__ = "prepare_libritts"
        monkeypatch.setattr(lhotse.recipes, "prepare_libritts", job)
        with pytest.raises(ConfigError, match="PermissionError|tried to run a program|only local files"):
            read_foreign(tmp_path, "lhotse:libritts")
    assert not (tmp_path / "ran").exists()
    subprocess.run(["touch", f"{tmp_path}/ran"], check=True)  # allowed outside the sandbox
    with pytest.raises(ConfigError, match="recipe not found.*libritts"):
        read_foreign(tmp_path, "lhotse:librits")


@pytest.mark.parametrize(("name", "source"), [("lhotse", "lhotse:vctk"), ("datasets", "datasets")])
def test_missing_library_is_named_with_its_requirements(tmp_path, monkeypatch, name, source):
    kaldi(tmp_path)
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name}.* is required .*requirements-import.txt"):
        read_foreign(tmp_path, source)


@pytest.mark.parametrize("with_test", [False, True])
@pytest.mark.parametrize("kind", ["folders", "column"])
def test_corpus_keeps_its_own_split(tmp_path, capsys, kind, with_test):
    parts = ("train", "train", "test", "validation")
    rows = []
    for number, part in enumerate(parts):
        clip = tmp_path / "in" / (part if kind == "folders" else "") / f"{number}.wav"
        write_clip(clip, 0)
        rows.append([f"{clip.relative_to(tmp_path / 'in')}", f"Text {number}.", part][: 2 if kind == "folders" else 3])
    with (tmp_path / "in" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text", "split"][: len(rows[0])], *rows])
    flags = ["--with_test"] if with_test else []
    assert main(["import", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--val_share", "0.5", *flags]) == 0
    said = capsys.readouterr().out
    sides = [read_manifest(tmp_path / "out" / f"{side}.jsonl")[0] for side in ("train", "val")]
    assert [[row.messages[-2].content[0][5] for row in side] for side in sides] == [["0", "1", *"2" * with_test], ["3"]]
    assert "test: 1 row, " in said and ("in neither file" in said) != with_test and "--val_share: not used" in said
    assert "split" not in (tmp_path / "out" / "val.jsonl").read_text()


@pytest.mark.parametrize("folders", ["", "flac:ogg"])
def test_clip_in_two_formats_is_one_row(tmp_path, folders):
    of_format = dict(zip(("flac", "ogg"), folders.split(":") if folders else ("", ""), strict=True))
    for suffix, folder in of_format.items():
        write_clip(tmp_path / folder / f"0.{suffix}", 0)
        shutil.copy(tmp_path / folder / f"0.{suffix}", tmp_path / folder / f"1.{suffix}")
        for number in range(2):
            (tmp_path / folder / f"{number}.txt").write_text(f"Text {number}.")
    _, found = read_foreign(tmp_path, None)
    assert [row["audio"][-6:] for row in found.rows] == ["0.flac", "1.flac"]
    assert found.left_out == {"clips also present in a better format": 2}


def test_text_that_names_a_file_is_read_from_it(tmp_path):
    write_clip(tmp_path / "a.wav", 0)
    (tmp_path / "a.txt").write_text("0.0\t1.5\tHello there.\n")
    (tmp_path / "m.csv").write_text("file_name,text\na.wav,a.txt\na.wav,gone.txt\na.wav,a.wav\na.wav,Hi.\n")
    _, found = read_foreign(tmp_path / "m.csv", None)
    assert [row["text"] for row in found.rows] == ["Hello there.", "Hi."]
    assert [*found.left_out.values()] == [1, 1] and found.forms == {"times and labels": 1}
