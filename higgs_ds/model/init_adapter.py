"""`--init_adapter`: a new run takes weights and LoRA options from an existing adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError
from ..options.sections import TrainConfig
from .files.adapter_file import AdapterConfig, check_base, read_adapter, read_adapter_config
from .files.adapter_names import layers_named

if TYPE_CHECKING:
    from .family import Adaptable, Family, ModuleNames

OPTIONS = ("lora_r", "lora_alpha", "lora_rslora", "lora_target_modules", "train_audio_embeddings", "train_heads")
FLAG = "--init_adapter"


def settle_lora(
    config: TrainConfig, family: Family, base: Any, resumed: dict | None = None
) -> tuple[TrainConfig, dict[str, torch.Tensor] | None]:
    """Takes those of `OPTIONS` that were not given from the adapter.

    Args:
        config: the run's options; without `--init_adapter` only its heads and targets are checked.
        family: family of the base checkpoint.
        base: the base checkpoint's config.
        resumed: options of a resumed run, which then replace the adapter.

    Returns:
        The options; and the adapter's checked weights by PEFT's keys, None without an adapter or when resuming.

    Raises:
        ConfigError: the adapter is not plain LoRA, does not fit the base one to one, was trained on another base, or
            differs from what was given; a line each.
    """
    if config.lora.init_adapter is None:
        if problems := family.modules.contradictions(config):
            raise ConfigError(problems)
        return config, None
    if resumed is not None:
        return _filled(config, {name: resumed[name] for name in OPTIONS if name in resumed}), None
    folder, modules = Path(config.lora.init_adapter), family.adaptable_modules(base)
    adapter = read_adapter_config(folder, FLAG)
    found = _options_of(adapter, family, modules)
    if not config.lora.other_base:
        check_base(adapter, config.model.base_ckpt, config.model.base_revision, FLAG)
    if problems := _contradictions(config, found, family.modules, modules):
        raise ConfigError([f"{FLAG}: {problem}" for problem in problems])
    weights = read_adapter(folder, modules, adapter, FLAG).state_dict()
    config = _filled(config, found)
    if problems := family.modules.contradictions(config):
        raise ConfigError([f"{FLAG}: {problem}" for problem in problems])
    return config, weights


def _options_of(adapter: AdapterConfig, family: Family, modules: Adaptable) -> dict[str, Any]:
    """Settings of an adapter under this program's option names."""
    names = family.modules
    targets = sorted(adapter.target_modules)  # PEFT writes a set, in any order
    if targets == sorted(names.lora_targets):
        targets = list(names.lora_targets)
    whole = names.options_of(layers_named(adapter.modules_to_save, modules.savable))
    values = (adapter.rank, adapter.alpha, adapter.rslora, targets, *whole)
    return dict(zip(OPTIONS, values, strict=True))


def _filled(config: TrainConfig, values: dict) -> TrainConfig:
    return config.settled(**{name: value for name, value in values.items() if name not in config.given})


def _contradictions(config: TrainConfig, found: dict[str, Any], names: ModuleNames, modules: Adaptable) -> list[str]:
    """Lists options that were given and differ from the adapter."""
    problems = []
    for name, value in found.items():
        given = config.get(name)
        same = given == value
        if name == "lora_target_modules":
            # Two lists of targets mean the same where they name the same layers.
            asked = layers_named(names.targets(config.lora.lora_target_modules), modules.linears)
            same = asked == layers_named(value, modules.linears)
        if name in config.given and not same:
            problems.append(f"--{name} is {_words(given)}, the adapter has {_words(value)}; leave the flag out")
    return problems


def _words(value) -> str:
    return " ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
