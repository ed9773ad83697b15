"""What may stand in DeepSpeed's JSON and of which type: DeepSpeed 0.19's own fields, and narrower where a run needs it.

A wrong value is told here within a second, in the file's own words; `engine.check_config` then asks DeepSpeed's models
the same of what is handed to them. An "auto" is of every type but the stage's, by which all others are settled in
`ds_config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import nearest, shown

LARGEST = 2**63 - 1  # what a tensor can count
LARGEST_BUCKET = 10**10  # elements; DeepSpeed sets memory aside for a bucket


def _is_whole(value: object) -> bool:
    """Whether it is a whole number, in whichever of JSON's two ways to write one."""
    return type(value) is int or (isinstance(value, float) and value.is_integer())


@dataclass(frozen=True)
class Whole:
    """A whole number; 5e8, which JSON reads as a float, is one."""

    least: int = 0
    most: int = LARGEST
    null: bool = False
    even: bool = False

    def fault(self, value: object) -> str | None:
        """What is expected instead of `value`; None where it is right."""
        if value is None and self.null:
            return None
        if _is_whole(value) and self.least <= value <= self.most and not (self.even and value % 2):
            return None
        upper = "" if self.most == LARGEST else f" to {self.most:,}"
        kind = "an even" if self.even else "a whole"
        return f"expected {kind} number from {self.least}{upper}" + (" or null" if self.null else "")


@dataclass(frozen=True)
class Number:
    """A finite number."""

    least: float = 0

    def fault(self, value: object) -> str | None:
        """See `Whole`."""
        try:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return None if value >= self.least else f"expected a number from {self.least:g}"
        except OverflowError:  # a whole number beyond every float
            pass
        return f"expected a number from {self.least:g}"


@dataclass(frozen=True)
class Flag:
    """true or false; with `only`, nothing but that, for a reason."""

    only: bool | None = None
    reason: str = ""
    null: bool = False

    def fault(self, value: object) -> str | None:
        """See `Whole`."""
        if value is None and self.null:
            return None
        if not isinstance(value, bool):
            return "expected true or false"
        return self.reason if self.only is not None and value != self.only else None


@dataclass(frozen=True)
class OneOf:
    """One of a few words or whole numbers, of their very type."""

    values: tuple[object, ...]
    reason: str

    def fault(self, value: object) -> str | None:
        """See `Whole`."""
        value = int(value) if _is_whole(value) else value
        return None if any(type(value) is type(v) and value == v for v in self.values) else self.reason


@dataclass(frozen=True)
class Text:
    """A text, or a list of texts."""

    many: bool = False
    null: bool = True

    def fault(self, value: object) -> str | None:
        """See `Whole`."""
        if self.many:
            whole = isinstance(value, list) and all(isinstance(item, str) for item in value)
            return None if whole else "expected a list of texts"
        return None if isinstance(value, str) or (value is None and self.null) else "expected a text"


@dataclass(frozen=True)
class Same:
    """One value, as a whole."""

    value: object
    reason: str

    def fault(self, value: object) -> str | None:
        """See `Whole`."""
        return None if value == self.value and not isinstance(value, bool) else self.reason


@dataclass(frozen=True)
class Section:
    """An object of fields, or null where DeepSpeed takes that."""

    fields: dict[str, object]
    null: bool = False


Field = Whole | Number | Flag | OneOf | Text | Same | Section

_DTYPES = ("fp32", "fp16", "bf16", None)
_MASTERS = "LoRA's weights and moments are kept in float32; remove the key"
_CPU_ADAM = "needs DeepSpeed's own CPU Adam, this trainer steps torch's AdamW; remove the key"
_LEAVES = "which modules are gathered whole is this trainer's choice; remove it"
_DEVICE = "needs {'device': 'cpu'} (or 'none')"
_OFFLOADED = {
    "device": OneOf(("cpu", "none"), _DEVICE),
    "pin_memory": Flag(),
    "nvme_path": Text(),  # this and the next two: of "nvme" alone
    "buffer_count": Whole(),
}
_BUCKET = Whole(1, LARGEST_BUCKET)

STAGE = OneOf((0, 1, 2, 3), "expected 0, 1, 2 or 3")

