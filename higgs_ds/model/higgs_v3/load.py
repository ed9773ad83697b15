"""A Higgs TTS 3 checkpoint: what its folder holds, compared with what the model needs, and loaded.

The codec that is bundled with it and the tied copies of embedding and table are not this model's, and are left alone.
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

COPIES = "tied.head."  # before those of copies that no index lists


def open_base(
    name_or_path: str, revision: str | None, flag: str, folder: Path, *, weights: bool = True
) -> BaseCheckpoint:
    """Everything that can be asked of a checkpoint's folder without loading it; without `weights`, beside them.

    Raises:
        ConfigError: weights or a tokenizer that do not fit its config; all that is wrong with it, a line each.
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
    """The checkpoint's config. Raises ConfigError."""
    file = folder / "config.json"
    return config_from(read_json(file, flag), f"{flag}: {file}")


def load_tokenizer(folder: Path, flag: str = "--base_ckpt") -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer.json by itself: what is written beside it is for a newer transformers."""
    file = folder / "tokenizer.json"
    with reading(f"{flag}: {file}: the tokenizer cannot be loaded"):
        file.open("rb").close()  # a missing file is named by its path
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(file)))


def _prompt_ids(folder: Path, tokenizer: PreTrainedTokenizerFast, config: HiggsV3Config, flag: str) -> dict[str, int]:
    """Ids of the tokens that prompts are written with.

    Raises:
        ConfigError: one of them is cut to pieces; ids beyond the model's vocabulary.
    """
    problems, ids = [], {}
    for token in PROMPT_TOKENS:
        with reading(f"{flag}: {folder / 'tokenizer.json'} cannot encode {token}"):
            encoded = tokenizer.encode(token, add_special_tokens=False)
        ids[token] = encoded[0] if encoded else 0
        if len(encoded) != 1:
            problems.append(f"its tokenizer cuts {token} into {len(encoded)} tokens; it must be one special token")
    if len(tokenizer) > config.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    refuse(problems, f"{flag}: {folder}")
    return ids


def wanted_weights(config: HiggsV3Config, flag: str = "--base_ckpt") -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that the model has, which are the checkpoint's."""
    return {name: tuple(value.shape) for name, value in _without_memory(config, flag).state_dict().items()}


def adaptable_modules(config: HiggsV3Config) -> Adaptable:
    """LoRA may stand on the decoder's linear layers; the table of codes may be trained whole, as one tensor."""
    model = _without_memory(config)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    shapes: dict[str, tuple[int, ...]] = {name: (one.out_features, one.in_features) for name, one in linears.items()}
    return Adaptable(shapes, {TABLE: tuple(model.code_table.weight.shape)})


def _without_memory(config: HiggsV3Config, flag: str = "--base_ckpt") -> HiggsV3Model:
    with reading(f"{flag}: config.json describes no model"), torch.device("meta"):
        return HiggsV3Model(copy.deepcopy(config))


def headers(folder: Path, flag: str = "--base_ckpt") -> dict[str, Stored]:
    """All weights in the folder's files by their names, but for the tied copies."""
    found = weight_headers(folder, flag=flag)
    return {name: one for name, one in found.items() if not name.startswith(COPIES)}


def check_weights(folder: Path, config: HiggsV3Config, flag: str, found: dict[str, Stored]) -> dict[str, Stored]:
    """The language model's weights of `headers`, in the model's order.

    Raises:
        ConfigError: missing, extra, misshapen or quantized weights, each by its name; files that cannot be read.
    """
    wanted = wanted_weights(config, flag)
    stored = {name: one for name, one in found.items() if not name.startswith(CODEC)}
    refuse(differences(stored, wanted), f"{flag}: {folder}")
    return {name: stored[name] for name in wanted}


def empty_base(config: HiggsV3Config, dtype: str) -> HiggsV3Model:
    """The model of `load_base` on the meta device: names and shapes, no weight."""
    return _without_memory(config).to(DTYPES[dtype])


def load_base(
    folder: Path, config: HiggsV3Config, dtype: str, *, quantize_on: torch.device | None = None
) -> HiggsV3Model:
    """The model, frozen, in `dtype` ("bf16", "fp16", "fp32"); after `check_weights`.

    Args:
        quantize_on: keeps the linear layers of the decoder in NF4, made on this device; not under ZeRO-3.
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
        # Where the dtype is the file's, `to` gives the mapped tensor itself.
        model.load_state_dict({name: one.read().to(kind) for name, one in stored.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)
