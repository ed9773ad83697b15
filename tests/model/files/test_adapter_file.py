"""Adapters as somebody else may have made them: one line each, and nothing of them runs."""

from __future__ import annotations

import contextlib
import json
import random
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from higgs_ds.errors import ConfigError
from higgs_ds.model.files.adapter_file import (
    CONFIG,
    WEIGHTS,
    check_base,
    read_adapter,
    read_adapter_config,
    revision_for,
    same_base,
)
from higgs_ds.model.higgs_v2.load import adaptable_modules
from higgs_ds.options.sections import BASE_NAMES, DEFAULT_BASE, DEFAULT_BASE_REVISION


def write_adapter(folder, config, *, rank=4, targets=("q_proj", "audio_lm_head"), whole=(), **fields):
    """An adapter as PEFT writes it, with random weights; returns its path."""
    settings = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "b/ase", "modules_to_save": list(whole) or None}
    LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets), **settings).save_pretrained(folder)
    edit(folder, **fields)
    draw = torch.Generator().manual_seed(1)
    weights = {}
    linears, savable = adaptable_modules(config)
    for name, (out, width) in (linears | savable).items():
        if name.split(".")[-1] in targets:
            weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width, generator=draw)
            weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * 0.1
        if name.split(".")[-1] in whole:
            weights[f"base_model.model.{name}.weight"] = torch.randn(out, width, generator=draw).bfloat16()
    save_file(weights, folder / WEIGHTS)
    return folder


def edit(folder, **fields):
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | fields))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_config):
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_config)


@pytest.fixture
def adapter(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "adapter")


def refused(adapter, tiny_config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_adapter(adapter, adaptable_modules(tiny_config), read_adapter_config(adapter))
    for line in caught.value.problems:
        assert line.startswith("--adapter: ") and "\n" not in line and len(line) < 700, line
    return caught.value.problems


def test_what_peft_writes_is_read_whole(whole, tiny_config):
    config = read_adapter_config(whole)
    assert (config.rank, config.alpha, config.scale, config.base_name) == (4, 8.0, 2.0, "b/ase")
    adapter = read_adapter(whole, adaptable_modules(tiny_config), config)
    assert set(adapter.weights) == {f"layers.{n}.self_attn.q_proj" for n in (0, 1)} | {
        "audio_decoder_proj.audio_lm_head"
    }
    stored = load_file(whole / WEIGHTS)
    assert all(torch.equal(adapter.state_dict()[key], value) for key, value in stored.items())
    a, b = adapter.weights["layers.1.self_attn.q_proj"]
    assert torch.allclose(adapter.delta_rows("layers.1.self_attn.q_proj", 3, 9), 2 * (b @ a)[3:9])


@pytest.mark.parametrize(
    "fields",
    [
        dict(zip(("new_a", "new_b", "new_c", "new_d", "new_e", "new_f"), (None, False, 0, "", [], {}), strict=True)),
        {"auto_mapping": {"base_model_class": "HiggsAudioModel", "parent_library": "os"}, "task_type": None},
        {"peft_version": "0.20.0", "lora_dropout": 0.1, "megatron_core": "os", "qalora_group_size": 32},
    ],
    ids=["empty fields of a newer PEFT", "auto_mapping", "nothing that touches a weight"],
)
def test_fields_that_change_no_weight_are_read_over(whole, adapter, fields):
    edit(adapter, **fields)
    assert read_adapter_config(adapter) == read_adapter_config(whole)


def test_rslora_scales_by_the_root_of_the_rank(adapter):
    edit(adapter, use_rslora=True)
    assert read_adapter_config(adapter).scale == 8 / 4**0.5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is {'a': 1}: not plain LoRA"),
        ({"use_dora": True}, "use_dora is True: not plain LoRA"),
        ({"rank_pattern": {"(a+)+$": 3}}, "rank_pattern is {'(a+)+$': 3}: not plain LoRA"),
        ({"bias": "all"}, "bias is 'all': not plain LoRA"),
        ({"peft_type": "BONE"}, "peft_type is 'BONE': Input should be 'LORA'"),
        ({"something_new": ["layers.0"]}, "'something_new' is ['layers.0']: PEFT 0.18.1 does not know this field"),
        (
            {"modules_to_save": ["norm"]},
            "modules_to_save: 'norm' is not a module that can be trained in full: audio_",
        ),
        ({"modules_to_save": ["audio_lm_head"]}, "audio_lm_head has LoRA and is listed in modules_to_save too"),
        ({"modules_to_save": ["text_lm_head"]}, "missing weight base_model.model.audio_decoder_proj.text_lm_head"),
        ({"r": 0}, "r is 0: Input should be greater than or equal to 1"),
        ({"r": 10**9}, "r is 1000000000: Input should be less than"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"target_modules": "(a+)+$"}, "target_modules is '(a+)+$': Input should be a valid list"),
        ({"target_modules": ["q_proj", "q_prj"]}, "'q_prj' matches no linear layer of the base"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer of the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', expected true, false, null"),
        ({"base_model_name_or_path": "\ud800"}, "cannot be read: "),
        ({"r": 8}, "lora_A.weight has shape [4, 64], the base and r need [8, 64]"),
        ({"target_modules": ["q_proj"]}, "extra weight base_model.model.audio_decoder_proj.audio_lm_head"),
        ({"target_modules": ["q_proj", "k_proj", "audio_lm_head"]}, "missing weight base_model.model.layers.0"),
    ],
    ids=str,
)
def test_a_config_that_is_not_plain_lora_is_refused_by_name(fields, words, adapter, tiny_config):
    edit(adapter, **fields)
    assert any(words in line for line in refused(adapter, tiny_config))


