"""Base checkpoints: what loads, what is refused, and that every weight is accounted for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from higgs_ds.errors import ConfigError
from higgs_ds.model.base import locate_checkpoint
from higgs_ds.model.higgs_v2.checkpoint import load_base, open_base
from higgs_ds.model.higgs_v2.config import read_checkpoint_config
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS, MODULES
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.model.higgs_v2.tiny import SPECIAL_TOKENS, byte_tokenizer, write_tiny
from higgs_ds.model.higgs_v2.upstream import HiggsAudioForTraining
from higgs_ds.model.lora import attach_lora, initial_lora


def test_upstreams_own_classes_load_the_tiny_checkpoint(tiny_dir):
    model, info = HiggsAudioModel.from_pretrained(tiny_dir, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    for token in SPECIAL_TOKENS.values():
        (token_id,) = tokenizer.encode(token, add_special_tokens=False)
        assert tokenizer.decode([token_id]) == token
    text = "<|begin_of_text|>Ünïcode ☂, and\n\nnewlines"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert model.config.use_delay_pattern and model.config.audio_num_codebooks == 8
    assert model.audio_decoder_proj.audio_lm_head.weight.shape == (8 * 1026, 64)


# Config fields of Boson's checkpoint, but for sizes; ids in its vocabulary of 128,256; and what the config in
# transformers' layout becomes.
FACTS = json.loads(Path(__file__).with_name("boson.json").read_text())


def test_the_tiny_checkpoint_is_of_bosons_kind(tiny_dir):
    config = json.loads((tiny_dir / "config.json").read_text())
    assert config | FACTS["config"] == config and config["text_config"] | FACTS["text"] == config["text_config"]
    assert "tie_word_embeddings" not in config and config["audio_dual_ffn_layers"] == [0, 1]
    assert config["audio_encoder_config"]["d_model"] == 1280 and config["hidden_size"] == 64
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    assert type(tokenizer) is PreTrainedTokenizerFast and len(tokenizer) == config["text_config"]["vocab_size"] == 512
    shift = 128256 - 512
    for token, boson_id in FACTS["tokens"].items():
        assert tokenizer.convert_tokens_to_ids(token) == boson_id - shift, token
    ids = {"pad_token_id": 128001, "audio_in_token_idx": 128015, "audio_out_token_idx": 128016}
    ids |= {"audio_out_bos_token_id": 128013, "audio_eos_token_id": 128012}
    assert {name: config[name] + shift for name in ids} == ids
    generation = json.loads((tiny_dir / "generation_config.json").read_text())
    assert {name: generation[f"{name}_token_id"] + shift for name in ("bos", "eos", "pad")} == {
        "bos": 128000,
        "eos": 128001,
        "pad": 128001,
    }
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tiny_dir / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    weights = {name: tensor for shard in shards for name, tensor in load_file(tiny_dir / shard).items()}
    assert {name: index["weight_map"][name] for name in weights} == index["weight_map"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in weights.values())


def test_the_same_seed_gives_the_same_checkpoint(tiny_dir, tmp_path):
    write_tiny(tmp_path / "again", seed=0, hidden_size=64, num_layers=2)
    write_tiny(tmp_path / "other", seed=1, hidden_size=64, num_layers=2)
    first = "model-00001-of-00003.safetensors"
    base, again, other = (load_file(p / first) for p in (tiny_dir, tmp_path / "again", tmp_path / "other"))
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
        open_base(str(folder))
    return str(caught.value)


def change_weights(folder, change, *, shard_of: str = "embed_tokens.weight"):
    """Changes the tensors of the shard that holds this one, and has the index say what is where then."""
    index_file = folder / "model.safetensors.index.json"
    file = folder / json.loads(index_file.read_text())["weight_map"][shard_of]
    weights = load_file(file)
    before = set(weights)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    index = json.loads(index_file.read_text())
    for name in before - set(weights):
        del index["weight_map"][name]
    index["weight_map"] |= dict.fromkeys(weights, file.name)
    index_file.write_text(json.dumps(index))


def test_missing_extra_misshapen_and_quantized_weights_are_refused(copy):
    change_weights(copy, lambda w: w.pop("norm.weight"), shard_of="norm.weight")
    change_weights(copy, lambda w: w.update({"stray.weight": torch.zeros(2)}))
    change_weights(copy, lambda w: w.update({"embed_tokens.weight": torch.zeros(3, 64)}))
    change_weights(copy, lambda w: w.update({"layers.0.mlp.up_proj.weight": torch.zeros(256, 64, dtype=torch.int8)}))
    text = refused(copy)
    assert "missing weight norm.weight [64]" in text
    assert "extra weight stray.weight [2]" in text
    assert "embed_tokens.weight has shape [3, 64], the model needs [512, 64]" in text
    assert "layers.0.mlp.up_proj.weight is I8, expected one of BF16, F16, F32: quantized weights do not train" in text


def test_how_a_checkpoint_would_generate_is_not_read(copy):
    (copy / "generation_config.json").write_text('{"suppress_tokens": [1], "eos_token_id": "x", "num_beams": []}')
    found = load_base(copy, read_checkpoint_config(copy), "fp32").generation_config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (256, 257, 257)
    assert found.suppress_tokens is None and found.num_beams == 1


def test_files_that_do_not_say_who_wrote_them_are_loaded_all_the_same(copy):
    """safetensors' own `save_file` leaves the mark out, and transformers' loader ends in a traceback without it."""
    config = read_checkpoint_config(copy)
    wanted = load_base(copy, config, "fp32").state_dict()
    for file, metadata in zip(sorted(copy.glob("*.safetensors")), (None, {"format": "tf"}, {"by": "me"}), strict=True):
        save_file({name: value.clone() for name, value in load_file(file).items()}, file, metadata=metadata)
    found = load_base(copy, config, "fp32").state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_weights_that_this_family_carries_along_are_left_out_and_mentioned_once(copy):
    strays = {
        "audio_codebook_weights": torch.ones(8),
        "rotary_emb.inv_freq": torch.ones(32),
        "layers.0.self_attn.rotary_emb.original_inv_freq": torch.ones(32),
    }
    change_weights(copy, lambda w: w.update(strays))
    base = open_base(str(copy))
    (note,) = base.notes
    assert all(name in note for name in strays)
    model, info = HiggsAudioForTraining.from_pretrained(copy, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert base.stored.keys() == model.state_dict().keys()


def test_two_weights_of_one_name_are_refused(copy):
    file = copy / "model-00001-of-00003.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    other = copy / "model-00002-of-00003.safetensors"
    save_file({**load_file(other), name: weights[name].clone()}, other, metadata={"format": "pt"})
    assert f"{name} is in {file.name} too" in refused(copy)


def test_truncated_absent_and_unnamed_files_are_refused(copy):
    file = copy / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model-00002-of-00003.safetensors cannot be read" in refused(copy)
    file.unlink()
    assert "model-00002-of-00003.safetensors is missing, the index names it" in refused(copy)
    index = copy / "model.safetensors.index.json"
    for content in ("{", "[]", '{"weight_map": {"a": "../up.safetensors"}}', '{"weight_map": {"a": "x.bin"}}'):
        index.write_text(content)
        assert "model.safetensors.index.json cannot be used" in refused(copy)
    index.unlink()
    assert "but neither model.safetensors nor model.safetensors.index.json" in refused(copy)
    for shard in copy.glob("*.safetensors"):
        shard.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert "no .safetensors file" in refused(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    other = byte_tokenizer()
    other._tokenizer.add_tokens(["one too many"])
    other.save_pretrained(copy)
    assert "its tokenizer has 513 tokens, the model 512" in refused(copy)
    state = json.loads((copy / "tokenizer.json").read_text())
    state["added_tokens"] = [token for token in state["added_tokens"] if "AUDIO_OUT" not in token["content"]]
    (copy / "tokenizer.json").write_text(json.dumps(state))
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "its tokenizer splits <|AUDIO_OUT|> into 13 tokens" in refused(copy)
    config = json.loads((copy / "config.json").read_text())
    byte_tokenizer().save_pretrained(copy)
    (copy / "config.json").write_text(json.dumps(config | {"audio_out_token_idx": 280}))
    assert "its tokenizer gives <|AUDIO_OUT|> the id 272, config.json 280" in refused(copy)
    (copy / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be loaded" in refused(copy)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("higgs_audio_v2", "audio_token_id is 128016, the tokenizer's <|AUDIO_OUT|> is 272"),
        ("llama", "model_type 'llama', expected 'higgs_audio'"),
    ],
)
def test_other_checkpoints_are_refused(model_type, words, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert words in refused(copy)


def test_a_name_that_no_card_can_hold_is_one_line():
    with pytest.raises(ConfigError, match=r"^--base_ckpt: 'a/\\udcff': 'utf-8' codec can't encode"):
        locate_checkpoint("a/\udcff")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        locate_checkpoint(name)


def test_the_sizes_of_a_layer(tiny_dir, tiny_config):
    weights = [p for p in load_base(tiny_dir, tiny_config, "fp32").layers[0].parameters() if p.ndim == 2]
    assert HiggsV2Spec.from_config(tiny_config).layer_parameters == sum(weight.numel() for weight in weights)
    assert HiggsV2Spec.from_config(tiny_config).widest == max(max(weight.shape) for weight in weights)


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
    with pytest.raises(ConfigError, match="'q_prj' matches no linear layer \\(did you mean 'q_proj'"):
        lora_on(load_base(tiny_dir, tiny_config, "fp32"), target_modules=["q_prj"])


@pytest.mark.parametrize(("group", "in_layer"), [("attention", 4), ("text_mlp", 3), ("audio_mlp", 3), ("all", 10)])
def test_a_group_of_targets_is_its_layers_and_no_others(group, in_layer, tiny_dir, tiny_config):
    suffixes = MODULES.targets([group])
    model = lora_on(load_base(tiny_dir, tiny_config, "fp32"), target_modules=suffixes)
    adapted = [name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
    assert len(adapted) == 2 * in_layer
    path = {"attention": ".self_attn.", "text_mlp": ".mlp.", "audio_mlp": ".audio_mlp."}.get(group, ".")
    assert all(path in name for name in adapted)


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
