"""Merging and exporting: what is written, read back and loaded by plain boson_multimodal."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from higgs_ds.errors import ConfigError
from higgs_ds.model.files.adapter_file import read_adapter, read_adapter_config
from higgs_ds.model.files.weight_files import Planned, shards, weight_headers, write_checkpoint_weights
from higgs_ds.model.higgs_v2.checkpoint import open_base
from higgs_ds.model.higgs_v2.config import read_checkpoint_config
from higgs_ds.model.higgs_v2.layouts import transformers_name
from higgs_ds.model.higgs_v2.load import adaptable_modules, load_checkpoint, wanted_weights
from higgs_ds.model.higgs_v2.merge import merge, prove, prove_tokenizer
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS, SAVABLE_MODULES
from higgs_ds.model.lora import attach_adapter
from higgs_ds.tools.cli import main
from tests.model.files.test_adapter_file import edit, write_adapter
from tests.model.higgs_v2.test_layouts import translated

PROJECTIONS = [f"self_attn.{one}_proj" for one in "qkvo"]
PROJECTIONS += [f"{mlp}.{one}_proj" for mlp in ("mlp", "audio_mlp") for one in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, tiny_config, tiny_dir):
    folder = tmp_path_factory.mktemp("adapter")
    targets = (*DEFAULT_LORA_TARGETS, "audio_lm_head")
    whole = ("audio_codebook_embeddings", "text_lm_head")
    return write_adapter(folder, tiny_config, targets=targets, whole=whole, base_model_name_or_path=str(tiny_dir))


def run(capsys, *argv) -> tuple[int, list[str]]:
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    return code, (said.out + said.err).splitlines()


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_dir, adapter_dir):
    """The same adapter merged in both layouts."""
    folder = tmp_path_factory.mktemp("merged")
    for layout in ("boson", "transformers"):
        flags = ["--base_ckpt", tiny_dir, "--adapter", adapter_dir, "--output_dir", folder / layout]
        assert main(["merge", *map(str, flags), "--layout", layout, "--dtype", "fp32"]) == 0
    return folder


def test_boson_loads_it_with_nothing_missing_and_the_weights_are_pefts(merged, tiny_dir, adapter_dir):
    model, report = HiggsAudioModel.from_pretrained(merged / "boson", output_loading_info=True)
    assert not any(report.values()), report
    pefts = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(tiny_dir), adapter_dir).merge_and_unload()
    wanted, changed = pefts.state_dict(), set()
    ours = read_adapter(adapter_dir, adaptable_modules(model.config), read_adapter_config(adapter_dir))
    # As `generate` has it.
    spoken = attach_adapter(HiggsAudioModel.from_pretrained(tiny_dir), ours).merge_and_unload().state_dict()
    base = {name: value.float() for file in tiny_dir.glob("*.safetensors") for name, value in load_file(file).items()}
    for name, value in model.state_dict().items():
        assert torch.allclose(value, wanted[name], atol=1e-6, rtol=0), name
        assert torch.equal(spoken[name], wanted[name]), name
        changed |= {name} if not torch.equal(value, base[name]) else set()
    layers = {f"layers.{n}.{part}.weight" for n in (0, 1) for part in PROJECTIONS}
    assert changed == layers | {f"{name}.weight" for name in SAVABLE_MODULES} and wanted.keys() == base.keys()


def test_both_layouts_hold_the_same_values(merged, tiny_config):
    one, two = load_file(merged / "boson/model.safetensors"), load_file(merged / "transformers/model.safetensors")
    assert {transformers_name(name) for name in one} == set(two)
    assert all(torch.equal(value, two[transformers_name(name)]) for name, value in one.items())
    assert len(open_base(str(merged / "transformers")).stored) == len(one)
    names = {path.name for path in (merged / "transformers").iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"processor_config.json", "preprocessor_config.json", "chat_template.jinja", "model.safetensors"}
    settings = json.loads((merged / "transformers/generation_config.json").read_text())
    assert settings["ras_win_len"] == 7 and settings["ras_win_max_num_repeat"] == 2


def test_a_model_read_from_either_layout_is_the_same(merged):
    inputs = {"input_ids": torch.arange(16)[None], "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    found = []
    for layout in ("boson", "transformers"):
        config = read_checkpoint_config(merged / layout)
        model = load_checkpoint(HiggsAudioModel, merged / layout, config, torch.bfloat16).eval()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        found.append(model(**inputs).logits)
    assert torch.equal(*found)


def test_the_other_way_round(merged, tmp_path, capsys):
    """A base in transformers' layout, written in Boson's and in another dtype."""
    flags = ("--base_ckpt", merged / "transformers", "--layout", "boson", "--output_dir", tmp_path / "out")
    code, said = run(capsys, "merge", *flags, "--dtype", "bf16")
    assert code == 0 and "nothing merged" in said[-1]
    model, report = HiggsAudioModel.from_pretrained(tmp_path / "out", torch_dtype="auto", output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.bfloat16
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert not [key for part in (fields, fields["text_config"]) for key in part if key.startswith("_")]
    was = load_file(merged / "boson/model.safetensors")
    assert all(torch.equal(value, was[name].bfloat16()) for name, value in model.state_dict().items())


def test_shards_and_index_are_the_hubs(tmp_path):
    """At real size: three files; here with a limit that a test can afford, read by the library."""
    config = translated()
    real = [Planned(name, shape, torch.bfloat16) for name, shape in wanted_weights(config).items()]
    files = shards(real)
    assert len(files) == 3 and all(sum(t.num_bytes for t in file) <= 5e9 for file in files)
    assert sum(t.num_bytes for t in real) == 11_542_566_912

    planned = [Planned(f"t{n}", (n, 3), torch.float32) for n in range(5)] + [Planned("one", (), torch.bfloat16)]

    def pieces(tensor):
        value = torch.full(tensor.shape, float(len(tensor.shape)), dtype=tensor.dtype)
        yield from value.split(2) if tensor.shape else [value]

    write_checkpoint_weights(tmp_path, planned, pieces, limit=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == (1 + 2 + 3 + 4) * 12 + 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as tensors:
            (tensor,) = [one for one in planned if one.name == name]
            value = tensors.get_tensor(name)
            assert tuple(value.shape) == tensor.shape and value.dtype == tensor.dtype and (value == value.ndim).all()
            assert tensors.metadata() == {"format": "pt"}
    assert set(index["weight_map"]) == {tensor.name for tensor in planned}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
    with pytest.raises(ValueError, match="0 bytes written, expected 12"):
        write_checkpoint_weights(tmp_path, planned[1:2], lambda tensor: iter(()))


def test_what_was_written_wrongly_is_found(merged, tiny_dir, adapter_dir, tmp_path):
    """A value that was changed or left, a name that is missing, a shape and a dtype: in what a sample looks at."""
    base = open_base(str(tiny_dir))
    adapter = read_adapter(adapter_dir, adaptable_modules(base.config), read_adapter_config(adapter_dir))
    plan = {name: Planned(name, one.shape, torch.float32) for name, one in base.stored.items()}
    assert prove(base, adapter, merged / "boson", "boson", plan) == (12, 10)
    copy = shutil.copytree(merged / "boson", tmp_path / "copy")
    was = {name: value.clone() for name, value in load_file(copy / "model.safetensors").items()}

    def broken(**changes) -> str:
        values = was | changes
        stored = [Planned(n, tuple(v.shape), v.dtype) for n, v in values.items() if v is not None]
        write_checkpoint_weights(copy, stored, lambda tensor: iter([values[tensor.name]]))
        with pytest.raises(ConfigError) as caught:
            prove(base, adapter, copy, "boson", plan)
        return str(caught.value)

    layer, head = "layers.0.self_attn.q_proj.weight", "audio_decoder_proj.text_lm_head.weight"
    assert f"{layer} is not the sum of base and adapter" in broken(**{layer: was[layer] * 1.001})
    assert f"{head} is not the sum of base and adapter" in broken(**{head: base.stored[head].read().float()})
    assert "embed_tokens.weight is not the sum" in broken(**{"embed_tokens.weight": was["embed_tokens.weight"] + 1e-3})
    assert "missing weight norm.weight" in broken(**{"norm.weight": None})
    assert "has shape [65]" in broken(**{"norm.weight": torch.ones(65)})
    assert "embed_tokens.weight is not the sum" in broken(
        **{"embed_tokens.weight": was["embed_tokens.weight"].bfloat16()}
    )


def test_nothing_is_overwritten_and_nothing_half_written_stays(merged, tiny_dir, adapter_dir, tmp_path, capsys):
    flags = ("merge", "--base_ckpt", tiny_dir, "--adapter", adapter_dir, "--layout", "boson", "--output_dir")
    before = (merged / "boson/model.safetensors").stat().st_mtime_ns
    code, said = run(capsys, *flags, merged / "boson")
    assert code == 2 and said == [f"--output_dir: {merged / 'boson'} exists; it is not overwritten"]
    assert (merged / "boson/model.safetensors").stat().st_mtime_ns == before

    (tmp_path / "file").write_text("kept")
    code, said = run(capsys, *flags, tmp_path / "file" / "out")
    assert code == 2 and len(said) == 1 and "cannot be written" in said[0]

    base = open_base(str(tiny_dir))
    lora = read_adapter(adapter_dir, adaptable_modules(base.config), read_adapter_config(adapter_dir))
    lora.weights["layers.0.mlp.up_proj"] = lora.weights["layers.0.self_attn.k_proj"]
    with pytest.raises(RuntimeError):
        merge(base, lora, tmp_path / "half", "boson", dtype=None, codec="a/b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(weight_headers(merged / "boson")) == len(base.stored)


def test_wrong_bases_are_listed_by_their_own_names(merged, tmp_path, capsys):
    copy = shutil.copytree(merged / "transformers", tmp_path / "copy")
    weights = {name: value.clone() for name, value in load_file(copy / "model.safetensors").items()}
    del weights["text_lm_head.weight"]
    weights["embed_tokens.weight"] = torch.ones(2)
    weights["model.norm.weight"] = torch.ones(3)
    plan = [Planned(name, tuple(value.shape), value.dtype) for name, value in weights.items()]
    write_checkpoint_weights(copy, plan, lambda tensor: iter([weights[tensor.name]]))
    code, said = run(capsys, "merge", "--base_ckpt", copy, "--output_dir", tmp_path / "x", "--layout", "boson")
    assert code == 2 and len(said) == 4
    assert "missing weight text_lm_head.weight [512, 64]" in said[0]
    assert "extra weight embed_tokens.weight [2]" in said[1]
    assert "weight model.norm.weight has shape [3], the model needs [64]" in said[2]
    assert "without text_lm_head.weight it speaks in transformers alone, and cannot be trained" in said[3]


@pytest.mark.parametrize("layout", ["boson", "transformers"])
@pytest.mark.parametrize("gone", ["tokenizer.json", "tokenizer_config.json"])
def test_a_base_without_its_tokenizer_is_not_merged(gone, layout, tiny_dir, tmp_path, capsys):
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    (base / gone).unlink()
    flags = ("--base_ckpt", base, "--layout", layout, "--output_dir", tmp_path / "out")
    code, said = run(capsys, "merge", *flags)
    assert code == 2 and said[0].startswith(f"--base_ckpt: {base}") and gone in said[0]
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_not_copied_whole_is_found(tiny_dir, tmp_path, capsys, monkeypatch):
    flags = ("--base_ckpt", tiny_dir, "--layout", "boson", "--output_dir", tmp_path / "out")
    monkeypatch.setattr("higgs_ds.model.higgs_v2.merge.TOKENIZER_FILES", ("tokenizer_config.json",))
    code, said = run(capsys, "merge", *flags)
    assert code == 2 and said[0].startswith("--output_dir: ") and "tokenizer" in said[0]
    assert not (tmp_path / "out").exists()
    base, other = open_base(str(tiny_dir)), shutil.copytree(tiny_dir, tmp_path / "other")
    prove_tokenizer(base, other)
    state = json.loads((other / "tokenizer.json").read_text())
    state["added_tokens"][-1]["content"] = "another"
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="its tokenizer differs"):
        prove_tokenizer(base, other)


@pytest.mark.parametrize(
    ("name", "value", "dtype", "words"),
    [
        ("norm.weight", float("nan"), "fp32", ["norm.weight holds NaN or infinity", "norm.weight holds NaN"]),
        (
            "layers.1.mlp.up_proj.weight",
            1e6,
            "fp16",
            ["beyond float16; fp32 holds them", "infinity in fp16; --dtype bf16"],
        ),
        ("norm.weight", 3e38, "fp32", [None, "the model computes NaN or infinity in fp32; the weights are broken"]),
    ],
)
def test_weights_that_are_not_finite_are_neither_written_nor_spoken_with(
    name, value, dtype, words, tiny_dir, codec_dir, tmp_path, capsys
):
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    file = weight_headers(base)[name].file
    weights = {key: tensor.clone().float() for key, tensor in load_file(file).items()}
    weights[name].view(-1)[0] = value
    save_file(weights, file, metadata={"format": "pt"})
    flags = ("--base_ckpt", base, "--dtype", dtype)
    code, said = run(capsys, "merge", *flags, "--layout", "boson", "--output_dir", tmp_path / "out")
    if words[0]:
        assert code == 2 and len(said) == 1 and words[0] in said[0] and not (tmp_path / "out").exists()
    speak = ("--text", "hello", "--output_file", tmp_path / "a.wav", "--max_new_tokens", 12)
    code, said = run(capsys, "generate", *flags, "--codec", codec_dir, *speak, "--sampler", "served")
    assert code == 2 and len(said) == 1 and words[1] in said[0], said
    assert not (tmp_path / "a.wav").exists()


def test_rslora_is_merged_as_peft_merges_it_and_exported(adapter_dir, tiny_dir, tmp_path, capsys):
    rooted = shutil.copytree(adapter_dir, tmp_path / "rooted")
    edit(rooted, use_rslora=True)
    out = tmp_path / "out"
    flags = ["--base_ckpt", tiny_dir, "--adapter", rooted, "--output_dir", out, "--layout", "boson", "--dtype", "fp32"]
    assert run(capsys, "merge", *flags)[0] == 0
    pefts = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(tiny_dir), rooted).merge_and_unload().state_dict()
    for name, value in HiggsAudioModel.from_pretrained(out).state_dict().items():
        assert torch.allclose(value, pefts[name], atol=1e-6, rtol=0), name
    assert (
        run(capsys, "export", "--adapter", rooted, "--layout", "transformers", "--output_dir", tmp_path / "x")[0] == 0
    )
    assert json.loads((tmp_path / "x/adapter_config.json").read_text())["use_rslora"] is True