@pytest.mark.parametrize("began", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_how_a_began_does_not_matter_where_the_base_was_left_alone(began, whole, adapter):
    edit(adapter, init_lora_weights=began, eva_config={"rho": 2.0} if began == "eva" else None)
    assert read_adapter_config(adapter) == read_adapter_config(whole)


def test_modules_that_were_trained_whole_are_read_and_checked_like_the_others(tmp_path, tiny_config):
    folder = write_adapter(
        tmp_path, tiny_config, targets=["q_proj"], whole=["audio_codebook_embeddings", "audio_lm_head"]
    )
    config = read_adapter_config(folder)
    adapter = read_adapter(folder, adaptable_modules(tiny_config), config)
    assert adapter.describe()["trained whole"] == "audio_codebook_embeddings, audio_decoder_proj.audio_lm_head"
    stored, ours = load_file(folder / WEIGHTS), adapter.state_dict()
    assert stored.keys() == ours.keys() and all(torch.equal(value, ours[key]) for key, value in stored.items())
    key = "base_model.model.audio_codebook_embeddings.weight"
    for value, words in (
        (stored[key][1:].clone(), f"{key} has shape [8207, 64], the base and r need [8208, 64]"),
        (stored[key].float().index_fill(0, torch.tensor([8000]), torch.inf), f"{key} holds NaN or infinity"),
        (stored[key].to(torch.int8), f"{key} is I8, expected one of BF16, F16, F32"),
    ):
        save_file(stored | {key: value}, folder / WEIGHTS)
        assert words in refused(folder, tiny_config)[0]


@pytest.mark.parametrize("text", ["", "[]", '{"r": 4}', "\xff\xfe", "[" * 100_000], ids=lambda t: t[:8])
def test_a_config_that_is_none_is_refused(text, adapter, tiny_config):
    (adapter / CONFIG).write_bytes(text.encode("latin-1"))
    assert CONFIG in refused(adapter, tiny_config)[0]


def test_a_folder_without_a_config_is_refused(adapter, tiny_config):
    (adapter / CONFIG).unlink()
    assert refused(adapter, tiny_config) == [f"--adapter: {adapter} holds no adapter_config.json"]


def test_random_bytes_end_in_lines_and_never_in_a_traceback(whole, adapter, tiny_config):
    draw = random.Random(0)
    for name in (CONFIG, WEIGHTS):
        was = (whole / name).read_bytes()
        for _ in range(40):
            changed, at = bytearray(was), draw.randrange(min(len(was), 2000))
            changed[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(1, 4))
            (adapter / name).write_bytes(changed)
            with contextlib.suppress(ConfigError):
                read_adapter(adapter, adaptable_modules(tiny_config), read_adapter_config(adapter))
        (adapter / name).write_bytes(was)


def damaged(change):
    def apply(adapter):
        weights = {key: value.clone() for key, value in load_file(adapter / WEIGHTS).items()}  # not mapped from it
        change(weights, sorted(weights)[0])
        save_file(weights, adapter / WEIGHTS)

    return apply


def truncated(adapter):
    file = adapter / WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])


