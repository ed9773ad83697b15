"""Every option of a training run: one dataclass, filled from defaults, YAML and flags, checked once and completely.

Nothing here imports torch, so that a wrong flag is reported in a fraction of a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

DEFAULT_BASE = "bosonai/higgs-audio-v2-generation-3B-base"
DEFAULT_BASE_REVISION = "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
# The last revisions that boson_multimodal can read: the hub's `main` is in the layout of newer transformers.
DEFAULT_CODEC = "bosonai/higgs-audio-v2-tokenizer"
DEFAULT_CODEC_REVISION = "9d4988fbd4ad07b4cac3a5fa462741a41810dbec"
DEFAULT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("text_lm_head", "audio_lm_head")
PROJECT_ROOT = Path(__file__).resolve().parents[1]

ALIASES = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "deepspeed": "deepspeed_config",
    "model_name_or_path": "base_ckpt",
    "max_grad_norm_clip": "max_grad_norm",
    "lr_scheduler_type": "lr_scheduler",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "lora_rank": "lora_r",
    "dataloader_num_workers": "num_workers",
}


class ConfigError(ValueError):
    """What is wrong with flags, YAML or DeepSpeed JSON: all problems at once, one a line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def _option(default, section: str, text: str, **extra):
    metadata = {"section": section, "help": text, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """The options of `train_ds.py`; a field is a flag (`--name`) and a YAML key of the same name."""

    train_manifest: str | None = _option(None, "data", "JSON or JSONL manifest of training rows", required=True)
    val_manifest: str | None = _option(None, "data", "manifest of validation rows")
    codec: str = _option(
        DEFAULT_CODEC, "data", "Higgs audio tokenizer (hub id or folder), or a folder of the sample codec"
    )
    codec_revision: str | None = _option(
        None, "data", f"revision of a hub codec (Boson's: {DEFAULT_CODEC_REVISION[:12]}…)"
    )
    codes_cache: str | None = _option(
        None, "data", "folder of the clips' codes; several runs may share one (default: codes_cache in --output_dir)"
    )
    max_duration_sec: float = _option(30.0, "data", "longest clip that is accepted, seconds", above=0)
    skip_bad_rows: bool = _option(False, "data", "train without the rows that fail their check, and say which")
    num_workers: int = _option(2, "data", "processes a rank that prepare batches (0: the training process)", least=0)

    base_ckpt: str = _option(DEFAULT_BASE, "model", "base checkpoint: hub id or folder, boson_multimodal layout")
    base_revision: str | None = _option(
        None, "model", f"revision of a hub checkpoint (Boson's: {DEFAULT_BASE_REVISION[:12]}…)"
    )
    dtype: str = _option("bf16", "model", "what the model computes in", choices=("bf16", "fp16", "fp32"))
    lora_r: int = _option(16, "model", "LoRA rank", least=1)
    lora_alpha: float = _option(32.0, "model", "LoRA alpha; updates are scaled by alpha / r", above=0)
    lora_dropout: float = _option(0.05, "model", "dropout before the LoRA branch", least=0, below=1)
    lora_target_modules: list[str] = _option(
        list(DEFAULT_LORA_TARGETS), "model", "names of the linear layers that get LoRA, by suffix"
    )
    forward_impl: str = _option(
        "padding_free",
        "model",
        "padding_free: real tokens alone, without waiting for the GPU; upstream: boson_multimodal's own forward",
        choices=("padding_free", "upstream"),
    )
    activation_checkpointing: str = _option(
        "none",
        "model",
        "decoder layers whose activations are recomputed in the backward: none, full, or N for every N-th",
    )

    batch_size: int = _option(1, "optimisation", "rows a rank and micro-batch", least=1)
    max_tokens_per_batch: int | None = _option(
        None,
        "optimisation",
        "micro-batches of at most so many tokens, of rows of similar length, instead of --batch_size rows",
        least=1,
    )
    grad_accum: int = _option(1, "optimisation", "micro-batches an optimizer step", least=1)
    epochs: float = _option(1.0, "optimisation", "passes over the training rows", above=0)
    max_steps: int | None = _option(None, "optimisation", "stop after this many optimizer steps", least=1)
    lr: float = _option(2e-4, "optimisation", "peak learning rate of AdamW", above=0)
    lr_scheduler: str = _option(
        "cosine", "optimisation", "shape after warm-up", choices=("cosine", "linear", "constant")
    )
    warmup_ratio: float = _option(0.03, "optimisation", "share of the steps that warm up", least=0, below=1)
    weight_decay: float = _option(0.0, "optimisation", "AdamW weight decay of the LoRA weights", least=0)
    max_grad_norm: float = _option(1.0, "optimisation", "gradient clipping, 0 for none", least=0)
    seed: int = _option(42, "optimisation", "LoRA initialisation, order of the data, dropout", least=0)

    text_loss_weight: float = _option(1.0, "loss", "weight of the text head's mean cross-entropy", least=0)
    audio_loss_weight: float = _option(1.0, "loss", "weight of the audio head's mean cross-entropy", least=0)
    codebook_weights: list[float] | None = _option(
        None, "loss", "one weight a codebook, scaled to sum 1 (default: equal)"
    )
    loss_impl: str = _option(
        "fused",
        "loss",
        "fused: labelled rows in chunks, for frozen heads; reference: plain cross-entropy on their logits",
        choices=("fused", "reference"),
    )
    on_bad_loss: str = _option(
        "raise", "loss", "a failed loss check ends the run (code 3) or drops the step", choices=("raise", "skip")
    )

    deepspeed_config: str = _option(
        "ds_configs/zero2.json", "run", "DeepSpeed JSON; swap the file to swap the ZeRO stage"
    )
    output_dir: str | None = _option(None, "run", "where the run's files go", required=True)
    log_every: int = _option(1, "run", "optimizer steps between two logged points", least=1)
    eval_every: int | None = _option(
        None, "run", "optimizer steps between two validations (default: once an epoch)", least=1
    )
    save_every: int | None = _option(None, "run", "optimizer steps between two checkpoints (default: none)", least=1)
    keep_last: int = _option(3, "run", "checkpoints that are kept; older ones are removed", least=1)
    resume: str = _option(
        "none", "run", "auto: go on from the newest whole checkpoint of --output_dir; none; or a checkpoint's folder"
    )
    stall_timeout_sec: float = _option(
        600.0, "run", "seconds without progress on any rank, after which all ranks end and say who is stuck", above=0
    )
    init_adapter: str | None = _option(None, "model", "start from this adapter's weights: a new run, not a resume")
    other_base: bool = _option(False, "model", "--init_adapter was trained on another base than --base_ckpt")
    run_name: str | None = _option(None, "run", "name of the run in W&B and on the plot")
    wandb_project: str | None = _option(None, "run", "W&B project (default: higgs-ds)")
    wandb_mode: str = _option(
        "auto", "run", "auto: online with a key, else offline", choices=("auto", "online", "offline", "disabled")
    )

    @property
    def checkpoint_every(self) -> int:
        """`activation_checkpointing` as a number: 0 for none, 1 for every layer, N for every N-th."""
        return {"none": 0, "full": 1}.get(self.activation_checkpointing) or _whole(self.activation_checkpointing)

    def as_dict(self) -> dict:
        """All options as plain values, as saved in `config.yaml`."""
        return dataclasses.asdict(self)


def _whole(text: str) -> int:
    """The number that digits say; 0 for anything else."""
    return int(text) if text.isascii() and text.isdigit() else 0


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_HINTS = typing.get_type_hints(TrainConfig)


def nearest(name: str, valid) -> str:
    """` (did you mean 'x'?)` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _convert(name: str, value):
    """A flag's text or a YAML value in the field's type; ValueError says what was expected."""
    hint = _HINTS[name]
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in arms and (value is None or str(value).lower() in ("none", "null")):
        return None
    if value is None:
        raise ValueError("needs a value")
    kind = next(arm for arm in arms if arm is not type(None))
    if typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        items = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else value
        if not isinstance(items, list) or not items or items == [""]:
            raise ValueError(f"expected a list, got {value!r}")
        return [_scalar(item_kind, item) for item in items]
    return _scalar(kind, value)


def _scalar(kind, value):
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError(f"expected true or false, got {value!r}")
    if kind is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise ValueError(f"expected text, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected a number, got {value!r}")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"expected a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value!r}")
    if kind is int:
        if number != int(number):
            raise ValueError(f"expected a whole number, got {value!r}")
        return int(number)
    return number


def _range_problem(name: str, value) -> str | None:
    rules = FIELDS[name].metadata
    if value is None:
        return "is required" if rules.get("required") else None
    if "choices" in rules and value not in rules["choices"]:
        return f"{value!r} is not one of {', '.join(rules['choices'])}"
    if "least" in rules and value < rules["least"]:
        return f"{value!r} is below {rules['least']}"
    if "above" in rules and value <= rules["above"]:
        return f"{value!r} must be above {rules['above']}"
    if "below" in rules and value >= rules["below"]:
        return f"{value!r} must be below {rules['below']}"
    return None


def build_parser() -> argparse.ArgumentParser:
    """Flags as text: conversion and checks are done together afterwards, so that all errors show at once."""
    parser = argparse.ArgumentParser(
        prog="train_ds.py",
        description="LoRA fine-tuning of Higgs Audio v2 on DeepSpeed.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the same names; flags win")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, f in FIELDS.items():
        section = f.metadata["section"]
        group = groups.setdefault(section, parser.add_argument_group(section))
        names = [f"--{name}"] + [f"--{alias}" for alias, target in ALIASES.items() if target == name]
        shown = f.default if f.default is not dataclasses.MISSING else " ".join(map(str, f.default_factory()))
        options: dict = {"dest": name, "default": argparse.SUPPRESS}
        if _HINTS[name] is bool:
            options |= {"nargs": "?", "const": "true"}
        elif typing.get_origin(_HINTS[name]) is list or name == "codebook_weights":
            options |= {"nargs": "+"}
        choices = f.metadata.get("choices")
        metavar = "|".join(choices) if choices else name.split("_")[-1].upper()
        suffix = "" if f.metadata.get("required") or shown is None else f" (default: {shown})"
        group.add_argument(*names, metavar=metavar, help=(f.metadata["help"] + suffix).replace("%", "%%"), **options)
    return parser


def parse_args(argv: list[str], *, may_lack: tuple[str, ...] = ()) -> TrainConfig:
    """Defaults ← YAML ← flags; required options named in `may_lack` may be left out.

    Raises:
        ConfigError: with every problem found, each naming its flag or `file: key`.
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(argv)
    flags = vars(given)
    flags.pop("local_rank", None)
    config_file = flags.pop("config", None)
    problems: list[str] = []
    valid = [*FIELDS, *ALIASES, "config"]
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            close = nearest(name, valid).replace("'", "'--", 1)
            problems.append(f"--{name}: unknown flag{close}")
        else:
            problems.append(f"{word!r}: not a flag, and no flag takes it")

    values: dict[str, tuple[str, object]] = {}
    if config_file is not None:
        for key, value in _read_yaml(config_file, problems).items():
            name = ALIASES.get(str(key), str(key))
            if name not in FIELDS:
                problems.append(f"{config_file}: {key}: unknown key{nearest(str(key), valid)}")
            elif name in values:
                problems.append(f"{config_file}: {key}: given twice (as {name} and under another name)")
            else:
                values[name] = (f"{config_file}: {key}", value)
    for name, value in flags.items():
        text = " ".join(value) if isinstance(value, list) else value
        values[name] = (f"--{name}", text)

    config = TrainConfig()
    for name in FIELDS:
        where, value = values.get(name, (f"--{name}", None))
        try:
            if name in values:
                setattr(config, name, _convert(name, value))
            problem = _range_problem(name, getattr(config, name))
        except ValueError as error:
            problem = str(error)
        if problem and not (name in may_lack and name not in values):
            problems.append(f"{where}: {problem}")
    if not problems:
        problems += _cross_checks(config)
    if problems:
        raise ConfigError(problems)
    return config


def _read_yaml(path: str, problems: list[str]) -> dict:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config: {path} cannot be read: {error.strerror or error}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
        return {}
    if data is None:
        return {}
    if not isinstance(data, dict):
        problems.append(f"--config: {path} must hold `name: value` lines, it holds a {type(data).__name__}")
        return {}
    return data


def _cross_checks(config: TrainConfig) -> list[str]:
    problems = []
    if config.text_loss_weight == 0 and config.audio_loss_weight == 0:
        problems.append("--text_loss_weight, --audio_loss_weight: both are 0, so there is no loss to train on")
    if config.codebook_weights is not None:
        if any(weight < 0 for weight in config.codebook_weights):
            problems.append(f"--codebook_weights: {config.codebook_weights} holds a negative weight")
        elif sum(config.codebook_weights) <= 0:
            problems.append(f"--codebook_weights: {config.codebook_weights} sum to 0; give at least one above 0")
    problems += _forward_checks(config)
    if config.max_tokens_per_batch is not None and config.batch_size != 1:
        problems.append("--batch_size, --max_tokens_per_batch: one counts rows, the other tokens; leave one out")
    if config.base_revision is None and config.base_ckpt == DEFAULT_BASE:
        config.base_revision = DEFAULT_BASE_REVISION
    if config.codec_revision is None and config.codec == DEFAULT_CODEC:
        config.codec_revision = DEFAULT_CODEC_REVISION
    return problems


def _forward_checks(config: TrainConfig) -> list[str]:
    """Which forward, loss and recomputation go together."""
    problems = []
    recomputed = config.activation_checkpointing
    if recomputed != "none" and not config.checkpoint_every:
        problems.append(f"--activation_checkpointing: {recomputed!r} is not none, full or a whole number above 0")
    if config.forward_impl == "upstream":
        if config.loss_impl == "fused":
            problems.append(
                "--forward_impl upstream: upstream's forward computes the logits of every position itself; "
                "give --loss_impl reference with it"
            )
        if recomputed != "none":
            problems.append("--activation_checkpointing: upstream's forward has none; use --forward_impl padding_free")
    if config.loss_impl == "fused":
        heads = [t for t in config.lora_target_modules if t.rsplit(".", 1)[-1] in HEADS]
        problems += [
            f"--lora_target_modules: LoRA on {head} would get no gradient from the fused loss; "
            "use --loss_impl reference"
            for head in heads
        ]
    return problems
