"""Reading Boson's own config.json: what upstream's class takes as it is, and the model ends in a traceback over."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from transformers import LlamaConfig

from ...errors import ConfigError
from ..files.config_values import LIMITS, LLAMA_FIELDS, dtype_problems, kind_problem, limit_problem, rope_of
from ..files.weight_files import refuse

_SWITCHES = (
    "audio_embed_avg",
    "encode_whisper_embed",
    "encode_audio_in_tokens",
    "use_delay_pattern",
    "skip_audio_tower",
    "use_audio_out_embed_projector",
    "use_rq_transformer",
    "tie_word_embeddings",
    "text_config.tie_word_embeddings",
)
_IDS = ("text_config.bos_token_id", "text_config.eos_token_id", "text_config.pad_token_id")
_OBJECTS = ("audio_encoder_config", "audio_tokenizer_config", "text_config.rope_scaling")


def config_from_boson(raw: dict, where: str) -> HiggsAudioConfig:
    """Upstream's config of the fields that it has; what transformers adds to every config (`torchscript`, …) is left.

    Args:
        raw: the config.json.
        where: begins each message.

    Raises:
        ConfigError: every value that would end in a traceback, in NaN, or in a wrong index, a line each.
    """
    refuse(_boson_problems(raw), where)
    fields = _fields_of(HiggsAudioConfig, raw) | {"text_config": _fields_of(LlamaConfig, raw["text_config"])}
    return made(lambda: HiggsAudioConfig.from_dict(fields), where)


def _fields_of(cls: type, raw: dict) -> dict:
    known = {*inspect.signature(cls.__init__).parameters, "architectures", "hidden_size", "torch_dtype"}
    known |= {"model_type", "tie_word_embeddings"}
    return {key: value for key, value in raw.items() if key in known - {"self", "kwargs"}}


def made(make: Callable[[], HiggsAudioConfig], where: str) -> HiggsAudioConfig:
    """What upstream's class makes of a config.json; whatever it cannot take is one line."""
    try:
        return make()
    except Exception as error:  # a value that nobody has thought of, in upstream's code, transformers' or torch's
        reason = " ".join(str(error).split())[:300]
        raise ConfigError([f"{where} is no config of Higgs Audio: {reason or type(error).__name__}"]) from None


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
    found = [limit_problem(name, name, values[name]) for name in LIMITS if name in values]
    problems = [problem for problem in found if problem]
    problems += [
        f"{name} is {repr(values[name])[:80]}, expected a token's text"
        for name in ("audio_bos_token", "audio_in_token", "audio_out_token", "audio_out_bos_token", "audio_eos_token")
        if not isinstance(values.get(name, ""), str)
    ]
    problems += [
        f"{name} is no field of a config"
        for name in raw
        if name.startswith("__") or callable(getattr(HiggsAudioConfig, name, None))
    ]
    problems += dtype_problems({key: values.get(key) for key in ("torch_dtype", "text_config.torch_dtype")})
    problems += _kind_problems(values)
    if problems:
        return problems
    layers, dual = values.get("text_config.num_hidden_layers", 32), raw.get("audio_dual_ffn_layers") or []
    if len(set(dual)) < len(dual) or not all(0 <= layer < layers for layer in dual):
        problems.append(f"audio_dual_ffn_layers is {repr(dual)[:80]}, expected some of the {layers} layers, each once")
    scaling = dict(text.get("rope_scaling") or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type")  # its older name
    rope_of({**scaling, "rope_theta": text.get("rope_theta", 10000.0)}, problems, "text_config.rope_scaling")
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


def _kind_problems(values: dict[str, object]) -> list[str]:
    """Types of the fields that are there, by their dotted names."""
    kinds = {f"text_config.{name}": kind for name, kind in LLAMA_FIELDS.items()} | dict.fromkeys(_SWITCHES, bool)
    found = [kind_problem(name, kind, values[name]) for name, kind in kinds.items() if name in values]
    problems = [problem for problem in found if problem]

    def expect(name: str, right: bool, words: str) -> None:
        if not right:
            problems.append(f"{name} is {repr(values[name])[:80]}, expected {words}")

    for name in _OBJECTS:
        expect(name, isinstance(values.get(name), dict | None), "an object or null")
    for name in _IDS:
        ids = values.get(name)
        ids = ids if isinstance(ids, list) and name.endswith("eos_token_id") else [ids]
        expect(name, all(one is None or (type(one) is int and 0 <= one < 1 << 24) for one in ids), "a token's id")
    dual = values.get("audio_dual_ffn_layers")
    is_list = dual is None or (isinstance(dual, list) and all(type(layer) is int for layer in dual))
    expect("audio_dual_ffn_layers", is_list, "a list of layers")
    layers = values.get("audio_decoder_proj_num_layers", 0)
    words = "0: boson_multimodal's own code cannot compute others"
    expect("audio_decoder_proj_num_layers", type(layers) is int and layers == 0, words)
    # Boson writes 0 for false.
    expect("use_audio_out_self_attention", values.get("use_audio_out_self_attention") in (None, 0, 1), "true or false")
    for name in (name for name in values if name.startswith("rq_transformer_")):
        number = values[name]
        expect(name, number is None or (type(number) is int and 0 < number <= 1 << 18), "a whole number or null")
    kind = values.get("text_config.model_type", "llama")
    expect("text_config.model_type", kind == "llama", "llama")
    return problems
