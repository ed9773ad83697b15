"""Reading a LoRA adapter that somebody else made: its config by our own eyes, every weight accounted for.

PEFT takes a config as it is: fields of it import modules, replace layers by name or compile a pattern from the file.
So what plain LoRA needs is read here, everything else is refused by name, and PEFT gets a config that we made.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ...errors import ConfigError, reason_of
from ...options.sections import BASE_NAMES, DEFAULT_BASE, revision_of
from ..higgs_v2.modules import EMBEDDINGS
from .adapter_names import PREFIX, WHOLE_MODULES, layers_named, names_layer, naming_nothing, peft_key
from .layouts import read_json
from .weight_files import DTYPES_BY_NAME, Stored, refuse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 8192
MAX_CONFIG_BYTES = 1 << 20
MAX_TARGETS = 1000

# Ways of beginning that leave the base as it is. PiSSA, OLoRA, CorDA and LoftQ take from it what A and B began with.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# Of no effect on the weights of a trained adapter, whatever they hold.
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
_READ = {"r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "base_model_name_or_path", "revision"}
_READ |= {"init_lora_weights"}


@dataclass(frozen=True)
class AdapterConfig:
    """What plain LoRA says of itself, and the modules of the base that were trained whole beside it."""

    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    base_name: str | None
    base_revision: str | None
    whole: tuple[str, ...] = ()  # of WHOLE_MODULES

    @property
    def scale(self) -> float:
        """The factor of B·A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def describe(self) -> dict[str, str]:
        """Lines of a card."""
        lines = {"LoRA rank / alpha": f"{self.rank} / {self.alpha:g}" + (", scaled by the root" if self.rslora else "")}
        return lines | ({"trained whole": ", ".join(self.whole)} if self.whole else {})


@dataclass(frozen=True)
class Adapter:
    """A checked adapter, by modules of boson_multimodal's model."""

    config: AdapterConfig
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]  # (A [rank, in], B [out, rank]) in float32
    whole: dict[str, Stored]  # weights that stand for the base's, in the file, which may be a large part of it

    def lora(self) -> dict[str, torch.Tensor]:
        """LoRA's weights by the names of PEFT's files."""
        return {
            f"{PREFIX}{name}.lora_{part}.weight": value
            for name, pair in self.weights.items()
            for part, value in zip("AB", pair, strict=True)
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights by the names of PEFT's files; those that are whole are mapped from the file."""
        return self.lora() | {f"{PREFIX}{name}.weight": stored.read() for name, stored in self.whole.items()}

    def delta_rows(self, module: str, start: int, stop: int) -> torch.Tensor:
        """Rows of scale · B·A, float32 [stop - start, in]."""
        a, b = self.weights[module]
        return (b[start:stop] @ a) * self.config.scale


def read_adapter_config(folder: Path, flag: str = "--adapter") -> AdapterConfig:
    """Checks adapter_config.json, field by field, against what plain LoRA has.

    Raises:
        ConfigError: every field that is wrong, or that makes it something else than plain LoRA, a line each.
    """
    file = folder / CONFIG
    try:
        if not file.is_file():
            raise ConfigError([f"{flag}: {folder} holds no {CONFIG}"])
        size = file.stat().st_size
    except OSError as error:
        raise ConfigError([f"{flag}: {_short(str(folder))} cannot be read: {reason_of(error)}"]) from None
    if size > MAX_CONFIG_BYTES:
        raise ConfigError([f"{flag}: {file} has {size} bytes, a config has a few thousand"])
    raw = read_json(file, flag)
    problems = _more_than_plain_lora(raw)
    if not raw.get("peft_type"):
        problems.append("peft_type is missing")
    problems += _wrong_fields(raw)
    refuse(problems, f"{flag}: {file}")
    return AdapterConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        rslora=raw.get("use_rslora", False),
        target_modules=tuple(raw["target_modules"]),
        base_name=raw.get("base_model_name_or_path"),
        base_revision=raw.get("revision"),
        whole=tuple(layers_named(raw.get("modules_to_save") or (), WHOLE_MODULES)),
    )


def _more_than_plain_lora(raw: dict) -> list[str]:
    """Fields that hold something else than PEFT's default, and that is not empty either.

    An empty value of a field that this PEFT does not know, as newer ones write them, changes nothing.
    """
    import peft

    defaults = peft.LoraConfig().to_dict()
    problems = []
    for key, value in raw.items():
        if key in _IGNORED or key in _READ or not value or value == defaults.get(key):
            continue
        if key in defaults:
            problems.append(f"{key} is {_short(value)}: not plain LoRA, it is not loaded")
        else:
            problems.append(f"{_short(key)} is {_short(value)}: PEFT {peft.__version__} does not know this field")
    return problems


