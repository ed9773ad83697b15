"""The two layouts of a Higgs Audio v2 checkpoint: boson_multimodal's and transformers' (5.3 and later).

The tensors are identical; their names and the config differ. Everything here is a pure function of names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import ConfigError, shown
from ..files.config_values import read_json

BOSON, TRANSFORMERS = "boson", "transformers"
LAYOUTS = (BOSON, TRANSFORMERS)
# Weights in checkpoints of this family that no module of the model has.
CARRIED_ALONG = r"(^|\.)(audio_codebook_weights|rotary_emb\.(original_)?inv_freq)$"
MODEL_TYPES = {BOSON: "higgs_audio", TRANSFORMERS: "higgs_audio_v2"}

# Prefix of a weight's name: boson_multimodal's -> transformers'.
_PREFIXES = (
    ("audio_codebook_embeddings.", "model.embed_audio_tokens.embed_audio_tokens."),
    ("audio_decoder_proj.text_lm_head.", "text_lm_head."),
    ("audio_decoder_proj.audio_lm_head.", "audio_lm_head."),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)


def transformers_name(boson_name: str) -> str | None:
    """Maps boson_multimodal's name of a weight or module to transformers'; None if transformers' model has none."""
    return _renamed(boson_name, _PREFIXES)


def boson_name(transformers_name: str) -> str | None:
    """Inverse of `transformers_name`."""
    return _renamed(transformers_name, [(new, old) for old, new in _PREFIXES])


def _renamed(name: str, prefixes) -> str | None:
    dotted = name + "."  # a module's own name then has the prefix too
    return next((new + dotted[len(old) :] for old, new in prefixes if dotted.startswith(old)), ".")[:-1] or None


def name_in(layout: str, boson_name: str) -> str:
    """Maps boson_multimodal's name of a weight to `layout`.

    Raises:
        ValueError: transformers' model has no such weight.
    """
    name = boson_name if layout == BOSON else transformers_name(boson_name)
    if name is None:
        raise ValueError(f"{boson_name} has no name in transformers' layout")
    return name


def boson_names(layout: str) -> Callable[[str], str | None]:
    """A function from a weight's name in `layout` to boson_multimodal's; None for an unknown weight."""
    return boson_name if layout == TRANSFORMERS else lambda name: name


def layout_of(folder: Path, flag: str = "--base_ckpt") -> str:
    """`BOSON` or `TRANSFORMERS`, by `model_type` in the checkpoint's config.json.

    Raises:
        ConfigError: any other model type.
    """
    found = read_json(folder / "config.json", flag).get("model_type")
    for layout, model_type in MODEL_TYPES.items():
        if found == model_type:
            return layout
    hint = "; it is the codec's: give it to --codec" if found == "higgs_audio_v2_tokenizer" else ""
    expected = f"expected {' or '.join(map(repr, MODEL_TYPES.values()))}"
    raise ConfigError([f"{flag}: {folder / 'config.json'} says model_type {shown(found)}, {expected}{hint}"])
