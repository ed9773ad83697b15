"""DeepSpeed's JSON, resolved strictly: "auto" is filled from the flags, a contradiction or an unknown key is refused.

DeepSpeed's own models judge its sections, in `engine.check_config`. Importing them takes 10 s, and they neither resolve
"auto" nor look at top-level keys that they do not know (`gradient_cliping` ran, unclipped). Both are done here, and
values that would train something else are refused, before torch is imported.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigError, nearest, reading, shown
from ..options.sections import PROJECT_ROOT, TrainConfig

if TYPE_CHECKING:
    from ..model.spec import ModelSpec

# Keys of other trainers' files that cannot change a LoRA run: left out, and named in one line.
IGNORED_KEYS = {
    *("aio", "autotuning", "checkpoint", "compile", "dataloader_drop_last", "use_node_local_storage"),
    *("comms_config", "monitor_config"),
    *("zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_optimization.load_from_fp32_weights"),
    *("zero_optimization.stage3_gather_fp16_weights_on_model_save", "zero_optimization.elastic_checkpoint"),
    *("zero_optimization.gather_16bit_weights_on_model_save", "zero_optimization.ignore_unused_parameters"),
    *("zero_optimization.override_module_apply", "zero_optimization.cpu_offload_use_pin_memory"),
    *("zero_optimization.legacy_stage1", "zero_optimization.log_trace_cache_warnings"),
    # It deals the weights out in another order than the module's, to no use where LoRA's gradients fill one bucket.
    "zero_optimization.round_robin_gradients",
}
# Switches that are left out likewise with these values, and refused with any other.
IGNORED_VALUES = {
    **dict.fromkeys(("prescale_gradients", "sparse_gradients", "graph_harvesting"), (False,)),
    **dict.fromkeys(("disable_allgather", "fp32_allreduce"), (False,)),
    **dict.fromkeys(("gradient_predivide_factor", "sequence_parallel_size"), (1,)),
    **dict.fromkeys((f"zero_optimization.cpu_offload{end}" for end in ("", "_param", "_params")), (False, None)),
    **dict.fromkeys((f"zero_optimization.{key}" for key in ("zenflow", "leaf_module")), (None,)),
    "tensor_parallel": ({"autotp_size": 0}, {"autotp_size": 1}),
}
# Blocks likewise, with `"enabled": false` or no `enabled`. DeepSpeed refuses some of them even then.
OFF_BLOCKS = {
    *("amp", "compression_training", "curriculum_learning", "data_efficiency", "eigenvalue", "elasticity"),
    *("expert_parallel", "fp8", "hybrid_engine", "nebula", "progressive_layer_drop", "quantize_training"),
    *("sparse_attention", "torch_autocast", "wandb", "tensorboard", "csv_monitor", "comet"),
}
# Blocks that mean the same when they are null.
NULLABLE = {"optimizer", "zero_optimization.offload_param", "zero_optimization.offload_optimizer"}
# Of the keys that DeepSpeed takes with `stage3_` and without, those that are judged or filled in here.
_PREFIXED = ("prefetch_bucket_size", "param_persistence_threshold", "module_granularity_threshold")

SECTIONS = {
    *("zero_optimization", "bf16", "fp16", "data_types", "comms_logger", "flops_profiler", "optimizer", "timers"),
    *("optimizer.params", "timers.throughput"),
    *("zero_optimization.offload_param", "zero_optimization.offload_optimizer"),
}
# The names of the top level, and of the sections in which DeepSpeed ignores unknown keys.
KEYS: dict[str, set[str]] = {
    "": {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("managed_gradient_accumulation", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("communication_data_type", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
        *(name for name in SECTIONS if "." not in name),
    },
    "data_types": {"grad_accum_dtype"},
    "flops_profiler": {
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    },
    "optimizer": {"type", "params", "legacy_fusion"},
    "optimizer.params": {
        *("lr", "weight_decay", "betas", "eps", "torch_adam", "adam_w_mode", "bias_correction", "amsgrad"),
    },
    "timers": {"throughput"},
}
# Blocks in whose place there are flags.
REFUSED = {
    "scheduler": "the learning rate follows --lr_scheduler, --warmup_ratio and --lr; remove the block, or give each of "
    "its params as 'auto'",
    "activation_checkpointing": "it has no effect on this model, --activation_checkpointing has; remove the block",
    "wandb": "give --wandb_project instead; remove the block",
    "torch_autocast": "the computing dtype is --dtype; remove the block",
}
_STAGE = "zero_optimization.stage"
# The values that this trainer takes of keys that could train something else, or hide an update that was not made.
ALLOWED: dict[str, tuple] = {
    _STAGE: (0, 1, 2, 3),
    **{f"zero_optimization.offload_{what}.device": ("cpu", "none") for what in ("param", "optimizer")},
    "zero_optimization.offload_optimizer.ratio": (1,),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.stage3_module_granularity_threshold": (0,),
    "zero_optimization.parameter_alignment": (False,),
    "bf16.bf16_master_weights_and_grads": (False,),
    "bf16.bf16_optimizer_states": (False,),
    "fp16.fp16_master_weights_and_grads": (False,),
    "fp16.auto_cast": (False,),
    "optimizer.type": ("AdamW", "Adam"),
}


# The boundaries of an optimizer step and its optimizer are this trainer's.
OURS = {
    "managed_gradient_accumulation": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "optimizer.params.betas": [0.9, 0.999],
    "optimizer.params.eps": 1e-8,
    **dict.fromkeys(("optimizer.params.adam_w_mode", "optimizer.params.bias_correction"), True),
    "optimizer.params.amsgrad": False,
}


def _places(place: dict, section: str = "") -> Iterator[tuple[str, str, str, object]]:
    """(section, key, both with a dot between, value) of everything in the file's content, objects and their parts."""
    for key, value in place.items():
        name = f"{section}.{key}" if section else key
        yield section, key, name, value
        if isinstance(value, dict):
            yield from _places(value, name)


