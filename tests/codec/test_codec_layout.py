"""Boson's codec in transformers' layout: the real architecture with random weights, read in both layouts."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from higgs_ds.codec.codec_layout import BUNDLED, WEIGHTS, new_name, old_config
from higgs_ds.codec.load import load_codec
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.manifest import read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.model.families import open_base
from higgs_ds.model.higgs_v3.tiny import write_tiny
from higgs_ds.tools.cli import main
from tests.codec.test_codec import REAL_CONFIG, boson_folder, clips_of  # noqa: F401 - a fixture
from tests.conftest import SPEECH

# As transformers writes it for Boson's codec; what is left out has the class's default.
NEW_CONFIG = {
    "model_type": "higgs_audio_v2_tokenizer",
    "sample_rate": 24000,
    "codebook_size": 1024,
    "codebook_dim": 64,
    "target_bandwidths": [0.5, 1, 1.5, 2],
    "kernel_size": 3,
    "acoustic_model_config": {
        "model_type": "dac",
        "encoder_hidden_size": 64,
        "decoder_hidden_size": 1024,
        "hidden_size": 256,
        "downsampling_ratios": [8, 5, 4, 2, 3],
        "upsampling_ratios": [8, 5, 4, 2, 3],
    },
    "semantic_model_config": {"model_type": "hubert", "hidden_size": 768, "mask_time_prob": 0.0},
}


def fold(weights):
    """As transformers' files have them: the weight norm multiplied out, over all but the first dimension."""
    folded = {}
    for old, value in weights.items():
        if old.endswith(".weight_v"):
            length = weights[old.removesuffix("v") + "g"]
            value = length * value / value.norm(dim=list(range(1, value.ndim)), keepdim=True)
        if not old.endswith(".weight_g"):
            folded[new_name(old)] = value
    return folded


@pytest.fixture(scope="module")
def folded(boson_folder, tmp_path_factory):  # noqa: F811
    """The same weights under transformers' names, weight norm multiplied out; lengths made unlike the directions'."""
    weights = torch.load(boson_folder / "model.pth", weights_only=True)
    draw = torch.Generator().manual_seed(3)
    for name, value in weights.items():
        if name.endswith(".weight_g"):
            value *= 0.5 + torch.rand(value.shape, generator=draw)
    torch.save(weights, boson_folder / "model.pth")
    folder = tmp_path_factory.mktemp("folded")
    (folder / "config.json").write_text(json.dumps(NEW_CONFIG))
    new = fold(weights)
    del new["semantic_model.masked_spec_embed"]  # transformers drops it: only HuBERT's training has a use for it
    save_file({name: value.contiguous() for name, value in new.items()}, folder / WEIGHTS)
    yield folder
    (folder / WEIGHTS).unlink()


def test_codes_and_speech_of_both_layouts_are_equal(boson_folder, folded):  # noqa: F811
    old, new = load_codec(str(boson_folder)), load_codec(str(folded))
    sizes = [(one.num_codebooks, one.codebook_size, one.frame_rate, one.sample_rate) for one in (old, new)]
    assert sizes[0] == sizes[1] == (8, 1024, 25.0, 24000)
    assert old.fingerprint != new.fingerprint
    samples, rate = clips_of("manifest.jsonl")[0]
    wanted, waveforms = {}, {}
    for codec in (old, new):
        for length in (rate + 123, 2 * rate):
            codes = codec.encode(samples[:length], rate)
            assert np.array_equal(wanted.setdefault(length, codes), codes)
        waveforms[codec is old] = codec.decode(codes)
    assert len(np.unique(wanted[2 * rate])) > 20
    assert np.allclose(waveforms[True], waveforms[False], atol=1e-5) and np.abs(waveforms[True]).max() > 1e-3
    # Every weight comes back to the bit.
    with safe_open(folded / WEIGHTS, framework="pt") as stored:
        left = set(stored.keys())
        for name, weight in new._model.state_dict().items():
            if name != "semantic_model.masked_spec_embed":
                assert torch.equal(weight, stored.get_tensor(new_name(name))), name
                left.remove(new_name(name))
        assert not left and len(stored.keys()) == 602 - 74 - 1
    old.release()
    new.release()


