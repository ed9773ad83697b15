"""config.json in either layout: reading transformers' as boson_multimodal's, and writing each from the other.

transformers' config leaves out what that model never varies (a dual FFN in every layer, the delay pattern, codes of a
clip in the prompt) and the ids of tokens that it does not use; the first are the class's own constants, the second
stand in the checkpoint's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from boson_multimodal.model.higgs_audio import HiggsAudioConfig

from ..errors import ConfigError
from .facts import peculiarities
from .layouts import TRANSFORMERS, layout_of, read_json
from .weight_files import refuse

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
# Fields of Boson's config that sizes and indices are computed from, and the largest value that any model of this kind
# could have.
_LIMITS = {
    "audio_num_codebooks": 64,
    "audio_codebook_size": 1 << 20,
    "audio_stream_bos_id": 1 << 20,
    "audio_stream_eos_id": 1 << 20,
    "pad_token_id": 1 << 24,
    "audio_in_token_idx": 1 << 24,
    "audio_out_token_idx": 1 << 24,
    "audio_out_bos_token_id": 1 << 24,
    "audio_eos_token_id": 1 << 24,
    "text_config.vocab_size": 1 << 24,
    "text_config.hidden_size": 1 << 16,
    "text_config.intermediate_size": 1 << 18,
    "text_config.num_hidden_layers": 1 << 10,
    "text_config.num_attention_heads": 1 << 10,
    "text_config.num_key_value_heads": 1 << 10,
    "text_config.head_dim": 1 << 12,
    "text_config.max_position_embeddings": 1 << 30,
    # transformers makes a list of so many names.
    **dict.fromkeys(("num_labels", "text_config.num_labels", "audio_encoder_config.num_labels"), 1 << 10),
}
# transformers' names of them, where they are others.
_RENAMED_LIMITS = {
    "num_codebooks": "audio_num_codebooks",
    "codebook_size": "audio_codebook_size",
    "audio_token_id": "audio_out_token_idx",
    "audio_bos_token_id": "audio_out_bos_token_id",
    "audio_delay_token_id": "audio_out_token_idx",
}


def read_checkpoint_config(folder: Path, flag: str = "--base_ckpt") -> HiggsAudioConfig:
    """The config of a checkpoint in either layout, as boson_multimodal's model takes it.

    Raises:
        ConfigError: neither layout, or values that the other layout's model does not have; each named.
    """
    file = folder / "config.json"
    where, raw = f"{flag}: {file}", read_json(file, flag)
    if layout_of(folder, flag) == TRANSFORMERS:
        return config_from_transformers(raw, token_ids(folder, flag), where)
    refuse(_boson_problems(raw), where)
    return _made(lambda: HiggsAudioConfig.from_dict(raw), where)


def _made(make: Callable[[], HiggsAudioConfig], where: str) -> HiggsAudioConfig:
    """What upstream's class makes of a config.json; whatever it cannot take is one line."""
    try:
        return make()
    except Exception as error:  # a value that nobody has thought of, in upstream's code, transformers' or torch's
        reason = " ".join(str(error).split())[:300]
        raise ConfigError([f"{where} is no config of Higgs Audio: {reason or type(error).__name__}"]) from None


def _limit_problem(name: str, limit: str, value: object) -> str | None:
    """What is wrong with the value of `name`, whose bound is that of Boson's `limit`."""
    least = 1 if any(word in limit for word in ("num_", "size", "dim", "max_")) else 0
    if type(value) is int and least <= value <= _LIMITS[limit]:
        return None
    return f"{name} is {repr(value)[:80]}, expected a whole number from {least} to {_LIMITS[limit]}"


