"""The base checkpoint, every weight accounted for, and the LoRA adapter on it.

What the checkpoint holds is compared with what the model needs from the files' headers alone, before anything is
loaded: the same verdict on every rank and under every ZeRO stage, where loading itself would leave random weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from . import adapter_file
from .config import DEFAULT_BASE, DEFAULT_BASE_REVISION, ConfigError, TrainConfig, nearest
from .ds_config import LayerSizes
from .forward import HiggsAudioForTraining
from .layout_config import read_checkpoint_config
from .layouts import TRANSFORMERS, layout_of
from .load_layout import check_renamed_weights, linear_layers, load_checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def locate_checkpoint(name_or_path: str, revision: str | None = None) -> Path:
    """The folder of a base checkpoint; a hub id is downloaded (safetensors, JSON and tokenizer files only).

    Raises:
        ConfigError: neither a folder nor a hub id that can be had.
    """
    folder = Path(name_or_path)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise ConfigError([f"--base_ckpt: {name_or_path[:200]} cannot be read: {error.strerror}"]) from None
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") != 1:
        raise ConfigError([f"--base_ckpt: {name_or_path} is neither a folder nor a hub id (owner/name)"])
    from huggingface_hub import snapshot_download

    if revision is None and name_or_path == DEFAULT_BASE:
        revision = DEFAULT_BASE_REVISION
    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt"]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ConfigError(
            [f"--base_ckpt: {name_or_path} (revision {revision}) cannot be had from the hub: {error}"]
        ) from error


def read_model_config(folder: Path) -> HiggsAudioConfig:
    """The checkpoint's `config.json`, refused where this trainer would train something else than the model is.

    Raises:
        ConfigError: not a Higgs Audio checkpoint in either layout, or with an audio tower.
    """
    config = read_checkpoint_config(folder)
    if config.encode_whisper_embed or not config.skip_audio_tower:
        raise ConfigError(
            [
                f"--base_ckpt: {folder} has a Whisper audio tower (encode_whisper_embed or not skip_audio_tower); "
                "this trainer covers the generation checkpoints, which have none"
            ]
        )
    return config


def check_weights(folder: Path, config: HiggsAudioConfig) -> None:
    """Compares names and shapes in the safetensors headers with those that the model has.

    Raises:
        ConfigError: missing, extra or misshapen weights, each named.
    """
    if layout_of(folder) == TRANSFORMERS:
        return check_renamed_weights(folder, config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            [f"--base_ckpt: {folder} holds no .safetensors file (pickled checkpoints are not loaded: convert it)"]
        )
    found: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    if key in found:
                        problems.append(f"{file.name}: {key} stands in two files")
                    found[key] = tuple(tensors.get_slice(key).get_shape())
        except Exception as error:  # the safetensors reader raises its own SafetensorError, OSError or ValueError
            problems.append(f"{file.name} cannot be read: {error}")
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in HiggsAudioModel(config).state_dict().items()}
    if not problems:
        problems += [f"missing weight {key} {list(wanted[key])}" for key in wanted if key not in found]
        problems += [f"extra weight {key} {list(found[key])}" for key in found if key not in wanted]
        problems += [
            f"weight {key} has shape {list(found[key])}, the model needs {list(wanted[key])}"
            for key in wanted
            if key in found and found[key] != wanted[key]
        ]
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ConfigError([f"--base_ckpt: {folder}: {problem}" for problem in shown])


def load_tokenizer(folder: Path):
    """The checkpoint's own tokenizer; nothing in the checkpoint is run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError([f"--base_ckpt: {folder}: the tokenizer cannot be loaded: {error}"]) from error


def load_base(folder: Path, config: HiggsAudioConfig, dtype: str) -> HiggsAudioForTraining:
    """The base model, all parameters frozen, in `dtype` ("bf16", "fp16", "fp32"); after `check_weights`."""
    model = load_checkpoint(HiggsAudioForTraining, folder, config, DTYPES[dtype])
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
) -> PeftModel:
    """LoRA on every linear layer whose name ends in one of `target_modules`, A drawn from our own generator, B zero.

    The draw depends on the seed and the weight's name alone: the same start under every ZeRO stage and world size.

    Raises:
        ConfigError: a target that names no linear layer.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    suffixes = {name.rsplit(".", 1)[-1] for name in linears}
    problems = [
        f"--lora_target_modules: {target!r} names no linear layer{nearest(target, suffixes)}"
        for target in target_modules
        if not any(name == target or name.endswith("." + target) for name in linears)
    ]
    if problems:
        raise ConfigError(problems)
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        revision=base_revision,
    )
    # peft's default would keep float32 copies of LoRA under zero.Init alone, so that the stages would differ.
    peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(initial_lora(name, tuple(parameter.shape), seed))
    return peft_model


def set_lora(model: PeftModel, weights: dict[str, torch.Tensor], source: str) -> None:
    """Takes over LoRA weights, keyed as in PEFT's files; before the engine, which makes its masters of them.

    Raises:
        ConfigError: weights that are missing, extra or of another shape, each named.
    """
    own = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"{source}: missing weight {key}" for key in own if key not in weights]
    problems += [f"{source}: extra weight {key}" for key in weights if key not in own]
    problems += [
        f"{source}: {key} has shape {list(weights[key].shape)}, this run needs {list(p.shape)}"
        for key, p in own.items()
        if key in weights and weights[key].shape != p.shape
    ]
    if problems:
        raise ConfigError(problems[:20])
    for key, parameter in own.items():
        parameter.data.copy_(weights[key])


def read_init_adapter(options: TrainConfig, config: HiggsAudioConfig) -> dict[str, torch.Tensor] | None:
    """The checked weights of `--init_adapter`, by the keys of its file; None without one.

    Raises:
        ConfigError: it is not plain LoRA, does not fit the base one to one, or was trained on another base.
    """
    if options.init_adapter is None:
        return None
    folder, flag = Path(options.init_adapter), "--init_adapter"
    lora = adapter_file.read_adapter_config(folder, flag)
    if not options.other_base:
        adapter_file.check_base(lora, options.base_ckpt, options.base_revision, flag)
    return adapter_file.read_adapter(folder, linear_layers(config), lora, flag).state_dict()


def initial_lora(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """B is zero; A is uniform in ±1/sqrt(fan_in), peft's kaiming_uniform(a=sqrt(5)), from (seed, name) alone."""
    if "lora_B" in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = shape[-1] ** -0.5
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def layer_sizes(config: HiggsAudioConfig) -> LayerSizes:
    """Of a dual-FFN decoder layer of this model."""
    text = config.text_config
    hidden, head_dim = text.hidden_size, text.head_dim
    attention = 2 * hidden * head_dim * (text.num_attention_heads + text.num_key_value_heads)
    return LayerSizes(
        widest=max(hidden, text.intermediate_size), parameters=attention + 2 * 3 * hidden * text.intermediate_size
    )