ZERO = {
    "stage": STAGE,
    "contiguous_gradients": Flag(),
    "reduce_scatter": Flag(),
    "reduce_bucket_size": _BUCKET,
    "use_multi_rank_bucket_allreduce": Flag(),
    "allgather_partitions": Flag(),
    "allgather_bucket_size": Whole(2, even=True),
    "overlap_comm": Flag(null=True),
    "compute_grad_norm": Flag(True, "the norm is logged, and shows an update that was not made; remove the key"),
    "offload_param": Section(
        {**_OFFLOADED, "buffer_size": Whole(), "max_in_cpu": Whole()},
        null=True,
    ),
    "offload_optimizer": Section(
        {
            **_OFFLOADED,
            **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init"), Flag()),
            "ratio": Same(1, _CPU_ADAM),
            "super_offload": Flag(False, _CPU_ADAM),
        },
        null=True,
    ),
    "sub_group_size": Whole(),
    "stage3_prefetch_bucket_size": Whole(),
    "stage3_param_persistence_threshold": Whole(),
    "stage3_model_persistence_threshold": Whole(),
    "stage3_max_live_parameters": Whole(),
    "stage3_max_reuse_distance": Whole(),
    "stage3_module_granularity_threshold": Same(0, _LEAVES),
    "stage3_use_all_reduce_for_fetch_params": Flag(),
    "stage3_allgather_sequential": Flag(),
    "parameter_alignment": Flag(False, "the trained weights are gathered from buffers without gaps; remove the key"),
    "zero_hpz_partition_size": Whole(1),
    "zero_quantized_weights": Flag(),
    "zero_quantized_nontrainable_weights": Flag(),
    "zero_quantized_gradients": Flag(),
    "memory_efficient_linear": Flag(),
    "enable_sanity_checks": Flag(),
}

# The file's top level.
FIELDS: dict[str, Field] = {
    "train_batch_size": Whole(1),
    "train_micro_batch_size_per_gpu": Whole(1),
    "gradient_accumulation_steps": Whole(1),
    "gradient_clipping": Number(),
    "zero_optimization": Section(ZERO),
    "bf16": Section(
        {
            "enabled": Flag(),
            "check_grad_overflow": Flag(),
            "immediate_grad_update": Flag(),
            "bf16_master_weights_and_grads": Flag(False, _MASTERS),
            "bf16_optimizer_states": Flag(False, _MASTERS),
        }
    ),
    "fp16": Section(
        {
            "enabled": Flag(),
            "auto_cast": Flag(False, "the model's inputs are what its dtype needs; remove the key"),
            "loss_scale": Number(),
            "initial_scale_power": Whole(0, 100),
            "loss_scale_window": Whole(1),
            "hysteresis": Whole(1),
            "consecutive_hysteresis": Flag(),
            "min_loss_scale": Whole(1),
            "fp16_master_weights_and_grads": Flag(False, _MASTERS),
        }
    ),
    "data_types": Section({"grad_accum_dtype": OneOf(_DTYPES, "expected fp32, fp16, bf16 or null")}),
    "communication_data_type": OneOf(_DTYPES, "expected fp32, fp16, bf16 or null"),
    "zero_allow_untested_optimizer": Flag(),
    "zero_force_ds_cpu_optimizer": Flag(),
    "managed_gradient_accumulation": Flag(),
    "steps_per_print": Whole(1, null=True),
    "wall_clock_breakdown": Flag(),
    "memory_breakdown": Flag(),
    "comms_logger": Section(
        {**dict.fromkeys(("enabled", "prof_all", "verbose", "debug"), Flag()), "prof_ops": Text(many=True)}
    ),
    "flops_profiler": Section(
        {
            "enabled": Flag(),
            "recompute_fwd_factor": Number(),
            "profile_step": Whole(1),
            "module_depth": Whole(-1),
            "top_modules": Whole(1),
            "detailed": Flag(),
            "output_file": Text(),
        }
    ),
    "timers": Section({"throughput": Section({"enabled": Flag(), "synchronized": Flag()})}),
    "dump_state": Flag(),
    "optimizer": Section(
        {
            "type": OneOf(("AdamW", "Adam"), "this trainer uses AdamW; remove the block or give type AdamW"),
            "params": Section(
                {
                    "lr": Number(),
                    "weight_decay": Number(),
                    "betas": Same([0.9, 0.999], "this trainer gives [0.9, 0.999]; use 'auto'"),
                    "eps": Same(1e-8, "this trainer gives 1e-08; use 'auto'"),
                    "torch_adam": Flag(),
                    "adam_w_mode": Flag(True, "this trainer decouples weight decay, as AdamW does; remove the key"),
                    "bias_correction": Flag(True, "this trainer corrects Adam's bias; remove the key"),
                    "amsgrad": Flag(False, "this trainer uses plain AdamW; remove the key"),
                }
            ),
            "legacy_fusion": Flag(),
        },
        null=True,
    ),
}