def pickled(adapter):
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def not_finite(weights, key):
    weights[key][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged(lambda weights, key: weights.pop(key)), "missing weight base_model.model.audio_decoder_proj"),
        (damaged(lambda weights, key: weights.update(foreign=torch.ones(1))), "extra weight foreign [1]"),
        (damaged(not_finite), "lora_A.weight holds NaN or infinity"),
        (damaged(lambda w, key: w.update({key: w[key].to(torch.int32)})), "is I32, expected one of BF16, F16, F32"),
        (damaged(lambda w, key: w.update({key: w[key][:, :5].clone()})), "has shape [4, 5]"),
        (truncated, "cannot be read"),
        (pickled, "is missing; adapter_model.bin is a pickle and is not loaded"),
    ],
)
def test_weights_that_are_not_all_there_and_nothing_else_are_refused(damage, words, adapter, tiny_config):
    damage(adapter)
    assert words in refused(adapter, tiny_config)[0]


def test_many_problems_are_listed_and_counted(adapter, tiny_config):
    save_file({f"x{n}": torch.ones(1) for n in range(300)}, adapter / WEIGHTS)
    assert len(refused(adapter, tiny_config)) == 21


def test_another_base_is_refused(adapter, tmp_path, monkeypatch):
    config = read_adapter_config(adapter)
    check_base(config, "b/ase", None)
    with pytest.raises(ConfigError, match=r"trained on 'b/ase', --base_ckpt is 'b/other'; --other_base takes it"):
        check_base(config, "b/other", None)
    edit(adapter, revision="one")
    config = read_adapter_config(adapter)
    check_base(config, "b/ase", "one")
    with pytest.raises(ConfigError, match="b/ase at one'.* is 'b/ase at two'"):
        check_base(config, "b/ase", "two")
    for name in BASE_NAMES:  # no revision means the pinned one
        edit(adapter, base_model_name_or_path=name, revision="f" * 40)
        config = read_adapter_config(adapter)
        for base, revision in ((DEFAULT_BASE, None), (BASE_NAMES[1], None), (DEFAULT_BASE, DEFAULT_BASE_REVISION)):
            with pytest.raises(ConfigError, match=f"--base_revision {'f' * 40} loads that; --other_base"):
                check_base(config, base, revision)
        check_base(config, DEFAULT_BASE, "f" * 40)
    edit(adapter, revision=DEFAULT_BASE_REVISION)
    check_base(read_adapter_config(adapter), DEFAULT_BASE, None)
    edit(adapter, base_model_name_or_path=None)
    check_base(read_adapter_config(adapter), "anything", "two")


def test_the_same_base_under_other_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs/base")
    assert same_base("runs/base", str(tmp_path / "runs/base")) and same_base("./link", "runs/base/")
    assert same_base("bosonai/higgs-audio-v2-generation-3B-base", "bosonai/higgs-tts-2-3b-base")
    cached = "/home/a/hub/models--bosonai--higgs-tts-2-3b-base/snapshots/0123"
    assert same_base("bosonai/higgs-tts-2-3b-base", cached)
    assert not same_base("runs/base", "runs/other") and not same_base("a/b", "/a/b")
    assert same_base(cached, f"/elsewhere{cached}/") and not same_base(cached, cached.replace("0123", "4567"))


def test_the_revision_of_a_base_is_what_the_adapter_was_trained_on(adapter, tmp_path):
    edit(adapter, revision="one")
    config = read_adapter_config(adapter)
    assert revision_for(config, "b/ase", None) == "one" and revision_for(config, "b/ase", "two") == "two"
    assert revision_for(config, "o/ther", None) is None and revision_for(config, str(tmp_path), None) is None
    assert revision_for(config, DEFAULT_BASE, None) == revision_for(None, DEFAULT_BASE, None) == DEFAULT_BASE_REVISION
    for revision in ("one", "two"):  # the snapshots in the hub's cache are folders
        (tmp_path / f"models--b--ase/snapshots/{revision}").mkdir(parents=True)
    check_base(config, str(tmp_path / "models--b--ase/snapshots/one"), None)
    with pytest.raises(ConfigError, match="trained on 'b/ase at one', --base_ckpt is .*"):
        check_base(config, str(tmp_path / "models--b--ase/snapshots/two"), None)
    edit(adapter, base_model_name_or_path=str(tmp_path / "models--b--ase/snapshots/two"), revision=None)
    config = read_adapter_config(adapter)
    assert revision_for(config, "b/ase", None) == "two"
    with pytest.raises(ConfigError, match="--base_revision two loads that"):
        check_base(config, "b/ase", "one")
