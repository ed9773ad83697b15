"""Names, shapes and config of the published checkpoint; each mismatch is reported on one line."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from higgs_ds.errors import ConfigError
from higgs_ds.model.files.weight_files import weight_headers
from higgs_ds.model.higgs_v3.config import config_from
from higgs_ds.model.higgs_v3.layers import HiggsV3Model
from higgs_ds.model.higgs_v3.load import CODEC, load_base, open_base
from higgs_ds.model.higgs_v3.tiny import ADDED_TOKENS, Sizes, base_config, write_zeros
from higgs_ds.model.lora import attach_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def open_at(folder):
    return open_base(str(folder), None, "--base_ckpt", folder)


def test_the_real_size_has_the_published_names_shapes_and_ids(tmp_path):
    assert write_zeros(tmp_path) == 4_244_881_897
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 927 and index["metadata"]["total_size"] == 8_489_763_794
    assert sum(name.startswith(CODEC) for name in index["weight_map"]) == 528
    held = weight_headers(tmp_path)
    assert len(held) == 929 and (tmp_path / "model.safetensors").stat().st_blocks * 512 < 1e6
    assert held["tied.head.modality_heads.0.weight"].shape == (8208, 2560)
    base = open_at(tmp_path)
    assert base.bundles_codec and sum(math.prod(one.shape) for one in base.stored.values()) == 4_043_480_576
    shapes = {name: list(one.shape) for name, one in base.stored.items()}
    assert len(shapes) == 399 and sum(name.startswith("body.layers.35.") for name in shapes) == 11
    assert shapes["tied.embedding.modality_embeddings.0.embedding.weight"] == [8208, 2560]
    assert shapes["body.layers.0.self_attn.q_proj.weight"] == [4096, 2560]
    assert shapes["body.layers.0.self_attn.k_norm.weight"] == [128]
    ids = {name: base.tokenizer.convert_tokens_to_ids(name) for name in ("<|tts|>", "<|prosody:pause|>", "<think>")}
    assert ids["<|tts|>"] == 151667 and ids["<|prosody:pause|>"] == 151722 and ids["<think>"] is None
    assert (base.spec.audio_out_token, base.spec.audio_in_token) == (151670, 151679)
    assert len(ADDED_TOKENS) == 84 and base.tokenizer.convert_tokens_to_ids("<|prosody:expressive_low|>") == 151726
    with torch.device("meta"):
        model = HiggsV3Model(base.config).requires_grad_(False)
    lora = attach_lora(model, rank=16, alpha=32.0, dropout=0.05, target_modules=TARGETS, seed=0, base_name="zeros")
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert len(trained) == 504 and sum(p.numel() for p in trained) == 33_030_144


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({}, 1e6),
        ({"rope_parameters": None, "rope_theta": 5000.0}, 5000.0),
        ({"rope_parameters": {"rope_theta": 7000, "rope_type": "default"}}, 7000.0),
        ({"rope_parameters": None}, 1e6),
    ],
)
def test_both_forms_of_rope_parameters_are_read(change, theta):
    raw = base_config(Sizes())
    raw["text_config"] |= change
    assert config_from(raw, "here").rope_theta == theta


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("text_config", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rope_type"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"num_key_value_heads": 7}, "must be a multiple"),
        ("text_config", {"hidden_size": "2560"}, "hidden_size"),
        ("audio_encoder_config", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("audio_encoder_config", {"encoder_type": "whisper"}, "encoder_type"),
    ],
)
def test_another_model_is_refused_with_the_field_named(part, change, named):
    raw = base_config(Sizes())
    raw[part] |= change
    with pytest.raises(ConfigError, match=named):
        config_from(raw, "here")


def test_codec_and_tied_copies_are_ignored_and_other_names_are_refused(v3_dir, tmp_path):
    folder = shutil.copytree(v3_dir, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    table = weights["tied.embedding.modality_embeddings.0.embedding.weight"]
    copies = {"tied.head.modality_heads.0.weight": table.clone()}
    codec = {"tied.embedding.modality_embeddings.0.model.fc.bias": torch.ones(3)}
    save_file(weights | copies | codec, folder / "model.safetensors")
    base = open_at(folder)
    assert base.stored.keys() == weights.keys()
    model = load_base(folder, base.config, "bf16")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    save_file(weights | {"body.layers.0.self_attn.q_proj.bias": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"extra weight body\.layers\.0\.self_attn\.q_proj\.bias"):
        open_at(folder)
    del weights["body.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing weight body\.norm\.weight \[64\]"):
        open_at(folder)


def test_a_tokenizer_without_the_speech_tokens_is_refused(v3_dir, tmp_path):
    folder = shutil.copytree(v3_dir, tmp_path / "copy")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [one for one in raw["added_tokens"] if one["content"] != "<|ref_audio|>"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"splits <\|ref_audio\|> into 13 tokens"):
        open_at(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        open_at(folder)