_OWN_METRICS = "metrics are in metrics.jsonl and, by --wandb_project and --wandb_mode, in W&B; remove the block"
_ORDER = "the order of the data is this trainer's own; remove the block"
_MEAN = "the loss is scaled for the mean over ranks; remove the key"
_DTYPE = "the computing dtype is --dtype; remove the block"
_SPLIT = "a rank computes whole rows with whole layers here; remove the block"
_REMOVED = "DeepSpeed has removed it; remove it here too"
_BF16_SCALE = "bf16 needs no loss scaling; the fields of it are fp16's"
# What DeepSpeed knows and a run here does not take, by its place in the file.
REFUSED_KEYS = {
    "scheduler": "the learning rate follows --lr_scheduler, --warmup_ratio and --lr; remove the block, or give each of "
    "its params as 'auto'",
    "activation_checkpointing": "it has no effect on this model, --activation_checkpointing has; remove the block",
    **dict.fromkeys(("wandb", "tensorboard", "csv_monitor", "comet"), _OWN_METRICS),
    **dict.fromkeys(("gradient_allreduce_op", "prescale_gradients", "gradient_predivide_factor"), _MEAN),
    **dict.fromkeys(("torch_autocast", "amp"), _DTYPE),
    **dict.fromkeys((f"data_types.{key}" for key in ("param_dtype", "buffer_dtype", "keep_in_fp32_modules")), _DTYPE),
    **dict.fromkeys(("data_efficiency", "curriculum_learning"), _ORDER),
    **dict.fromkeys(("tensor_parallel", "expert_parallel", "sequence_parallel_size"), _SPLIT),
    **dict.fromkeys(("elasticity", "nebula", "eigenvalue", "progressive_layer_drop", "sparse_gradients"), _REMOVED),
    **dict.fromkeys(("compression_training", "quantize_training", "sparse_attention", "graph_harvesting"), _REMOVED),
    "hybrid_engine": "this trainer generates nothing while it trains; remove the block",
    "bfloat16": "old name of bf16; rename it",
    "fp32_allreduce": "old name; LoRA's gradients are sent in float32 anyway, remove the key",
    "disable_allgather": "old name; remove the key",
    **dict.fromkeys(
        (f"bf16.{key}" for key in ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis")), _BF16_SCALE
    ),
    **dict.fromkeys((f"bf16.{key}" for key in ("min_loss_scale", "consecutive_hysteresis", "auto_cast")), _BF16_SCALE),
    "zero_optimization.cpu_offload": "old name; give \"offload_optimizer\": {\"device\": \"cpu\"}",
    "zero_optimization.cpu_offload_param": "old name; give \"offload_param\": {\"device\": \"cpu\"}",
    "zero_optimization.cpu_offload_params": "old name; give \"offload_param\": {\"device\": \"cpu\"}",
    "zero_optimization.zenflow": _CPU_ADAM,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _CPU_ADAM,
    "zero_optimization.leaf_module": _LEAVES,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
}  # fmt: skip


def field_faults(place: dict, fields: dict[str, Field] = FIELDS, prefix: str = "") -> list[str]:
    """What is wrong with the keys and values of an object and those within it, a line each.

    Args:
        place: the file's content, without what is ignored.
        fields: what may stand there.
        prefix: the place's own name in the file, with a dot.
    """
    found = []
    for key, value in place.items():
        name, field = f"{prefix}{key}", fields.get(key)
        if name in REFUSED_KEYS:
            found.append(f"{name}: {REFUSED_KEYS[name]}")
        elif field is None:
            found.append(f"{shown(name)[1:-1]}: unknown key{nearest(key, fields)}")
        elif isinstance(field, Section):
            if isinstance(value, dict):
                found += field_faults(value, field.fields, f"{name}.")
            elif not (value is None and field.null):
                found.append(f"{name}: must be an object, it is {shown(value)}")
        elif (value != "auto" or field is STAGE) and (fault := field.fault(value)):
            found.append(f"{name} is {shown(value)}, {fault}")
    return found


def as_whole(place: dict, fields: dict[str, Field] = FIELDS) -> None:
    """Turns the whole numbers of checked content that JSON reads as floats (5e8) into whole numbers, in place."""
    for key, value in place.items():
        field = fields[key]
        if isinstance(field, Section) and isinstance(value, dict):
            as_whole(value, field.fields)
        elif isinstance(field, (Whole, OneOf)) and isinstance(value, float):
            place[key] = int(value)
