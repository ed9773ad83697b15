"""Load a checkpoint in either layout into boson_multimodal's model, tensor by tensor.

transformers 4.46 cannot rename weights while loading. Outside ZeRO-3 the model is built on the meta device and adopts
memory-mapped tensors, so that the processes of a node share one copy in the page cache. Under ZeRO-3 transformers'
loader gathers, fills and shards one module after the other from the same mapped tensors.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from transformers import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from ...errors import reading
from ..family import Adaptable
from ..files.weight_files import MappedWeights, Stored, differences, refuse, weight_headers
from ..quantized import QuantizedLinear
from .layouts import CARRIED_ALONG, TRANSFORMERS, boson_names, layout_of, name_in
from .modules import SAVABLE_MODULES

TEXT_HEAD = "audio_decoder_proj.text_lm_head.weight"
Model = TypeVar("Model", bound=HiggsAudioModel)


def wanted_weights(config: HiggsAudioConfig, flag: str = "--base_ckpt") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of boson_multimodal's model."""
    return {name: tuple(value.shape) for name, value in _without_memory(config, flag).state_dict().items()}


def adaptable_modules(config: HiggsAudioConfig) -> Adaptable:
    """See `Family.adaptable_modules`."""
    model = _without_memory(config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
    return Adaptable(shapes, {name: tuple(model.get_submodule(name).weight.shape) for name in SAVABLE_MODULES})


def _without_memory(config: HiggsAudioConfig, flag: str = "--base_ckpt") -> HiggsAudioModel:
    """boson_multimodal's model on the meta device.

    Raises:
        ConfigError: its classes cannot build a model from this config.
    """
    with reading(f"{flag}: config.json describes no model"), torch.device("meta"):
        return HiggsAudioModel(copy.deepcopy(config))  # the constructor modifies its config


def check_weights(
    folder: Path, config: HiggsAudioConfig, flag: str = "--base_ckpt"
) -> tuple[dict[str, Stored], list[str]]:
    """Compares the headers of a checkpoint in either layout with the model's weights.

    Returns:
        the weights by boson_multimodal's names, in the model's order; and notes on known superfluous weights, which are
        left out.

    Raises:
        ConfigError: a line for each missing, extra, misshapen or quantized weight, or unreadable file.
    """
    layout, wanted = layout_of(folder, flag), wanted_weights(config, flag)
    stored = weight_headers(folder, boson_names(layout), flag)
    left_out = [one.key for one in stored.values() if re.search(CARRIED_ALONG, one.key)]
    stored = {name: one for name, one in stored.items() if one.key not in left_out}
    problems = differences(stored, wanted, lambda name: name_in(layout, name))
    if layout == TRANSFORMERS and TEXT_HEAD not in stored:
        problems.append("without text_lm_head.weight it speaks in transformers alone, and cannot be trained")
    refuse(problems, f"{flag}: {folder}")
    notes = []
    if left_out:
        more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        notes = [f"{folder}: weights that the model does not have, left out: {', '.join(left_out[:4])}{more}"]
    return {name: stored[name] for name in wanted}, notes


def load_checkpoint(
    cls: type[Model],
    folder: Path,
    config: HiggsAudioConfig,
    dtype: torch.dtype,
    *,
    quantize_on: torch.device | None = None,
) -> Model:
    """Loads a folder in either layout into a `cls`; call `check_weights` first.

    Args:
        cls: boson_multimodal's model, or a subclass.
        folder: the checkpoint.
        config: from `read_checkpoint_config`.
        dtype: dtype of the loaded weights.
        quantize_on: quantize the decoder's linear layers to NF4 on this device; not under ZeRO-3.
    """
    stored = weight_headers(folder, boson_names(layout_of(folder)))
    stored = {name: one for name, one in stored.items() if not re.search(CARRIED_ALONG, one.key)}
    if is_deepspeed_zero3_enabled():
        model = cls.from_pretrained(None, config=config, state_dict=MappedWeights(stored), torch_dtype=dtype)
    else:
        with init_empty_weights(include_buffers=False):  # rotary tables are computed, not stored
            model = cls(copy.deepcopy(config))
        model.config.torch_dtype = dtype
        if quantize_on is not None:
            _quantize_decoder(model, stored, dtype, quantize_on)
        # If the dtype is the file's, `to` returns the mapped tensor itself.
        model.load_state_dict({name: one.read().to(dtype) for name, one in stored.items()}, strict=True, assign=True)
    text = config.text_config
    # As in Boson's file; any other would sample differently.
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model.eval()


def _quantize_decoder(model: Model, stored: dict[str, Stored], dtype: torch.dtype, device: torch.device) -> None:
    """Quantizes the decoder's linear layers to NF4, one by one, and removes their weights from `stored`."""
    for place, layer in list(model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            weight = stored.pop(f"layers.{place}.weight").read()
            model.layers.set_submodule(place, QuantizedLinear(weight, layer.bias, dtype, device))
