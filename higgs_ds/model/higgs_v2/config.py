"""config.json in either layout: read transformers' as boson_multimodal's, and convert in both directions.

transformers' config omits what its model never varies (a dual FFN in every layer, the delay pattern, codes of prompt
clips), and the ids of tokens that it does not use; those are taken from the checkpoint's tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ..files.config_values import Count, Dtype, Size, TokenId, checked, read_json, rope_of
from ..files.weight_files import refuse
from .boson_config import LLAMA_FIELDS, LlamaFields, config_from_boson, made
from .layouts import TRANSFORMERS, layout_of
from .spec import peculiarities

# Boson's names of the tokens; transformers calls <|reserved_special_token_6|> the audio delay token.
TOKENS = {
    "bos": "<|begin_of_text|>",
    "end_of_text": "<|end_of_text|>",
    "eot": "<|eot_id|>",
    "audio_eos": "<|audio_eos|>",
    "audio_out_bos": "<|audio_out_bos|>",
    "audio_in": "<|AUDIO|>",
    "audio_out": "<|AUDIO_OUT|>",
}
DELAY_TOKEN = "<|reserved_special_token_6|>"
# Rotary parameters of a config that has none.
DEFAULT_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 0.5,
    "low_freq_factor": 0.125,
    "original_max_position_embeddings": 1024,
}


class TransformersFields(LlamaFields):
    """Fields of config.json in transformers' layout; the defaults are those of HiggsAudioV2Config."""

    pad_token_id: TokenId = 128001
    tie_word_embeddings: bool = False
    num_codebooks: Count = 8
    codebook_size: Size = 1024
    audio_token_id: TokenId = 128016
    audio_bos_token_id: TokenId = 128013
    audio_delay_token_id: TokenId = 128014
    audio_stream_bos_id: TokenId = 1024
    audio_stream_eos_id: TokenId = 1025
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    quantization_config: None = None
    rope_parameters: dict | None = None
    rope_scaling: dict | None = None
    rope_theta: float | None = None


DEFAULTS = TransformersFields().model_dump(exclude_none=True)
_FIELDS: TypeAdapter = TypeAdapter(TransformersFields)


class AddedToken(TypedDict):
    """Fields read from an added token of a tokenizer."""

    content: str
    id: TokenId


_ADDED_TOKENS: TypeAdapter = TypeAdapter(list[AddedToken])


def read_checkpoint_config(folder: Path, flag: str = "--base_ckpt") -> HiggsAudioConfig:
    """The config of a checkpoint in either layout, as boson_multimodal's class.

    Raises:
        ConfigError: neither layout, or values that Boson's model cannot have; a line each.
    """
    file = folder / "config.json"
    where, raw = f"{flag}: {file}", read_json(file, flag)
    if layout_of(folder, flag) == TRANSFORMERS:
        return config_from_transformers(raw, token_ids(folder, flag), where)
    return config_from_boson(raw, where)


