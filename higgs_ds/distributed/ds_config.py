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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError, nearest, reading, shown
from ..options.sections import PROJECT_ROOT, TrainConfig

if TYPE_CHECKING:
    from ..model.spec import ModelSpec

_ZERO = "zero_optimization."
# Keys of other trainers' files that cannot change a LoRA run: left out, and named in one line.
IGNORED_KEYS = {
    *("aio", "autotuning", "checkpoint", "compile", "dataloader_drop_last", "use_node_local_storage"),
    *("comms_config", "monitor_config", "steps_per_print"),
    # round_robin_gradients deals the weights out in another order than the module's, to no use where LoRA's gradients
    # fill one bucket.
    *(
        _ZERO + key
        for key in (
            *("stage3_gather_16bit_weights_on_model_save", "load_from_fp32_weights", "elastic_checkpoint"),
            *("stage3_gather_fp16_weights_on_model_save", "gather_16bit_weights_on_model_save", "legacy_stage1"),
            *("ignore_unused_parameters", "override_module_apply", "cpu_offload_use_pin_memory"),
            *("log_trace_cache_warnings", "round_robin_gradients"),
        )
    ),
}
# Keys that are left out likewise with these values; switches among them are refused with any other.
IGNORED_VALUES: dict[str, tuple] = {
    **dict.fromkeys(("prescale_gradients", "sparse_gradients", "graph_harvesting"), (False,)),
    **dict.fromkeys(("disable_allgather", "fp32_allreduce"), (False,)),
    **dict.fromkeys(("gradient_predivide_factor", "sequence_parallel_size"), (1,)),
    **dict.fromkeys((f"{_ZERO}cpu_offload{end}" for end in ("", "_param", "_params")), (False, None)),
    **dict.fromkeys((f"{_ZERO}{key}" for key in ("zenflow", "leaf_module")), (None,)),
    "tensor_parallel": ({"autotp_size": 0}, {"autotp_size": 1}),
}
# Blocks likewise, with `"enabled": false` or no `enabled`. DeepSpeed refuses some of them even then.
OFF_BLOCKS = {
    *("amp", "compression_training", "curriculum_learning", "data_efficiency", "eigenvalue", "elasticity"),
    *("expert_parallel", "fp8", "hybrid_engine", "nebula", "progressive_layer_drop", "quantize_training"),
    *("sparse_attention", "torch_autocast", "wandb", "tensorboard", "csv_monitor", "comet"),
}
# Of the keys that DeepSpeed takes with `stage3_` and without, those that are judged or filled in here.
_PREFIXED = ("prefetch_bucket_size", "param_persistence_threshold", "module_granularity_threshold")

