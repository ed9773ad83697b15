"""Boson's codec in transformers' layout: the real architecture with random weights, read in both layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from higgs_ds.codec.codec_layout import WEIGHTS, new_name, old_config
from higgs_ds.codec.load import load_codec
from higgs_ds.errors import ConfigError
from tests.codec.test_codec import REAL_CONFIG, boson_folder, clips_of  # noqa: F401 - a fixture

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


def test_the_config_says_the_same():
    ours = {key: value for key, value in REAL_CONFIG.items() if key != "n_filters"}
    assert old_config(NEW_CONFIG) == ours | {"target_bandwidths": [0.5, 1, 1.5, 2]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strides": [1, 2]}, "strides is [1, 2], Boson's codec has [1, 1]"),
        ({"semantic_model_config": {"num_attention_heads": 24}}, "semantic_model_config.num_attention_heads is 24"),
        ({"acoustic_model_config": {"upsampling_ratios": [8, 5]}}, "downsampling_ratios and upsampling_ratios differ"),
        ({"target_bandwidths": []}, "config.json is no config of Boson's codec: "),
    ],
)
def test_another_network_is_refused(changes, words, tmp_path):
    config = {key: {**NEW_CONFIG[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    (tmp_path / "config.json").write_text(json.dumps(NEW_CONFIG | config))
    save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError) as caught:
        load_codec(str(tmp_path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


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