def _wrong_fields(raw: dict) -> list[str]:
    """Types and bounds of the fields that are read."""
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    problems = []
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        problems.append(f"r is {_short(rank)}, expected a whole number from 1 to {MAX_RANK}")
    # 1e6 times an update is no training any more, and an infinity would be written into every merged weight.
    if type(alpha) not in (int, float) or not 0 < alpha <= 1e6:
        problems.append(f"lora_alpha is {_short(alpha)}, expected a number above 0, up to 1000000")
    is_list = isinstance(targets, list) and 0 < len(targets) <= MAX_TARGETS
    if not is_list or not all(isinstance(name, str) and 0 < len(name) <= 200 for name in targets):
        problems.append(f"target_modules is {_short(targets)}, expected a list of names of layers")
    saved = raw.get("modules_to_save")
    if saved is not None:
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            problems.append(f"modules_to_save is {_short(saved)}, expected a list of names of modules")
        elif strange := naming_nothing(saved, WHOLE_MODULES):
            known = ", ".join(name.rsplit(".", 1)[-1] for name in WHOLE_MODULES)
            problems.append(f"modules_to_save: {_short(strange[0])} is not one that is trained whole here: {known}")
    if type(raw.get("use_rslora", False)) is not bool:
        problems.append(f"use_rslora is {_short(raw['use_rslora'])}, expected true or false")
    began = raw.get("init_lora_weights")
    if not any(type(began) is type(one) and began == one for one in _BEGINNINGS):
        problems.append(
            f"init_lora_weights is {_short(began)}, expected true, false, null, gaussian, eva or orthogonal: others "
            "change the base; save the adapter as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    for key in ("base_model_name_or_path", "revision"):
        value = raw.get(key)
        if value is not None and (not isinstance(value, str) or len(value) > 4096 or not value.isprintable()):
            problems.append(f"{key} is {_short(value)}, expected text")
    return problems


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def check_base(config: AdapterConfig, base_name: str, base_revision: str | None, flag: str = "--adapter") -> None:
    """Compares the base that an adapter was trained on with the one given.

    Args:
        base_revision: of a base on the hub; None is Boson's pinned one, or unknown.

    Raises:
        ConfigError: another one, or another revision of it.
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
        trained, given, hint = (
            f"{trained} at {was_at}",
            f"{given} at {now_at}",
            f"--base_revision {was_at} loads that; ",
        )
    raise ConfigError(
        [
            f"{flag}: trained on {_short(trained)}, --base_ckpt is {_short(given)}; {hint}--other_base takes it all "
            "the same"
        ]
    )


def revision_for(config: AdapterConfig | None, base_name: str, given: str | None) -> str | None:
    """The revision of a base to load an adapter on: the one given, Boson's pinned one, or what it was trained on."""
    known = revision_of(base_name, given)
    if known is None and config and config.base_name and _place(config.base_name)[0] == _place(base_name)[0]:
        known = _place(config.base_name)[1] or config.base_revision
    return given if os.path.isdir(base_name) else known


# The hub renamed the repository in spring 2026; the old name leads to the new one.
_RENAMED = {old.lower(): DEFAULT_BASE for old in BASE_NAMES}


def same_base(one: str, other: str) -> bool:
    """Whether two values of --base_ckpt mean the same: folders by their place, hub ids by any name of theirs.

    Two snapshots in the hub's cache are two bases, where their revisions are two.
    """
    (here, here_at), (there, there_at) = _place(one), _place(other)
    return one == other or (here == there and (here_at is None or there_at is None or here_at == there_at))


def _place(name: str) -> tuple[str, str | None]:
    """Where a base is; a snapshot in the hub's cache stands for the repository that it is of, at its revision."""
    parts, revision = Path(name).parts, None
    for at, part in enumerate(parts):
        if part.startswith("models--") and part.count("--") == 2:
            name = part.removeprefix("models--").replace("--", "/")
            revision = parts[at + 2] if parts[at + 1 : at + 2] == ("snapshots",) and len(parts) > at + 2 else None
    if name.count("/") == 1 and not os.path.isdir(name) and not name.startswith((".", "/")):
        return _RENAMED.get(name.lower(), name.lower()), revision
    return os.path.realpath(name), None


def read_adapter(
    folder: Path, modules: dict[str, tuple[int, int]], config: AdapterConfig, flag: str = "--adapter"
) -> Adapter:
    """The weights of a checked adapter, each one that its config promises and no other.

    Args:
        folder: holds adapter_model.safetensors, by PEFT's names.
        modules: shapes of the weights that an adapter may change, from `load_layout.adaptable_modules`.
        config: from `read_adapter_config`.
        flag: begins each message.

    Raises:
        ConfigError: missing, extra, misshapen or not finite weights, targets that name no layer, a file that cannot be
            read; a line each.
    """
    linears = [name for name in modules if not names_layer(EMBEDDINGS, name)]
    adapted = layers_named(config.target_modules, linears)
    problems = [
        f"target_modules: {_short(target)} names no linear layer of the base"
        for target in naming_nothing(config.target_modules, linears)
    ]
    problems += [f"{name} has LoRA and stands in modules_to_save too" for name in config.whole if name in adapted]
    wanted: dict[str, tuple[int, int]] = {}
    for name in adapted:
        out, width = modules[name]
        wanted[f"{PREFIX}{name}.lora_A.weight"] = (config.rank, width)
        wanted[f"{PREFIX}{name}.lora_B.weight"] = (out, config.rank)
    file = folder / WEIGHTS
    shapes = {f"{PREFIX}{name}.weight": modules[name] for name in config.whole}
    refuse(problems, f"{flag}: {folder / CONFIG}")
    tensors, whole, problems = _read_weights(file, wanted, shapes)
    refuse(problems, f"{flag}: {file}")
    pairs = {name: tuple(tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB") for name in adapted}
    return Adapter(config, pairs, {name: whole[f"{PREFIX}{name}.weight"] for name in config.whole})


def attach(model, adapter: Adapter):
    """A `PeftModel` of `model` with a checked adapter on it; PEFT sees a config of ours, and not the file's.

    Args:
        model: boson_multimodal's, the one whose linear layers `adapter` was checked against.
        adapter: from `read_adapter`.
    """
    from peft import LoraConfig

    lora = LoraConfig(
        r=adapter.config.rank,
        lora_alpha=adapter.config.alpha,
        use_rslora=adapter.config.rslora,
        target_modules=list(adapter.weights),
        task_type="CAUSAL_LM",
    )
    for name, stored in adapter.whole.items():
        model.get_submodule(name).weight.data.copy_(stored.read())
    peft_model = with_lora(model, lora)
    weights = adapter.lora()
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[peft_key(name)])
    return peft_model


def with_lora(model, config):
    """PEFT's `get_peft_model` for plain LoRA, in the dtype of the layers that it is put on.

    PEFT's default would keep float32 copies of LoRA under zero.Init alone, so that the stages would differ. And where
    bitsandbytes is installed it imports it (1.5 s and 44 MB a rank), to look for that library's own layers: here are
    none. `tests/model/test_quantized.py` fails when that changes.
    """
    from peft import get_peft_model
    from peft.tuners.lora import model as pefts

    pefts.is_bnb_available = pefts.is_bnb_4bit_available = lambda: False
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _read_weights(
    file: Path, wanted: dict[str, tuple[int, int]], whole: dict[str, tuple[int, int]]
) -> tuple[dict[str, torch.Tensor], dict[str, Stored], list[str]]:
    """The wanted tensors in float32, places of the whole ones, both by key; and what is wrong with the file.

    Names and shapes come before any value.
    """
    if not file.is_file():
        others = [name for name in ("adapter_model.bin", "adapter_model.pt") if (file.parent / name).exists()]
        pickled = f"; {others[0]} is a pickle and is not loaded" if others else ""
        return {}, {}, [f"is not there{pickled}"]
    tensors: dict[str, torch.Tensor] = {}
    found: dict[str, Stored] = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - safe_open is not a mapping
                part = stored.get_slice(key)
                found[key] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
            shapes = wanted | whole
            problems = [f"missing weight {key}" for key in shapes if key not in found]
            extra = [one for key, one in found.items() if key not in shapes]
            problems += [f"extra weight {_short(one.key)[1:-1]} {list(one.shape)}" for one in extra]
            problems += [
                f"{key} has shape {list(found[key].shape)}, the base and r need {list(shape)}"
                for key, shape in shapes.items()
                if key in found and found[key].shape != shape
            ]
            for key in () if problems else wanted:
                value = stored.get_tensor(key)
                if not value.is_floating_point():
                    problems.append(f"{key} is {value.dtype}, expected floating point")
                    continue
                tensors[key] = value.to(torch.float32, copy=True)
                if not bool(torch.isfinite(tensors[key]).all()):
                    problems.append(f"{key} holds NaN or infinity")
        for key in () if problems else whole:
            if found[key].dtype not in DTYPES_BY_NAME:
                problems.append(f"{key} is {found[key].dtype}, expected one of {', '.join(sorted(DTYPES_BY_NAME))}")
            elif not all(bool(torch.isfinite(rows).all()) for rows in found[key].rows()):
                problems.append(f"{key} holds NaN or infinity")
    except Exception as error:  # the safetensors reader raises its own SafetensorError, OSError or ValueError
        problems = [f"cannot be read: {error}"]
    return tensors, {key: found[key] for key in whole if key in found}, problems


def write_adapter(folder: Path, config, weights: dict[str, torch.Tensor]) -> None:
    """An adapter in PEFT's format.

    Args:
        folder: is there.
        config: PEFT's `LoraConfig`.
        weights: by their names in the training module or in PEFT's file.
    """
    config.save_pretrained(folder)
    values = {peft_key(name): value.contiguous() for name, value in weights.items()}
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