def without_private(fields: dict) -> dict:
    """A config without transformers' private fields (`_name_or_path`, …), at any depth."""
    return {
        key: without_private(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if not str(key).startswith("_")
    }


def token_ids(folder: Path, flag: str = "--base_ckpt") -> dict[str, int]:
    """Ids of the added tokens in the checkpoint's tokenizer.json, by text.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = folder / "tokenizer.json"
    added = read_json(file, flag).get("added_tokens")
    return {one["content"]: one["id"] for one in checked(_ADDED_TOKENS, added, f"{flag}: {file}: added_tokens")}


def config_from_transformers(raw: dict, tokens: dict[str, int], where: str) -> HiggsAudioConfig:
    """Boson's config for a model in transformers' layout.

    Args:
        raw: the parsed config.json.
        tokens: ids of the tokenizer's added tokens, by text.
        where: prefix of each message.

    Raises:
        ConfigError: a line for each value that Boson's model cannot have.
    """
    values: dict[str, Any] = checked(_FIELDS, raw, where).model_dump()
    rope = _rope_of(values, where)
    problems = _not_bosons(values)
    ids = {name: tokens.get(text) for name, text in TOKENS.items()}
    problems += [f"the tokenizer has no {TOKENS[name]}" for name, found in ids.items() if found is None]
    for key, name in (("audio_token_id", "audio_out"), ("audio_bos_token_id", "audio_out_bos")):
        if ids[name] is not None and values[key] != ids[name]:
            problems.append(f"{key} is {values[key]}, the tokenizer's {TOKENS[name]} is {ids[name]}")
    refuse(problems, where)
    text = {key: values[key] for key in LLAMA_FIELDS}
    text |= {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["end_of_text"],
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": values["dtype"] or values["torch_dtype"],
    }
    fields = dict(
        architectures=["HiggsAudioModel"],
        text_config=text,
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(values["num_hidden_layers"])),
        audio_ffn_hidden_size=values["hidden_size"],
        audio_ffn_intermediate_size=values["intermediate_size"],
        audio_num_codebooks=values["num_codebooks"],
        audio_codebook_size=values["audio_stream_bos_id"],
        audio_stream_bos_id=values["audio_stream_bos_id"],
        audio_stream_eos_id=values["audio_stream_eos_id"],
        audio_in_token_idx=ids["audio_in"],
        audio_out_token_idx=ids["audio_out"],
        audio_out_bos_token_id=ids["audio_out_bos"],
        audio_eos_token_id=ids["audio_eos"],
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
        skip_audio_tower=True,
        use_delay_pattern=True,
        use_audio_out_self_attention=False,
        hidden_size=values["hidden_size"],
        pad_token_id=values["pad_token_id"],
        torch_dtype=text["torch_dtype"],
    )
    return made(fields, where)


def _not_bosons(values: dict[str, Any]) -> list[str]:
    """Lists values that Boson's model cannot have."""
    size, begin, end = values["codebook_size"], values["audio_stream_bos_id"], values["audio_stream_eos_id"]
    problems = []
    if values["tie_word_embeddings"]:
        problems.append("tie_word_embeddings is true: this model's heads and embeddings are weights of their own")
    if (begin, end) != (size - 2, size - 1):
        problems.append(
            f"codebook_size is {size}, with audio_stream_bos_id {begin} and audio_stream_eos_id {end}: expected the "
            "codes, then these two (Boson's: 1026, 1024, 1025)"
        )
    return problems


def _rope_of(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Rotary parameters from either spelling in transformers' config.json."""
    found, scaling, theta = (values[key] for key in ("rope_parameters", "rope_scaling", "rope_theta"))
    if found is None and not scaling and theta is None:
        found = DEFAULT_ROPE
    if found is None:
        found = {"rope_theta": 10000.0 if theta is None else theta, **(scaling or {})}
        found.setdefault("rope_type", found.get("type", "default"))
    return rope_of(found, found.get("rope_theta"), where)


def transformers_config(config: HiggsAudioConfig, tokens: dict[str, int], dtype: str, where: str) -> dict:
    """config.json in transformers' layout for a model in Boson's.

    Args:
        config: Boson's config.
        tokens: ids of the tokenizer's added tokens, by text.
        dtype: dtype of the weights as torch names it: "bfloat16".
        where: prefix of each message.

    Raises:
        ConfigError: a line for each property that transformers' model cannot have.
    """
    text = config.text_config
    cannot = {
        "codes without the delay pattern": not config.use_delay_pattern,
        "averaged audio embeddings (audio_embed_avg)": config.audio_embed_avg,
    }
    found = [*peculiarities(config), *(what for what, is_so in cannot.items() if is_so)]
    problems = [f"the model has {what}, transformers' has not" for what in found]
    size = config.audio_codebook_size
    if (config.audio_stream_bos_id, config.audio_stream_eos_id) != (size, size + 1):
        problems.append(f"audio_codebook_size is {size}, its stream ids are not the two after it")
    for token in (DELAY_TOKEN, TOKENS["eot"]):
        if token not in tokens:
            problems.append(f"the tokenizer has no {token}, which transformers' generation writes")
    refuse(problems, where)
    rope = rope_of(text.rope_scaling, text.rope_theta, where)
    values = {key: getattr(text, key) for key in LLAMA_FIELDS}
    return {
        "architectures": ["HiggsAudioV2ForConditionalGeneration"],
        **values,
        "audio_bos_token_id": config.audio_out_bos_token_id,
        "audio_delay_token_id": tokens[DELAY_TOKEN],
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "audio_token_id": config.audio_out_token_idx,
        "bos_token_id": text.bos_token_id,
        "codebook_size": size + 2,
        "dtype": dtype,
        "eos_token_id": tokens[TOKENS["eot"]],
        "model_type": "higgs_audio_v2",
        "num_codebooks": config.audio_num_codebooks,
        "pad_token_id": config.pad_token_id,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }
