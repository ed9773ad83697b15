"""Base checkpoints: what loads, what is refused, and that every weight is accounted for."""

import json
import shutil

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from higgs_ds.config import DEFAULT_LORA_TARGETS, ConfigError
from higgs_ds.model import (
    attach_lora,
    check_weights,
    initial_lora,
    layer_sizes,
    load_base,
    locate_checkpoint,
    read_model_config,
)
from higgs_ds.tiny import SPECIAL_TOKENS, write_tiny


def test_upstreams_own_classes_load_the_tiny_checkpoint(tiny_dir):
    model, info = HiggsAudioModel.from_pretrained(tiny_dir, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    for token in SPECIAL_TOKENS:
        (token_id,) = tokenizer.encode(token, add_special_tokens=False)
        assert tokenizer.decode([token_id]) == token
    text = "<|begin_of_text|>Ünïcode ☂, and\n\nnewlines"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert model.config.use_delay_pattern and model.config.audio_num_codebooks == 8
    assert model.audio_decoder_proj.audio_lm_head.weight.shape == (8 * 1026, 64)


def test_the_same_seed_gives_the_same_checkpoint(tiny_dir, tmp_path):
    write_tiny(tmp_path / "again", seed=0, hidden_size=64, num_layers=2)
    write_tiny(tmp_path / "other", seed=1, hidden_size=64, num_layers=2)
    base, again, other = (
        load_file(p / "model.safetensors") for p in (tiny_dir, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(base[name], again[name]) for name in base)
    assert not torch.equal(base["embed_tokens.weight"], other["embed_tokens.weight"])
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        write_tiny(tmp_path / "again")


@pytest.fixture
def copy(tiny_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dir, folder)
    return folder


def refused(folder) -> str:
    with pytest.raises(ConfigError) as caught:
        check_weights(folder, read_model_config(folder))
    return str(caught.value)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_extra_and_misshapen_weights_are_refused(copy):
    change_weights(copy, lambda w: w.pop("norm.weight"))
    change_weights(copy, lambda w: w.update({"stray.weight": torch.zeros(2)}))
    change_weights(copy, lambda w: w.update({"embed_tokens.weight": torch.zeros(3, 64)}))
    text = refused(copy)
    assert "missing weight norm.weight [64]" in text
    assert "extra weight stray.weight [2]" in text
    assert "embed_tokens.weight has shape [3, 64], the model needs [271, 64]" in text


def test_truncated_and_absent_files_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors cannot be read" in refused(copy)
    file.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert "no .safetensors file" in refused(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "higgs_audio_v2"}, ["audio_token_id is 128016, the tokenizer's <|AUDIO_OUT|> is 267"]),
        ({"model_type": "llama"}, ["model_type 'llama', expected 'higgs_audio'"]),
        ({"skip_audio_tower": False}, ["Whisper audio tower"]),
    ],
)
def test_other_checkpoints_are_refused(changes, words, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError) as caught:
        read_model_config(copy)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        locate_checkpoint(name)


def test_the_sizes_of_a_layer(tiny_dir, tiny_config):
    weights = [p for p in load_base(tiny_dir, tiny_config, "fp32").layers[0].parameters() if p.ndim == 2]
    assert layer_sizes(tiny_config).parameters == sum(weight.numel() for weight in weights)
    assert layer_sizes(tiny_config).widest == max(max(weight.shape) for weight in weights)


def lora_on(model, **changes):
    settings = dict(rank=4, alpha=8, dropout=0.0, target_modules=list(DEFAULT_LORA_TARGETS), seed=5, base_name="b")
    return attach_lora(model, **(settings | changes))


def test_lora_starts_from_its_own_generator(tiny_dir, tiny_config):
    def start(seed, noise):
        torch.manual_seed(noise)
        model = lora_on(load_base(tiny_dir, tiny_config, "fp32"), seed=seed)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    one, two, other = start(5, 1), start(5, 2), start(6, 1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all("lora_" in name for name in one)
    # Text and audio FFN and the shared attention of both layers, A and B each.
    assert len(one) == 2 * 2 * (4 + 3 + 3)
    a = [name for name in one if "lora_A" in name]
    assert not any(torch.equal(one[name], other[name]) for name in a)
    assert all(not one[name].any() for name in one if "lora_B" in name)
    values = initial_lora("x.lora_A.default.weight", (64, 256), 0)
    assert values.abs().max() <= 1 / 16 and abs(float(values.std()) - 1 / 16 / 3**0.5) < 1e-3


def test_a_target_that_names_nothing_is_refused(tiny_dir, tiny_config):
    with pytest.raises(ConfigError, match="'q_prj' names no linear layer \\(did you mean 'q_proj'"):
        lora_on(load_base(tiny_dir, tiny_config, "fp32"), target_modules=["q_prj"])


def test_a_head_that_is_a_target_trains(tiny_dir, tiny_config):
    model = lora_on(load_base(tiny_dir, tiny_config, "fp32"), target_modules=["text_lm_head", "audio_lm_head"])
    assert sum("lora_B" in name for name, p in model.named_parameters() if p.requires_grad) == 2


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_base_is_frozen_and_in_its_dtype(dtype, wanted, tiny_dir, tiny_config):
    model = load_base(tiny_dir, tiny_config, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert not any(p.requires_grad for p in model.parameters())
    upstream = HiggsAudioModel.from_pretrained(tiny_dir, torch_dtype=wanted)
    inputs = {"input_ids": torch.arange(16)[None], "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    assert torch.equal(model.eval()(**inputs).logits, upstream.eval()(**inputs).logits)
    assert {p.dtype for p in lora_on(model).parameters()} == {wanted}
