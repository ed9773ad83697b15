"""A voice by its speaker's name: the reference clip from a manifest."""

import json

import pytest

from higgs_ds.data.manifest import read_manifest
from higgs_ds.tools.cli import main
from tests.conftest import SPEECH


@pytest.fixture
def manifest(tmp_path):
    rows = [json.loads(line) for line in SPEECH.read_text().splitlines()][:7]
    for row, name in zip(rows, ["anna", "anna", "anna", "bert", "bert", 7, None], strict=True):
        row |= {"audio": str(SPEECH.parent / row["audio"]), "speaker": name, "style": "calm", "instruction": "Hush."}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "m.jsonl"


def test_generate_speaks_with_a_clip_of_the_speaker(manifest, tiny_dir, codec_dir, tmp_path, capsys):
    rows = read_manifest(manifest)[0][:3]
    middle = sorted(rows, key=lambda row: len(row.target()[0]))[1]
    clip, text = str(middle.audio_refs[0][1].path), middle.target()[0]
    common = ["generate", "--base_ckpt", str(tiny_dir), "--codec", str(codec_dir), "--text", "Hello.", "--seed", "1"]
    common += ["--max_new_tokens", "24", "--output_file"]
    assert main([*common, str(tmp_path / "a.wav"), "--speaker", "anna", "--train_manifest", str(manifest)]) == 0
    assert f"reference clip of anna: {clip}" in capsys.readouterr().out
    assert main([*common, str(tmp_path / "b.wav"), "--ref_audio", clip, "--ref_text", text]) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--speaker", "zoe"], "it has 7, anna, bert"),
        (["--speaker", "anna", "--ref_audio", "x.wav", "--ref_text", "x"], "they replace --ref_audio"),
        ([], "one requires the other"),
    ],
)
def test_an_unknown_speaker_is_reported_before_anything_is_loaded(manifest, flags, said, capsys):
    argv = ["generate", "--text", "Hello.", "--output_file", "x.wav", "--train_manifest", str(manifest), *flags]
    assert main(argv) == 2 and said in "".join(capsys.readouterr())


def test_style_and_instruction_are_reported_as_ignored(manifest):
    from higgs_ds.data.manifest import Manifest

    read = Manifest(manifest)
    assert all(read.check(i)[1] == [] for i in range(len(read)))
    assert read.notes() == [f"{manifest}: style, instruction: not read, in 7 rows"]
