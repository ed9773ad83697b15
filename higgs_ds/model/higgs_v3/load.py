"""Checks and loads a Higgs TTS 3 checkpoint.

The bundled codec and the tied copies of embedding and table are ignored.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.integrations import is_deepspeed_zero3_enabled

from ...codec.codec_layout import BUNDLED as CODEC
from ...errors import reading
from ..base import DTYPES, BaseCheckpoint
from ..family import Adaptable
from ..files.config_values import read_json
from ..files.weight_files import MappedWeights, Stored, differences, refuse, weight_headers
from ..quantized import QuantizedLinear
from .config import HiggsV3Config, config_from
from .family import LAYOUT
from .layers import TABLE, HiggsV3Model
from .prompt import AUDIO, PROMPT_TOKENS, REF_AUDIO
from .spec import HiggsV3Spec

COPIES = "tied.head."  # prefix of the tied copies


def open_base(
    name_or_path: str, revision: str | None, flag: str, folder: Path, *, weights: bool = True
) -> BaseCheckpoint:
    """Reads and checks a checkpoint's folder without loading weights; `weights` False skips their check.

    Raises:
        ConfigError: weights or tokenizer do not match the config; one line per problem.
    """
    config, tokenizer = read_config(folder, flag), load_tokenizer(folder, flag)
    ids = _prompt_ids(folder, tokenizer, config, flag)
    config.audio_token, config.reference_token = ids[AUDIO], ids[REF_AUDIO]
    found = headers(folder, flag) if weights else {}
    stored = check_weights(folder, config, flag, found) if weights else {}
    spec, bundles_codec = HiggsV3Spec.from_config(config, ids), len(found) > len(stored)
    return BaseCheckpoint(
        name_or_path, revision, folder, LAYOUT, config, tokenizer, spec, (), flag, stored, bundles_codec
    )


def read_config(folder: Path, flag: str = "--base_ckpt") -> HiggsV3Config:
    """Reads the checkpoint's config. Raises ConfigError."""
    file = folder / "config.json"
    return config_from(read_json(file, flag), f"{flag}: {file}")


def load_tokenizer(folder: Path, flag: str = "--base_ckpt") -> PreTrainedTokenizerFast:
    """Loads only tokenizer.json; the other tokenizer files require a newer transformers. Raises ConfigError."""
    file = folder / "tokenizer.json"
    with reading(f"{flag}: {file}: the tokenizer cannot be loaded"):
        file.open("rb").close()  # gives a clear error if the file is missing
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(file)))


def _prompt_ids(folder: Path, tokenizer: PreTrainedTokenizerFast, config: HiggsV3Config, flag: str) -> dict[str, int]:
    """Looks up the ids of the special tokens in prompts.

    Raises:
        ConfigError: one of them is not a single token; the tokenizer exceeds the model's vocabulary.
    """
    problems, ids = [], {}
    for token in PROMPT_TOKENS:
        with reading(f"{flag}: {folder / 'tokenizer.json'} cannot encode {token}"):
            encoded = tokenizer.encode(token, add_special_tokens=False)
        ids[token] = encoded[0] if encoded else 0
        if len(encoded) != 1:
            problems.append(f"its tokenizer splits {token} into {len(encoded)} tokens; it must be one special token")
    if len(tokenizer) > config.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    refuse(problems, f"{flag}: {folder}")
    return ids


def wanted_weights(config: HiggsV3Config, flag: str = "--base_ckpt") -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the model's weights, as expected in the checkpoint."""
    return {name: tuple(value.shape) for name, value in _without_memory(config, flag).state_dict().items()}


def adaptable_modules(config: HiggsV3Config) -> Adaptable:
    """Lists the modules to adapt: linear layers of the decoder with LoRA, the table of codes as a whole."""
    model = _without_memory(config)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    shapes: dict[str, tuple[int, ...]] = {name: (one.out_features, one.in_features) for name, one in linears.items()}
    return Adaptable(shapes, {TABLE: tuple(model.code_table.weight.shape)})


def _without_memory(config: HiggsV3Config, flag: str = "--base_ckpt") -> HiggsV3Model:
    with reading(f"{flag}: config.json describes no model"), torch.device("meta"):
        return HiggsV3Model(copy.deepcopy(config))


def headers(folder: Path, flag: str = "--base_ckpt") -> dict[str, Stored]:
    """Reads the headers of all weights in the folder by name, without the tied copies."""
    found = weight_headers(folder, flag=flag)
    return {name: one for name, one in found.items() if not name.startswith(COPIES)}


def check_weights(folder: Path, config: HiggsV3Config, flag: str, found: dict[str, Stored]) -> dict[str, Stored]:
    """Checks the weights of `headers` and returns those of the language model, in the model's order.

    Raises:
        ConfigError: missing, extra, misshapen or quantized weights, each by name; unreadable files.
    """
    wanted = wanted_weights(config, flag)
    stored = {name: one for name, one in found.items() if not name.startswith(CODEC)}
    refuse(differences(stored, wanted), f"{flag}: {folder}")
    return {name: stored[name] for name in wanted}


def empty_base(config: HiggsV3Config, dtype: str) -> HiggsV3Model:
    """Makes the model of `load_base` on the meta device: names and shapes without values."""
    return _without_memory(config).to(DTYPES[dtype])


def load_base(
    folder: Path, config: HiggsV3Config, dtype: str, *, quantize_on: torch.device | None = None
) -> HiggsV3Model:
    """Loads the frozen model in `dtype` ("bf16", "fp16", "fp32"); call `check_weights` first.

    Args:
        quantize_on: device to quantize the decoder's linear layers to NF4; None for no quantization. Not with ZeRO-3.
    """
    kind = DTYPES[dtype]
    stored = {name: one for name, one in headers(folder).items() if not name.startswith(CODEC)}
    if is_deepspeed_zero3_enabled():
        model = HiggsV3Model.from_pretrained(None, config=config, state_dict=MappedWeights(stored), torch_dtype=kind)
    else:
        with init_empty_weights():
            model = HiggsV3Model(copy.deepcopy(config))
        if quantize_on is not None:
            for name in adaptable_modules(config).linears:
                weight = stored.pop(f"{name}.weight").read()
                model.set_submodule(name, QuantizedLinear(weight, None, kind, quantize_on))
        # If the dtype equals the file's, `to` returns the memory-mapped tensor itself.
        model.load_state_dict({name: one.read().to(kind) for name, one in stored.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)