def ignored_keys(raw: dict) -> list[str]:
    """The keys of a file, sections written out, that cannot change a run: DeepSpeed is not given them."""

    def means_nothing(name: str, value: object) -> bool:
        if name in OFF_BLOCKS and isinstance(value, dict):
            return value.get("enabled", False) is False
        if name == "scheduler":
            return _leaves_the_rate_to_flags(value)
        if name == "activation_checkpointing" and isinstance(value, dict):
            return all(item in (False, None) for item in value.values())
        return name in IGNORED_KEYS or value in IGNORED_VALUES.get(name, ()) or (name in NULLABLE and value is None)

    return [name for _, _, name, value in _places(raw) if means_nothing(name, value)]


def _leaves_the_rate_to_flags(scheduler: object) -> bool:
    """True if all params of the block are "auto", as in Hugging Face's examples."""
    params = scheduler.get("params") if isinstance(scheduler, dict) and scheduler.keys() <= {"type", "params"} else None
    return isinstance(params, dict) and bool(params) and all(value == "auto" for value in params.values())


def _content(raw: dict, file: str) -> dict:
    """Copies the file's content without the ignored keys. Raises ConfigError for any invalid part."""
    content = copy.deepcopy(raw)
    for name in ignored_keys(raw):
        section, _, key = name.rpartition(".")
        del (content[section] if section else content)[key]
    zero = content.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    for key in (key for key in _PREFIXED if key in zero):
        if f"stage3_{key}" in zero:
            raise ConfigError([f"{file}: zero_optimization.{key}: given twice, as stage3_{key} too; leave one out"])
        zero[f"stage3_{key}"] = zero.pop(key)
    if problems := [f"{file}: {fault}" for place in _places(content) if (fault := _fault(*place))]:
        raise ConfigError(problems)
    return content


def _fault(section: str, key: str, name: str, value: object) -> str | None:
    """A line on a key or value of a file that DeepSpeed's models would let through, or none."""
    if name in REFUSED:
        return f"{name}: {REFUSED[name]}"
    if name in OFF_BLOCKS:
        return f"{name}: this trainer does not use it; remove it, or give 'enabled': false"
    if key not in KEYS.get(section, {key}) and name not in IGNORED_VALUES:
        return f"{shown(name)[1:-1]}: unknown key{nearest(key, KEYS[section])}"
    if name in SECTIONS and not isinstance(value, dict):
        return f"{name}: must be an object, it is {shown(value)}"
    allowed = ALLOWED.get(name) or IGNORED_VALUES.get(name) or (value,)
    if value in allowed or (value == "auto" and name != _STAGE):
        return None
    return f"{name} is {shown(value)}, this trainer takes {' or '.join(map(repr, allowed))}"


def read_deepspeed_config(path: str) -> dict:
    """The JSON as it stands in the file, each key once.

    A relative path (`ds_configs/zero2.json`) is looked up from the working folder, then from the project's root, then
    where an installed wheel keeps the shipped files.

    Raises:
        ConfigError: missing, not JSON, not an object, a key given twice; a key or value that can stand in no such file.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"duplicate key {shown(key)}")
            found[key] = value
        return found

    with reading(f"--deepspeed_config: {path}"):
        file = Path(path)
        if not file.is_absolute():
            places = (file, PROJECT_ROOT / file, Path(sys.prefix) / "share" / "higgs_ds" / file)
            file = next((place for place in places if place.exists()), file)
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
        if not isinstance(raw, dict):
            raise ValueError("it must hold a JSON object")
        _content(raw, path)
    return raw


class LayerSizes(NamedTuple):
    """Sizes of a decoder layer, which ZeRO-3's "auto" values follow."""

    widest: int  # largest in- or output width of a projection: a LoRA matrix is at most rank times as large
    parameters: int  # of its projections

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> LayerSizes:
        """Sizes of a checkpoint's decoder layer."""
        return cls(spec.widest, spec.layer_parameters)


