"""What the values of a config.json may be, whichever layout it is of: types, bounds, rotary parameters.

The model's classes take them as they are; a wrong one ends far from here, in an index, in an allocation or in NaN.
"""

from __future__ import annotations

import math

# Llama's own fields, under the same names in both layouts.
LLAMA_FIELDS = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "hidden_act": str,
    "max_position_embeddings": int,
    "initializer_range": float,
    "rms_norm_eps": float,
    "use_cache": bool,
    "pretraining_tp": int,
    "attention_bias": bool,
    "attention_dropout": float,
    "mlp_bias": bool,
}
DEFAULT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 0.5,
    "low_freq_factor": 0.125,
    "original_max_position_embeddings": 1024,
}
_ROPE_KEYS = {"default": set(), "llama3": set(DEFAULT_ROPE) - {"rope_type", "rope_theta"}}

# Fields of Boson's config that sizes and indices are computed from, and the largest value that any model of this kind
# could have.
LIMITS = {
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
    "audio_ffn_hidden_size": 1 << 16,
    "audio_ffn_intermediate_size": 1 << 18,
    # transformers makes a list of so many names.
    **dict.fromkeys(("num_labels", "text_config.num_labels", "audio_encoder_config.num_labels"), 1 << 10),
}
_RANGES = {"initializer_range": (0, 1000), "rms_norm_eps": (1e-30, 1), "attention_dropout": (0, 1)}


def limit_problem(name: str, limit: str, value: object) -> str | None:
    """What is wrong with the value of `name`, whose bound is that of Boson's `limit`."""
    least = 1 if any(word in limit for word in ("num_", "size", "dim", "max_")) else 0
    if type(value) is int and least <= value <= LIMITS[limit]:
        return None
    return f"{name} is {repr(value)[:80]}, expected a whole number from {least} to {LIMITS[limit]}"


def kind_problem(name: str, kind: type, value: object) -> str | None:
    """What is wrong with the type of a field's value, or with a number that no training gives it."""
    field = name.rsplit(".", 1)[-1]
    if type(value) not in ((int, float) if kind is float else (kind,)):
        return f"{name} is {repr(value)[:80]}, expected {kind.__name__}"
    low, high = _RANGES.get(field, (-math.inf, math.inf))
    if kind is float and not low <= value <= high:
        return f"{name} is {repr(value)[:80]}, expected a number from {low:g} to {high:g}"
    if field == "pretraining_tp" and value != 1:
        return f"{name} is {repr(value)[:80]}, expected 1: the projections are computed whole"
    return None


def dtype_problems(values: dict[str, object]) -> list[str]:
    known = ("bfloat16", "float16", "float32")
    return [
        f"{key} is {repr(value)[:80]}, expected one of {', '.join(known)}"
        for key, value in values.items()
        if value is not None and value not in known
    ]


def rope_of(found: object, problems: list[str], name: str) -> dict:
    """Rotary parameters as `rope_theta`, `rope_type` and that type's own; adds to `problems` what is not known.

    Args:
        found: the parameters of either layout; None are those that transformers' config takes then.
        name: of the field they stand in.
    """
    rope = dict(DEFAULT_ROPE) if found is None else dict(found) if isinstance(found, dict) else {}
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        problems.append(f"{name}: rope_type is {repr(kind)[:80]}, expected one of {', '.join(_ROPE_KEYS)}")
    elif set(rope) != _ROPE_KEYS[kind] | {"rope_type", "rope_theta"}:
        problems.append(f"{name} of type {kind!r} are {repr(sorted(rope))[:200]}")
    elif any(type(v) not in (int, float) or not 0 < v < 1e12 for key, v in rope.items() if key != "rope_type"):
        problems.append(f"{name}: {repr(rope)[:300]} holds something else than positive numbers")
    elif rope.get("low_freq_factor", 0) >= rope.get("high_freq_factor", 1):
        problems.append(f"{name}: low_freq_factor {rope['low_freq_factor']} must be below high_freq_factor")
    return rope


def quantization_problems(raw: dict) -> list[str]:
    """Refuses a checkpoint that calls itself quantized, in a line."""
    parts = {"": raw, "text_config.": raw.get("text_config")}
    return [
        f"{part}quantization_config is there: quantized weights are neither trained on nor merged"
        for part, fields in parts.items()
        if isinstance(fields, dict) and fields.get("quantization_config") is not None
    ]
