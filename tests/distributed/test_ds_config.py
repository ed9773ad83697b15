"""DeepSpeed's JSON: what everybody's files hold is taken or refused in one line, whatever value stands in it."""

import copy
import json
import math
import subprocess
import sys

import pytest

from higgs_ds.distributed.ds_config import (
    LayerSizes,
    ignored_keys,
    nothing_to_shard_note,
    read_deepspeed_config,
    resolve,
)
from higgs_ds.distributed.ds_fields import FIELDS, REFUSED_KEYS, Section
from higgs_ds.errors import ConfigError
from higgs_ds.options.parse import parse_args
from tests.conftest import ROOT

NEEDED = ["--train_manifest", "train.json", "--output_dir", "out"]


def resolved(raw=None, *, name="zero2.json", argv=(), world_size=4, on_cpu=True):
    config = parse_args([*NEEDED, "--deepspeed_config", f"ds_configs/{name}", *argv])
    raw = read_deepspeed_config(config.run.deepspeed_config) if raw is None else raw
    return resolve(raw, config, world_size=world_size, on_cpu=on_cpu, layer=LayerSizes(8192, 176_160_768))


def refused(raw, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(raw, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        ("zero0", 0, False),
        ("zero1", 1, False),
        ("zero2", 2, False),
        ("zero3", 3, False),
        ("zero2_offload", 2, True),
        ("zero3_offload", 3, True),
    ],
)
def test_the_shipped_files_resolve_from_flags_alone(name, stage, offload):
    flags = ["--batch_size", "2", "--grad_accum", "8", "--max_grad_norm", "0.5"]
    dtype = "bf16" if stage else "fp32"
    out = resolved(name=f"{name}.json", argv=[*flags, "--dtype", dtype])
    assert "auto" not in json.dumps(out)
    assert out["zero_optimization"]["stage"] == stage
    assert out["train_batch_size"] == 64 and out["train_micro_batch_size_per_gpu"] == 2
    assert out["gradient_accumulation_steps"] == 8 and out["gradient_clipping"] == 0.5
    assert out["bf16"]["enabled"] is (dtype == "bf16") and not out["fp16"]["enabled"]
    assert ("offload_optimizer" in out["zero_optimization"]) is offload
    if stage == 3:
        assert out["zero_optimization"]["stage3_param_persistence_threshold"] >= 16 * 8192
        assert out["zero_optimization"]["stage3_prefetch_bucket_size"] == 176_160_768  # the real model's layer
        assert out["zero_optimization"]["reduce_scatter"] is False
    assert sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json")) == [
        "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_communication_overlaps_under_stage_3_on_gpus_alone(name):
    for on_cpu in (True, False):
        overlaps = resolved(name=f"{name}.json", on_cpu=on_cpu)["zero_optimization"].get("overlap_comm", False)
        assert overlaps is ("zero3" in name and not on_cpu)


def test_stage_3_reduces_gradients_without_cutting_them_unless_the_file_asks_for_it():
    for given in ({}, {"reduce_scatter": "auto"}, {"reduce_scatter": False}):
        assert resolved({"zero_optimization": {"stage": 3, **given}})["zero_optimization"]["reduce_scatter"] is False
    asked = {"zero_optimization": {"stage": 3, "reduce_scatter": True}}
    assert resolved(asked)["zero_optimization"]["reduce_scatter"] is True
    assert "reduce_scatter" not in resolved({"zero_optimization": {"stage": 2}})["zero_optimization"]
    quantized = {"stage": 3, "zero_quantized_gradients": True}
    assert resolved({"zero_optimization": quantized}, on_cpu=False)["zero_optimization"]["reduce_scatter"] is True
    assert refused({"zero_optimization": quantized | {"reduce_scatter": False}}, on_cpu=False) == (
        "ds_configs/zero2.json: zero_optimization.zero_quantized_gradients needs reduce_scatter true"
    )


@pytest.mark.parametrize(
    ("name", "world_size", "told"),
    [
        ("zero2", 1, "one rank: ZeRO-2 has nobody to share with, and costs seven times ZeRO-1's kernel launches"),
        ("zero3", 1, "one rank: ZeRO-3 has nobody to share with, and costs the hooks that gather every layer"),
        *(("zero2", 8, None), ("zero3", 2, None), ("zero1", 1, None), ("zero2_offload", 1, None)),
        ("zero3_offload", 1, None),
    ],
)
def test_one_card_is_told_of_zero1(name, world_size, told):
    note = nothing_to_shard_note(resolved(name=f"{name}.json", world_size=world_size), world_size=world_size)
    assert note is None if told is None else note.startswith(told) and "ds_configs/zero1.json" in note


