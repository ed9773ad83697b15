"""LoRA on a base model: attach it, initialise it from a seed, load weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import model as pefts
from torch import nn

from ..codec.base import Codec, check_fits
from ..distributed.device import pick_device, take_device
from ..errors import ConfigError, first_of, nearest
from .base import BaseCheckpoint
from .family import Adaptable
from .files.adapter_file import Adapter, check_base, read_adapter, read_adapter_config
from .files.adapter_names import layers_named, naming_nothing, peft_key
from .files.weight_files import all_finite
from .speech import default_dtype


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
    """Attaches LoRA to every linear layer whose name ends in one of `target_modules`; A is random, B is zero.

    A depends only on the seed and the weight's name, so that every ZeRO stage and world size starts alike.

    Args:
        groups: names of layer groups, suggested for misspelt targets.
        modules_to_save: names of modules, or ends of names, to train in full from the base's weights.
        whole: returns a full copy of a base weight, which ZeRO-3 has sharded.

    Raises:
        ConfigError: a target that matches no linear layer.
    """
    modules = [name for name, _ in model.named_modules()]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    suffixes = {name.rsplit(".", 1)[-1] for name in linears}
    problems = [
        f"--lora_target_modules: {target!r} matches no linear layer{nearest(target, [*suffixes, *groups])}"
        for target in naming_nothing(target_modules, linears)
    ]
    if problems:
        raise ConfigError(problems)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number works
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
    # Not PEFT's wrapper, which would keep the frozen weight beside the copy; the saved file and config are the same.
    for name in layers_named(modules_to_save, modules):
        module = model.get_submodule(name)
        module.weight = nn.Parameter(whole(module.get_parameter("weight")))
    peft_model.peft_config["default"].modules_to_save = list(modules_to_save) or None
    return peft_model


def load_voice(
    base: BaseCheckpoint,
    adapter: str | None,
    codec: Codec,
    modules: Adaptable,
    load: Callable[[str], nn.Module],
    *,
    dtype: str | None = None,
    other_base: bool = False,
) -> tuple[Any, torch.device, str]:
    """The model that speaks, its device, and the dtype that it computes in.

    Args:
        modules: of the base, see `Adaptable`.
        load: the base's model in a dtype.
        dtype: None is bf16 on a GPU and fp32 on the CPU.

    Raises:
        ConfigError: no usable GPU unless DS_ACCELERATOR=cpu; a codec of another model; an adapter that is not
            plain LoRA or whose weights do not fit the base one to one, or, without `other_base`, one that was
            trained on another base; weights that are NaN or infinite in this dtype.
    """
    device = pick_device()
    take_device(device)
    dtype = dtype or default_dtype(device)
    weights = None
    if adapter is not None:
        lora = read_adapter_config(Path(adapter))
        if not other_base:
            check_base(lora, base.name, base.revision)
        weights = read_adapter(Path(adapter), modules, lora)
    check_fits(codec, base.spec.num_codebooks, base.spec.codebook_size)
    codec.build()  # what is wrong with it is said before the base is loaded
    model: Any = load(dtype)
    if weights is not None:
        model = attach_adapter(model, weights).merge_and_unload()
    model = model.to(device).eval()
    _refuse_broken(model, dtype, base, adapter, weights)
    return model, device, dtype


def _refuse_broken(
    model: nn.Module, dtype: str, base: BaseCheckpoint, folder: str | None, adapter: Adapter | None
) -> None:
    """Weights that are NaN or infinite, in the files or by the sum or the dtype. Raises ConfigError."""
    changed = {f"{module}.weight" for module in (adapter.weights if adapter else ())}
    broken = [name for name, value in model.state_dict().items() if not all_finite(value)]
    more = "; --dtype bf16 or fp32 holds more" if dtype == "fp16" else ""
    where = f"{base.flag}: {base.folder}: ", f"--adapter: {folder}: base + scale · B·A of "
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        name = f"{where[broken[0] in changed]}{broken[0]}{others}"
        raise ConfigError([f"{name} holds NaN or infinity in {dtype}{more}"])


def attach_adapter(model: nn.Module, adapter: Adapter) -> PeftModel:
    """Attaches a checked adapter to the model it was checked against; PEFT never sees the file's config."""
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
    """Copies trainable weights, keyed as in PEFT's files, into the model; call it before the engine makes its masters.

    Raises:
        ConfigError: a line for each weight that is missing, extra or of another shape.
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
    """Zero for B; for A uniform in ±1/sqrt(fan_in), PEFT's kaiming_uniform(a=sqrt(5)), from (seed, name)."""
    if "lora_B" in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = shape[-1] ** -0.5
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def with_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """PEFT's `get_peft_model` for plain LoRA, in the dtype of the adapted layers.

    By default PEFT would keep LoRA in float32 under zero.Init only, so that ZeRO stages would differ. If bitsandbytes
    is installed, PEFT imports it (1.5 s and 44 MB a rank) to look for its layers; there are none here, so that is
    switched off. `tests/model/test_quantized.py` fails if PEFT changes this.
    """
    pefts.is_bnb_available = pefts.is_bnb_4bit_available = lambda: False  # type: ignore[assignment]
    return get_peft_model(model, config, autocast_adapter_dtype=False)
