"""Loading a checkpoint in transformers' layout into boson_multimodal's model, tensor by tensor.

transformers 4.46 cannot rename weights while it loads them. Outside ZeRO-3 the model is built without memory and takes
over tensors that are mapped from the files, so that the processes of a node share one copy in its page cache. Under
ZeRO-3 transformers' own loader gathers, fills and shards one module after the other from the same mapped tensors.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.logging import disable_progress_bar

from .layouts import TRANSFORMERS, layout_of, name_in
from .weight_files import differences, refuse, weight_headers

Model = TypeVar("Model", bound=HiggsAudioModel)


def wanted_weights(config: HiggsAudioConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that boson_multimodal's model has."""
    with torch.device("meta"):
        model = HiggsAudioModel(copy.deepcopy(config))  # which writes into its config
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def linear_layers(config: HiggsAudioConfig) -> dict[str, tuple[int, int]]:
    """The model's linear layers, which are what LoRA adapts: name to (out, in)."""
    with torch.device("meta"):
        modules = HiggsAudioModel(config).named_modules()
    return {name: (m.out_features, m.in_features) for name, m in modules if isinstance(m, torch.nn.Linear)}


def check_renamed_weights(folder: Path, config: HiggsAudioConfig, flag: str = "--base_ckpt") -> None:
    """Compares a folder in transformers' layout, by its headers, with what the model needs.

    Raises:
        ConfigError: missing, extra or misshapen weights, each under its name there.
    """
    found = weight_headers(folder, TRANSFORMERS)
    problems = differences(found, wanted_weights(config), lambda name: name_in(TRANSFORMERS, name))
    head = "audio_decoder_proj.text_lm_head.weight"
    if not found.problems and head not in found.stored:
        problems.append("without text_lm_head.weight it speaks in transformers alone, and cannot be trained")
    refuse(problems, f"{flag}: {folder}")


def load_checkpoint(cls: type[Model], folder: Path, config: HiggsAudioConfig, dtype: torch.dtype) -> Model:
    """A `cls` with the weights of a folder in either layout; after its weights were checked.

    Args:
        cls: boson_multimodal's model, or a subclass.
        folder: the checkpoint.
        config: from `read_checkpoint_config`.
        dtype: of the weights in the model.
    """
    if layout_of(folder) == TRANSFORMERS:
        return load_renamed(cls, folder, config, dtype)
    disable_progress_bar()  # a bar for three files, from every rank
    return cls.from_pretrained(
        folder,
        config=config,
        torch_dtype=dtype,
        use_safetensors=True,
        # Without it every rank would hold the weights twice for a moment; with stage 3 it is not to be had.
        low_cpu_mem_usage=not is_deepspeed_zero3_enabled(),
    )


def load_renamed(cls: type[Model], folder: Path, config: HiggsAudioConfig, dtype: torch.dtype) -> Model:
    """`load_checkpoint` of a folder in transformers' layout."""
    mapped = {name: stored.read() for name, stored in weight_headers(folder, TRANSFORMERS).stored.items()}
    if is_deepspeed_zero3_enabled():
        return cls.from_pretrained(None, config=config, state_dict=mapped, torch_dtype=dtype)
    with init_empty_weights(include_buffers=False):  # rotary tables are computed, they stand in no file
        model = cls(copy.deepcopy(config))
    model.config.torch_dtype = dtype
    # Where the dtype is the file's, `to` gives the mapped tensor itself.
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in mapped.items()}, strict=True, assign=True)
    return model.eval()
