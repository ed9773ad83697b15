"""DeepSpeed's JSON: everybody's files are taken, and a wrong value is one line, whatever it is."""

import json
import subprocess
import sys

import pytest

from higgs_ds.distributed.ds_config import (
    KEYS,
    LayerSizes,
    ignored_keys,
    nothing_to_shard_note,
    read_deepspeed_config,
    resolve,
)
from higgs_ds.distributed.engine import check_config
from higgs_ds.errors import ConfigError
from higgs_ds.options.parse import parse_args
from tests.conftest import ROOT

NEEDED = ["--train_manifest", "train.json", "--output_dir", "out"]
# As other trainers write them, axolotl with unprefixed names; `workers/all_configs.py` trains under the first two.
FROM_THE_FIELD = json.loads((ROOT / "tests/distributed/files_of_other_trainers.json").read_text())
SHIPPED = {file.name: json.loads(file.read_text()) for file in sorted((ROOT / "ds_configs").glob("*.json"))}


def resolved(raw=None, *, name="zero2.json", argv=(), world_size=4, on_cpu=True):
    config = parse_args([*NEEDED, "--deepspeed_config", f"ds_configs/{name}", *argv])
    raw = read_deepspeed_config(config.run.deepspeed_config) if raw is None else raw
    return resolve(raw, config, world_size=world_size, on_cpu=on_cpu, layer=LayerSizes(8192, 176_160_768))


def refused(raw, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(resolved(raw, **kwargs), "ds.json")
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_resolve_from_flags_alone(name):
    stage = int(name[4])
    dtype = "bf16" if stage else "fp32"
    flags = ["--batch_size", "2", "--grad_accum", "8", "--max_grad_norm", "0.5", "--dtype", dtype]
    out = resolved(name=name, argv=flags)
    zero = out["zero_optimization"]
    assert "auto" not in json.dumps(out) and zero["stage"] == stage
    assert out["train_batch_size"] == 64 and out["train_micro_batch_size_per_gpu"] == 2
    assert out["gradient_accumulation_steps"] == 8 and out["gradient_clipping"] == 0.5
    assert out["bf16"]["enabled"] is (dtype == "bf16") and not out["fp16"]["enabled"]
    assert ("offload_optimizer" in zero) is ("offload" in name)
    if stage == 3:
        assert zero["stage3_param_persistence_threshold"] >= 16 * 8192
        assert zero["stage3_prefetch_bucket_size"] == 176_160_768  # the real model's layer
        assert zero["reduce_scatter"] is False
    assert resolved(out, name=name, argv=flags) == out  # as --output_dir's ds_config.json is given back
    assert not zero.get("overlap_comm", False)  # on GPUs under stage 3 alone
    assert resolved(name=name, argv=flags, on_cpu=False)["zero_optimization"].get("overlap_comm", False) is (stage == 3)


def test_what_stands_in_no_file_is_filled_in_and_what_a_file_asks_for_stays():
    def of_stage(stage, **keys):
        return resolved({"zero_optimization": {"stage": stage, **keys}}, on_cpu=False)["zero_optimization"]

    for given in ({}, {"reduce_scatter": "auto"}, {"reduce_scatter": False}):
        assert of_stage(3, **given)["reduce_scatter"] is False
    assert of_stage(3, reduce_scatter=True)["reduce_scatter"] is True and "reduce_scatter" not in of_stage(2)
    assert of_stage(3, zero_quantized_gradients=True)["reduce_scatter"] is True
    assert resolved()["timers"] == {"throughput": {"enabled": False, "synchronized": False}}
    asked = {"zero_optimization": {"stage": 2}, "timers": {"throughput": {"enabled": True, "synchronized": "auto"}}}
    assert resolved(asked)["timers"] == {"throughput": {"enabled": True, "synchronized": False}}


def test_one_card_is_told_of_zero1():
    def note(name: str, world_size: int) -> str | None:
        return nothing_to_shard_note(resolved(name=name, world_size=world_size), world_size=world_size)

    assert note("zero2.json", 1).startswith("one rank: ZeRO-2 has nobody to share with, and costs seven times ZeRO-1's")
    assert note("zero3.json", 1).startswith("one rank: ZeRO-3 has nobody to share with, and costs the hooks")
    assert "ds_configs/zero1.json" in note("zero3.json", 1)
    silent = (("zero2", 8), ("zero3", 2), ("zero1", 1), ("zero2_offload", 1), ("zero3_offload", 1))
    assert not any(note(f"{name}.json", world_size) for name, world_size in silent)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"gradient_cliping": 1.0}, ["gradient_cliping: unknown key", "'gradient_clipping'"]),
        ({"zero_optimization": {"stage": 2, "stge": 2}}, ["stge", "DeepSpeedZeroConfig says"]),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}, ["overlap_comm is 'maybe'", "valid boolean"]),
        ({"gradient_clipping": 2.0}, ["gradient_clipping is 2.0, but --max_grad_norm gives 1.0"]),
        ({"train_batch_size": 7}, ["train_batch_size is 7", "× 4 ranks gives 4"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr is 0.001", "--lr", "0.0002"]),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ["this trainer gives [0.9, 0.999]"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type is 'Lamb', this trainer takes 'AdamW' or 'Adam'"]),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, ["scheduler: the learning rate follows --lr_scheduler"]),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, ["sub_group_size: 'auto' has no meaning here"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["device is 'nvme'"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm is False"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads is True"]),
        ({"bf16": True}, ["bf16: must be an object"]),
        ({"elasticity": {"enabled": True}}, ["elasticity: this trainer does not use it"]),
    ],
)
def test_contradictions_and_unknown_keys_are_refused_with_both_values(raw, words):
    text = refused({"zero_optimization": {"stage": 2}} | raw)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("stages", "flags", "world_size", "said"),
    [
        ("123", "--dtype fp16", 1, "--dtype: fp16 needs a GPU"),
        ("0", "--dtype fp16", 1, "--dtype: fp16 needs ZeRO stage 1, 2 or 3"),
        ("0", "--grad_accum 2", 1, "stage 0 sums LoRA's gradients in bf16, over --grad_accum 2 × 1 ranks"),
        ("0", "", 2, "use zero1.json, which sums them in float32, or --dtype fp32"),
        ("23", "--compile", 2, "--compile: stage "),
        ("3", "--base_dtype nf4", 1, "--base_dtype: nf4 needs ZeRO stage 0, 1 or 2"),
        ("0123", "", 1, None),
        ("0", "--dtype fp32 --grad_accum 2", 8, None),
        ("23", "--compile", 1, None),
        ("01", "--compile --dtype fp32", 8, None),
        ("012", "--base_dtype nf4", 1, None),
    ],
)
def test_flags_that_a_stage_does_not_go_with(stages, flags, world_size, said):
    for stage in stages:
        how = {"name": f"zero{stage}.json", "argv": flags.split(), "world_size": world_size}
        if said is None:
            assert resolved(**how)["zero_optimization"]["stage"] == int(stage)
        else:
            assert said in refused(None, **how)
    assert resolved(name="zero2.json", argv=["--dtype", "fp16"], on_cpu=False)["fp16"]["enabled"]


