"""A base checkpoint of Higgs Audio v2, every weight accounted for.

The files' headers are compared with the model's weights before anything is loaded, so that every rank and ZeRO stage
comes to the same verdict; transformers' loader would leave missing weights random.
"""

from __future__ import annotations

from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig

from ..base import DTYPES, BaseCheckpoint, load_tokenizer, locate_checkpoint
from ..files.weight_files import refuse
from .config import read_checkpoint_config
from .layouts import layout_of
from .load import check_weights, load_checkpoint
from .spec import HiggsV2Spec
from .upstream import HiggsAudioForTraining


def open_base(
    name_or_path: str,
    revision: str | None = None,
    flag: str = "--base_ckpt",
    folder: Path | None = None,
    *,
    weights: bool = True,
) -> BaseCheckpoint:
    """Locates a checkpoint and checks config, weight headers and tokenizer; used by every verb.

    Args:
        name_or_path: a folder, or a hub id to download.
        revision: hub revision; None means the pinned one for Boson's own repository, else the newest.
        flag: the flag that named it, for messages.
        folder: its folder, if it has been located already.
        weights: also check the weights' headers.

    Raises:
        ConfigError: a line for each problem: not found, another model type, weights or a tokenizer that do not fit the
            config.
    """
    folder = folder or locate_checkpoint(name_or_path, revision, flag)
    config = read_checkpoint_config(folder, flag)
    stored, notes = check_weights(folder, config, flag) if weights else ({}, [])
    tokenizer = load_tokenizer(folder, flag)
    check_tokenizer(folder, tokenizer, config, flag)
    spec, layout = HiggsV2Spec.from_config(config), layout_of(folder, flag)
    known = (folder, layout, config, tokenizer, spec, tuple(notes), flag, stored)
    return BaseCheckpoint(name_or_path, revision, *known)


# Special tokens of the prompt: a tokenizer that splits one of them would train another prompt.
_PROMPT_TOKENS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|recipient|>"),
    *("<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|scene_desc_start|>", "<|scene_desc_end|>"),
)


def check_tokenizer(folder: Path, tokenizer, config: HiggsAudioConfig, flag: str = "--base_ckpt") -> None:
    """Compares the tokenizer's special tokens with the config.

    Raises:
        ConfigError: a prompt token that is not a single special token, or has another id; ids beyond the vocabulary.
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
            problems.append(f"its tokenizer splits {token} into {len(encoded)} tokens; it must be one special token")
        elif wanted is not None and encoded[0] != wanted:
            problems.append(f"its tokenizer gives {token} the id {encoded[0]}, config.json {wanted}")
    if len(tokenizer) > config.text_config.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer)} tokens, the model {config.text_config.vocab_size}")
    refuse(problems, f"{flag}: {folder}")


def empty_base(config: HiggsAudioConfig, dtype: str) -> HiggsAudioForTraining:
    """The model of `load_base` on the meta device: names and shapes without values."""
    with torch.device("meta"):
        return HiggsAudioForTraining._from_config(config, torch_dtype=DTYPES[dtype])


def load_base(
    folder: Path, config: HiggsAudioConfig, dtype: str, *, quantize_on: torch.device | None = None
) -> HiggsAudioForTraining:
    """Loads the base model, frozen, in `dtype` ("bf16", "fp16", "fp32"); call `check_weights` first.

    With `quantize_on`, the decoder's linear layers are quantized to NF4 on that device, see `load_checkpoint`.
    """
    model = load_checkpoint(HiggsAudioForTraining, folder, config, DTYPES[dtype], quantize_on=quantize_on)
    model.requires_grad_(False)
    return model
