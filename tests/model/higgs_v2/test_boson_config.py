"""Values of Boson's config.json that end in a traceback of the model's classes, or in a wrong number: a line each."""

from __future__ import annotations

import json
import shutil

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.model.base import open_base, read_model_config


@pytest.fixture
def copy(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir, tmp_path / "copy")


def refused(folder) -> str:
    with pytest.raises(ConfigError) as caught:
        open_base(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audio_num_codebooks": "8"}, "audio_num_codebooks is '8', expected a whole number from 1 to 64"),
        ({"audio_codebook_size": 0}, "audio_codebook_size is 0"),
        ({"audio_stream_eos_id": 1026}, "audio_stream_eos_id is 1026, expected 1024 or 1025"),
        ({"pad_token_id": 512}, "pad_token_id is 512, beyond text_config.vocab_size 512"),
        ({"text_config": None}, "text_config is NoneType, expected an object"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers is 1000000000"),
        ({"audio_adapter_type": "other"}, "is no config of Higgs Audio: Invalid audio adapter type: other"),
        ({"audio_dual_ffn_layers": None}, "is no config of Higgs Audio"),
        ({"torch_dtype": "nonsense"}, "torch_dtype is 'nonsense', expected one of bfloat16, float16, float32"),
        ({"audio_eos_token": []}, "audio_eos_token is [], expected a token's text"),
        ({"to_diff_dict": 1}, "to_diff_dict is no field of a config"),
        ({"__dict__": {}}, "__dict__ is no field of a config"),
        ({"num_labels": 10**30}, "expected a whole number from 1 to 1024"),
        ({"text_config": {"rope_scaling": "abc"}}, "text_config.rope_scaling is 'abc', expected an object or null"),
        ({"text_config": {"hidden_size": -64}}, "text_config.hidden_size is -64, expected a whole number from 1"),
        ({"text_config": {"hidden_act": "none"}}, "config.json describes no model: KeyError"),
        ({"pad_token_id": "\udcff"}, "surrogates not allowed"),
        ({"text_config": {"rms_norm_eps": "x"}}, "text_config.rms_norm_eps is 'x', expected float"),
        ({"text_config": {"rms_norm_eps": None}}, "text_config.rms_norm_eps is None, expected float"),
        ({"text_config": {"rms_norm_eps": float("nan")}}, "text_config.rms_norm_eps is nan, expected a number from"),
        ({"text_config": {"pretraining_tp": 2}}, "text_config.pretraining_tp is 2, expected 1"),
        ({"text_config": {"use_cache": None}}, "text_config.use_cache is None, expected bool"),
        ({"text_config": {"attention_dropout": 2.0}}, "text_config.attention_dropout is 2.0, expected a number from 0"),
        ({"text_config": {"eos_token_id": "x"}}, "text_config.eos_token_id is 'x', expected a token's id"),
        ({"text_config": {"model_type": "opt"}}, "text_config.model_type is 'opt', expected llama"),
        (
            {"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}},
            "text_config.rope_scaling: rope_type is 'yarn', expected one of default, llama3",
        ),
        ({"text_config": {"rope_theta": -1}}, "something else than positive numbers"),
        ({"audio_decoder_proj_num_layers": None}, "audio_decoder_proj_num_layers is None, expected 0"),
        ({"audio_decoder_proj_num_layers": []}, "audio_decoder_proj_num_layers is [], expected 0"),
        ({"audio_dual_ffn_layers": [0, 1, [0]]}, "audio_dual_ffn_layers is [0, 1, [0]], expected a list of layers"),
        ({"audio_dual_ffn_layers": [0, 1, 1]}, "expected some of the 2 layers, each once"),
        ({"use_delay_pattern": "x"}, "use_delay_pattern is 'x', expected bool"),
        ({"audio_encoder_config": 5}, "audio_encoder_config is 5, expected an object or null"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config is there: quantized weights"),
    ],
)
def test_a_config_that_describes_no_model_is_one_line(changes, words, copy):
    config = json.loads((copy / "config.json").read_text())
    if isinstance(changes.get("text_config"), dict):
        changes = {"text_config": config["text_config"] | changes["text_config"]}
    (copy / "config.json").write_text(json.dumps(config | changes))
    text = refused(copy)
    assert words in text and len(text.splitlines()) == 1


def test_what_transformers_adds_to_every_config_changes_nothing(copy):
    config, was = json.loads((copy / "config.json").read_text()), read_model_config(copy).to_dict()
    config |= {"is_encoder_decoder": True, "torchscript": True, "auto_map": {"AutoModel": "evil.X"}, "max_length": "x"}
    config["text_config"] |= {"output_attentions": True, "pruned_heads": {"a": 1}, "_attn_implementation": "nope"}
    (copy / "config.json").write_text(json.dumps(config))
    assert read_model_config(copy).to_dict() == was