@pytest.mark.parametrize("text", ['{"bf16": {}, "bf16": {}}', "[]", "[" * 100_000])
def test_a_file_that_is_no_config(text, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match="--deepspeed_config") as caught:
        read_deepspeed_config(str(tmp_path / "ds.json"))
    assert len(caught.value.problems) == 1


def test_a_key_that_would_be_passed_over_is_told_before_torch_is_imported(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"gradient_cliping": 1.0, "zero_optimization": {"stage": 2, "compute_grad_norm": false}}')
    code = (
        "import sys, train_ds\n"
        f"code = train_ds.main({[*NEEDED, '--deepspeed_config', str(file)]!r})\n"
        "sys.exit(code if 'torch' not in sys.modules else 99)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2, ran
    assert (ran.stdout + ran.stderr).splitlines() == [
        f"{file}: gradient_cliping: unknown key (did you mean 'gradient_clipping'?)",
        f"{file}: zero_optimization.compute_grad_norm is False, this trainer takes True",
    ]


def test_keys_of_everybodys_files_that_change_nothing_are_left_out():
    raw = {
        "train_batch_size": "auto",
        "prescale_gradients": False,
        "wandb": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            "cpu_offload": False,
            "sub_group_size": 1e9,
        },
    }
    left_out = ignored_keys(raw)
    assert left_out == [
        *("prescale_gradients", "wandb", "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
        "zero_optimization.cpu_offload",
    ]
    out = resolved(raw)
    assert "wandb" not in out and "cpu_offload" not in out["zero_optimization"]
    assert out["zero_optimization"]["sub_group_size"] == 1e9 and raw["wandb"] == {"enabled": False}
    decay = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    assert ignored_keys({"scheduler": {"type": "WarmupDecayLR", "params": decay}}) == ["scheduler"]


@pytest.mark.parametrize("name", FROM_THE_FIELD)
def test_files_of_other_trainers_are_taken(name):
    raw = FROM_THE_FIELD[name]
    out = resolved(raw, world_size=1)
    check_config(out, name)
    assert '"auto"' not in json.dumps(out) and out["zero_optimization"]["stage"] == raw["zero_optimization"]["stage"]


def test_the_known_names_are_those_that_deepspeed_reads():
    """Fails where a DeepSpeed no longer reads one: it would be passed over without a word."""
    from deepspeed import DeepSpeedConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    asked = set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)

    class Noted(dict):
        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def keys(self):
            return self

    DeepSpeedConfig(Noted(resolved(world_size=1)))
    assert asked >= KEYS[""], KEYS[""] - asked
