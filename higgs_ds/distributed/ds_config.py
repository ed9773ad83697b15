"""DeepSpeed's JSON, resolved strictly: "auto" is filled from the flags, a contradiction or an unknown key is refused.

DeepSpeed 0.19 neither resolves "auto" nor looks at top-level keys that it does not know (`gradient_cliping` ran,
unclipped), so both are done here, before anything is imported.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigError, reason_of, shown
from ..files import read_settings
from ..options.sections import PROJECT_ROOT, TrainConfig
from .ds_fields import as_whole, field_faults

if TYPE_CHECKING:
    from ..model.facts import ModelFacts

# Keys of files that others use, which cannot change a LoRA run here: left out, and named in one line.
IGNORED_KEYS = {
    *("aio", "autotuning", "checkpoint", "compile", "dataloader_drop_last", "use_node_local_storage", "datastates"),
    *("comms_config", "monitor_config", "vocabulary_size", "log_level", "disable_python_gc", "pipeline"),
    *("weight_quantization", "seq_parallel_communication_data_type", "use_data_before_expert_parallelism"),
    *("zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_optimization.load_from_fp32_weights"),
    *("zero_optimization.stage3_gather_fp16_weights_on_model_save", "zero_optimization.elastic_checkpoint"),
    *("zero_optimization.gather_16bit_weights_on_model_save", "zero_optimization.save_muon_momentum_buffer_in_memory"),
    *("zero_optimization.ignore_unused_parameters", "zero_optimization.log_trace_cache_warnings"),
    *("zero_optimization.override_module_apply", "zero_optimization.pipeline_loading_checkpoint"),
    # It deals the weights out in another order than the module's, to no use where LoRA's gradients fill one bucket.
    "zero_optimization.round_robin_gradients",
    *("zero_optimization.cpu_offload_use_pin_memory", "zero_optimization.legacy_stage1"),
}
# Blocks and switches that do nothing as long as they say so.
IGNORED_VALUES = {
    **dict.fromkeys(("prescale_gradients", "sparse_gradients", "disable_allgather", "fp32_allreduce"), (False,)),
    **dict.fromkeys((f"zero_optimization.cpu_offload{end}" for end in ("", "_param", "_params")), (False, None)),
    "gradient_predivide_factor": (1, 1.0),
    "sequence_parallel_size": (1,),
    "tensor_parallel": ({"autotp_size": 0}, {"autotp_size": 1}),
    "zero_optimization.mics_shard_size": (-1,),
    "zero_optimization.mics_hierarchical_params_gather": (False,),
    "zero_optimization.zenflow": (None,),
}
OFF_BLOCKS = {
    *("wandb", "tensorboard", "csv_monitor", "comet", "amp", "torch_autocast", "data_efficiency", "elasticity"),
    *("curriculum_learning", "hybrid_engine", "nebula", "eigenvalue", "progressive_layer_drop", "quantize_training"),
    *("expert_parallel", "fp8"),
}
# DeepSpeed's own two names for one thing.
_PREFIXED = (
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
    *("max_reuse_distance", "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
)
OTHER_NAMES = {f"zero_optimization.{key}": f"zero_optimization.stage3_{key}" for key in _PREFIXED}


def _places(raw: dict) -> dict[str, object]:
    """The values of a file's top level and of its ZeRO section, by their names in full."""
    zero = raw.get("zero_optimization")
    return dict(raw) | {f"zero_optimization.{key}": v for key, v in (zero if isinstance(zero, dict) else {}).items()}


def ignored_keys(raw: dict) -> list[str]:
    """The keys of a file, sections written out, that cannot change a run: DeepSpeed is not given them."""

    def means_nothing(key: str, value: object) -> bool:
        if key in OFF_BLOCKS and isinstance(value, dict):
            return value.get("enabled", False) is False
        if key == "scheduler":
            return _leaves_the_rate_to_flags(value)
        if key == "activation_checkpointing" and isinstance(value, dict):
            return all(item in (False, None) for item in value.values())
        same = (v for v in IGNORED_VALUES.get(key, ()) if value is v or (type(value) is not bool and value == v))
        return key in IGNORED_KEYS or any(True for _ in same)

    return [key for key, value in _places(raw).items() if means_nothing(key, value)]


def _leaves_the_rate_to_flags(scheduler: object) -> bool:
    """Whether each of the block's params is "auto", as in Hugging Face's examples."""
    params = scheduler.get("params") if isinstance(scheduler, dict) and scheduler.keys() <= {"type", "params"} else None
    named = isinstance(params, dict) and isinstance(scheduler.get("type", ""), str)
    return named and bool(params) and all(value == "auto" for value in params.values())


def _content(raw: dict) -> tuple[dict, list[str]]:
    """A copy of the file's content without what is ignored and under the names that `FIELDS` has; and what is wrong."""
    content, problems = _without(raw, ignored_keys(raw)), []
    for name in [name for name in _places(content) if name in OTHER_NAMES]:
        (section, _, key), other = name.rpartition("."), OTHER_NAMES[name].rpartition(".")[2]
        place = content[section] if section else content
        if other in place:
            problems.append(f"{name}: given twice, as {OTHER_NAMES[name]} too; leave one out")
        place.setdefault(other, place.pop(key))
    return content, problems + field_faults(content)