def test_deepspeeds_throughput_timer_is_off_unless_the_file_asks_for_it():
    off = {"enabled": False, "synchronized": False}
    assert resolved()["timers"] == {"throughput": off}
    zero2 = {"zero_optimization": {"stage": 2}}
    assert resolved(zero2 | {"timers": {"throughput": {"enabled": "auto"}}})["timers"] == {"throughput": off}
    assert resolved(zero2 | {"timers": {"throughput": {"enabled": True}}})["timers"]["throughput"]["enabled"] is True


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"timers": {"thruput": {}}}, ["timers.thruput: unknown key", "'throughput'"]),
        ({"timers": {"throughput": {"enable": True}}}, ["timers.throughput.enable: unknown key", "'enabled'"]),
        ({"timers": {"throughput": {"enabled": "no"}}}, ["timers.throughput.enabled is 'no', expected true or false"]),
        ({"timers": {"throughput": False}}, ["timers.throughput: must be an object, it is False"]),
        ({"timers": []}, ["timers: must be an object"]),
        ({"gradient_cliping": 1.0}, ["gradient_cliping: unknown key", "'gradient_clipping'"]),
        ({"zero_optimization": {"stge": 2}}, ["zero_optimization.stge: unknown key", "'stage'"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4"]),
        ({"gradient_clipping": 2.0}, ["gradient_clipping is 2.0, but --max_grad_norm gives 1.0"]),
        ({"train_batch_size": 7}, ["train_batch_size is 7", "× 4 ranks gives 4"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is True, but --dtype bf16 gives False"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr is 0.001", "--lr", "0.0002"]),
        ({"optimizer": {"type": "Lamb"}}, ["this trainer uses AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["--lr_scheduler"]),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, ["scheduler: the learning rate follows"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}}, ["scheduler", "params as 'auto'"]),
        ({"scheduler": {"params": {"warmup_max_lr": "auto"}, "steps": 5}}, ["scheduler: the learning rate follows"]),
        ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage is 'auto', expected 0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, ["sub_group_size: 'auto' has no meaning here"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param needs stage 3"]),
        ({"bf16": True}, ["bf16: must be an object"]),
    ],
)
def test_contradictions_and_unknown_keys_are_refused_with_both_values(raw, words):
    text = refused(raw)
    assert all(word in text for word in words), text


def test_fp16_needs_a_gpu_and_a_stage_that_scales_its_loss():
    zero2 = {"zero_optimization": {"stage": 2}}
    assert "fp16 needs a GPU" in refused(zero2, argv=["--dtype", "fp16"])
    assert resolved(zero2, argv=["--dtype", "fp16"], on_cpu=False)["fp16"]["enabled"]
    assert "fp16 needs ZeRO stage 1, 2 or 3" in refused({}, argv=["--dtype", "fp16"], on_cpu=False)


@pytest.mark.parametrize("raw", [{}, {"zero_optimization": {"stage": 0}}])
def test_stage_0_in_bf16_is_refused_where_it_would_sum_in_bf16(raw):
    for grad_accum, world_size in ((2, 1), (1, 2), (4, 8)):
        words = ["--grad_accum", str(grad_accum)]
        assert refused(raw, name="zero0.json", argv=words, world_size=world_size) == (
            f"ds_configs/zero0.json: stage 0 sums LoRA's gradients in bf16, here over --grad_accum {grad_accum} × "
            f"{world_size} ranks; use zero1.json, which sums them in float32, or --dtype fp32"
        )
        assert resolved(raw, name="zero0.json", argv=[*words, "--dtype", "fp32"], world_size=world_size)
    assert resolved(raw, name="zero0.json", world_size=1)["bf16"]["enabled"]  # there is nothing to sum


def test_compiled_layers_are_refused_where_gradients_are_added_up_as_they_come():
    for name in ("zero2.json", "zero3.json"):
        said = refused(None, name=name, argv=["--compile"], world_size=2)
        assert said.startswith(f"--compile: stage {name[4]} ") and "zero1.json" in said
        assert resolved(name=name, argv=["--compile"], world_size=1)
    for name in ("zero0.json", "zero1.json"):
        assert resolved(name=name, argv=["--compile", "--dtype", "fp32"], world_size=8)


def test_a_quantized_base_is_refused_where_weights_are_cut_over_the_ranks():
    for name in ("zero3.json", "zero3_offload.json"):
        said = refused(None, name=name, argv=["--base_dtype", "nf4"])
        assert said == "--base_dtype: nf4 needs ZeRO stage 0, 1 or 2; stage 3 shards dense weights alone"
    for name in ("zero0.json", "zero1.json", "zero2_offload.json"):
        assert resolved(name=name, argv=["--base_dtype", "nf4"], world_size=1)


def test_an_optimizer_block_that_agrees_is_taken():
    params = {"lr": "auto", "betas": [0.9, 0.999], "torch_adam": True}
    raw = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": params}}
    assert "optimizer" not in resolved(raw)


@pytest.mark.parametrize("text", ["{", '{"bf16": {}, "bf16": {}}', "[]"])
def test_a_file_that_is_no_config(text, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--deepspeed_config"):
        read_deepspeed_config(str(file))


def test_a_field_that_cannot_be_is_told_before_torch_is_imported(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        '{"bf16": {"enabled": true, "loss_scale": 0}, "zero_optimization": {"stage": 2, "overlap_comm": "yes"}}'
    )
    code = (
        "import sys, train_ds\n"
        f"code = train_ds.main({[*NEEDED, '--deepspeed_config', str(file)]!r})\n"
        "sys.exit(code if 'torch' not in sys.modules else 99)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2, ran
    assert (ran.stdout + ran.stderr).splitlines() == [
        f"{file}: bf16.loss_scale: bf16 needs no loss scaling; the fields of it are fp16's",
        f"{file}: zero_optimization.overlap_comm is 'yes', expected true or false",
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
    for key, value in (("prescale_gradients", True), ("wandb", {"enabled": True}), ("gradient_predivide_factor", 2.0)):
        assert key in refused(raw | {key: value})
    assert 'cpu_offload: old name; give "offload_optimizer"' in refused(
        {"zero_optimization": {"stage": 2, "cpu_offload": True}}
    )


# --- Files of other trainers, and every value of them gone wrong

_AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
_FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 32,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
# As other trainers write them, axolotl with unprefixed names; `workers/all_configs.py` trains under the first two.
FROM_THE_FIELD = {
    "llama_factory_zero2": {
        **_AUTO,
        "zero_allow_untested_optimizer": True,
        "fp16": _FP16,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "round_robin_gradients": True,
        },
        "comms_config": {"verbose": False},
        "monitor_config": {"enabled": True, "csv_monitor": {"enabled": False}},
    },
    "axolotl_zero3_offload": {
        **_AUTO,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "sub_group_size": 0,
            "reduce_bucket_size": "auto",
            "prefetch_bucket_size": "auto",
            "param_persistence_threshold": "auto",
            "max_live_parameters": 0,
            "max_reuse_distance": 0,
            "gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": True},
        "fp16": {**_FP16, "enabled": False, "auto_cast": False},
        "wall_clock_breakdown": False,
    },
    "hugging_face_zero3": {
        **_AUTO,
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "none", "nvme_path": None, "buffer_count": 4, "fast_init": False},
            "offload_param": None,
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "tensor_parallel": {"autotp_size": 1},
        "fp8": {"enabled": False},
        "steps_per_print": 2000,
    },
    "every_other_field_zero3_offload": {
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 5e7,
            "stage3_param_persistence_threshold": 1e5,
            "stage3_model_persistence_threshold": 1e9,
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "use_multi_rank_bucket_allreduce": True,
            "allgather_bucket_size": 2e8,
            "compute_grad_norm": True,
            "offload_param": {"device": "cpu", "buffer_size": 1e8, "max_in_cpu": 1e9, "nvme_path": "/nvme"},
            "offload_optimizer": {
                "device": "cpu",
                "pipeline_read": False,
                "pipeline_write": False,
                "ratio": 1.0,
                "super_offload": False,
            },
            "parameter_alignment": False,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
            "memory_efficient_linear": True,
            "enable_sanity_checks": False,
        },
        "bf16": {
            "enabled": True,
            "check_grad_overflow": True,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False, "consecutive_hysteresis": False, "fp16_master_weights_and_grads": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "managed_gradient_accumulation": False,
        "memory_breakdown": False,
        "dump_state": False,
        "comms_logger": {
            "enabled": False,
            "prof_all": True,
            "verbose": False,
            "debug": False,
            "prof_ops": ["all_reduce"],
        },
        "flops_profiler": {
            "enabled": False,
            "recompute_fwd_factor": 0.0,
            "profile_step": 1,
            "module_depth": -1,
            "top_modules": 1,
            "detailed": True,
            "output_file": None,
        },
        "timers": {"throughput": {"enabled": False, "synchronized": True}},
        "optimizer": {
            "type": "Adam",
            "params": {"adam_w_mode": True, "bias_correction": True, "amsgrad": False},
            "legacy_fusion": False,
        },
    },
}
SHIPPED = {file.name: json.loads(file.read_text()) for file in sorted((ROOT / "ds_configs").glob("*.json"))}
WRONG = (
    *(
        None,
        "",
        "abc",
        "true",
        "auto",
        "1e9",
        -1,
        0,
        1,
        3,
        0.5,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        "a\nb",
        "x" * 5000,
    ),
    *([], {}, [1], {"a": 1}, [[[]]], {"enabled": {"enabled": True}}, 2**31, 2**63, 10**400, -(10**400), "fp16", "cpu"),
)


def paths_of(place: dict, *before: str) -> list[tuple[str, ...]]:
    """Where something stands, objects and their parts, and one unknown key in each of them."""
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


def read_by_deepspeed(config, path: tuple[str, ...]):
    """What DeepSpeed's own configuration holds at a place of the file, as far as it keeps it by the same name."""
    of_section = {
        "bf16": config.bfloat16_config,
        "fp16": config.float16_config,
        "zero_optimization": config.zero_config,
    }
    if path[0] in of_section:
        place = of_section[path[0]].model_dump(by_alias=True)
        for key in path[1:]:
            place = place[key]
        return place
    return getattr(config, path[0], None) if len(path) == 1 else None


@pytest.mark.parametrize("name", FROM_THE_FIELD)
def test_files_of_other_trainers_are_taken(name):
    raw = FROM_THE_FIELD[name]
    out = resolved(raw, world_size=1)
    assert '"auto"' not in json.dumps(out) and out["zero_optimization"]["stage"] == raw["zero_optimization"]["stage"]


def test_the_fields_here_are_deepspeeds_own():
    """Fails where a DeepSpeed renames or adds one: take it into `ds_fields`, or say why not in REFUSED or IGNORED."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config, "zero_optimization": DeepSpeedZeroConfig}
    for section, model in models.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        assert set(FIELDS[section].fields) <= theirs
        for name in theirs - set(FIELDS[section].fields):
            place = f"{section}.{name}"
            assert place in REFUSED_KEYS or place in ignored_keys({section: {name: None}}), place


def test_any_value_gone_wrong_is_one_line_or_means_the_same_to_deepspeed():
    """Each value of each file replaced by each of WRONG: DeepSpeed's own class takes whatever is let through."""
    from deepspeed import DeepSpeedConfig

    from higgs_ds.distributed.engine import check_config

    config = parse_args(NEEDED)
    refused_count, taken_count, covered = 0, 0, set()
    for name, raw in (SHIPPED | FROM_THE_FIELD).items():
        for path in paths_of(raw):
            covered.add(path)
            for value in WRONG:
                changed = with_value(raw, path, value)
                where = f"{name}: {'.'.join(path)} = {str(value)[:80]}"
                try:
                    out = resolve(changed, config, world_size=1, on_cpu=True, layer=LayerSizes(8192, 176_160_768))
                except ConfigError as error:
                    assert all("\n" not in line and len(line) < 400 for line in error.problems), where
                    assert any(word in line for line in error.problems for word in (*path, "stage")), where
                    refused_count += 1
                    continue
                taken_count += 1
                check_config(out, name)
                if ignored_keys(with_value({}, path[:1], changed[path[0]])) or ".".join(path) in ignored_keys(changed):
                    continue
                if path[0] == "optimizer" or path[-1] == "nvme_path" or value in (None, {}, "auto"):  # as ours
                    continue
                read = read_by_deepspeed(DeepSpeedConfig(out), path)
                assert read is None or read == value, f"{where}: DeepSpeed reads {read!r}"
    fields = [(s, f) for s, section in FIELDS.items() if isinstance(section, Section) for f in section.fields]
    assert {path[:2] for path in covered} >= set(fields) - {("zero_optimization", "stage3_allgather_sequential")}
    print(refused_count, taken_count)
    assert refused_count > 5000