def _boson_problems(raw: dict) -> list[str]:
    """What stands in a `config.json` of Boson's that would end in a traceback, or in a wrong index, later on."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        return [f"text_config is {type(text).__name__}, expected an object"]
    parts = {"": raw, "text_config.": text, "audio_encoder_config.": raw.get("audio_encoder_config")}
    values = {
        part + name: value
        for part, fields in parts.items()
        for name, value in (fields if isinstance(fields, dict) else {}).items()
    }
    found = [_limit_problem(name, name, values[name]) for name in _LIMITS if name in values]
    problems = [problem for problem in found if problem]
    problems += [
        f"{name} is {repr(values[name])[:80]}, expected a token's text"
        for name in ("audio_in_token", "audio_out_token", "audio_out_bos_token", "audio_eos_token")
        if not isinstance(values.get(name, ""), str)
    ]
    problems += [
        f"{name} is no field of a config"
        for name in raw
        if name.startswith("__") or callable(getattr(HiggsAudioConfig, name, None))
    ]
    problems += _dtype_problems({key: values.get(key) for key in ("torch_dtype", "text_config.torch_dtype")})
    if not isinstance(text.get("rope_scaling"), dict | None):
        problems.append(f"text_config.rope_scaling is {repr(text['rope_scaling'])[:80]}, expected an object or null")
    if problems:
        return problems
    codes = values.get("audio_codebook_size", 0)
    for name in ("audio_stream_bos_id", "audio_stream_eos_id"):
        if codes and not codes <= values.get(name, codes) < codes + 2:
            problems.append(
                f"{name} is {values[name]}, expected {codes} or {codes + 1}: one of the two behind the codes"
            )
    vocabulary = values.get("text_config.vocab_size", 1 << 24)
    for name in ("pad_token_id", "audio_in_token_idx", "audio_out_token_idx"):
        if values.get(name, 0) >= vocabulary:
            problems.append(f"{name} is {values[name]}, beyond text_config.vocab_size {vocabulary}")
    return problems


def without_private(fields: dict) -> dict:
    """A config's fields but for those that transformers keeps for itself (`_name_or_path`, …), at every depth."""
    return {
        key: without_private(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if not str(key).startswith("_")
    }


def token_ids(folder: Path, flag: str = "--base_ckpt") -> dict[str, int]:
    """Ids of the added tokens of the checkpoint's tokenizer.json, by their text.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = folder / "tokenizer.json"
    added = read_json(file, flag).get("added_tokens")
    try:
        ids = {str(token["content"]): token["id"] for token in added}
    except (TypeError, KeyError):
        ids = {"": None}
    if not all(type(one) is int and 0 <= one < 1 << 24 for one in ids.values()):
        raise ConfigError([f"{flag}: {file}: added_tokens is no list of tokens with content and id"])
    return ids


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
    problems += _dtype_problems({key: raw.get(key) for key in ("dtype", "torch_dtype")})
    ids = {name: tokens.get(text) for name, text in TOKENS.items()}
    problems += [f"the tokenizer has no {TOKENS[name]}" for name, found in ids.items() if found is None]
    for key, name in (("audio_token_id", "audio_out"), ("audio_bos_token_id", "audio_out_bos")):
        if ids[name] is not None and values[key] != ids[name]:
            problems.append(f"{key} is {values[key]}, the tokenizer's {TOKENS[name]} is {ids[name]}")
    refuse(problems, where)
    text = {key: values[key] for key in _LLAMA_KEYS}
    text |= {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["end_of_text"],
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": raw.get("dtype") or raw.get("torch_dtype"),
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
    return _made(lambda: HiggsAudioConfig(**fields), where)


def _dtype_problems(values: dict[str, object]) -> list[str]:
    known = ("bfloat16", "float16", "float32")
    return [
        f"{key} is {repr(value)[:80]}, expected one of {', '.join(known)}"
        for key, value in values.items()
        if value is not None and value not in known
    ]


def _wrong_values(values: dict) -> list[str]:
    """Of `DEFAULTS`' keys: types, bounds, and what Boson's model cannot be."""
    problems = []
    for key, default in DEFAULTS.items():
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(values[key]) not in kinds:
            problems.append(f"{key} is {values[key]!r}, expected {type(default).__name__}")
    if problems:
        return problems
    limits = {key: _RENAMED_LIMITS.get(key, key if key in _LIMITS else f"text_config.{key}") for key in values}
    found = [_limit_problem(key, limit, values[key]) for key, limit in limits.items() if limit in _LIMITS]
    problems += [problem for problem in found if problem]
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
    found, scaling = raw.get("rope_parameters"), raw.get("rope_scaling")
    if found is None and isinstance(scaling, dict | None) and ("rope_theta" in raw or scaling):
        found = {"rope_theta": raw.get("rope_theta", 10000.0), **(scaling or {"rope_type": "default"})}
    elif found is None and scaling is not None:
        found = {"rope_type": scaling}  # which is none
    rope = dict(DEFAULT_ROPE) if found is None else dict(found) if isinstance(found, dict) else {}
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
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
    scaling = dict(text.rope_scaling or {"rope_type": "default"})
    scaling.setdefault("rope_type", scaling.pop("type", None))
    rope = _rope({"rope_parameters": {**scaling, "rope_theta": text.rope_theta}}, problems)
    refuse(problems, where)
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
