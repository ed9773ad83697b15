"""config.json in either layout: reading transformers' as boson_multimodal's, and writing each from the other.

transformers' config leaves out what that model never varies (a dual FFN in every layer, the delay pattern, codes of a
clip in the prompt) and the ids of tokens that it does not use; the first are the class's own constants, the second
stand in the checkpoint's tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from boson_multimodal.model.higgs_audio import HiggsAudioConfig

from ..errors import ConfigError
from .layouts import BOSON, layout_of, read_json

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

# What transformers' HiggsAudioV2Config takes for a key that config.json leaves out.
DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "pad_token_id": 128001,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "num_codebooks": 8,
    "codebook_size": 1024,
    "audio_token_id": 128016,
    "audio_bos_token_id": 128013,
    "audio_delay_token_id": 128014,
    "audio_stream_bos_id": 1024,
    "audio_stream_eos_id": 1025,
}
DEFAULT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 0.5,
    "low_freq_factor": 0.125,
    "original_max_position_embeddings": 1024,
}
ROPE_KEYS = {"default": set(), "llama3": set(DEFAULT_ROPE) - {"rope_type", "rope_theta"}}

# The keys that Llama's config has under the same name in both layouts.
_LLAMA_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pretraining_tp",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
_SIZES = tuple(key for key, value in DEFAULTS.items() if type(value) is int and not key.endswith("_id"))


def read_checkpoint_config(folder: Path, flag: str = "--base_ckpt") -> HiggsAudioConfig:
    """The config of a checkpoint in either layout, as boson_multimodal's model takes it.

    Raises:
        ConfigError: neither layout, or values that the other layout's model does not have; each named.
    """
    if layout_of(folder, flag) == BOSON:
        try:
            return HiggsAudioConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise ConfigError([f"{flag}: {folder / 'config.json'} is no config of Higgs Audio: {error}"]) from None
    raw = read_json(folder / "config.json", flag)
    return config_from_transformers(raw, token_ids(folder, flag), where=f"{flag}: {folder / 'config.json'}")


def token_ids(folder: Path, flag: str = "--base_ckpt") -> dict[str, int]:
    """Ids of the added tokens of the checkpoint's tokenizer.json, by their text.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = folder / "tokenizer.json"
    added = read_json(file, flag).get("added_tokens")
    try:
        return {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, KeyError, ValueError):
        raise ConfigError([f"{flag}: {file}: added_tokens is no list of tokens with content and id"]) from None


