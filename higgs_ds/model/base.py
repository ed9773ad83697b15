"""The base checkpoint, every weight accounted for, and the LoRA adapter on it.

What the checkpoint holds is compared with what the model needs from the files' headers alone, before anything is
loaded: the same verdict on every rank and under every ZeRO stage, where loading itself would leave random weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..errors import ConfigError, first_of, nearest, reading
from ..options.sections import revision_of
from .facts import ModelFacts
from .files.adapter_file import with_lora
from .files.adapter_names import WHOLE_MODULES, layers_named, naming_nothing, peft_key
from .files.layout_config import read_checkpoint_config
from .files.layouts import layout_of
from .files.load_layout import check_weights, load_checkpoint
from .files.weight_files import Stored, refuse
from .higgs_v2.facts import HiggsV2Facts
from .higgs_v2.modules import LORA_TARGET_GROUPS
from .higgs_v2.upstream import HiggsAudioForTraining

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BaseCheckpoint:
    """A base checkpoint whose every file was looked at, before any of its weights is loaded."""

    name: str  # as the user gave it: a folder or a hub id
    revision: str | None
    folder: Path
    layout: str  # of its files, one of `layouts.LAYOUTS`
    config: HiggsAudioConfig
    tokenizer: PreTrainedTokenizerFast
    facts: ModelFacts
    notes: tuple[str, ...]  # what the user should read once, a line each
    flag: str = "--base_ckpt"  # that named it
    stored: dict[str, Stored] = field(default_factory=dict)  # weights by boson_multimodal's names, in the model's order


def open_base(name_or_path: str, revision: str | None = None, flag: str = "--base_ckpt") -> BaseCheckpoint:
    """Finds a checkpoint and asks it everything that can be asked without loading it; the same for every verb.

    Args:
        name_or_path: a folder, or a hub id, which is downloaded.
        revision: of the hub; None means the pinned one for Boson's own, the newest for any other.
        flag: that named it, for the messages.

    Raises:
        ConfigError: not to be had, of another kind or layout, weights or a tokenizer that do not fit its config; all
            that is wrong with it, a line each.
    """
    folder = locate_checkpoint(name_or_path, revision, flag)
    config = read_checkpoint_config(folder, flag)
    stored, notes = check_weights(folder, config, flag)
    tokenizer = load_tokenizer(folder, flag)
    check_tokenizer(folder, tokenizer, config, flag)
    facts, layout = HiggsV2Facts.from_config(config), layout_of(folder, flag)
    known = (folder, layout, config, tokenizer, facts, tuple(notes), flag, stored)
    return BaseCheckpoint(name_or_path, revision, *known)


def locate_checkpoint(
    name_or_path: str, revision: str | None = None, flag: str = "--base_ckpt", *, weights: bool = True
) -> Path:
    """The folder of a base checkpoint; a hub id is downloaded (safetensors, JSON and tokenizer files only).

    Args:
        weights: whether they are needed too; without them it is a matter of megabytes.

    Raises:
        ConfigError: neither a folder nor a hub id that can be had.
    """
    with reading(f"{flag}: {name_or_path!r}"):
        name_or_path.encode()  # it is to stand in configs and cards
        folder = Path(name_or_path)
        if folder.is_dir():
            return folder
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") != 1:
        raise ConfigError([f"{flag}: {name_or_path} is neither a folder nor a hub id (owner/name)"])
    from huggingface_hub import snapshot_download

    revision = revision_of(name_or_path, revision)
    patterns = ["*.json", "tokenizer*", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        where = f"{flag}: {name_or_path} (revision {revision})"
        raise ConfigError([f"{where} cannot be had from the hub: {error}"]) from error


def read_model_config(folder: Path, flag: str = "--base_ckpt") -> HiggsAudioConfig:
    """The config of a checkpoint in either layout. Raises ConfigError for what this trainer does not train."""
    return read_checkpoint_config(folder, flag)


def load_tokenizer(folder: Path, flag: str = "--base_ckpt") -> PreTrainedTokenizerFast:
    """The checkpoint's own tokenizer; nothing in the checkpoint is run."""
    from transformers import AutoTokenizer

    with reading(f"{flag}: {folder}: the tokenizer cannot be loaded"):
        if lacks := [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]:
            raise ValueError(f"it lacks {' and '.join(lacks)}")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


# What the prompt is written with: a tokenizer that cuts one of these to pieces would train another prompt.
_PROMPT_TOKENS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|recipient|>"),
    *("<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|scene_desc_start|>", "<|scene_desc_end|>"),
)


def check_tokenizer(folder: Path, tokenizer, config: HiggsAudioConfig, flag: str = "--base_ckpt") -> None:
    """Compares the tokenizer's special tokens with those of the config.

    Raises:
        ConfigError: a special token that is none, or has another id; ids beyond the model's vocabulary.
    """
    ids = {
        config.audio_in_token: config.audio_in_token_idx,
        config.audio_out_token: config.audio_out_token_idx,
        config.audio_out_bos_token: config.audio_out_bos_token_id,
        config.audio_eos_token: config.audio_eos_token_id,
    }
    problems = []
    for token in dict.fromkeys([*_PROMPT_TOKENS, *ids]):
        encoded = tokenizer.encode(token, add_special_tokens=False)
        wanted = ids.get(token)
        if len(encoded) != 1:
            problems.append(f"its tokenizer cuts {token} into {len(encoded)} tokens; it must be one special token")
        elif wanted is not None and encoded[0] != wanted:
            problems.append(f"its tokenizer gives {token} the id {encoded[0]}, config.json {wanted}")
    if len(tokenizer) > config.text_config.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer)} tokens, the model {config.text_config.vocab_size}")
    refuse(problems, f"{flag}: {folder}")


def load_base(
    folder: Path, config: HiggsAudioConfig, dtype: str, *, quantize_on: torch.device | None = None
) -> HiggsAudioForTraining:
    """The base model, all parameters frozen, in `dtype` ("bf16", "fp16", "fp32"); after `check_weights`.

    With `quantize_on` the decoder's linear layers are kept in NF4, made on that device, see `load_checkpoint`.
    """
    model = load_checkpoint(HiggsAudioForTraining, folder, config, DTYPES[dtype], quantize_on=quantize_on)
    model.requires_grad_(False)
    return model


def attach_lora(
    model: HiggsAudioModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    seed: int,
    base_name: str,
    base_revision: str | None = None,
    rslora: bool = False,
    whole_modules: Sequence[str] = (),
    whole: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: parameter.detach().clone(),
) -> PeftModel:
    """LoRA on every linear layer whose name ends in one of `target_modules`, A drawn from our own generator, B zero.

    The draw depends on the seed and the weight's name alone: the same start under every ZeRO stage and world size.

    Args:
        whole_modules: ends of names from `WHOLE_MODULES`; the weights of these train themselves, from the base's on.
        whole: gives a copy of a base weight, which ZeRO-3 has cut.

    Raises:
        ConfigError: a target that names no linear layer.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    suffixes = {name.rsplit(".", 1)[-1] for name in linears}
    problems = [
        f"--lora_target_modules: {target!r} names no linear layer{nearest(target, [*suffixes, *LORA_TARGET_GROUPS])}"
        for target in naming_nothing(target_modules, linears)
    ]
    if problems:
        raise ConfigError(problems)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
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
    for name in layers_named(whole_modules, WHOLE_MODULES):
        module = model.get_submodule(name)
        module.weight = nn.Parameter(whole(module.weight))
    peft_model.peft_config["default"].modules_to_save = list(whole_modules) or None
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