def test_the_codec_in_a_checkpoint_is_the_default_and_gives_the_codes_of_the_same_one_alone(folded, tmp_path, capsys):
    weights = {name: value.bfloat16() for name, value in load_file(folded / WEIGHTS).items()}
    weights["semantic_model.masked_spec_embed"] = torch.ones(768, dtype=torch.bfloat16)
    alone, base, merged = (tmp_path / name for name in ("alone", "base", "merged"))
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps(NEW_CONFIG))
    save_file(weights, alone / WEIGHTS)
    write_tiny(base, hidden_size=64, num_layers=2)
    with pytest.raises(ConfigError, match="bundles no codec"):
        load_codec(str(base))
    shards = {"a.safetensors": load_file(base / WEIGHTS), "b.safetensors": {}}
    for number, (name, value) in enumerate(weights.items()):
        shards[("a.safetensors", "b.safetensors")[number % 2]][BUNDLED + name] = value
    for file, tensors in shards.items():
        save_file(tensors, base / file)
    (base / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    # A merge keeps the codec to the bit, whatever files hold it, and its card names no other.
    assert main(["merge", "--base_ckpt", str(base), "--output_dir", str(merged), "--dtype", "fp32"]) == 0
    kept = {name: value for name, value in load_file(merged / WEIGHTS).items() if name.startswith(BUNDLED)}
    assert kept.keys() == {BUNDLED + name for name in weights} and len(kept) == 528
    assert all(torch.equal(kept[BUNDLED + name], value) for name, value in weights.items())
    assert "--codec" not in (merged / "README.md").read_text()
    assert open_base(str(base)).codec == (str(base), None)

    codecs = [load_codec(str(folder)) for folder in (alone, base, merged)]
    assert codecs[0].fingerprint != codecs[1].fingerprint == codecs[2].fingerprint
    samples, rate = clips_of("manifest.jsonl")[0]
    wanted = codecs[0].encode(samples, rate)
    assert all(np.array_equal(codec.encode(samples, rate), wanted) for codec in codecs[1:])
    assert np.array_equal(codecs[0].decode(wanted), codecs[1].decode(wanted))
    for codec in codecs:
        codec.release()

    # Without --codec, clips are encoded by it, and speech is decoded by it.
    rows = SPEECH.read_text().splitlines()[:1]
    (manifest := tmp_path / "one.jsonl").write_text(rows[0])
    flags = [
        "--train_manifest",
        str(manifest),
        "--audio_root",
        str(SPEECH.parent),
        "--codes_cache",
        str(tmp_path / "c"),
    ]
    assert main(["prepare", "--base_ckpt", str(base), *flags]) == 0
    (row,), _ = read_manifest(manifest, audio_root=str(SPEECH.parent))
    assert np.array_equal(CodeCache(tmp_path / "c", codecs[1]).get(row.audio_refs[0][1]), wanted)
    spoken = ["--text", "Hi.", "--max_new_tokens", "12", "--output_file"]
    for number, voice in enumerate((["--base_ckpt", str(base)], ["--merged", str(merged), "--codec", str(alone)])):
        assert main(["generate", *voice, *spoken, str(tmp_path / f"{number}.wav")]) == 0
    assert (tmp_path / "0.wav").read_bytes() == (tmp_path / "1.wav").read_bytes()


def test_the_config_says_the_same():
    ours = {key: value for key, value in REAL_CONFIG.items() if key != "n_filters"}
    assert old_config(NEW_CONFIG) == ours | {"target_bandwidths": [0.5, 1, 1.5, 2]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strides": [1, 2]}, "strides is [1, 2], Boson's codec has [1, 1]"),
        ({"semantic_model_config": {"num_attention_heads": 24}}, "semantic_model_config.num_attention_heads is 24"),
        ({"acoustic_model_config": {"upsampling_ratios": [8, 5]}}, "downsampling_ratios and upsampling_ratios differ"),
    ],
)
def test_another_network_is_refused(changes, words):
    config = {key: {**NEW_CONFIG[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=re.escape(words)):
        old_config(NEW_CONFIG | config)


def test_weights_that_are_not_the_codecs_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NEW_CONFIG))
    with pytest.raises(ConfigError, match="it has no model.safetensors"):
        load_codec(str(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="does not hold the weights of Boson's codec"):
        load_codec(str(tmp_path))
    save_file({"model.embed_tokens.weight": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=r"does not fit its config.json .*missing .*holds model.embed_tokens.weight"):
        load_codec(str(tmp_path)).build()