def config_from_transformers(raw: dict, tokens: dict[str, int], where: str) -> HiggsAudioConfig:
    """Boson's config of a model in transformers' layout.

    Args:
        raw: its config.json.
        tokens: ids of the tokenizer's added tokens, by text.
        where: begins each message.

    Raises:
        ConfigError: every value that Boson's model does not have, a line each.
    """
    values = {key: raw.get(key, default) for key, default in DEFAULTS.items()}
    problems = _wrong_values(values)
    rope = _rope(raw, problems)
    ids = {name: tokens.get(text) for name, text in TOKENS.items()}
    problems += [f"the tokenizer has no {TOKENS[name]}" for name, found in ids.items() if found is None]
    for key, name in (("audio_token_id", "audio_out"), ("audio_bos_token_id", "audio_out_bos")):
        if ids[name] is not None and values[key] != ids[name]:
            problems.append(f"{key} is {values[key]}, the tokenizer's {TOKENS[name]} is {ids[name]}")
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    text = {key: values[key] for key in _LLAMA_KEYS}
    text |= {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["end_of_text"],
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": raw.get("dtype") or raw.get("torch_dtype"),
    }
    return HiggsAudioConfig(
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


def _wrong_values(values: dict) -> list[str]:
    """Of `DEFAULTS`' keys: types, bounds, and what Boson's model cannot be."""
    problems = []
    for key, default in DEFAULTS.items():
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(values[key]) not in kinds:
            problems.append(f"{key} is {values[key]!r}, expected {type(default).__name__}")
    if problems:
        return problems
    problems += [f"{key} is {values[key]}, expected 1 or more" for key in _SIZES if values[key] < 1]
    if values["tie_word_embeddings"]:
        problems.append("tie_word_embeddings is true: this model's heads and embeddings are weights of their own")
    size, begin, end = values["codebook_size"], values["audio_stream_bos_id"], values["audio_stream_eos_id"]
    if (begin, end) != (size - 2, size - 1):
        problems.append(
            f"codebook_size is {size}, with audio_stream_bos_id {begin} and audio_stream_eos_id {end}: expected the "
            "codes, then these two (Boson's: 1026, 1024, 1025)"
        )
    return problems


def _rope(raw: dict, problems: list[str]) -> dict:
    """Rotary parameters as `rope_theta`, `rope_type` and that type's own; adds to `problems` what is not known."""
    found = raw.get("rope_parameters")
    if found is None and ("rope_theta" in raw or raw.get("rope_scaling") is not None):
        found = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {"rope_type": "default"})}
    rope = dict(DEFAULT_ROPE) if found is None else dict(found) if isinstance(found, dict) else {}
    kind = rope.get("rope_type")
    if kind not in ROPE_KEYS:
        problems.append(f"rope_parameters: rope_type is {kind!r}, expected one of {', '.join(ROPE_KEYS)}")
    elif set(rope) != ROPE_KEYS[kind] | {"rope_type", "rope_theta"}:
        problems.append(f"rope_parameters of type {kind!r} are {sorted(rope)}")
    elif any(type(v) not in (int, float) or not 0 < v < 1e12 for key, v in rope.items() if key != "rope_type"):
        problems.append(f"rope_parameters: {rope} holds something else than positive numbers")
    return rope


def transformers_config(config: HiggsAudioConfig, tokens: dict[str, int], dtype: str, where: str) -> dict:
    """config.json in transformers' layout of a model in Boson's.

    Args:
        config: Boson's.
        tokens: ids of the tokenizer's added tokens, by text.
        dtype: of the weights, as torch names it: "bfloat16".
        where: begins each message.

    Raises:
        ConfigError: what transformers' model does not have, a line each.
    """
    text = config.text_config
    layers = set(range(text.num_hidden_layers))
    cannot = {
        f"audio_adapter_type {config.audio_adapter_type!r}": not config.audio_adapter_type.startswith("dual_ffn"),
        "a dual FFN in only some of its layers": set(config.audio_dual_ffn_layers or ()) != layers,
        "an audio tower": config.encode_whisper_embed or not config.skip_audio_tower,
        "codes without the delay pattern": not config.use_delay_pattern,
        "averaged audio embeddings (audio_embed_avg)": config.audio_embed_avg,
        "its own attention for audio (use_audio_out_self_attention)": config.use_audio_out_self_attention,
        "a projector of audio embeddings (use_audio_out_embed_projector)": config.use_audio_out_embed_projector,
        "decoder layers before its heads (audio_decoder_proj_num_layers)": config.audio_decoder_proj_num_layers,
        "an RQ transformer (use_rq_transformer)": config.use_rq_transformer,
    }
    problems = [f"the model has {what}, transformers' has not" for what, is_so in cannot.items() if is_so]
    size = config.audio_codebook_size
    if (config.audio_stream_bos_id, config.audio_stream_eos_id) != (size, size + 1):
        problems.append(f"audio_codebook_size is {size}, its stream ids are not the two after it")
    for token in (DELAY_TOKEN, TOKENS["eot"]):
        if token not in tokens:
            problems.append(f"the tokenizer has no {token}, which transformers' generation writes")
    scaling = dict(text.rope_scaling or {"rope_type": "default"})
    scaling.setdefault("rope_type", scaling.pop("type", None))
    rope = _rope({"rope_parameters": {**scaling, "rope_theta": text.rope_theta}}, problems)
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    values = {key: getattr(text, key) for key in _LLAMA_KEYS}
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
