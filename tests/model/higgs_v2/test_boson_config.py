"""Values of Boson's config.json that would compute something else, or end in a traceback: a line each."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.model.higgs_v2.checkpoint import open_base
from higgs_ds.model.higgs_v2.config import read_checkpoint_config


@pytest.fixture
def copy(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir, tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audio_num_codebooks": "8"}, "audio_num_codebooks is '8': Input should be a valid integer"),
        ({"audio_stream_eos_id": 1026}, "audio_stream_eos_id is 1026, expected 1024 or 1025"),
        ({"pad_token_id": 512}, "pad_token_id is 512, beyond text_config.vocab_size 512"),
        ({"text_config": None}, "text_config is None"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers is 1000000000"),
        ({"text_config": {"num_attention_heads": 8}}, "q_proj.weight has shape"),
        ({"audio_adapter_type": "other"}, "is no config of Higgs Audio: AssertionError: Invalid audio adapter type"),
        ({"audio_dual_ffn_layers": [0, 1, 1]}, "expected some of the 2 layers, each once"),
        ({"audio_decoder_proj_num_layers": 2}, "audio_decoder_proj_num_layers is 2: Input should be 0"),
        ({"use_delay_pattern": "x"}, "use_delay_pattern is 'x'"),
        ({"skip_audio_tower": False}, "has a Whisper audio tower"),
        ({"text_config": {"hidden_act": "none"}}, "config.json describes no model: KeyError"),
        ({"text_config": {"rms_norm_eps": float("nan")}}, "text_config.rms_norm_eps is nan"),
        ({"text_config": {"model_type": "opt"}}, "text_config.model_type is 'opt': Input should be 'llama'"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}}, "rope parameters is {'factor': 2.0"),
        ({"text_config": {"rope_theta": -1}}, "rope_theta is -1.0: Input should be greater than 0"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config is {'quant_method'"),
        ({"architectures": ["\udcff"]}, "cannot be read: lone leading surrogate"),
    ],
)
def test_a_config_of_another_model_is_refused(changes, words, copy):
    config = json.loads((copy / "config.json").read_text())
    if isinstance(changes.get("text_config"), dict):
        changes = {"text_config": config["text_config"] | changes["text_config"]}
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError) as caught:
        open_base(str(copy))
    assert words in str(caught.value) and all(
        str(copy) in line or "config.json" in line for line in caught.value.problems
    )


def test_what_transformers_adds_to_every_config_changes_nothing(copy):
    config, was = json.loads((copy / "config.json").read_text()), read_checkpoint_config(copy).to_dict()
    config |= {"is_encoder_decoder": True, "torchscript": True, "auto_map": {"AutoModel": "evil.X"}, "max_length": "x"}
    config |= {"to_diff_dict": 1, "__dict__": {}, "audio_encoder_config": 5}
    config["text_config"] |= {"output_attentions": True, "pruned_heads": {"a": 1}, "_attn_implementation": "nope"}
    (copy / "config.json").write_text(json.dumps(config))
    assert read_checkpoint_config(copy).to_dict() == was


def test_random_changes_end_in_lines_and_never_in_a_traceback(copy):
    draw, file = random.Random(0), copy / "config.json"
    was = json.loads(file.read_text())
    values = [None, True, -1, 0, 3, 2.5, 10**12, "x", [], [1], [None], {}, {"a": 1}]
    refused = 0
    for _ in range(60):
        config = json.loads(file.read_text()) if draw.random() < 0.2 else json.loads(json.dumps(was))
        part = draw.choice([config, config["text_config"]]) if isinstance(config.get("text_config"), dict) else config
        part[draw.choice(sorted(part))] = draw.choice(values)
        file.write_text(json.dumps(config))
        try:
            open_base(str(copy))
        except ConfigError as error:
            refused += 1
            assert all(line.startswith("--base_ckpt: ") and "\n" not in line for line in error.problems)
            file.write_text(json.dumps(was))
    assert refused > 20
