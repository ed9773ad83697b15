"""DeepSpeed's JSON: everybody's files are taken, and a wrong value is one line, whatever it is."""

import copy
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


def test_stage_3_reduces_gradients_without_cutting_them_unless_the_file_asks_for_it():
    for given in ({}, {"reduce_scatter": "auto"}, {"reduce_scatter": False}):
        assert resolved({"zero_optimization": {"stage": 3, **given}})["zero_optimization"]["reduce_scatter"] is False
    asked = {"zero_optimization": {"stage": 3, "reduce_scatter": True}}
    assert resolved(asked)["zero_optimization"]["reduce_scatter"] is True
    assert "reduce_scatter" not in resolved({"zero_optimization": {"stage": 2}})["zero_optimization"]
    quantized = {"stage": 3, "zero_quantized_gradients": True}
    assert resolved({"zero_optimization": quantized}, on_cpu=False)["zero_optimization"]["reduce_scatter"] is True


def test_one_card_is_told_of_zero1():
    def note(name: str, world_size: int) -> str | None:
        return nothing_to_shard_note(resolved(name=name, world_size=world_size), world_size=world_size)

    assert note("zero2.json", 1).startswith("one rank: ZeRO-2 has nobody to share with, and costs seven times ZeRO-1's")
    assert note("zero3.json", 1).startswith("one rank: ZeRO-3 has nobody to share with, and costs the hooks")
    assert "ds_configs/zero1.json" in note("zero3.json", 1)
    silent = (("zero2", 8), ("zero3", 2), ("zero1", 1), ("zero2_offload", 1), ("zero3_offload", 1))
    assert not any(note(f"{name}.json", world_size) for name, world_size in silent)


