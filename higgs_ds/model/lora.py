"""LoRA on a base model: attaching it, initialising it from a seed, loading its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import model as pefts
from torch import nn

from ..errors import ConfigError, first_of, nearest
from .files.adapter_file import Adapter
from .files.adapter_names import layers_named, naming_nothing, peft_key


def attach_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    seed: int,
    base_name: str,
    base_revision: str | None = None,
    rslora: bool = False,
    groups: Iterable[str] = (),
    modules_to_save: Sequence[str] = (),
    whole: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: parameter.detach().clone(),
) -> PeftModel:
    """LoRA on every linear layer whose name ends in one of `target_modules`, A drawn from our own generator, B zero.

    The draw depends on the seed and the weight's name alone: the same start under every ZeRO stage and world size.

    Args:
        groups: names for several layers at once, suggested where a target misspells one.
        modules_to_save: module names, or their ends; they train in full, from the base's on.
        whole: gives a copy of a base weight, which ZeRO-3 has cut.

    Raises:
        ConfigError: a target that names no linear layer.
    """
    modules = [name for name, _ in model.named_modules()]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    suffixes = {name.rsplit(".", 1)[-1] for name in linears}
    problems = [
        f"--lora_target_modules: {target!r} names no linear layer{nearest(target, [*suffixes, *groups])}"
        for target in naming_nothing(target_modules, linears)
    ]
    if problems:
        raise ConfigError(problems)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT computes with it as with any number
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        revision=base_revision,
    )
    peft_model = with_lora(model, lora)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(initial_lora(name, tuple(parameter.shape), seed))
    # Not by PEFT, whose wrapper would keep the frozen weight beside a copy: its file and config say the same without.
    for name in layers_named(modules_to_save, modules):
        module = model.get_submodule(name)
        module.weight = nn.Parameter(whole(module.get_parameter("weight")))
    peft_model.peft_config["default"].modules_to_save = list(modules_to_save) or None
    return peft_model


def attach_adapter(model: nn.Module, adapter: Adapter) -> PeftModel:
    """A checked adapter on the model that it was checked against; PEFT sees a config of ours, and not the file's."""
    config = adapter.config
    peft_model = attach_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        dropout=0.0,
        target_modules=list(adapter.weights),
        modules_to_save=list(adapter.whole),
        seed=0,
        base_name=config.base_name or "",
    )
    set_lora(peft_model, adapter.state_dict(), "--adapter")
    return peft_model


def set_lora(model: PeftModel, weights: dict[str, torch.Tensor], source: str) -> None:
    """Takes over what trains, keyed as in PEFT's files; before the engine, which makes its masters of it.

    Raises:
        ConfigError: weights that are missing, extra or of another shape, each named.
    """
    own = {peft_key(name): p for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"{source}: missing weight {key}" for key in own if key not in weights]
    problems += [f"{source}: extra weight {key}" for key in weights if key not in own]
    problems += [
        f"{source}: {key} has shape {list(weights[key].shape)}, this run needs {list(p.shape)}"
        for key, p in own.items()
        if key in weights and weights[key].shape != p.shape
    ]
    if problems:
        raise ConfigError(first_of(problems))
    for key, parameter in own.items():
        parameter.data.copy_(weights[key])


def initial_lora(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """B is zero; A is uniform in ±1/sqrt(fan_in), peft's kaiming_uniform(a=sqrt(5)), from (seed, name) alone."""
    if "lora_B" in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = shape[-1] ** -0.5
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def with_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """PEFT's `get_peft_model` for plain LoRA, in the dtype of the layers that it is put on.

    PEFT's default would keep float32 copies of LoRA under zero.Init alone, so that the stages would differ. And where
    bitsandbytes is installed it imports it (1.5 s and 44 MB a rank), to look for that library's own layers: here are
    none. `tests/model/test_quantized.py` fails when that changes.
    """
    pefts.is_bnb_available = pefts.is_bnb_4bit_available = lambda: False  # type: ignore[assignment]
    return get_peft_model(model, config, autocast_adapter_dtype=False)
