"""What is written here, in transformers 5: loaded strictly, the same logits, the same speech, the same tokens.

In the second environment of this folder; skipped, with the reason, where it cannot be made.
"""

from __future__ import annotations

import json
import re

import pytest
import soundfile
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from safetensors.torch import load_file, save_file

from higgs_ds.batching.collate import Collator, Sample
from higgs_ds.codec.load import load_codec
from higgs_ds.data.audio import read_audio
from higgs_ds.data.manifest import AudioRef, Turn, read_manifest, speech_messages
from higgs_ds.model.base import load_tokenizer
from higgs_ds.model.higgs_v2.config import DEFAULT_ROPE, DEFAULTS, read_checkpoint_config
from higgs_ds.model.higgs_v2.layouts import transformers_name
from higgs_ds.model.higgs_v2.load import wanted_weights
from higgs_ds.model.higgs_v2.modules import SAVABLE_MODULES
from higgs_ds.model.higgs_v2.prompt import tokenize
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.tools.cli import main
from higgs_ds.tools.reproduce import share_reproduced
from tests.conftest import SPEECH
from tests.model.files.test_adapter_file import write_adapter
from tests.model.higgs_v2.test_layouts import translated

SYSTEM, SCENE = "Generate audio following instruction.", "Two people in a small kitchen.\nA clock ticks."
CLIP = AudioRef(None, None, None, None)


@pytest.fixture(scope="module")
def trained(quickstart):
    """The quick start's base, adapter and sample codec."""
    return quickstart[0]


@pytest.fixture(scope="module")
def merged(trained, transformers_side, tmp_path_factory):
    """The quick start's voice, merged in both layouts; the exported adapter beside its base in transformers' layout."""
    folder = tmp_path_factory.mktemp("interop")
    transformers_side("make_codec", folder=folder / "codec")
    base, codec = ("--base_ckpt", trained / "base"), ("--codec", folder / "codec")
    voice = ("--adapter", trained / "adapter")

    def run(*flags):
        assert main([str(flag) for flag in flags]) == 0

    # In float32: rounded to the base's bf16, the merged weights are not quite base and adapter.
    run("merge", *base, *voice, "--output_dir", folder / "boson", "--layout", "boson", "--dtype", "fp32")
    into = ("--output_dir", folder / "transformers", "--layout", "transformers")
    run("merge", *base, *voice, *codec, *into, "--dtype", "fp32")
    run("merge", *base, *codec, "--output_dir", folder / "base", "--layout", "transformers")
    run("export", *voice, "--layout", "transformers", "--output_dir", folder / "exported")
    return folder


def test_our_tables_are_the_classes_own(transformers_side):
    facts = transformers_side("facts")
    found = {key: facts["defaults"].get(key) for key in DEFAULTS}
    assert found == DEFAULTS
    assert facts["defaults"]["rope_parameters"] == DEFAULT_ROPE
    shapes = wanted_weights(translated())
    assert {transformers_name(name): list(shape) for name, shape in shapes.items()} == facts["model"]


def test_it_loads_strictly_with_and_without_the_text_head(merged, transformers_side):
    assert transformers_side("load_report", folder=merged / "transformers") == {}
    assert transformers_side("load_report", folder=merged / "transformers", text_head=False) == {}


def conversations() -> dict[str, list[Turn]]:
    """Prompts as a server builds them: plain, with a scene, with a cloned voice, and of two turns."""
    first, second = "Where is the café?", "It was here — yesterday."
    cloned = {"ref_text": f" {first}\n", "ref_audio": CLIP, "prompt_style": "served"}
    rows = {
        "plain": speech_messages(first, None),
        "scene": speech_messages(first, None, scene=f"{SCENE}\n"),
        "cloned": speech_messages(f"{second} ", None, **cloned),
        "two turns": speech_messages(second, CLIP, **cloned),
        "cloned in a scene": speech_messages(second, CLIP, **cloned, scene=SCENE),
    }
    return {name: list(turns) for name, (turns, _) in rows.items()}


def as_messages(turns: list[Turn]) -> list[dict]:
    """As transformers' chat template takes them; the scene is a message of its own, texts have blanks around them."""
    messages = []
    for turn in turns:
        pieces = [
            {"type": "text", "text": f"  {one}\n"} if isinstance(one, str) else {"type": "audio"}
            for one in turn.content
        ]
        messages.append({"role": turn.role, "content": pieces})
    text = messages[0]["content"][0]["text"]
    if "scene_desc_start" in text:
        messages[0]["content"][0]["text"] = SYSTEM
        messages.insert(1, {"role": "scene", "content": [{"type": "text", "text": f" {SCENE} "}]})
    return messages


