"""Whisper in transformers' format: tiny.en, converted from CTranslate2's format, and a random turbo."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
START, END, NO_TIMESTAMPS = 50257, 50256, 50362


def variables(file: Path) -> dict[str, torch.Tensor]:
    """Reads the variables of a model.bin, in float32."""
    data, at, found = file.read_bytes(), 0, {}

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        size = take("H")
        at += size
        return data[at - size : at - 1].decode()

    assert take("I") == 6 and text() == "WhisperSpec" and take("I") == 3
    for _ in range(take("I")):
        name, shape = text(), [take("I") for _ in range(take("B"))]
        dtype, size = DTYPES[take("B")], take("I")
        found[name] = torch.from_numpy(np.frombuffer(data[at : at + size], dtype).reshape(shape).astype(np.float32))
        at += size
    return found


def linears(name: str) -> list[str]:
    """Returns transformers' names of the layers that CTranslate2 fuses into one linear layer."""
    kind, number = name.split("/")[-2:]
    heads = {"self_attention": (["q", "k", "v"], ["out"]), "attention": (["q"], ["k", "v"], ["out"])}
    if kind == "ffn":
        return ["fc1" if number == "linear_0" else "fc2"]
    of_kind = "encoder_attn" if kind == "attention" else "self_attn"
    return [f"{of_kind}.{head}_proj" for head in heads[kind][int(number[-1])]]


def weights(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames and splits variables into transformers' state dict."""
    norms = {
        "self_attention": "self_attn_layer_norm",
        "attention": "encoder_attn_layer_norm",
        "ffn": "final_layer_norm",
    }
    state = {}
    for name, value in found.items():
        side, *parts = name.split("/")
        kind = {"gamma": "weight", "beta": "bias"}.get(parts[-1], parts[-1])
        if parts[0].startswith("layer_") and parts[0] != "layer_norm":
            prefix = f"model.{side}.layers.{parts[0][6:]}"
            if "layer_norm" in parts:
                state[f"{prefix}.{norms.get(parts[1], 'final_layer_norm')}.{kind}"] = value
            else:
                names = linears("/".join(parts[:-1]))
                for linear, part in zip(names, value.chunk(len(names)), strict=True):
                    state[f"{prefix}.{linear}.{kind}"] = part.clone()
        elif parts[0] in ("conv1", "conv2", "layer_norm"):
            state[f"model.{side}.{parts[0]}.{kind}"] = value
        elif parts[-1] == "encodings":
            state[f"model.{side}.embed_positions.weight"] = value
        elif parts[0] == "embeddings":
            state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = value
    return {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}  # zeros


def write(source: Path, folder: Path) -> Path:
    """Writes model, tokenizer and feature extractor to a folder."""
    config = WhisperConfig(vocab_size=51864, max_source_positions=1500, decoder_start_token_id=START)
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(weights(variables(source / "model.bin")))
    theirs = json.loads((source / "config.json").read_text())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
        return_timestamps=False,
        suppress_tokens=theirs["suppress_ids"],
        begin_suppress_tokens=theirs["suppress_ids_begin"],
    )
    return _saved(model, source, folder, WhisperFeatureExtractor())


def write_turbo(source: Path, folder: Path) -> Path:
    """Writes a random model like large-v3-turbo: multilingual, 128 mel bands, few decoder layers, 10 tokens at most."""
    small = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "encoder_layers"), 4)
    small |= {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_layers": 1, "init_std": 0.3}
    torch.manual_seed(0)
    config = WhisperConfig(vocab_size=51864, num_mel_bins=128, decoder_start_token_id=START, **small)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        max_length=10,
        is_multilingual=True,
        lang_to_id={f"<|{name}|>": START + 1 + place for place, name in enumerate(list(LANGUAGES)[:-1])},
        task_to_id={"translate": 50357, "transcribe": 50358},
        no_timestamps_token_id=NO_TIMESTAMPS,
        return_timestamps=False,
    )
    return _saved(model, source, folder, WhisperFeatureExtractor(feature_size=128))


def _saved(model, source: Path, folder: Path, extractor: WhisperFeatureExtractor) -> Path:
    model.save_pretrained(folder)
    tokens = source / "tokenizer.json"
    special = [token["content"] for token in json.loads(tokens.read_text())["added_tokens"]]
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(tokens), additional_special_tokens=special)
    tokenizer.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder
