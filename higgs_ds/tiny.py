"""A small randomly initialised base checkpoint, for learning the tool and for its tests.

Upstream's own classes load it. It is scaled so that LoRA alone can overfit: with heads of std 0.02 the logits of a
frozen random model cannot grow, and the loss stays near 5.98 whatever is trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

# The strings that Boson's tokenizer has, in the order of their ids there; here they follow the 256 bytes.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio_out_bos|>",
    "<|reserved_special_token_6|>",  # transformers' audio delay token
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
    "<|recipient|>",
    "<|scene_desc_start|>",
    "<|scene_desc_end|>",
)
HEAD_STD = 0.15
EMBEDDING_STD = 0.5


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(
    tokenizer,
    *,
    hidden_size: int = 256,
    num_layers: int = 4,
    vocab_size: int | None = None,
    ffn_size: int | None = None,
) -> HiggsAudioConfig:
    """Boson's architecture (dual FFN in every layer, delay pattern, 8 codebooks of 1024 + 2) at a small size."""
    token_id = tokenizer.convert_tokens_to_ids
    text = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=ffn_size or 4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        bos_token_id=token_id("<|begin_of_text|>"),
        eos_token_id=token_id("<|eot_id|>"),
        pad_token_id=token_id("<|end_of_text|>"),
        tie_word_embeddings=False,
    )
    return HiggsAudioConfig(
        text_config=text.to_dict(),
        audio_adapter_type="dual_ffn",
        audio_dual_ffn_layers=list(range(num_layers)),
        audio_ffn_hidden_size=hidden_size,
        audio_ffn_intermediate_size=ffn_size or 4 * hidden_size,
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
        use_delay_pattern=True,
        skip_audio_tower=True,
        audio_num_codebooks=8,
        audio_codebook_size=1024,
        audio_stream_bos_id=1024,
        audio_stream_eos_id=1025,
        audio_in_token_idx=token_id("<|AUDIO|>"),
        audio_out_token_idx=token_id("<|AUDIO_OUT|>"),
        audio_out_bos_token_id=token_id("<|audio_out_bos|>"),
        audio_eos_token_id=token_id("<|audio_eos|>"),
        pad_token_id=token_id("<|end_of_text|>"),
        bos_token_id=token_id("<|begin_of_text|>"),
        eos_token_id=token_id("<|eot_id|>"),
        tie_word_embeddings=False,
    )


def write_tiny(
    output_dir: Path, *, seed: int = 0, hidden_size: int = 256, num_layers: int = 4, **sizes: int | None
) -> int:
    """Writes config, weights (safetensors, float32) and tokenizer; returns the number of parameters.

    `sizes` are `tiny_config`'s: a `vocab_size` beyond the tokenizer's, another `ffn_size`.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
    """
    if (output_dir / "config.json").exists():
        raise FileExistsError(f"{output_dir} holds a checkpoint already; remove it or name another --output_dir")
    tokenizer = byte_tokenizer()
    config = tiny_config(tokenizer, hidden_size=hidden_size, num_layers=num_layers, **sizes)
    model = HiggsAudioModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # norms
            elif "lm_head" in name:
                parameter.normal_(0, HEAD_STD, generator=generator)
            elif "embed" in name:
                parameter.normal_(0, EMBEDDING_STD, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir, safe_serialization=True)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "README.md").write_text(
        f"A random base checkpoint of {model.num_parameters():,} parameters (seed {seed}), for trying higgs_ds.\n"
    )
    return model.num_parameters()