def resolve(raw: dict, config: TrainConfig, *, world_size: int, on_cpu: bool, layer: LayerSizes) -> dict:
    """The content for `deepspeed.initialize`, with every "auto" replaced and checked against the flags.

    On CPU, fp16 and pinned memory are not to be had.

    Raises:
        ConfigError: every contradiction and unknown key, each with both values or the nearest valid name.
    """
    name = config.run.deepspeed_config
    with reading(name):
        file = _File(name, _content(raw, name), [])
        _resolve(file, config, world_size, on_cpu, layer)
        autos = [place for _, _, place, value in _places(file.content) if value == "auto"]
        file.problems += [f"{name}: {place}: 'auto' has no meaning here; give a value or remove it" for place in autos]
        if file.problems:
            raise ConfigError(file.problems)
    return file.content


def _resolve(file: _File, config: TrainConfig, world_size: int, on_cpu: bool, layer: LayerSizes) -> None:
    """Fills the file's content by the flags, in place."""
    zero = file.section("zero_optimization")
    stage = zero["stage"] = int(zero.get("stage", 0))
    _settle_step(file, config, world_size)
    _settle_dtype(file, config, stage, world_size, on_cpu)
    file.settle("optimizer.params.lr", config.optim.lr, "--lr")
    file.settle("optimizer.params.weight_decay", config.optim.weight_decay, "--weight_decay")
    for name, value in OURS.items():
        file.settle(name, value, "this trainer")
    del file.content["optimizer"]  # torch's AdamW, which the engine makes
    every = file.content.setdefault("steps_per_print", "auto")
    if every in ("auto", None):
        file.content["steps_per_print"] = None
    elif not (isinstance(every, (int, float)) and every >= 1):  # DeepSpeed divides by it, once it trains
        file.problems.append(f"{file.name}: steps_per_print is {shown(every)}, expected a number from 1")
    throughput = file.section("timers.throughput")
    for key in (
        "enabled",
        "synchronized",
    ):  # off unless the file asks for it: it waits for the GPU in every micro-batch
        throughput[key] = False if throughput.get(key, "auto") == "auto" else throughput[key]
    _fill_zero(zero, stage, config, layer, on_cpu)
    _check_offload(file, zero, stage, on_cpu)
    group = zero.get("zero_hpz_partition_size", 1)
    if stage == 3 and group != "auto" and world_size % min(group, world_size):  # asserted once the model is there
        file.problems.append(
            f"{file.name}: zero_optimization.zero_hpz_partition_size is {group}, no divisor of {world_size} ranks"
        )


@dataclass
class _File:
    """The file's content as it is being resolved, and the problems found in it."""

    name: str
    content: dict
    problems: list[str]

    def section(self, name: str) -> dict:
        """An object by its name in full, made where there is none."""
        return functools.reduce(lambda place, part: place.setdefault(part, {}), name.split("."), self.content)

    def settle(self, name: str, value: object, flag: str) -> None:
        """Sets a key, by its name in full: filled where absent, null or "auto", a problem where it is another value."""
        section, _, key = name.rpartition(".")
        place = self.section(section) if section else self.content
        if (given := place.get(key, "auto")) not in ("auto", None, value):
            both = f"{name} is {shown(given)}, but {flag} gives {value!r}"
            self.problems.append(f"{self.name}: {both}; make them agree or use 'auto'")
        place[key] = value


def _settle_step(file: _File, config: TrainConfig, world_size: int) -> None:
    """Batch size, accumulation and clipping are the flags'."""
    optim = config.optim
    rows = optim.batch_size or 1
    product = f"--batch_size {rows} × --grad_accum {optim.grad_accum} × {world_size} ranks"
    file.settle("train_micro_batch_size_per_gpu", rows, "--batch_size")
    file.settle("gradient_accumulation_steps", optim.grad_accum, "--grad_accum")
    file.settle("train_batch_size", rows * optim.grad_accum * world_size, product)
    file.settle("gradient_clipping", optim.max_grad_norm, "--max_grad_norm")


