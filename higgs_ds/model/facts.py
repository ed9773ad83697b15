"""What a checkpoint says of itself, read once: all that the rest of the program knows of the model.

A second model family begins here: nothing outside `model/` names a class of boson_multimodal's model or a field of its
config. It brings its own `open_base` and `load_base` (base_checkpoint.py) and training forward (forward.py), chosen
where `run.py` and `setup.py` call them, and its prompt in `data/chatml.py` and `batching/collate.py`; see
docs/internals.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Token ids, codebooks and sizes of one checkpoint."""

    num_codebooks: int
    codebook_size: int  # codes are 0 to codebook_size - 1; the stream's BOS and EOS follow them
    stream_bos: int
    stream_eos: int
    use_delay_pattern: bool  # codebook k starts k frames later
    audio_in_token: int  # id of `<|AUDIO|>`, which stands for a clip in a user turn
    audio_out_token: int  # id of `<|AUDIO_OUT|>`, which stands for a clip in an assistant turn
    audio_in_codes: bool  # whether the model is given the codes of clips in user turns
    pad_token: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # text tokens
    max_positions: int

    @classmethod
    def from_config(cls, config) -> ModelFacts:
        """From a `HiggsAudioConfig`."""
        text = config.text_config
        return cls(
            num_codebooks=config.audio_num_codebooks,
            codebook_size=config.audio_codebook_size,
            stream_bos=config.audio_stream_bos_id,
            stream_eos=config.audio_stream_eos_id,
            use_delay_pattern=config.use_delay_pattern,
            audio_in_token=config.audio_in_token_idx,
            audio_out_token=config.audio_out_token_idx,
            audio_in_codes=config.encode_audio_in_tokens,
            pad_token=config.pad_token_id,
            hidden_size=text.hidden_size,
            ffn_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
        )

    @property
    def num_classes(self) -> int:
        """What the audio head tells apart in a codebook: its codes, BOS and EOS (1026)."""
        return self.codebook_size + 2

    @property
    def max_code(self) -> int:
        """The largest id that may stand in `audio_out_ids` (1025)."""
        return self.num_classes - 1

    @property
    def widest(self) -> int:
        """The largest in- or output width of a projection: a LoRA matrix is at most rank times as large."""
        return max(self.hidden_size, self.ffn_size)

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer's projections: attention, and a feed-forward network for text and for audio."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_key_value_heads)
        return attention + 2 * 3 * self.hidden_size * self.ffn_size


def peculiarities(config) -> list[str]:
    """What a `HiggsAudioConfig` has that Boson's generation checkpoints have not, in words."""
    layers = config.text_config.num_hidden_layers
    # "dual_ffn_fast_forward", as Boson's own says, differs from "dual_ffn" in the layers that are none: here, nowhere.
    dual = config.audio_adapter_type in ("dual_ffn", "dual_ffn_fast_forward")
    has = {
        f"audio_adapter_type {config.audio_adapter_type!r}": not dual,
        f"a dual FFN in only some of its {layers} layers": (
            dual and set(config.audio_dual_ffn_layers or ()) != set(range(layers))
        ),
        "an audio tower": not config.skip_audio_tower or config.encode_whisper_embed,
        "its own attention for audio (use_audio_out_self_attention)": config.use_audio_out_self_attention,
        "a projector of audio embeddings (use_audio_out_embed_projector)": config.use_audio_out_embed_projector,
        "decoder layers before its heads (audio_decoder_proj_num_layers)": config.audio_decoder_proj_num_layers,
        "an RQ transformer (use_rq_transformer)": config.use_rq_transformer,
    }
    return [what for what, is_so in has.items() if is_so]