def _without(raw: dict, keys: list[str]) -> dict:
    """A copy of the file's content without these keys."""
    content = copy.deepcopy(raw)
    for key in keys:
        section, _, name = key.rpartition(".")
        del (content[section] if section else content)[name]
    return content


def read_deepspeed_config(path: str) -> dict:
    """The JSON as it stands in the file, each key once.

    A relative path (`ds_configs/zero2.json`) is looked up from the working folder, then from the project's root, then
    where an installed wheel keeps the shipped files.

    Raises:
        ConfigError: missing, not JSON, not an object, a key given twice; a key or value that can stand in no such file.
    """

    def unique(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {shown(key)} stands there twice")
            found[key] = value
        return found

    try:
        file = Path(path)
        if not file.is_absolute():
            places = (file, PROJECT_ROOT / file, Path(sys.prefix) / "share" / "higgs_ds" / file)
            file = next((place for place in places if place.exists()), file)
        raw = json.loads(read_settings(file), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError([f"--deepspeed_config: {path} cannot be read: {reason_of(error)}"]) from None
    except RecursionError:
        raise ConfigError([f"--deepspeed_config: {path} is nested too deeply for a file of settings"]) from None
    except ValueError as error:
        raise ConfigError([f"--deepspeed_config: {path} is not JSON: {error}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"--deepspeed_config: {path} must hold a JSON object"])
    _raise_if(path, _content(raw)[1])
    return raw


def _raise_if(name: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError([f"{name}: {problem}" for problem in problems])


class LayerSizes(NamedTuple):
    """Of a decoder layer: what ZeRO-3's "auto" values follow."""

    widest: int  # largest in- or output width of a projection: a LoRA matrix is at most rank times as large
    parameters: int  # of its projections

    @classmethod
    def from_facts(cls, facts: ModelFacts) -> LayerSizes:
        """Of a checkpoint's decoder layer."""
        return cls(facts.widest, facts.layer_parameters)


def resolve(raw: dict, config: TrainConfig, *, world_size: int, on_cpu: bool, layer: LayerSizes) -> dict:
    """What is handed to `deepspeed.initialize`, with every "auto" replaced and every value checked against the flags.

    Args:
        raw: the file's content.
        world_size: number of ranks.
        on_cpu: whether the run is on CPU, where fp16 and pinned memory are not to be had.
        layer: sizes of a decoder layer, for stage 3's persistence threshold and prefetching.

    Raises:
        ConfigError: every contradiction and unknown key, each with both values or the nearest valid name.
    """
    content, problems = _content(raw)
    _raise_if(config.run.deepspeed_config, problems)
    as_whole(content)
    file = _File(config.run.deepspeed_config, content, [])
    zero = file.section("zero_optimization")
    stage = zero.setdefault("stage", 0)
    _settle_step(file, config, world_size)
    _settle_dtype(file, config, stage, world_size, on_cpu)
    # The boundaries of an optimizer step, its optimizer and its learning rate are ours.
    for key, value in (
        ("managed_gradient_accumulation", False),
        ("zero_allow_untested_optimizer", True),
        ("zero_force_ds_cpu_optimizer", False),
    ):
        file.settle(file.content, key, value, "this trainer")
    if file.content.get("steps_per_print", "auto") == "auto":
        file.content["steps_per_print"] = None
    _check_optimizer(file.content.pop("optimizer", None), config, file.name, file.problems)
    _fill_timers(file.section("timers"))
    _fill_zero(zero, stage, config, layer, on_cpu)
    _check_offload(file, zero, stage, on_cpu)
    _check_sharding(file, zero, stage, world_size, on_cpu)
    _find_auto(file.content, file.name, "", file.problems)
    if file.problems:
        raise ConfigError(file.problems)
    return file.content


@dataclass
class _File:
    """The file's content as it is being resolved, and what was found wrong with it."""

    name: str
    content: dict
    problems: list[str]

    def section(self, key: str) -> dict:
        """An object of the top level, empty where there is none."""
        return self.content.setdefault(key, {})

    def settle(self, place: dict, key: str, value, flag: str, prefix: str = "") -> None:
        """`place[key]` is `value`: filled where absent, null or "auto", refused where it says something else."""
        given = place.get(key, "auto")
        if given not in ("auto", None, value):
            self.problems.append(
                f"{self.name}: {prefix}{key} is {given!r}, but {flag} gives {value!r}; make them agree or use 'auto'"
            )
        place[key] = value


def _settle_step(file: _File, config: TrainConfig, world_size: int) -> None:
    """Batch size, accumulation and clipping are the flags'."""
    optim = config.optim
    rows = optim.batch_size or 1
    product = f"--batch_size {rows} × --grad_accum {optim.grad_accum} × {world_size} ranks"
    file.settle(file.content, "train_micro_batch_size_per_gpu", rows, "--batch_size")
    file.settle(file.content, "gradient_accumulation_steps", optim.grad_accum, "--grad_accum")
    file.settle(file.content, "train_batch_size", rows * optim.grad_accum * world_size, product)
    file.settle(file.content, "gradient_clipping", optim.max_grad_norm, "--max_grad_norm")


def _settle_dtype(file: _File, config: TrainConfig, stage: int, world_size: int, on_cpu: bool) -> None:
    """The computing dtype is the flag's; LoRA gradients are summed and sent in float32."""
    dtype = config.model.dtype
    for key in ("bf16", "fp16"):
        file.settle(file.section(key), "enabled", dtype == key, f"--dtype {dtype}", f"{key}.")
    if dtype == "bf16":
        # Switched off, DeepSpeed would apply an update whose gradients are NaN.
        file.settle(file.section("bf16"), "check_grad_overflow", True, "this trainer", "bf16.")
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
        file.settle(file.section("data_types"), "grad_accum_dtype", "fp32", "this trainer", "data_types.")
        file.settle(file.content, "communication_data_type", "fp32", "this trainer")
    elif "grad_accum_dtype" in file.section("data_types"):  # DeepSpeed has no other without ZeRO
        file.settle(file.section("data_types"), "grad_accum_dtype", dtype, "stage 0 with --dtype", "data_types.")


def _fill_zero(zero: dict, stage: int, config: TrainConfig, layer: LayerSizes, on_cpu: bool) -> None:
    """The "auto" values of the ZeRO section."""
    # A LoRA matrix below the threshold stays whole on every rank, instead of being gathered on its own.
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
    for key in ("offload_optimizer", "offload_param"):
        block = zero.get(key)
        if block is None:
            continue
        if "device" not in block:
            file.problems.append(f"{file.name}: zero_optimization.{key}: needs {{'device': 'cpu'}} (or 'none')")
        elif block.get("pin_memory", "auto") == "auto":
            block["pin_memory"] = not on_cpu
        if key == "offload_param" and block.get("device") == "cpu" and stage != 3:
            file.problems.append(f"{file.name}: zero_optimization.offload_param needs stage 3, the stage is {stage}")


def _check_sharding(file: _File, zero: dict, stage: int, world_size: int, on_cpu: bool) -> None:
    """Stage 3's second partitioning and its quantised weights, which DeepSpeed asserts once the model is there."""
    group = zero.get("zero_hpz_partition_size", 1)
    if stage == 3 and group != "auto" and world_size % min(group, world_size):
        file.problems.append(
            f"{file.name}: zero_optimization.zero_hpz_partition_size is {group}, no divisor of {world_size} ranks"
        )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key) is True and on_cpu:
            file.problems.append(f"{file.name}: zero_optimization.{key} needs a GPU's kernels; remove it on CPUs")
    if stage == 3 and zero.get("zero_quantized_gradients") is True and not zero["reduce_scatter"]:
        file.problems.append(f"{file.name}: zero_optimization.zero_quantized_gradients needs reduce_scatter true")


def _fill_timers(timers: dict) -> None:
    """DeepSpeed's throughput timer is off unless the file asks for it: it waits for the GPU in every micro-batch."""
    throughput = timers.setdefault("throughput", {})
    for key in ("enabled", "synchronized"):
        if throughput.get(key, "auto") == "auto":
            throughput[key] = False


def _check_optimizer(block: dict | None, config: TrainConfig, name: str, problems: list[str]) -> None:
    """An `optimizer` block may repeat what the flags say; the optimizer itself is torch's AdamW, made by us."""
    for key, flag, ours in (
        ("lr", "--lr", config.optim.lr),
        ("weight_decay", "--weight_decay", config.optim.weight_decay),
    ):
        given = (block or {}).get("params", {}).get(key, "auto")
        if given not in ("auto", ours):
            problems.append(f"{name}: optimizer.params.{key} is {given!r}, but {flag} gives {ours!r}; use 'auto'")


def nothing_to_shard_note(ds_config: dict, *, world_size: int) -> str | None:
    """A sentence for a run on one rank at a stage that costs it and gives it nothing; else None.

    Args:
        ds_config: as resolved.
    """
    zero = ds_config["zero_optimization"]
    offloads = any((zero.get(f"offload_{what}") or {}).get("device") == "cpu" for what in ("param", "optimizer"))
    costs = {2: "seven times ZeRO-1's kernel launches an update", 3: "the hooks that gather every layer"}
    if world_size > 1 or offloads or zero["stage"] not in costs:
        return None
    return (
        f"one rank: ZeRO-{zero['stage']} has nobody to share with, and costs {costs[zero['stage']]}; "
        "ds_configs/zero1.json trains the same adapter"
    )


def _find_auto(value, name: str, path: str, problems: list[str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _find_auto(inner, name, f"{path}.{key}" if path else key, problems)
    elif value == "auto":
        problems.append(f"{name}: {path}: 'auto' has no meaning here; give a value or remove the key")