def _settle_dtype(file: _File, config: TrainConfig, stage: int, world_size: int, on_cpu: bool) -> None:
    """The computing dtype is the flag's; LoRA gradients are summed and sent in float32."""
    dtype = config.model.dtype
    for key in ("bf16", "fp16"):
        file.settle(f"{key}.enabled", dtype == key, f"--dtype {dtype}")
    if dtype == "bf16":
        # Switched off, DeepSpeed would apply an update whose gradients are NaN.
        file.settle("bf16.check_grad_overflow", True, "this trainer")
    if dtype == "fp16" and on_cpu:
        file.problems.append("--dtype: fp16 needs a GPU; on CPU use bf16 or fp32")
    if dtype == "fp16" and stage == 0:  # DeepSpeed would unscale gradients there whose loss nobody had scaled
        file.problems.append("--dtype: fp16 needs ZeRO stage 1, 2 or 3; at stage 0 use bf16 or fp32")
    summed = config.optim.grad_accum * world_size
    if dtype == "bf16" and stage == 0 and summed > 1:  # DeepSpeed has no other sum there
        file.problems.append(
            f"{file.name}: stage 0 sums LoRA's gradients in bf16, here over --grad_accum {config.optim.grad_accum} × "
            f"{world_size} ranks; use zero1.json, which sums them in float32, or --dtype fp32"
        )
    if config.model.base_dtype and stage == 3:
        file.problems.append("--base_dtype: nf4 needs ZeRO stage 0, 1 or 2; stage 3 shards dense weights alone")
    if config.model.compile and stage >= 2 and world_size > 1:  # see Engine.gradient_order
        file.problems.append(
            f"--compile: stage {stage} adds up the ranks' gradients in their order of arrival, which differs where one "
            "rank's rows hold no audio; use zero1.json, which has a fixed order"
        )
    if stage > 0:
        file.settle("data_types.grad_accum_dtype", "fp32", "this trainer")
        file.settle("communication_data_type", "fp32", "this trainer")
    elif "grad_accum_dtype" in file.section("data_types"):  # DeepSpeed has no other without ZeRO
        file.settle("data_types.grad_accum_dtype", dtype, "stage 0 with --dtype")


def _fill_zero(zero: dict, stage: int, config: TrainConfig, layer: LayerSizes, on_cpu: bool) -> None:
    """The "auto" values of the ZeRO section."""
    # A LoRA matrix below the threshold stays unsharded on every rank, instead of being gathered on its own.
    if stage == 3 and zero.get("stage3_param_persistence_threshold", "auto") == "auto":
        zero["stage3_param_persistence_threshold"] = max(100_000, config.lora.lora_r * layer.widest)
    # To scatter them, DeepSpeed cuts each of LoRA's gradients into ranks on the host at the end of every backward: at
    # 64 ranks that takes longer than to send all of them to all.
    if stage == 3 and zero.get("reduce_scatter", "auto") == "auto":
        zero["reduce_scatter"] = zero.get("zero_quantized_gradients") is True
    for key, value in (
        ("reduce_bucket_size", 50_000_000),
        ("allgather_bucket_size", 50_000_000),
        # A layer is gathered whole; the next one, or as much of it as this allows, while it computes.
        ("stage3_prefetch_bucket_size", max(50_000_000, layer.parameters)),
        # Stage 2 has nothing to overlap with (LoRA's gradients fit one bucket), and would wait for the GPU after every
        # backward to do it.
        ("overlap_comm", stage == 3 and not on_cpu),
    ):
        if key in zero and zero[key] in ("auto", None):  # null: overlap_comm's "as the stage has it"
            zero[key] = value


def _check_offload(file: _File, zero: dict, stage: int, on_cpu: bool) -> None:
    """Memory is pinned where there is a GPU; a block that offloads nothing is refused."""
    for key in ("offload_optimizer", "offload_param"):
        block = zero.get(key)
        if block is None:
            continue
        if "device" not in block:
            file.problems.append(f"{file.name}: zero_optimization.{key}: needs {{'device': 'cpu'}} (or 'none')")
        if block.get("pin_memory", "auto") == "auto":
            block["pin_memory"] = not on_cpu
        if key == "offload_param" and block.get("device") == "cpu" and stage != 3:
            file.problems.append(f"{file.name}: zero_optimization.offload_param needs stage 3, the stage is {stage}")


def nothing_to_shard_note(ds_config: dict, *, world_size: int) -> str | None:
    """A sentence for a run on one rank at a stage that costs it and gives it nothing; else None."""
    zero = ds_config["zero_optimization"]
    offloads = any((zero.get(f"offload_{what}") or {}).get("device") == "cpu" for what in ("param", "optimizer"))
    costs = {2: "seven times ZeRO-1's kernel launches an update", 3: "the hooks that gather every layer"}
    if world_size > 1 or offloads or zero["stage"] not in costs:
        return None
    return (
        f"one rank: ZeRO-{zero['stage']} has nobody to share with, and costs {costs[zero['stage']]}; "
        "ds_configs/zero1.json trains the same adapter"
    )
