"""DeepSpeed's JSON, resolved strictly: "auto" is filled from the flags, a contradiction or an unknown key is refused.

DeepSpeed 0.19 neither resolves "auto" nor looks at top-level keys that it does not know (`gradient_cliping` ran,
unclipped), so both are done here, before anything is imported.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..config import PROJECT_ROOT, TrainConfig
from ..errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..model.facts import ModelFacts

# Keys of the file's top level that do what they say with this trainer.
TOP_LEVEL_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "managed_gradient_accumulation",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "timers",
    "dump_state",
    "optimizer",
}
REFUSED_KEYS = {
    "scheduler": "the learning rate follows --lr_scheduler, --warmup_ratio and --lr; remove the block",
    "activation_checkpointing": "DeepSpeed's block has no effect on this model; remove it",
    "wandb": "metrics go to W&B through --wandb_project and --wandb_mode; remove the block",
    "tensorboard": "metrics are in metrics.jsonl and W&B; remove the block",
    "csv_monitor": "metrics are in metrics.jsonl and W&B; remove the block",
    "comet": "metrics are in metrics.jsonl and W&B; remove the block",
    "gradient_allreduce_op": "the loss is scaled for the mean over ranks; remove the key",
    "prescale_gradients": "the loss is scaled for the mean over ranks; remove the key",
    "gradient_predivide_factor": "the loss is scaled for the mean over ranks; remove the key",
    "torch_autocast": "the computing dtype is --dtype; remove the block",
    "amp": "the computing dtype is --dtype; remove the block",
    "data_efficiency": "the order of the data is this trainer's own; remove the block",
}
ZERO_KEYS = {
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_param",
    "offload_optimizer",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "round_robin_gradients",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
}


# Keys of files that others use, which cannot change a LoRA run here: left out, and named in one line.
IGNORED_KEYS = {
    *("aio", "autotuning", "checkpoint", "compile", "dataloader_drop_last", "use_node_local_storage"),
    *("zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_optimization.load_from_fp32_weights"),
    *("zero_optimization.stage3_gather_fp16_weights_on_model_save", "zero_optimization.elastic_checkpoint"),
    *("zero_optimization.ignore_unused_parameters", "zero_optimization.log_trace_cache_warnings"),
    *("zero_optimization.override_module_apply", "zero_optimization.pipeline_loading_checkpoint"),
    *("zero_optimization.cpu_offload_use_pin_memory", "zero_optimization.legacy_stage1"),
}
# Blocks and switches that do nothing as long as they say so.
IGNORED_VALUES = {
    **dict.fromkeys(("prescale_gradients", "sparse_gradients", "disable_allgather", "fp32_allreduce"), (False,)),
    **dict.fromkeys(("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_params"), (False, None)),
    "gradient_predivide_factor": (1, 1.0),
    "zero_optimization.mics_shard_size": (-1,),
    "zero_optimization.mics_hierarchical_params_gather": (False,),
}
OFF_BLOCKS = {
    *("wandb", "tensorboard", "csv_monitor", "comet", "amp", "torch_autocast", "data_efficiency", "elasticity"),
    *("curriculum_learning", "hybrid_engine", "nebula", "eigenvalue", "progressive_layer_drop"),
}


def ignored_keys(raw: dict) -> list[str]:
    """The keys of a file, sections written out, that cannot change a run: DeepSpeed is not given them."""
    zero = raw.get("zero_optimization")
    places = dict(raw) | {f"zero_optimization.{key}": v for key, v in (zero if isinstance(zero, dict) else {}).items()}

    def means_nothing(key: str, value: object) -> bool:
        off = isinstance(value, dict) and value.get("enabled", False) is False
        return (
            key in IGNORED_KEYS
            or (
                key in IGNORED_VALUES and any(value is v or (v is not None and value == v) for v in IGNORED_VALUES[key])
            )
            or (key in OFF_BLOCKS and off)
        )

    return [key for key, value in places.items() if means_nothing(key, value)]


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
        ConfigError: missing, not JSON, not an object, a key given twice.
    """
    file = Path(path)
    if not file.is_absolute():
        places = (file, PROJECT_ROOT / file, Path(sys.prefix) / "share" / "higgs_ds" / file)
        file = next((place for place in places if place.exists()), file)

    def unique(pairs):
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"key {key!r} stands there twice")
        return dict(pairs)

    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError([f"--deepspeed_config: {path} cannot be read: {error.strerror or error}"]) from None
    except RecursionError:
        raise ConfigError([f"--deepspeed_config: {path} is nested too deeply for a file of settings"]) from None
    except ValueError as error:
        raise ConfigError([f"--deepspeed_config: {path} is not JSON: {error}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"--deepspeed_config: {path} must hold a JSON object"])
    return raw


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
    file = _File(config.run.deepspeed_config, _without(raw, ignored_keys(raw)), [])
    file.refuse_unknown("", file.content, TOP_LEVEL_KEYS, REFUSED_KEYS)
    zero = file.section("zero_optimization")
    file.refuse_unknown("zero_optimization.", zero, ZERO_KEYS)
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        file.problems.append(f"{file.name}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
        stage = 0
    _settle_step(file, config, world_size)
    _settle_dtype(file, config, stage, on_cpu)
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
    _fill_timers(file.section("timers"), file.name, file.problems)
    _fill_zero(zero, stage, config, layer, on_cpu)
    _check_offload(file, zero, stage, on_cpu)
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
        value = self.content.setdefault(key, {})
        if not isinstance(value, dict):
            self.problems.append(f"{self.name}: {key}: must be an object, it is {value!r}")
            value = self.content[key] = {}
        return value

    def settle(self, place: dict, key: str, value, flag: str, prefix: str = "") -> None:
        """`place[key]` is `value`: filled where absent or "auto", refused where it says something else."""
        given = place.get(key, "auto")
        if given != "auto" and given != value:
            self.problems.append(
                f"{self.name}: {prefix}{key} is {given!r}, but {flag} gives {value!r}; make them agree or use 'auto'"
            )
        place[key] = value

    def refuse_unknown(self, prefix: str, place: dict, known: set[str], refused: Mapping[str, str] | None = None):
        """A problem for each key that is not known, and for each that is refused, with its reason."""
        for key in place:
            if refused and key in refused:
                self.problems.append(f"{self.name}: {prefix}{key}: {refused[key]}")
            elif key not in known:
                self.problems.append(f"{self.name}: {prefix}{key}: unknown key{nearest(key, known)}")


def _settle_step(file: _File, config: TrainConfig, world_size: int) -> None:
    """Batch size, accumulation and clipping are the flags'."""
    optim = config.optim
    rows = optim.batch_size or 1
    product = f"--batch_size {rows} × --grad_accum {optim.grad_accum} × {world_size} ranks"
    file.settle(file.content, "train_micro_batch_size_per_gpu", rows, "--batch_size")
    file.settle(file.content, "gradient_accumulation_steps", optim.grad_accum, "--grad_accum")
    file.settle(file.content, "train_batch_size", rows * optim.grad_accum * world_size, product)
    file.settle(file.content, "gradient_clipping", optim.max_grad_norm, "--max_grad_norm")


def _settle_dtype(file: _File, config: TrainConfig, stage: int, on_cpu: bool) -> None:
    """The computing dtype is the flag's; LoRA gradients are summed and sent in float32."""
    dtype = config.model.dtype
    for key in ("bf16", "fp16"):
        file.settle(file.section(key), "enabled", dtype == key, f"--dtype {dtype}", f"{key}.")
    if dtype == "bf16":
        # Switched off, DeepSpeed would apply an update whose gradients are NaN.
        file.settle(file.section("bf16"), "check_grad_overflow", True, "this trainer", "bf16.")
    if dtype == "fp16" and on_cpu:
        file.problems.append("--dtype: fp16 needs a GPU; on CPU use bf16 or fp32")
    if stage > 0:  # stage 0 has no such choice
        file.settle(file.section("data_types"), "grad_accum_dtype", "fp32", "this trainer", "data_types.")
        file.settle(file.content, "communication_data_type", "fp32", "this trainer")


def _fill_zero(zero: dict, stage: int, config: TrainConfig, layer: LayerSizes, on_cpu: bool) -> None:
    """The "auto" values of the ZeRO section."""
    # A LoRA matrix below the threshold stays whole on every rank, instead of being gathered on its own.
    if stage == 3 and zero.get("stage3_param_persistence_threshold", "auto") == "auto":
        zero["stage3_param_persistence_threshold"] = max(100_000, config.lora.lora_r * layer.widest)
    for key, value in (
        ("reduce_bucket_size", 50_000_000),
        ("allgather_bucket_size", 50_000_000),
        # A layer is gathered whole; the next one, or as much of it as this allows, while it computes.
        ("stage3_prefetch_bucket_size", max(50_000_000, layer.parameters)),
        # Stage 2 has nothing to overlap with (LoRA's gradients fit one bucket), and would wait for the GPU after every
        # backward to do it.
        ("overlap_comm", stage == 3 and not on_cpu),
    ):
        if zero.get(key) == "auto":
            zero[key] = value


def _check_offload(file: _File, zero: dict, stage: int, on_cpu: bool) -> None:
    for key in ("offload_optimizer", "offload_param"):
        block = zero.get(key)
        if block is None:
            continue
        if not isinstance(block, dict) or block.get("device") not in ("cpu", "none"):
            needs = "needs {'device': 'cpu'} (or 'none')"
            file.problems.append(f"{file.name}: zero_optimization.{key}: {needs}, it is {block!r}")
        elif block.get("pin_memory", "auto") == "auto":
            block["pin_memory"] = not on_cpu
    if isinstance(zero.get("offload_param"), dict) and stage != 3:
        file.problems.append(f"{file.name}: zero_optimization.offload_param needs stage 3, the stage is {stage}")


def _fill_timers(timers: dict, name: str, problems: list[str]) -> None:
    """DeepSpeed's throughput timer is off unless the file asks for it: it waits for the GPU in every micro-batch."""
    for key in timers:
        if key != "throughput":
            problems.append(f"{name}: timers.{key}: unknown key{nearest(key, {'throughput'})}")
    throughput = timers.setdefault("throughput", {})
    if not isinstance(throughput, dict):
        problems.append(f"{name}: timers.throughput: must be an object, it is {throughput!r}")
        return
    for key, value in throughput.items():
        if key not in ("enabled", "synchronized"):
            problems.append(f"{name}: timers.throughput.{key}: unknown key{nearest(key, {'enabled', 'synchronized'})}")
        elif not isinstance(value, bool) and value != "auto":
            problems.append(f"{name}: timers.throughput.{key} is {value!r}, expected true or false")
    for key in ("enabled", "synchronized"):
        if throughput.get(key, "auto") == "auto":
            throughput[key] = False


def _check_optimizer(block, config: TrainConfig, name: str, problems: list[str]) -> None:
    """An `optimizer` block may repeat what the flags say; the optimizer itself is torch's AdamW, made by us."""
    if block is None:
        return
    if not isinstance(block, dict) or block.get("type") not in ("AdamW", "Adam"):
        problems.append(f"{name}: optimizer: this trainer uses AdamW; remove the block or give type AdamW")
        return
    params = block.get("params", {})
    if not isinstance(params, dict):
        problems.append(f"{name}: optimizer.params: must be an object, it is {params!r}")
        return
    wanted = {
        "lr": ("--lr", config.optim.lr),
        "weight_decay": ("--weight_decay", config.optim.weight_decay),
        "betas": ("this trainer", [0.9, 0.999]),
        "eps": ("this trainer", 1e-8),
    }
    for key, value in params.items():
        if value == "auto" or key in ("torch_adam", "adam_w_mode"):
            continue
        flag, ours = wanted.get(key, ("this trainer", None))
        if value != ours:
            problems.append(f"{name}: optimizer.params.{key} is {value!r}, but {flag} gives {ours!r}; use 'auto'")


def _find_auto(value, name: str, path: str, problems: list[str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _find_auto(inner, name, f"{path}.{key}" if path else key, problems)
    elif value == "auto":
        problems.append(f"{name}: {path}: 'auto' has no meaning here; give a value or remove the key")