@pytest.mark.parametrize("prompt", [False, True])
def test_the_chat_templates_tokens_are_ours(prompt, merged, trained, transformers_side):
    tokenizer = load_tokenizer(trained / "base")
    rows = {name: turns for name, turns in conversations().items() if not (prompt and turns[-1].role == "assistant")}
    answer = transformers_side(
        "chat",
        folder=merged / "transformers",
        conversations=[as_messages(turns) for turns in rows.values()],
        add_generation_prompt=prompt,
    )
    assert answer["ids"] == answer["alone"]  # vllm-omni asks the tokenizer, and not the processor
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>" if prompt else ""
    for (name, turns), ids in zip(rows.items(), answer["ids"], strict=True):
        ours = tokenize(turns, None, tokenizer)[0] + tokenizer.encode(header, add_special_tokens=False)
        assert ids == ours, name


def test_a_conversation_that_the_model_never_saw_is_refused(merged, transformers_side):
    system, user, written = ({"role": role, "content": "x"} for role in ("system", "user", "assistant"))
    for messages in ([user], [system, written], [system, user, {"role": "scene", "content": "x"}]):
        with pytest.raises(AssertionError, match="The first message must|An assistant message must|A scene must"):
            transformers_side("chat", folder=merged / "transformers", conversations=[messages])


@pytest.fixture(scope="module")
def whole_rows(trained, merged):
    """A plain and a cloned row with real codes, as each stack takes them, and boson_multimodal's logits of them."""
    codec = load_codec(str(trained / "codec"))
    rows, _ = read_manifest(SPEECH)
    codes = [torch.from_numpy(codec.encode(*read_audio(row.audio_refs[0][1])).astype("int64")) for row in rows[:2]]
    return bosons_logits(merged / "boson", codes)


def bosons_logits(folder, codes):
    """Inputs for `logits` of the other side, by row and name; and boson_multimodal's own logits of them."""
    config, tokenizer = read_checkpoint_config(folder), load_tokenizer(folder)
    model, report = HiggsAudioModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    delay_token = tokenizer.convert_tokens_to_ids("<|reserved_special_token_6|>")
    inputs, wanted = {}, {}
    for number, (name, clips) in enumerate({"cloned": codes[:1], "two turns": codes}.items()):
        ids = torch.tensor(tokenize(conversations()[name], None, tokenizer)[0])
        batch = Collator(HiggsV2Spec.from_config(config), round_to=1)(
            [Sample(ids, torch.full_like(ids, -100), tuple(clips), name)]
        )
        with torch.no_grad():
            out = model.eval()(**batch.model_inputs())
        frames = [clip.shape[1] + 2 + 7 for clip in clips]
        expanded, left = [], iter(frames)
        for token in ids.tolist():
            if token == config.audio_out_token_idx:
                length = next(left)
                expanded += [token] * (length - 7) + [delay_token] * 7
            else:
                expanded.append(token)
        inputs[f"{number}.input_ids"] = torch.tensor([expanded])
        inputs[f"{number}.audio_input_ids"] = batch.audio_out_ids.T[None].contiguous()
        inputs[f"{number}.audio_input_ids_mask"] = torch.ones(1, sum(frames), dtype=torch.bool)
        audio = (inputs[f"{number}.input_ids"][0] == config.audio_out_token_idx) | (
            inputs[f"{number}.input_ids"][0] == delay_token
        )
        wanted[number] = (out.logits[0][-len(expanded) :], out.audio_logits.flatten(1), audio)
    return inputs, wanted


@pytest.mark.parametrize("way", ["merged", "exported"])
def test_logits_are_equal(way, whole_rows, merged, transformers_side, tmp_path):
    folder, adapter = (merged / "transformers", None) if way == "merged" else (merged / "base", merged / "exported")
    assert_logits_are_equal(whole_rows, transformers_side, tmp_path, folder=folder, adapter=adapter)


def test_modules_that_were_trained_whole_are_exported_and_taken_by_peft(
    tiny_dir, tiny_config, transformers_side, tmp_path
):
    """Random ones in place of all that can be trained whole: plain peft there, merged in Boson's layout here."""
    (tmp_path / "adapter").mkdir()
    whole = [name.rsplit(".", 1)[-1] for name in SAVABLE_MODULES]
    settings = {"targets": ["q_proj"], "whole": whole, "base_model_name_or_path": str(tiny_dir)}
    adapter = write_adapter(tmp_path / "adapter", tiny_config, **settings)
    flags = [*("--codec", "a/b", "--base_ckpt", str(tiny_dir), "--dtype", "fp32"), "--output_dir"]
    for name, more in {"boson": ["--adapter", str(adapter)], "transformers": []}.items():
        assert main(["merge", *flags, str(tmp_path / name), "--layout", name, *more]) == 0
    export = ["export", "--adapter", str(adapter), "--layout", "transformers"]
    assert main([*export, "--output_dir", str(tmp_path / "exported")]) == 0
    draw = torch.Generator().manual_seed(0)
    rows = bosons_logits(tmp_path / "boson", [torch.randint(0, 1024, (8, n), generator=draw) for n in (30, 40)])
    folders = {"folder": tmp_path / "transformers", "adapter": tmp_path / "exported"}
    assert_logits_are_equal(rows, transformers_side, tmp_path, **folders)


