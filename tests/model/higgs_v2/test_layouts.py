"""Names and configs of the two layouts, against what is known of Boson's real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig

from higgs_ds.errors import ConfigError
from higgs_ds.model.higgs_v2.config import (
    DEFAULT_ROPE,
    config_from_transformers,
    read_checkpoint_config,
    transformers_config,
)
from higgs_ds.model.higgs_v2.layouts import boson_name, layout_of, transformers_name
from higgs_ds.model.higgs_v2.load import adaptable_modules, wanted_weights

# Boson's real sizes and token ids.
TOKENS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|eot_id|>": 128009,
    "<|audio_eos|>": 128012,
    "<|audio_out_bos|>": 128013,
    "<|reserved_special_token_6|>": 128014,
    "<|AUDIO|>": 128015,
    "<|AUDIO_OUT|>": 128016,
}
HUB = {"model_type": "higgs_audio_v2", "codebook_size": 1026, "dtype": "bfloat16", "eos_token_id": 128009}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0}


def translated(**changes) -> HiggsAudioConfig:
    return config_from_transformers({**HUB, **changes}, TOKENS, "here")


def refused(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        wanted_weights(translated(**changes))
    return str(caught.value)


def test_every_name_of_the_real_model_goes_there_and_back():
    shapes = wanted_weights(translated())
    assert len(shapes) == 397
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) * 2 == 11_542_566_912
    renamed = {name: transformers_name(name) for name in shapes}
    assert len(set(renamed.values())) == 397
    assert all(boson_name(new) == old for old, new in renamed.items())
    assert all(new.startswith("model.") or new.endswith("lm_head.weight") for new in renamed.values())
    named = {
        "audio_codebook_embeddings.weight": "model.embed_audio_tokens.embed_audio_tokens.weight",
        "audio_decoder_proj.text_lm_head.weight": "text_lm_head.weight",
        "audio_decoder_proj.audio_lm_head.weight": "audio_lm_head.weight",
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "layers.27.audio_mlp.up_proj.weight": "model.layers.27.audio_mlp.up_proj.weight",
    }
    assert {name: renamed[name] for name in named} == named
    assert transformers_name("audio_tower.conv1.weight") is None and boson_name("layers.0.mlp.up_proj.weight") is None


def test_the_hubs_config_is_bosons():
    config, facts = translated().to_dict(), json.loads(Path(__file__).with_name("boson.json").read_text())["translated"]
    text = facts.pop("text_config")
    assert {key: config[key] for key in facts} == facts
    assert {key: config["text_config"][key] for key in text} == text


def test_both_spellings_of_the_rotary_parameters_turn_by_the_same_angles_to_the_bit():
    """The hub's new config counts in 1,024 positions, Boson's in 8,192, with factors to match."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    boson = {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    one = LlamaRotaryEmbedding(config=translated().text_config)
    two = LlamaRotaryEmbedding(config=translated(rope_parameters={**boson, "rope_theta": 500000.0}).text_config)
    assert torch.equal(one.inv_freq, two.inv_freq) and one.inv_freq.dtype == torch.float32


def test_a_config_goes_there_and_back():
    there = transformers_config(translated(), TOKENS, "bfloat16", "here")
    assert there["codebook_size"] == 1026 and there["eos_token_id"] == 128009 and there["bos_token_id"] == 128000
    assert there["audio_delay_token_id"] == 128014 and there["dtype"] == "bfloat16"
    assert config_from_transformers(there, TOKENS, "here").to_dict() == translated().to_dict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook_size": 1024}, "codebook_size is 1024, with audio_stream_bos_id 1024"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"audio_token_id": 5}, "audio_token_id is 5, the tokenizer's <|AUDIO_OUT|> is 128016"),
        ({"hidden_size": "3072"}, "hidden_size is '3072': Input should be a valid integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"dtype": "nonsense"}, "dtype is 'nonsense': Input should be 'bfloat16', 'float16' or 'float32'"),
        ({"quantization_config": {"a": 1}}, "quantization_config is {'a': 1}"),
        ({"hidden_act": "none"}, "describes no model: KeyError"),
        ({"rope_parameters": {**DEFAULT_ROPE, "low_freq_factor": 0.5}}, "low_freq_factor 0.5 must be below high_freq"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Input tag 'yarn' found using 'rope_type'"),
        (
            {"rope_parameters": {**DEFAULT_ROPE, "attention_factor": 2.0}},
            "llama3.attention_factor is 2.0: Extra inputs",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "llama3.high_freq_factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'"),
    ],
)
def test_what_bosons_model_is_not_is_refused(changes, words):
    assert words in refused(**changes)


def test_a_tokenizer_without_bosons_tokens_is_refused():
    with pytest.raises(ConfigError, match="the tokenizer has no <.AUDIO_OUT.>"):
        config_from_transformers(HUB, {k: v for k, v in TOKENS.items() if k != "<|AUDIO_OUT|>"}, "here")
    with pytest.raises(ConfigError, match="reserved_special_token_6.*which transformers' generation writes"):
        transformers_config(translated(), {"<|eot_id|>": 1}, "bfloat16", "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audio_adapter_type": "stack"}, "the model has audio_adapter_type 'stack', transformers' has not"),
        ({"audio_dual_ffn_layers": [0, 1]}, "a dual FFN in only some"),
        ({"use_delay_pattern": False}, "codes without the delay pattern"),
        ({"audio_embed_avg": True}, "averaged audio embeddings"),
        ({"audio_stream_bos_id": 7}, "its stream ids are not the two after it"),
    ],
)
def test_what_transformers_model_is_not_is_refused(changes, words):
    config = translated()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ConfigError) as caught:
        transformers_config(config, TOKENS, "bfloat16", "here")
    assert words in str(caught.value)


def test_the_layout_is_told_by_the_config(tmp_path, tiny_dir):
    assert layout_of(tiny_dir) == "boson"
    file = tmp_path / "config.json"
    for text, words in [
        ('{"model_type": "higgs_audio_v2_tokenizer"}', "give it to --codec"),
        ('{"model_type": "llama"}', "model_type 'llama', expected 'higgs_audio' or 'higgs_audio_v2'"),
        ("[]", "holds list, expected a JSON object"),
        ("{", "cannot be read"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_checkpoint_config(tmp_path)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    file.write_text(json.dumps(HUB))
    for added in ("[5]", '[{"content": "x", "id": NaN}]', "null"):
        (tmp_path / "tokenizer.json").write_text(f'{{"added_tokens": {added}}}')
        with pytest.raises(ConfigError, match="tokenizer.json: added_tokens"):
            read_checkpoint_config(tmp_path)


def test_the_adaptable_modules_are_those_that_lora_adapts():
    linears, savable = adaptable_modules(translated())
    assert len(linears) == 28 * 10 + 2 and len(savable) == 3 and savable["audio_codebook_embeddings"] == (8208, 3072)
    assert linears["layers.3.self_attn.k_proj"] == (1024, 3072)
    assert linears["audio_decoder_proj.audio_lm_head"] == (8208, 3072)
