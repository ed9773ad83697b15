"""Snippets in the README.md of adapters and merged checkpoints, run as printed, from another folder."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
import soundfile
import torch

from higgs_ds.codec.load import load_codec
from higgs_ds.data.manifest import AudioRef, Row, speech_messages
from higgs_ds.options.sections import BASE_NAMES, DEFAULT_BASE_REVISION, DEFAULT_CODEC, DEFAULT_CODEC_REVISION
from higgs_ds.report.cards import adapter_card, merged_card, pinned, prompt_details
from higgs_ds.tools.cli import main
from tests.support.ranks import assert_all


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.S)


@pytest.fixture(scope="module")
def trained(tiny_dir, codec_dir, flags_of, forks, tmp_path_factory):
    """The run's folder after one step."""
    folder = tmp_path_factory.mktemp("run")
    assert_all(forks.run(flags_of(folder, max_steps=1), 1))
    return folder


def run(command: str) -> int:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "higgs_ds"]
    return main(words[3:])


def test_an_adapters_card_runs_as_printed(trained, tiny_dir, codec_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (trained / "adapter/README.md").read_text()
    assert f"| base | `{tiny_dir}` |" in readme and "| rows with a reference clip | 0 of 32 rows |" in readme
    assert "| rows with a system turn | 32 of 32 rows |" in readme and "| prompt style | served |" in readme
    (python,) = blocks(readme, "python")
    names = {}
    exec(python, names)
    assert type(names["model"]).__name__ == "HiggsAudioModel"
    generate, merge = blocks(readme, "bash")
    assert run(generate.strip() + " --max_new_tokens 40") in (0, 1)  # 1 if the barely trained voice is silent
    assert "--sampler served" in readme and "Prompts:" not in readme
    assert run(merge) == 0
    merged = (trained / "adapter-merged/README.md").read_text()
    assert "LoRA rank / alpha | 8 / " in merged and f"base | `{tiny_dir}`" in merged
    assert "| prompt style | served |" in merged and "| rows with a reference clip | 0 of 32 rows |" in merged
    record = (trained / "adapter/higgs_ds.json").read_text()
    assert json.loads(record)["prompt_style"] == "served"
    assert (trained / "adapter-merged/higgs_ds.json").read_text() == record


def test_a_merged_folders_card_speaks_in_boson_multimodal(trained, tiny_dir, codec_dir, tmp_path, monkeypatch):
    """Runs the printed lines on upstream's engine; the sample codec replaces the audio tokenizer on the hub."""
    from boson_multimodal.serve import serve_engine

    monkeypatch.chdir(tmp_path)
    flags = ["--base_ckpt", str(tiny_dir), "--adapter", str(trained / "adapter"), "--layout", "boson"]
    assert main(["merge", *flags, "--output_dir", "voice"]) == 0
    card = (tmp_path / "voice/README.md").read_text()
    (python,), (speak,) = blocks(card, "python"), blocks(card, "bash")
    assert "| prompt style | served |" in card and "--sampler boson" in card
    # The sample codec, here too.
    speak = speak.replace(DEFAULT_CODEC, str(codec_dir)).strip()
    assert f"--merged {tmp_path / 'voice'}" in speak and run(f"{speak} --max_new_tokens 40") in (0, 1)
    codec, asked = load_codec(str(codec_dir)), []

    class Tokenizer:
        tps, sampling_rate = codec.frame_rate, codec.sample_rate

        def decode(self, codes):
            return codec.decode(np.minimum(codes[0].numpy(), codec.codebook_size - 1))[None, None]

    def snapshot_download(name, **settings):
        asked.append((name, settings))
        return "there"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    def load(where, **_):
        asked.append(where)
        return Tokenizer()

    monkeypatch.setattr(serve_engine, "load_higgs_audio_tokenizer", load)
    torch.manual_seed(0)
    exec(python.replace("max_new_tokens=1024", "max_new_tokens=40"), {})
    assert asked == [(DEFAULT_CODEC, {"revision": DEFAULT_CODEC_REVISION}), "there"]
    waveform, rate = soundfile.read(tmp_path / "speech.wav")
    assert rate == codec.sample_rate and len(waveform) > 0


def test_a_base_is_named_by_absolute_path_or_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert pinned("base", "x") == (str(tmp_path / "base"), None)
    for name in BASE_NAMES:
        assert pinned(name, None) == (name, DEFAULT_BASE_REVISION) and pinned(name, "c") == (name, "c")
    assert pinned("a/b", None) == ("a/b", None) and pinned("a/b", "c") == ("a/b", "c")
    names = {"base": "a/b", "revision": "c", "layout": "transformers", "folder": tmp_path / "it's"}
    names |= {"codec": "d/e", "codec_revision": None}
    card = merged_card({"share": 0.5}, **names)
    serve, speak = blocks(card, "bash")
    assert shlex.split(speak)[4:8] == ["--merged", str(tmp_path / "it's"), "--codec", "d/e"]
    assert shlex.split(serve) == ["vllm", "serve", str(tmp_path / "it's"), "--omni"]
    assert "`a/b` at revision `c`" in card and "| share | 0.5000 |" in card
    compile(*blocks(card, "python"), "card", "exec")
    assert "Prompts: built as in" in merged_card({"prompt style": "boson"}, **names)


def test_a_small_loss_is_not_printed_as_zero(tmp_path):
    losses = {"training text_loss": 4.114e-07, "training audio_loss": 0.03998, "validation loss": 0.0}
    card = adapter_card(
        losses, base="b", revision=None, layout="boson", codec="c", codec_revision=None, folder=tmp_path
    )
    assert "| training text_loss | 4.11e-07 |" in card and "| training audio_loss | 0.0400 |" in card
    assert "| validation loss | 0.0000 |" in card  # exactly 0


def test_every_command_names_the_codec_and_its_revision(tmp_path, codec_dir):
    names = {"base": "a/b", "revision": "c", "layout": "boson", "folder": tmp_path / "v", "codec_revision": "f"}
    codec = ["--codec", "d/e", "--codec_revision", "f"]
    generate, merge = (shlex.split(one) for one in blocks(adapter_card({}, **names, codec="d/e"), "bash"))
    assert generate[10:14] == codec and merge[10:14] == codec, (generate, merge)
    card = merged_card({}, **names, codec="d/e")
    (speak,) = blocks(card, "bash")
    assert shlex.split(speak)[6:10] == codec and "snapshot_download('d/e', revision='f')" in card
    # A folder has no revision; no server loads the sample codec.
    generate, merge = blocks(adapter_card({}, **names, codec=str(codec_dir)), "bash")
    assert f"--codec {codec_dir} --text" in generate and "--codec" not in merge
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    (renamed / "config.json").write_text('{"model_type": "higgs_audio_v2_tokenizer"}')
    generate, merge = blocks(adapter_card({}, **names, codec=str(renamed)), "bash")
    assert f"--codec {renamed} --output_dir" in merge


def test_prompts_are_counted():
    clip = AudioRef(None, "x", None, None)
    plain, start = speech_messages("a", clip)
    scene, _ = speech_messages("a", clip, scene="A kitchen.")
    cloned, _ = speech_messages("a", clip, ref_text="b", ref_audio=clip, prompt_style="boson")
    rows = [Row(messages, start, None, "m", 1) for messages in (plain, scene, cloned)]
    assert prompt_details(rows) == {
        "rows with a reference clip": "1 of 3 rows",
        "rows with a scene": "1 of 3 rows",
        "rows with a system turn": "2 of 3 rows",
    }
    assert prompt_details(rows * 500)["rows with a scene"] == "333 of the first 1000 rows"