def assert_logits_are_equal(rows, transformers_side, tmp_path, **folders):
    inputs, wanted = rows
    save_file(inputs, tmp_path / "inputs.safetensors")
    request = {"inputs": tmp_path / "inputs.safetensors", "output": tmp_path / "logits.safetensors"}
    assert transformers_side("logits", **folders, **request) == {}
    found = load_file(tmp_path / "logits.safetensors")
    for number, (text, audio, mask) in wanted.items():
        scale = audio.abs().max()
        assert scale > 5 and mask.sum() == len(audio) > 30
        assert (found[f"{number}.text"] - text).abs().max() <= 1e-5 * text.abs().max()
        assert (found[f"{number}.audio"][mask] - audio).abs().max() <= 1e-5 * scale


def test_its_own_greedy_generate_gives_every_clip_back(trained, merged, transformers_side, tmp_path):
    rows, _ = read_manifest(SPEECH)
    codec = load_codec(str(trained / "codec"))
    wanted = [codec.encode(*read_audio(row.audio_refs[0][1])) for row in rows]
    texts = [json.loads(line)["text"] for line in SPEECH.read_text().splitlines()]
    conversations = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in texts]
    report = transformers_side(
        "generate",
        folder=merged / "transformers",
        conversations=conversations,
        output=tmp_path / "codes.safetensors",
        max_new_tokens=max(codes.shape[1] for codes in wanted) + 64,
    )
    spoken = load_file(tmp_path / "codes.safetensors")
    assert report == {} and len(spoken) == 32
    for number, codes in enumerate(wanted):
        assert spoken[str(number)].shape == codes.shape, number
        assert share_reproduced(codes, spoken[str(number)].numpy()) >= 0.99, number


def test_the_merged_folders_card_speaks_as_it_is_printed(merged, transformers_side, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (merged / "transformers/README.md").read_text(), flags=re.S)
    # A random codec of this size takes its time.
    left = transformers_side("run", code=code.replace("max_new_tokens=1024", "max_new_tokens=100"), folder=tmp_path)
    waveform, rate = soundfile.read(tmp_path / "speech.wav")
    assert left == ["speech.wav"] and rate == 24000 and len(waveform) >= 960


def test_bosons_own_serve_engine_speaks_with_it(trained, merged, monkeypatch):
    """Upstream's engine as it is; the sample codec stands in for the audio tokenizer, whose weights are not here."""
    from boson_multimodal.data_types import ChatMLSample, Message
    from boson_multimodal.serve import serve_engine

    codec = load_codec(str(trained / "codec"))

    class Tokenizer:
        tps, sampling_rate = codec.frame_rate, codec.sample_rate

        def decode(self, codes):
            return codec.decode(codes[0].clip(0, codec.codebook_size - 1).numpy())[None, None]

    monkeypatch.setattr(serve_engine, "load_higgs_audio_tokenizer", lambda *_, **__: Tokenizer())
    engine = serve_engine.HiggsAudioServeEngine(
        str(merged / "boson"), "unused", device="cpu", torch_dtype=torch.float32, kv_cache_lengths=[512]
    )
    rows, _ = read_manifest(SPEECH)
    for row, line in list(zip(rows, SPEECH.read_text().splitlines(), strict=True))[:3]:
        text = json.loads(line)["text"]
        sample = ChatMLSample(messages=[Message(role="system", content=SYSTEM), Message(role="user", content=text)])
        said = engine.generate(sample, max_new_tokens=400, temperature=0.0, ras_win_len=None, force_audio_gen=True)
        wanted = codec.encode(*read_audio(row.audio_refs[0][1]))
        stream = torch.from_numpy(said.generated_audio_tokens)
        frames = wanted.shape[1]
        given = torch.stack([stream[k, k + 1 : k + 1 + frames] for k in range(8)]).numpy()
        assert share_reproduced(wanted, given) >= 0.99 and stream.shape[1] == frames + 2 + 7
        assert abs(len(said.audio) / said.sampling_rate - frames / codec.frame_rate) < 0.1
