"""DeepSpeed's JSON, resolved strictly: "auto" is filled from the flags, a contradiction or an unknown key is refused.

DeepSpeed 0.19 neither resolves "auto" nor looks at top-level keys that it does not know (`gradient_cliping` ran,
unclipped), so both are done here, before anything is imported.
"""

from __future__ import annotations

import copy
import json
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


def read_deepspeed_config(path: str) -> dict:
    """The JSON as it stands in the file, each key once.

    A relative path is looked up from the working folder, then from the project's root (`ds_configs/zero2.json`).

    Raises:
        ConfigError: missing, not JSON, not an object, a key given twice.
    """
    file = Path(path)
    if not file.exists() and not file.is_absolute() and (PROJECT_ROOT / file).exists():
        file = PROJECT_ROOT / file

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
    name = config.run.deepspeed_config
    problems: list[str] = []
    out = copy.deepcopy(raw)
    for key in list(out):
        if key in REFUSED_KEYS:
            problems.append(f"{name}: {key}: {REFUSED_KEYS[key]}")
        elif key not in TOP_LEVEL_KEYS:
            problems.append(f"{name}: {key}: unknown key{nearest(key, TOP_LEVEL_KEYS)}")

    def section(key: str) -> dict:
        value = out.setdefault(key, {})
        if not isinstance(value, dict):
            problems.append(f"{name}: {key}: must be an object, it is {value!r}")
            value = out[key] = {}
        return value

    def settle(place: dict, key: str, value, flag: str, prefix: str = "") -> None:
        """`place[key]` is `value`: filled where absent or "auto", refused where it says something else."""
        given = place.get(key, "auto")
        if given != "auto" and given != value:
            problems.append(
                f"{name}: {prefix}{key} is {given!r}, but {flag} gives {value!r}; make them agree or use 'auto'"
            )
        place[key] = value

    zero = section("zero_optimization")
    for key in zero:
        if key not in ZERO_KEYS:
            problems.append(f"{name}: zero_optimization.{key}: unknown key{nearest(key, ZERO_KEYS)}")
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        problems.append(f"{name}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
        stage = 0

    rows = config.optim.batch_size or 1
    batch = rows * config.optim.grad_accum * world_size
    settle(out, "train_micro_batch_size_per_gpu", rows, "--batch_size")
    settle(out, "gradient_accumulation_steps", config.optim.grad_accum, "--grad_accum")
    settle(
        out,
        "train_batch_size",
        batch,
        f"--batch_size {rows} × --grad_accum {config.optim.grad_accum} × {world_size} ranks",
    )
    settle(out, "gradient_clipping", config.optim.max_grad_norm, "--max_grad_norm")
    for key, wanted in (("bf16", config.model.dtype == "bf16"), ("fp16", config.model.dtype == "fp16")):
        settle(section(key), "enabled", wanted, f"--dtype {config.model.dtype}", f"{key}.")
    if config.model.dtype == "bf16":
        # Switched off, DeepSpeed would apply an update whose gradients are NaN.
        settle(section("bf16"), "check_grad_overflow", True, "this trainer", "bf16.")
    if config.model.dtype == "fp16" and on_cpu:
        problems.append("--dtype: fp16 needs a GPU; on CPU use bf16 or fp32")
    # LoRA gradients are tiny: they are summed and sent in float32. Stage 0 has no such choice.
    if stage > 0:
        settle(section("data_types"), "grad_accum_dtype", "fp32", "this trainer", "data_types.")
        settle(out, "communication_data_type", "fp32", "this trainer")
    # The boundaries of an optimizer step, its optimizer and its learning rate are ours.
    settle(out, "managed_gradient_accumulation", False, "this trainer")
    settle(out, "zero_allow_untested_optimizer", True, "this trainer")
    settle(out, "zero_force_ds_cpu_optimizer", False, "this trainer")
    if out.get("steps_per_print", "auto") == "auto":
        out["steps_per_print"] = None
    _check_optimizer(out.pop("optimizer", None), config, name, problems)
    _fill_timers(section("timers"), name, problems)

    if stage == 3:
        # A LoRA matrix below the threshold stays whole on every rank, instead of being gathered on its own.
        threshold = zero.get("stage3_param_persistence_threshold", "auto")
        zero["stage3_param_persistence_threshold"] = (
            max(100_000, config.lora.lora_r * layer.widest) if threshold == "auto" else threshold
        )
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
    for key in ("offload_optimizer", "offload_param"):
        block = zero.get(key)
        if block is None:
            continue
        if not isinstance(block, dict) or block.get("device") not in ("cpu", "none"):
            problems.append(f"{name}: zero_optimization.{key}: needs {{'device': 'cpu'}} (or 'none'), it is {block!r}")
        elif block.get("pin_memory", "auto") == "auto":
            block["pin_memory"] = not on_cpu
    if isinstance(zero.get("offload_param"), dict) and stage != 3:
        problems.append(f"{name}: zero_optimization.offload_param needs stage 3, the stage is {stage}")
    _find_auto(out, name, "", problems)
    if problems:
        raise ConfigError(problems)
    return out


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
    wanted = {"lr": ("--lr", config.optim.lr), "weight_decay": ("--weight_decay", config.optim.weight_decay)}
    for key, value in block.get("params", {}).items():
        if value == "auto" or key in ("torch_adam", "adam_w_mode"):
            continue
        if key == "betas" and list(value) == [0.9, 0.999]:
            continue
        if key == "eps" and value == 1e-8:
            continue
        flag, ours = wanted.get(key, ("this trainer", {"betas": [0.9, 0.999], "eps": 1e-8}.get(key)))
        if value != ours:
            problems.append(f"{name}: optimizer.params.{key} is {value!r}, but {flag} gives {ours!r}; use 'auto'")


def _find_auto(value, name: str, path: str, problems: list[str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _find_auto(inner, name, f"{path}.{key}" if path else key, problems)
    elif value == "auto":
        problems.append(f"{name}: {path}: 'auto' has no meaning here; give a value or remove the key")
