"""Read Boson's config.json, and check a config of either layout for consistency.

The tables list the fields that change what is computed; the rest follows from the shapes of the weights. A field in no
table is not read, so that only known, plain values reach transformers' config class.
"""

from __future__ import annotations

from typing import Annotated, Literal

from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from ...errors import reading, shown
from ..files.config_values import Count, Dtype, Size, TokenId, checked, rope_of
from ..files.weight_files import refuse


class LlamaFields(BaseModel):
    """Llama's fields, named alike in both layouts; the defaults are those of transformers' layout."""

    model_config = ConfigDict(strict=True)
    vocab_size: Size = 128256
    hidden_size: Size = 3072
    intermediate_size: Size = 8192
    num_hidden_layers: Count = 28
    num_attention_heads: Count = 24
    num_key_value_heads: Count = 8
    head_dim: Size = 128
    hidden_act: str = "silu"
    max_position_embeddings: Size = 2048
    initializer_range: float = 0.02
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    use_cache: bool = True
    pretraining_tp: Literal[1] = 1  # the projections are computed whole
    attention_bias: bool = False
    attention_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    mlp_bias: bool = False


LLAMA_FIELDS = tuple(LlamaFields.model_fields)


class TextFields(LlamaFields):
    """Fields of the language model in Boson's config.json; the defaults are those of transformers' LlamaConfig."""

    model_type: Literal["llama"] = "llama"
    architectures: list[str] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    quantization_config: None = None
    rope_scaling: dict | None = None
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    torch_dtype: Dtype | None = None


@with_config(ConfigDict(strict=True))
class BosonFields(TypedDict, total=False):
    """Boson's config.json, without the audio tower and transformers' generic fields (`torchscript`, …)."""

    text_config: TextFields
    model_type: str
    architectures: list[str] | None
    audio_adapter_type: str
    audio_bos_token: str
    audio_codebook_size: Size
    audio_decoder_proj_num_layers: Literal[0]  # boson_multimodal's own code cannot compute others
    audio_dual_ffn_layers: list[int] | None
    audio_embed_avg: bool
    audio_eos_token: str
    audio_eos_token_id: TokenId
    audio_ffn_hidden_size: Size
    audio_ffn_intermediate_size: Size
    audio_in_token: str
    audio_in_token_idx: TokenId
    audio_num_codebooks: Count
    audio_out_bos_token: str
    audio_out_bos_token_id: TokenId
    audio_out_token: str
    audio_out_token_idx: TokenId
    audio_stream_bos_id: TokenId
    audio_stream_eos_id: TokenId
    encode_audio_in_tokens: bool
    encode_whisper_embed: bool
    hidden_size: Size
    pad_token_id: TokenId
    quantization_config: None
    skip_audio_tower: bool
    tie_word_embeddings: bool
    torch_dtype: Dtype | None
    use_audio_out_embed_projector: bool
    use_audio_out_self_attention: Literal[0, 1, False, True] | None  # Boson writes 0 for false
    use_delay_pattern: bool
    use_rq_transformer: bool


_FIELDS: TypeAdapter = TypeAdapter(BosonFields)


def config_from_boson(raw: dict, where: str) -> HiggsAudioConfig:
    """Upstream's config from the fields of `BosonFields`.

    Args:
        raw: the parsed config.json.
        where: prefix of each message.

    Raises:
        ConfigError: a line for each value of the wrong type, out of range, refused by upstream's class or inconsistent
            with another.
    """
    fields = checked(_FIELDS, {"text_config": None, **raw}, where)
    return made(fields | {"text_config": fields["text_config"].model_dump(exclude_unset=True)}, where)


def made(fields: dict, where: str) -> HiggsAudioConfig:
    """Upstream's config from checked fields.

    Raises:
        ConfigError: refused by upstream's class, an audio tower, or ids or rotary parameters that would change what
            the model computes.
    """
    with reading(f"{where} is no config of Higgs Audio"):
        config = HiggsAudioConfig.from_dict(fields)
    text, codes, problems = config.text_config, config.audio_codebook_size, []
    if config.encode_whisper_embed or not config.skip_audio_tower:
        problems.append(
            "has a Whisper audio tower (encode_whisper_embed or not skip_audio_tower); this trainer covers the "
            "generation checkpoints, which have none"
        )
    layers, dual = text.num_hidden_layers, config.audio_dual_ffn_layers or []
    if len(set(dual)) < len(dual) or not all(0 <= layer < layers for layer in dual):
        problems.append(f"audio_dual_ffn_layers is {shown(dual)}, expected some of the {layers} layers, each once")
    problems += [
        f"{name} is {getattr(config, name)}, expected {codes} or {codes + 1}: one of the two behind the codes"
        for name in ("audio_stream_bos_id", "audio_stream_eos_id")
        if not codes <= getattr(config, name) < codes + 2
    ]
    problems += [
        f"{name} is {getattr(config, name)}, beyond text_config.vocab_size {text.vocab_size}"
        for name in ("pad_token_id", "audio_in_token_idx", "audio_out_token_idx")
        if getattr(config, name) >= text.vocab_size
    ]
    refuse(problems, where)
    rope_of(text.rope_scaling, text.rope_theta, where)
    return config
