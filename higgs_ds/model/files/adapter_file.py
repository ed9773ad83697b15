"""Read a LoRA adapter from an untrusted folder: check its config field by field, account for every weight.

PEFT trusts adapter_config.json: some fields import modules, replace layers by name or compile a pattern. So only the
fields of plain LoRA are read here, any other setting is refused by name, and PEFT is given a config made from scratch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from safetensors.torch import save_file
from typing_extensions import NotRequired, TypedDict

from ...errors import ConfigError, shown
from ...options.sections import BASE_NAMES, DEFAULT_BASE, revision_of
from ..family import Adaptable
from .adapter_names import PREFIX, layers_named, naming_nothing, peft_key
from .config_values import checked, read_json
from .weight_files import Planned, Stored, all_finite, differences, header_of, refuse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Initialisations that leave the base unchanged. PiSSA, OLoRA, CorDA and LoftQ subtract the initial A and B from it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields without effect on the weights of a trained adapter, whatever their value.
_IGNORED = {
    "auto_mapping",  # class and library of the base; PEFT writes it where task_type is left out
    "eva_config",  # how EVA's first A was found
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "task_type",
}


@with_config(ConfigDict(strict=True))
class PlainLora(TypedDict):
    """The fields of adapter_config.json that are read."""

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=8192)]
    # Bounded: an infinity would be written into every merged weight.
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    modules_to_save: NotRequired[list[str] | None]
    use_rslora: NotRequired[bool]
    base_model_name_or_path: NotRequired[str | None]
    revision: NotRequired[str | None]


_FIELDS: TypeAdapter = TypeAdapter(PlainLora)


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of plain LoRA, and names of the modules trained in full beside it."""

    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    base_name: str | None
    base_revision: str | None
    modules_to_save: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The factor of B·A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter, keyed by the modules of the base."""

    config: AdapterConfig
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]  # (A [rank, in], B [out, rank]) in float32
    whole: dict[str, Stored]  # replacements of base weights, left in the file because they may be large

    def describe(self) -> dict[str, str]:
        """Rows of a model card."""
        config = self.config
        scaled = ", scaled by the root" if config.rslora else ""
        lines = {"LoRA rank / alpha": f"{config.rank} / {config.alpha:g}{scaled}"}
        return lines | ({"trained whole": ", ".join(self.whole)} if self.whole else {})

    def lora(self) -> dict[str, torch.Tensor]:
        """LoRA weights under PEFT's file keys."""
        return {
            f"{PREFIX}{name}.lora_{part}.weight": value
            for name, pair in self.weights.items()
            for part, value in zip("AB", pair, strict=True)
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights under PEFT's file keys; fully trained modules are memory-mapped."""
        return self.lora() | {f"{PREFIX}{name}.weight": stored.read() for name, stored in self.whole.items()}

    def delta_rows(self, module: str, start: int, stop: int) -> torch.Tensor:
        """Rows of scale · B·A, float32 [stop - start, in]."""
        a, b = self.weights[module]
        return (b[start:stop] @ a) * self.config.scale


def merged_rows(
    stored: Stored, module: str, adapter: Adapter | None, planned: Planned, *, may_be_infinite: bool = False
) -> Iterator[torch.Tensor]:
    """A tensor of a merged checkpoint, a few rows at a time: float32 sums, rounded once.

    Raises:
        ConfigError: NaN or an infinity, in the base or made by the sum or by the dtype.
    """
    if adapter is not None and module in adapter.whole:
        stored = adapter.whole[module]
    start = 0
    for rows in stored.rows():
        merged = rows
        if adapter is not None and module in adapter.weights:
            merged = rows.float() + adapter.delta_rows(module, start, start + rows.shape[0])
            start += rows.shape[0]
        written = merged.to(planned.dtype)
        if not may_be_infinite and not all_finite(written):
            raise ConfigError([_not_finite(rows, merged, stored, planned)])
        yield written


def _not_finite(rows: torch.Tensor, merged: torch.Tensor, stored: Stored, planned: Planned) -> str:
    """Cause of an infinity: the file, the adapter or the dtype."""
    if not all_finite(rows):
        return f"{stored.file}: {stored.key} holds NaN or infinity; such a model speaks noise"
    if not all_finite(merged):
        return f"--adapter: base + scale · B·A of {planned.name} holds NaN or infinity; the adapter is damaged"
    return f"--dtype: {planned.name} holds values beyond {str(planned.dtype).removeprefix('torch.')}; fp32 holds them"


def read_adapter_config(folder: Path, flag: str = "--adapter") -> AdapterConfig:
    """Checks adapter_config.json, field by field, for plain LoRA.

    Raises:
        ConfigError: a line for each field that is invalid or goes beyond plain LoRA.
    """
    file = folder / CONFIG
    if os.path.isdir(folder) and not os.path.isfile(file):
        raise ConfigError([f"{flag}: {folder} holds no {CONFIG}"])
    raw, where = read_json(file, flag), f"{flag}: {file}"
    fields = checked(_FIELDS, raw, where)
    refuse(_more_than_plain_lora(raw), where)
    return AdapterConfig(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rslora=fields.get("use_rslora", False),
        target_modules=tuple(fields["target_modules"]),
        base_name=fields.get("base_model_name_or_path"),
        base_revision=fields.get("revision"),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
    )


def _more_than_plain_lora(raw: dict) -> list[str]:
    """Lists fields with a value that is neither empty nor PEFT's default.

    Newer PEFT versions write fields that this one does not know; an empty value there changes nothing.
    """
    import peft

    defaults = peft.LoraConfig().to_dict()
    problems = []
    for key, value in raw.items():
        if key == "init_lora_weights":
            if value not in _INITS:
                problems.append(
                    f"{key} is {shown(value)}, expected true, false, null, gaussian, eva or orthogonal: others change "
                    "the base; save the adapter as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
                )
            continue
        if key in _IGNORED or key in PlainLora.__annotations__ or not value or value == defaults.get(key):
            continue
        if key in defaults:
            problems.append(f"{key} is {shown(value)}: not plain LoRA, it is not loaded")
        else:
            problems.append(f"{shown(key)} is {shown(value)}: PEFT {peft.__version__} does not know this field")
    return problems


def check_base(config: AdapterConfig, base_name: str, base_revision: str | None, flag: str = "--adapter") -> None:
    """Compares the base that an adapter was trained on with the base given.

    Args:
        base_revision: hub revision of the base; None for Boson's pinned one, or unknown.

    Raises:
        ConfigError: another base, or another revision of it.
    """
    trained, given, hint = config.base_name, base_name, ""
    if trained is None:
        return
    (was, was_at), (now, now_at) = _place(trained), _place(given)
    if was == now:
        was_at = was_at or config.base_revision
        now_at = now_at or (None if os.path.isdir(given) else revision_of(given, base_revision))
        if was_at is None or now_at is None or was_at == now_at:
            return
        trained, given = f"{trained} at {was_at}", f"{given} at {now_at}"
        hint = f"--base_revision {was_at} loads that; "
    raise ConfigError(
        [f"{flag}: trained on {trained!r}, --base_ckpt is {given!r}; {hint}--other_base takes it all the same"]
    )


def revision_for(config: AdapterConfig | None, base_name: str, given: str | None) -> str | None:
    """The base revision to load an adapter on: the one given, else Boson's pinned one, else the adapter's."""
    known = revision_of(base_name, given)
    if known is None and config and config.base_name and _place(config.base_name)[0] == _place(base_name)[0]:
        known = _place(config.base_name)[1] or config.base_revision
    return given if os.path.isdir(base_name) else known


# The hub renamed the repository in spring 2026; the old name leads to the new one.
_RENAMED = {old.lower(): DEFAULT_BASE for old in BASE_NAMES}


def same_base(one: str, other: str) -> bool:
    """True if two values of --base_ckpt mean the same base: the same real folder, or any name of the same hub id.

    Two snapshots of the hub's cache differ if their revisions differ.
    """
    (here, here_at), (there, there_at) = _place(one), _place(other)
    return one == other or (here == there and (here_at is None or there_at is None or here_at == there_at))


def _place(name: str) -> tuple[str, str | None]:
    """Identity of a base: a real path, or a hub id with its revision if the path is a snapshot of the hub's cache."""
    parts, revision = Path(name).parts, None
    for at, part in enumerate(parts):
        if part.startswith("models--") and part.count("--") == 2:
            name = part.removeprefix("models--").replace("--", "/")
            revision = parts[at + 2] if parts[at + 1 : at + 2] == ("snapshots",) and len(parts) > at + 2 else None
    if name.count("/") == 1 and not os.path.isdir(name) and not name.startswith((".", "/")):
        return _RENAMED.get(name.lower(), name.lower()), revision
    return os.path.realpath(name), None


def read_adapter(folder: Path, modules: Adaptable, config: AdapterConfig, flag: str = "--adapter") -> Adapter:
    """Reads the weights of a checked adapter: exactly those that its config implies.

    Args:
        folder: holds adapter_model.safetensors, by PEFT's names.
        modules: from `Family.adaptable_modules`.
        config: from `read_adapter_config`.
        flag: prefix of each message.

    Raises:
        ConfigError: a line for each missing, extra, misshapen or non-finite weight, for each target without a layer, or
            for an unreadable file.
    """
    adapted = layers_named(config.target_modules, modules.linears)
    whole = layers_named(config.modules_to_save, modules.savable)
    problems = [
        f"target_modules: {shown(target)} matches no linear layer of the base"
        for target in naming_nothing(config.target_modules, modules.linears)
    ]
    known = ", ".join(name.rsplit(".", 1)[-1] for name in modules.savable)
    problems += [
        f"modules_to_save: {shown(name)} is not a module that can be trained in full: {known}"
        for name in naming_nothing(config.modules_to_save, modules.savable)
    ]
    problems += [f"{name} has LoRA and is listed in modules_to_save too" for name in whole if name in adapted]
    refuse(problems, f"{flag}: {folder / CONFIG}")
    wanted: dict[str, tuple[int, ...]] = {}
    for name in adapted:
        out, width = modules.linears[name]
        wanted[f"{PREFIX}{name}.lora_A.weight"] = (config.rank, width)
        wanted[f"{PREFIX}{name}.lora_B.weight"] = (out, config.rank)
    shapes = {f"{PREFIX}{name}.weight": modules.savable[name] for name in whole}
    file, where = folder / WEIGHTS, f"{flag}: {folder / WEIGHTS}"
    if not os.path.isfile(file):
        others = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        hint = f"; {others[0]} is a pickle and is not loaded" if others else ""
        raise ConfigError([f"{where} is missing{hint}"])
    stored = header_of(file, where)
    refuse(differences(stored, wanted | shapes, needs="the base and r need"), where)
    tensors = {key: stored[key].read().to(torch.float32, copy=True) for key in wanted}
    broken = [key for key, value in tensors.items() if not all_finite(value)]
    broken += [key for key in shapes if not all(map(all_finite, stored[key].rows()))]
    refuse([f"{key} holds NaN or infinity" for key in broken], where)
    a_of, b_of = ({name: tensors[f"{PREFIX}{name}.lora_{part}.weight"] for name in adapted} for part in "AB")
    pairs = {name: (a_of[name], b_of[name]) for name in adapted}
    return Adapter(config, pairs, {name: stored[f"{PREFIX}{name}.weight"] for name in whole})


def write_adapter(folder: Path, config, weights: dict[str, torch.Tensor]) -> None:
    """Writes an adapter in PEFT's format.

    Args:
        folder: an existing folder.
        config: PEFT's `LoraConfig`.
        weights: keyed by their names in the training module or in PEFT's file.
    """
    config.save_pretrained(folder)
    values = {peft_key(name): value.contiguous() for name, value in weights.items()}
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