SECTIONS = {
    *("zero_optimization", "bf16", "fp16", "data_types", "comms_logger", "flops_profiler", "optimizer", "timers"),
    *("optimizer.params", "timers.throughput", f"{_ZERO}offload_param", f"{_ZERO}offload_optimizer"),
}
# The names of the top level, and of the sections in which DeepSpeed ignores unknown keys.
KEYS: dict[str, set[str]] = {
    "": {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("managed_gradient_accumulation", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("communication_data_type", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
        *(name for name in SECTIONS if "." not in name),
    },
    "data_types": {"grad_accum_dtype"},
    "flops_profiler": set(
        "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file".split()
    ),
    "optimizer": {"type", "params", "legacy_fusion"},
    "optimizer.params": set("lr weight_decay betas eps torch_adam adam_w_mode bias_correction amsgrad".split()),
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
_STAGE = f"{_ZERO}stage"
# The values that this trainer takes of keys that could train something else, or hide an update that was not made.
ALLOWED: dict[str, tuple] = {
    _STAGE: (0, 1, 2, 3),
    **{f"{_ZERO}offload_{what}.device": ("cpu", "none") for what in ("param", "optimizer")},
    **{f"{_ZERO}offload_optimizer.{key}": (value,) for key, value in (("ratio", 1), ("super_offload", False))},
    **{f"{_ZERO}{key}": (value,) for key, value in (("compute_grad_norm", True), ("parameter_alignment", False))},
    f"{_ZERO}stage3_module_granularity_threshold": (0,),
    **dict.fromkeys(("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"), (False,)),
    **dict.fromkeys(("fp16.fp16_master_weights_and_grads", "fp16.auto_cast"), (False,)),
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

    def means_nothing(name: str, value: Any) -> bool:
        if name in OFF_BLOCKS and isinstance(value, dict):
            return value.get("enabled", False) is False
        if name == "scheduler":  # as in Hugging Face's examples: it leaves the rate to flags
            return {*(value.get("params") or {"": None}).values()} == {"auto"}
        if name == "activation_checkpointing":
            return not any(value.values())
        return name in IGNORED_KEYS or value in IGNORED_VALUES.get(name, ()) or (name in SECTIONS and value is None)

    return [name for _, _, name, value in _places(raw) if means_nothing(name, value)]


def _content(raw: dict, file: str) -> dict:
    """Copies the file's content without the ignored keys. Raises ConfigError for any invalid part."""
    content = copy.deepcopy(raw)
    for name in ignored_keys(raw):
        section, _, key = name.rpartition(".")
        del (content[section] if section else content)[key]
    zero = content.get("zero_optimization", {})
    for key in (key for key in _PREFIXED if key in zero):
        if f"stage3_{key}" in zero:
            raise ConfigError([f"{file}: {_ZERO}{key}: given twice, as stage3_{key} too; leave one out"])
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
        content = _content(raw, name)
        stage = int(_section(content, "zero_optimization").setdefault("stage", 0))
        problems = []
        for key, value, flag in _decided(config, stage, world_size, "data_types" in content):
            section, _, last = key.rpartition(".")
            place = _section(content, section)
            if (given := place.get(last, "auto")) not in ("auto", None, value):
                both = f"{key} is {shown(given)}, but {flag} gives {value!r}"
                problems.append(f"{name}: {both}; make them agree or use 'auto'")
            place[last] = value
        del content["optimizer"]  # torch's AdamW, which the engine makes
        _fill(content, stage, config, layer, on_cpu)
        autos = [place for _, _, place, value in _places(content) if value == "auto"]
        problems += [f"{name}: {place}: 'auto' has no meaning here; give a value or remove it" for place in autos]
        problems += _what_the_stage_does_not_do(config, stage, world_size, on_cpu)
        if problems:
            raise ConfigError(problems)
    return content


def _section(content: dict, name: str) -> dict:
    """An object by its name in full, made where there is none; the whole for an empty name."""
    return functools.reduce(lambda place, part: place.setdefault(part, {}), filter(None, name.split(".")), content)


def _decided(config: TrainConfig, stage: int, world_size: int, types: bool) -> Iterator[tuple[str, object, str]]:
    """(key, value, what gives it) of all that flags or this trainer decide: a file may leave them out or agree."""
    optim, dtype = config.optim, config.model.dtype
    rows = optim.batch_size or 1
    yield "train_micro_batch_size_per_gpu", rows, "--batch_size"
    yield "gradient_accumulation_steps", optim.grad_accum, "--grad_accum"
    product = f"--batch_size {rows} × --grad_accum {optim.grad_accum} × {world_size} ranks"
    yield "train_batch_size", rows * optim.grad_accum * world_size, product
    yield "gradient_clipping", optim.max_grad_norm, "--max_grad_norm"
    yield "optimizer.params.lr", optim.lr, "--lr"
    yield "optimizer.params.weight_decay", optim.weight_decay, "--weight_decay"
    for key in ("bf16", "fp16"):
        yield f"{key}.enabled", dtype == key, f"--dtype {dtype}"
    ours = dict(OURS)
    if dtype == "bf16":  # switched off, DeepSpeed would apply an update whose gradients are NaN
        ours["bf16.check_grad_overflow"] = True
    if stage > 0:  # LoRA gradients are summed and sent in float32
        ours |= dict.fromkeys(("data_types.grad_accum_dtype", "communication_data_type"), "fp32")
    elif types:  # which DeepSpeed has no other sum for without ZeRO
        ours["data_types.grad_accum_dtype"] = dtype
    for key, value in ours.items():
        yield key, value, "this trainer"


def _what_the_stage_does_not_do(config: TrainConfig, stage: int, world_size: int, on_cpu: bool) -> Iterator[str]:
    """A line for each flag that the stage, or the CPU, does not go with."""
    dtype, summed = config.model.dtype, config.optim.grad_accum * world_size
    if dtype == "fp16" and on_cpu:
        yield "--dtype: fp16 needs a GPU; on CPU use bf16 or fp32"
    if dtype == "fp16" and stage == 0:  # DeepSpeed would unscale gradients there whose loss nobody had scaled
        yield "--dtype: fp16 needs ZeRO stage 1, 2 or 3; at stage 0 use bf16 or fp32"
    if dtype == "bf16" and stage == 0 and summed > 1:  # DeepSpeed has no other sum there
        yield (
            f"--deepspeed_config: stage 0 sums LoRA's gradients in bf16, over --grad_accum {config.optim.grad_accum} × "
            f"{world_size} ranks; use zero1.json, which sums them in float32, or --dtype fp32"
        )
    if config.model.base_dtype and stage == 3:
        yield "--base_dtype: nf4 needs ZeRO stage 0, 1 or 2; stage 3 shards dense weights alone"
    if config.model.compile and stage >= 2 and world_size > 1:  # see Engine.gradient_order
        yield (
            f"--compile: stage {stage} adds up the ranks' gradients in their order of arrival, which differs where one "
            "rank's rows hold no audio; use zero1.json, which has a fixed order"
        )


def _fill(content: dict, stage: int, config: TrainConfig, layer: LayerSizes, on_cpu: bool) -> None:
    """The other "auto" values."""
    content["steps_per_print"] = None  # the loop says its steps itself
    zero = content["zero_optimization"]
    always: list[tuple[dict, str, object]] = [
        (_section(content, "timers.throughput"), key, False) for key in ("enabled", "synchronized")
    ]  # off unless the file asks for it: it waits for the GPU in every micro-batch
    if stage == 3:
        always += [
            # A LoRA matrix below the threshold stays unsharded on every rank, instead of being gathered on its own.
            (zero, "stage3_param_persistence_threshold", max(100_000, config.lora.lora_r * layer.widest)),
            # To scatter them, DeepSpeed cuts each of LoRA's gradients into ranks on the host at the end of every
            # backward: at 64 ranks that takes longer than to send all of them to all.
            (zero, "reduce_scatter", zero.get("zero_quantized_gradients") is True),
        ]
    offloaded = [zero[key] for key in ("offload_optimizer", "offload_param") if key in zero]
    for place, key, value in [*always, *((block, "pin_memory", not on_cpu) for block in offloaded)]:
        if place.get(key, "auto") == "auto":
            place[key] = value
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