def test_deepspeeds_throughput_timer_is_off_unless_the_file_asks_for_it():
    off = {"enabled": False, "synchronized": False}
    assert resolved()["timers"] == {"throughput": off}
    zero2 = {"zero_optimization": {"stage": 2}}
    assert resolved(zero2 | {"timers": {"throughput": {"enabled": "auto"}}})["timers"] == {"throughput": off}
    assert resolved(zero2 | {"timers": {"throughput": {"enabled": True}}})["timers"]["throughput"]["enabled"] is True


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"timers": {"thruput": {}}}, ["timers.thruput: unknown key"]),
        ({"gradient_cliping": 1.0}, ["gradient_cliping: unknown key", "'gradient_clipping'"]),
        ({"zero_optimization": {"stage": 2, "stge": 2}}, ["DeepSpeedZeroConfig says", "did you mean 'stage'"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4"]),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}, ["overlap_comm is 'maybe'", "valid boolean"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, ["reduce_bucket_size is -1", "greater than 0"]),
        ({"gradient_clipping": 2.0}, ["gradient_clipping is 2.0, but --max_grad_norm gives 1.0"]),
        ({"train_batch_size": 7}, ["train_batch_size is 7", "× 4 ranks gives 4"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr is 0.001", "--lr", "0.0002"]),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ["this trainer gives [0.9, 0.999]"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type is 'Lamb', this trainer takes 'AdamW' or 'Adam'"]),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, ["scheduler: the learning rate follows --lr_scheduler"]),
        ({"zero_optimization": {"stage": "auto"}}, ["stage is 'auto', this trainer takes 0 or 1 or 2 or 3"]),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, ["sub_group_size: 'auto' has no meaning here"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param needs stage 3"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, ["offload_optimizer: needs {'device': 'cpu'}"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["device is 'nvme'"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, ["is 3, no divisor of 4 ranks"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm is False"]),
        (
            {"zero_optimization": {"stage": 2, "leaf_module": {}}},
            ["zero_optimization.leaf_module is {}, this trainer takes None"],
        ),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads is True"]),
        ({"bf16": {"enabled": True, "loss_scale": 0}}, ["loss_scale", "DeepSpeedBF16Config"]),
        ({"bf16": True}, ["bf16: must be an object"]),
        ({"elasticity": {"enabled": True}}, ["elasticity: this trainer does not use it"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op: unknown key"]),
        ({"prescale_gradients": True}, ["prescale_gradients is True, this trainer takes False"]),
        ({"wandb": {"enabled": True}}, ["wandb: give --wandb_project"]),
        ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor is 2.0"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["zero_optimization.cpu_offload is True"]),
        ({"steps_per_print": "10"}, ["steps_per_print is '10'"]),
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
        (
            "0",
            "--grad_accum 2",
            1,
            "zero0.json: stage 0 sums LoRA's gradients in bf16, here over --grad_accum 2 × 1 ranks",
        ),
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


@pytest.mark.parametrize("text", ["{", '{"bf16": {}, "bf16": {}}', "[]", "[" * 100_000, "\udcff", "x" * 2_000_000])
def test_a_file_that_is_no_config(text, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match="--deepspeed_config") as caught:
        read_deepspeed_config(str(file))
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


# --- Files of other trainers, and every value of them gone wrong

_AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
_FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 32, "hysteresis": 2}
# As other trainers write them, axolotl with unprefixed names; `workers/all_configs.py` trains under the first two.
# fmt: off
FROM_THE_FIELD = {
    "llama_factory_zero2": {
        **_AUTO, "zero_allow_untested_optimizer": True, "fp16": _FP16, "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False,
            "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True,
            "round_robin_gradients": True,
        },
        "comms_config": {"verbose": False},
        "monitor_config": {"enabled": True, "csv_monitor": {"enabled": False}},
    },
    "axolotl_zero3_offload": {
        **_AUTO, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": True}, "wall_clock_breakdown": False,
        "fp16": {**_FP16, "enabled": False, "auto_cast": False},
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "sub_group_size": 0, "reduce_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "prefetch_bucket_size": "auto", "param_persistence_threshold": "auto",
            "max_live_parameters": 0, "max_reuse_distance": 0, "gather_16bit_weights_on_model_save": True,
        },
    },
    "hugging_face_zero3": {
        **_AUTO, "bf16": {"enabled": "auto"}, "steps_per_print": 2000,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": "auto", "betas": [0.9, 0.999], "eps": "auto", "weight_decay": "auto", "torch_adam": True
            },
        },
        "zero_optimization": {
            "stage": 3, "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
            "offload_optimizer": {"device": "none", "nvme_path": None, "buffer_count": 4, "fast_init": False},
            "offload_param": None, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "tensor_parallel": {"autotp_size": 1}, "fp8": {"enabled": False},
    },
}
# fmt: on
WRONG = (None, "abc", "a\nb", "x" * 5000, -1, 0, float("nan"), True, [], {}, {"a": 1}, 10**400)


def paths_of(place: dict, *before: str) -> list[tuple[str, ...]]:
    """Every place of a file, objects and their parts, and one unknown key in each of them."""
    found = [(*before, "no_such_key")]
    for key, value in place.items():
        found += [(*before, key)] + (paths_of(value, *before, key) if isinstance(value, dict) else [])
    return found


def with_value(raw: dict, path: tuple[str, ...], value) -> dict:
    changed = copy.deepcopy(raw)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


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


def test_any_value_gone_wrong_is_one_line_or_taken_by_deepspeed():
    """Each value of each file replaced by each of WRONG."""
    config = parse_args(NEEDED)
    refused_count = 0
    for name, raw in (SHIPPED | FROM_THE_FIELD).items():
        for path in paths_of(raw):
            for value in WRONG:
                changed = with_value(raw, path, value)
                where = f"{name}: {'.'.join(path)} = {str(value)[:80]}"
                try:
                    out = resolve(changed, config, world_size=1, on_cpu=True, layer=LayerSizes(8192, 176_160_768))
                    check_config(out, name)
                except ConfigError as error:
                    assert all("\n" not in line and len(line) < 400 for line in error.problems), where
                    refused_count += 1
    assert refused_count > 1000
