"""`generate` and `reproduce`: errors before anything is loaded, outputs, and stop rules."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile

from higgs_ds.codec.load import load_codec
from higgs_ds.data.chatml import speech_messages
from higgs_ds.model.higgs_v2 import speaker as speaking
from higgs_ds.model.higgs_v2 import stop_rules
from higgs_ds.model.higgs_v2.checkpoint import open_base
from higgs_ds.model.higgs_v2.speaker import Speaker
from higgs_ds.model.higgs_v3 import speaker as v3_speaker
from higgs_ds.model.speech import Sampling
from higgs_ds.options.sections import BASE_NAMES
from higgs_ds.tools import reproduce, speak_flags
from tests.conftest import SPEECH
from tests.model.files.test_adapter_file import write_adapter

CLIP = SPEECH.parent / json.loads(SPEECH.read_text().splitlines()[0])["audio"]


@pytest.fixture(scope="module")
def voice(tiny_dir, codec_dir):
    return ["--base_ckpt", str(tiny_dir), "--codec", str(codec_dir)]


def test_the_parsers_names_are_those_of_the_models():
    assert tuple(speaking.SAMPLERS) == tuple(v3_speaker.SAMPLERS) == speak_flags.SAMPLERS
    assert tuple(dict.fromkeys((*stop_rules.STOP_RULES, *v3_speaker.STOP_RULES))) == reproduce.STOP_RULES


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ref_audio", str(CLIP), "--ref_text", ""], "--ref_text: is empty"),
        (["--text", " "], "--text: is empty"),
        (["--text", "a <|eot_id|> b"], "--text: contains <|eot_id|>"),
        (["--scene", "<|scene_desc_end|>"], "--scene: contains <|scene_desc_end|>"),
        (["--max_row_tokens", "120", "--ref_audio", str(CLIP), "--ref_text", "x"], "--text: the prompt takes 1"),
        (["--max_new_tokens", "1000000"], "--max_new_tokens: 1000000 exceeds the model's"),
        (["--output_file", "a.aac"], "--output_file: a.aac must end in .wav"),
        (["--output_file", "missing/a.wav"], "--output_file: missing/a.wav cannot be written"),
        (["--output_file", "there.wav"], "--output_file: there.wav exists; add --overwrite"),
        (["--ref_audio", "there.wav", "--ref_text", "x"], "--ref_audio: there.wav: "),
        (["--merged", "nowhere"], "--merged: contains base and adapter; omit --base_ckpt"),
        (["--adapter", "boson", "--prompt_style", "served"], "--prompt_style: served"),
    ],
)
def test_wrong_input_is_reported_on_one_line_before_anything_is_loaded(
    flags, words, voice, said, tmp_path, monkeypatch, nothing_loads
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.wav").write_bytes(b"kept")
    (tmp_path / "boson").mkdir()
    (tmp_path / "boson/higgs_ds.json").write_text('{"prompt_style": "boson"}')
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    flags = [word for flag in ({"--text": "Hello.", "--output_file": "a.wav"} | given).items() for word in flag]
    code, lines = said("generate", *voice, *flags)
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
    assert (tmp_path / "there.wav").read_bytes() == b"kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boson", "there.wav"]


def test_weights_are_downloaded_last_and_never_by_export(said, codec_dir, tiny_dir, tiny_config, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        assert {"LICENSE*", "NOTICE*"} < set(allow_patterns)
        return str(tiny_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "a").mkdir()
    adapter = write_adapter(tmp_path / "a", tiny_config, revision="one")
    flags = ["--base_ckpt", "b/ase", "--adapter", adapter, "--codec", codec_dir, "--output_file", tmp_path / "a.wav"]
    assert said("generate", *flags, "--text", "a <|eot_id|>")[0] == 2
    assert said("generate", *flags, "--text", "Hello.", "--max_new_tokens", 10)[0] == 0
    assert asked == [("b/ase", "one", False), ("b/ase", "one", False), ("b/ase", "one", True)]
    asked.clear()
    assert said("export", "--adapter", adapter, "--layout", "transformers")[0] == 0
    assert asked == [("b/ase", "one", False)]


@pytest.mark.parametrize("verb", ["generate", "reproduce", "merge"])
def test_an_adapter_of_another_base_is_refused_before_the_download(verb, said, tiny_config, tmp_path, monkeypatch):
    def fetched(*_, **__):
        raise AssertionError("the base was looked for")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    other = {"base_model_name_or_path": BASE_NAMES[1], "revision": "f" * 40}
    (tmp_path / "a").mkdir()
    adapter = write_adapter(tmp_path / "a", tiny_config, **other)
    flags = {
        "generate": ["--text", "Hello.", "--output_file", tmp_path / "a.wav"],
        "reproduce": ["--train_manifest", SPEECH, "--output_dir", tmp_path / "out"],
        "merge": ["--layout", "boson", "--output_dir", tmp_path / "out"],
    }[verb]
    code, lines = said(verb, "--adapter", adapter, *flags)
    assert code == 2 and len(lines) == 1 and f"--base_revision {'f' * 40}" in lines[0], lines
    code, lines = said(verb, "--adapter", tmp_path, *flags)
    assert code == 2 and lines[0].startswith(f"--adapter: {tmp_path}") and "adapter_config.json" in lines[0]
    code, lines = said(verb, "--adapter", adapter, "--base_revision", "f" * 40, *flags)
    assert code == 1 and "the base was looked for" in lines[0], lines


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\ufeff\n\n".encode(), "contains no text"),
        (b"one\n\nthree\n", "t.txt:2: is empty"),
        (b"one\n<|eot_id|>\n", "t.txt:2: contains <|eot_id|>"),
        (b"\xff\xfe", "t.txt: 'utf-8' codec"),
    ],
)
def test_every_line_of_a_file_of_texts_is_checked(content, words, voice, said, tmp_path, nothing_loads):
    (tmp_path / "t.txt").write_bytes(content)
    code, lines = said("generate", *voice, "--texts", tmp_path / "t.txt", "--output_dir", tmp_path / "out")
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_every_text_becomes_a_file_of_its_format(voice, said, tmp_path):
    """An untrained model never ends a clip; the same seed gives the same samples."""
    (tmp_path / "t.txt").write_text(" Hello. \nWhere is the café?\n\n", encoding="utf-8")
    out = tmp_path / "made" / "here"
    flags = [*voice, "--sampler", "served", "--seed", 0, "--max_new_tokens", 30]
    several = [*flags, "--texts", tmp_path / "t.txt", "--output_dir", out, "--format", "ogg"]
    code, lines = said("generate", *several)
    assert code == 0, lines
    assert lines[0].startswith(f"[1/2] {out / '0001'}.ogg: ") and lines[1].startswith("[2/2] ")
    assert "cut off at --max_new_tokens 30" in lines[0]
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["0001.ogg", "0002.ogg"] and soundfile.info(files[0]).frames > 1000
    code, lines = said("generate", *several)
    assert code == 2 and "0001" in lines[0] and "and 1 more exists; add --overwrite" in lines[0]
    before = soundfile.read(files[1])[0]
    assert said("generate", *several, "--overwrite")[0] == 0
    assert np.array_equal(before, soundfile.read(files[1])[0])
    for ending in ("wav", "flac", "mp3"):
        file = tmp_path / f"one.{ending}"
        assert said("generate", *flags, "--text", "Hello.", "--output_file", file)[0] == 0
        assert soundfile.info(file).format == ending.upper() and soundfile.info(file).frames > 1000


def test_a_missing_file_of_a_merged_folder_is_reported_under_its_flag(voice, said, tiny_dir, tmp_path, nothing_loads):
    merged = shutil.copytree(tiny_dir, tmp_path / "m")
    flags = ["--merged", merged, *voice[2:], "--text", "Hello.", "--output_file", tmp_path / "a.wav"]
    for file in (next(merged.glob("model-00001-of-*.safetensors")).name, "tokenizer.json", "config.json"):
        (merged / file).unlink()
        code, lines = said("generate", *flags)
        assert code == 2 and lines[0].startswith(f"--merged: {merged}"), lines
        assert file.removesuffix(".json") in lines[0] and not any("--base_ckpt" in line for line in lines)


@pytest.mark.parametrize("layout", ["boson", "transformers"])
def test_a_merged_folder_speaks_as_its_base(layout, voice, said, codec_dir, tmp_path):
    code, lines = said("merge", *voice[:2], "--layout", layout, "--output_dir", tmp_path / "m")
    assert code == 0, lines
    clip = json.loads(SPEECH.read_text().splitlines()[0])
    more = ["--text", "Hello.", "--ref_audio", SPEECH.parent / clip["audio"], "--ref_text", clip["text"]]
    more += ["--max_new_tokens", 30, "--sampler", "served", "--seed", 0]
    code, lines = said("generate", *voice, *more, "--output_file", tmp_path / "base.wav")
    assert code == 0, lines
    merged = ["--merged", tmp_path / "m", "--codec", codec_dir]
    assert said("generate", *merged, *more, "--output_file", tmp_path / "merged.wav")[0] == 0
    assert (tmp_path / "base.wav").read_bytes() == (tmp_path / "merged.wav").read_bytes()
    code, lines = said("generate", *merged, *more, "--output_file", tmp_path / "unknown.wav")
    assert code == 0 and lines[0].startswith(f"{tmp_path / 'm'} does not record its prompt style; served")
    (tmp_path / "m/higgs_ds.json").write_text('{"prompt_style": "boson"}')
    code, lines = said("generate", *merged, *more, "--output_file", tmp_path / "boson.wav")
    assert code == 0 and lines[0] == f"prompt style boson, as {tmp_path / 'm'} was trained"
    assert (tmp_path / "boson.wav").read_bytes() != (tmp_path / "merged.wav").read_bytes()
    code, lines = said("generate", "--merged", tmp_path / "no", *more, "--output_file", tmp_path / "x.wav")
    assert code == 2 and lines == [f"--merged: {tmp_path / 'no'} is not a folder; create one with `merge`"]


@pytest.fixture(scope="module")
def untrained(tiny_dir, codec_dir):
    return Speaker.load(open_base(str(tiny_dir)), None, load_codec(str(codec_dir)))


def endings(speaker, eos_at: dict[int, list[int]]) -> dict[str, tuple[int, bool, bool]]:
    """Frames, ended, and agreement by stop rule, if codebook k's logits are highest for EOS at the given steps.

    Upstream's own `generate`; the logits that its forward returns are set.
    """
    eos, codebooks, found = speaker.spec.stream_eos, speaker.spec.num_codebooks, {}
    for rule in stop_rules.STOP_RULES:
        step = iter(range(1000))

        def say(_, __, out, step=step):
            if out.audio_logits is not None and out.audio_logits.numel():
                now = next(step)
                out.audio_logits.zero_()
                for k in range(codebooks):
                    out.audio_logits[-1, k, eos if now in eos_at.get(k, ()) else 7] = 9.0
            return out

        hook = speaker.model.register_forward_hook(say)
        try:
            messages, _ = speech_messages("Hello.", None)
            answer = speaker.speak(messages, [], Sampling(max_new_tokens=80), force_audio=True, stop=rule)
        finally:
            hook.remove()
        found[rule] = (answer.codes.shape[1], answer.ended, answer.rules_agree)
    assert "_sample_audio_tokens" not in vars(speaker.model)
    return found


def test_all_stop_rules_agree_on_a_clip_that_ends_as_in_training(untrained):
    assert set(endings(untrained, {k: [20 + k] for k in range(8)}).values()) == {(20, True, True)}


def test_each_stop_rule_is_that_of_its_library(untrained):
    """Codebook 5 predicts EOS 10 steps early; boson and transformers stop there, each in its own way."""
    found = endings(untrained, {0: [20], 1: [21], 2: [22], 3: [23], 4: [24], 5: [15, 25], 6: [26], 7: [27]})
    assert found["vllm"] == (20, True, False)
    assert found["boson"] == (10, True, False)  # as if codebook 5 had its usual delay: 5 frames before its EOS
    assert found["transformers"] == (16, True, False)  # codebook k is forced at step 16 + k
    # Two at once: boson follows the lowest and ignores the other.
    assert endings(untrained, {2: [15], 5: [15]})["boson"] == endings(untrained, {2: [15]})["boson"]
    never = endings(untrained, {})
    assert all(not ended for _, ended, _ in never.values())


def test_an_answer_cut_off_before_its_first_frame_is_an_error(untrained, voice, said, tmp_path):
    """BOS and the delay of eight codebooks come before the first complete frame."""
    messages, _ = speech_messages("Hello.", None)
    for most in range(1, 12):
        answer = untrained.speak(messages, [], Sampling(max_new_tokens=most), force_audio=True)
        assert (answer.codes.shape, answer.ended) == ((8, max(0, most - 9)), False), most
    text = untrained.speak(messages, [], Sampling(max_new_tokens=1), force_audio=False)
    assert (text.codes, text.ended) == (None, False)
    file = tmp_path / "a.wav"
    flags = ["--text", "Hello.", "--output_file", file, "--max_new_tokens", 5, "--seed", 1, "--top_k", 3]
    code, lines = said("generate", *voice, *flags)
    assert code == 1 and lines[0].startswith("--top_k, --seed: no effect") and not file.exists()
    assert lines[1].startswith(f"{file}: cut off at --max_new_tokens 5 before the first frame")
    (tmp_path / "t.txt").write_text(json.loads(SPEECH.read_text().splitlines()[0])["text"])
    flags = [*voice, "--train_manifest", SPEECH, "--output_dir", tmp_path / "out", "--texts", tmp_path / "t.txt"]
    code, lines = said("reproduce", *flags, "--max_new_tokens", 5, "--stop", "boson")
    assert code == 0 and "(not ended by the model: boson)" in lines[0]


def test_reproduce_has_a_line_for_each_stop_rule(voice, said, tmp_path):
    texts = [json.loads(line)["text"] for line in SPEECH.read_text().splitlines()[:3]]
    (tmp_path / "t.txt").write_text("\n".join(texts[1:]))
    flags = [*voice, "--train_manifest", SPEECH, "--output_dir", tmp_path / "out", "--texts", tmp_path / "t.txt"]
    code, lines = said("recite", *flags, "--max_new_tokens", 20, "--at_least", 0.9)
    assert code == 1 and lines.pop() == "recite is now called reproduce", lines
    rules = [line.split()[2] for line in lines if line.startswith("stop as ")]
    assert rules == ["boson:", "transformers:", "vllm:"]
    clips = json.loads((tmp_path / "out/recital.json").read_text())
    assert [r["text"] for r in clips] == texts[1:]
    assert all(set(r["endings"]) == set(stop_rules.STOP_RULES) for r in clips)
    before = (tmp_path / "out/recital.json").read_bytes()
    earlier = tmp_path / "out" / clips[0]["file"]
    earlier.write_bytes(b"of another voice")
    code, lines = said("reproduce", *flags, "--max_new_tokens", 8)
    assert code == 2 and f"{earlier} and 1 more exists; add --overwrite" in lines[0]
    assert (tmp_path / "out/recital.json").read_bytes() == before
    assert said("reproduce", *flags, "--max_new_tokens", 8, "--stop", "boson", "--overwrite")[0] == 0
    assert not earlier.exists()  # the answers were cut off before their first frame
    flags.append("--overwrite")
    code, lines = said("reproduce", *flags, "--sampler", "served", "--stop", "vllm")
    assert code == 2 and lines[0].startswith("--stop: ")


def test_reproduce_reports_texts_without_a_row_before_anything_is_loaded(voice, said, tmp_path, nothing_loads):
    (tmp_path / "t.txt").write_text("Nobody says so.\n\nNor so.\n")
    flags = [*voice, "--train_manifest", SPEECH, "--output_dir", tmp_path / "out", "--texts", tmp_path / "t.txt"]
    code, lines = said("reproduce", *flags)
    assert code == 2 and [line.split(": no row of")[0] for line in lines] == [
        f"--texts: {tmp_path}/t.txt:{n}" for n in (1, 3)
    ]
    (tmp_path / "m.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Hm."}]}\n')
    code, lines = said("reproduce", *voice, "--train_manifest", tmp_path / "m.jsonl", "--output_dir", tmp_path / "out")
    assert code == 2 and lines[0].startswith(f"{tmp_path}/m.jsonl: no row ends")


def test_an_unwritable_folder_is_reported_on_one_line(said, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for verb in (["tiny"], ["sample-codec", "--train_manifest", SPEECH]):
        code, lines = said(*verb, "--output_dir", tmp_path / "file" / "x")
        assert code == 2 and lines == [f"--output_dir: {tmp_path}/file/x cannot be written: Not a directory"]
