"""config.json of Higgs TTS 3: checks the fields that affect the computation, and flattens them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from transformers import PretrainedConfig

from ...errors import ConfigError
from ..files.config_values import Count, Positive, Size, TokenId, checked

MODEL_TYPE = "higgs_multimodal_qwen3"
ROPE_THETA = 1_000_000.0  # default of both servers


class RopeParameters(BaseModel):
    """Rotary parameters in the form of transformers 5."""

    model_config = ConfigDict(strict=True, extra="forbid")
    rope_theta: Positive = ROPE_THETA
    rope_type: Literal["default"] = "default"


class TextFields(BaseModel):
    """Qwen3's fields; sizes are required, other fields default to the published checkpoint's values."""

    model_config = ConfigDict(strict=True)
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Size
    max_position_embeddings: Size = 32768
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    attention_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    eos_token_id: TokenId = 151643
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    rope_scaling: None = None
    rope_theta: Positive | None = None
    rope_parameters: RopeParameters | None = None


class AudioFields(BaseModel):
    """Fields of the table of codes: one row per code, each codebook's codes followed by BOC and EOC."""

    model_config = ConfigDict(strict=True)
    num_codebooks: Count = 8
    vocab_size: Annotated[int, Field(ge=3, lt=1 << 15)] = 1026
    encoder_type: Literal["discrete"] = "discrete"
    use_delay_pattern: Literal[True] = True
    tie_word_embeddings: Literal[True] = True


class Fields(BaseModel):
    """The relevant parts of config.json."""

    text_config: TextFields
    audio_encoder_config: AudioFields


_FIELDS: TypeAdapter = TypeAdapter(Fields)


class HiggsV3Config(PretrainedConfig):
    """The checked fields in one config: Qwen3's under their own names, the table's `num_codebooks` and `num_classes`.

    `audio_token` and `reference_token` are the text tokens before a stream, `<|audio|>` and `<|ref_audio|>`.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        *,
        num_codebooks: int = 8,
        num_classes: int = 1026,
        audio_token: int = 0,
        reference_token: int = 0,
        **fields: Any,
    ):
        super().__init__(tie_word_embeddings=False)  # no tying by transformers; the table is a single module
        self.num_codebooks, self.num_classes = num_codebooks, num_classes
        self.audio_token, self.reference_token = audio_token, reference_token
        self.mlp_bias, self.pretraining_tp = False, 1  # required by LlamaMLP
        for name, value in fields.items():
            setattr(self, name, value)

    @property
    def boc(self) -> int:
        """Code before a codebook's first frame (1024)."""
        return self.num_classes - 2

    @property
    def eoc(self) -> int:
        """Code after a codebook's last frame (1025)."""
        return self.num_classes - 1


def config_from(raw: dict, where: str) -> HiggsV3Config:
    """Checks a parsed config.json and returns the config. Raises ConfigError; messages begin with `where`."""
    if raw.get("model_type") != MODEL_TYPE:
        raise ConfigError([f"{where} says model_type {raw.get('model_type')!r}, expected {MODEL_TYPE!r}"])
    found: Fields = checked(_FIELDS, raw, where)
    text = found.text_config
    if text.num_attention_heads % text.num_key_value_heads or text.head_dim % 2:
        heads = f"{text.num_attention_heads} heads of size {text.head_dim}, {text.num_key_value_heads} key heads"
        raise ConfigError([f"{where}: text_config has {heads}; heads must be a multiple of key heads, their size even"])
    theta = text.rope_theta or ROPE_THETA
    if text.rope_parameters is not None:
        theta = text.rope_parameters.rope_theta
    left_out = {"rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window"}
    return HiggsV3Config(
        num_codebooks=found.audio_encoder_config.num_codebooks,
        num_classes=found.audio_encoder_config.vocab_size,
        rope_theta=theta,
        **text.model_dump(exclude=left_out),
    )
