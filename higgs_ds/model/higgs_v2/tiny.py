"""Make base checkpoints in Boson's format at any size: small and random for trials, or zeros at the real size.

The files are like Boson's: all fields and values of `config.json` (except sizes and the ids that depend on them), a
fast tokenizer with Llama 3's special tokens in order, bf16 weights in three safetensors shards with an index.

The random checkpoint is scaled so that LoRA alone can overfit: with heads of std 0.02 the logits of a frozen random
model cannot grow, and the loss stays near 5.98 whatever is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from boson_multimodal.model.higgs_audio.configuration_higgs_audio import HiggsAudioEncoderConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from ..files.weight_files import Planned, write_safetensors, write_shards, write_sparse
from .config import without_private
from .load import wanted_weights

# Positions among the 256 special tokens at the end of Llama 3's vocabulary, some renamed by Boson. All others are
# `<|reserved_special_token_N|>`.
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|audio_bos|>",
    12: "<|audio_eos|>",
    13: "<|audio_out_bos|>",
    14: "<|reserved_special_token_6|>",  # transformers' "audio delay" token
    15: "<|AUDIO|>",
    16: "<|AUDIO_OUT|>",
    17: "<|recipient|>",
    18: "<|scene_desc_start|>",
    19: "<|scene_desc_end|>",
    20: "<|generation_instruction_start|>",
    21: "<|generation_instruction_end|>",
    22: "<SE>",
    23: "</SE>",
    24: "<SE_s>",
    25: "</SE_s>",
    26: "<SE_e>",
    27: "</SE_e>",
}
NUM_SPECIAL_TOKENS = 256
NUM_SHARDS = 3
HEAD_STD = 0.15
EMBEDDING_STD = 0.5


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a checkpoint; everything else is as in Boson's."""

    hidden_size: int
    num_layers: int
    ffn_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # text tokens, including the 256 special ones


REAL_SIZES = ModelSizes(
    hidden_size=3072,
    num_layers=28,
    ffn_size=8192,
    num_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128_256,
)


def small_sizes(
    hidden_size: int = 256, num_layers: int = 4, *, ffn_size: int | None = None, vocab_size: int = 512
) -> ModelSizes:
    """Heads of width 64, half as many for keys and values; a vocabulary of bytes and special tokens."""
    return ModelSizes(
        hidden_size=hidden_size,
        num_layers=num_layers,
        ffn_size=ffn_size or 4 * hidden_size,
        num_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        head_dim=64,
        vocab_size=vocab_size,
    )


def byte_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """One token per byte, and Llama 3's special tokens as the last 256 of the vocabulary; ids in between are unused."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"<unused {i}>" for i in range(vocab_size - NUM_SPECIAL_TOKENS - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_tokens()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        model_max_length=131_072,
        clean_up_tokenization_spaces=False,
    )


def special_tokens() -> list[str]:
    """Names of all 256, by id."""
    names, reserved = [], 0
    for place in range(NUM_SPECIAL_TOKENS):
        name = SPECIAL_TOKENS.get(place)
        if name is None:
            name = f"<|reserved_special_token_{reserved}|>"
        # Boson renamed reserved tokens, which still count; Llama's own do not.
        reserved += place not in (0, 1, 4, 6, 7, 8, 9, 10)
        names.append(name)
    return names


def base_config(sizes: ModelSizes) -> HiggsAudioConfig:
    """Boson's `config.json` at these sizes."""
    first_special = sizes.vocab_size - NUM_SPECIAL_TOKENS
    token_id = {name: first_special + place for place, name in SPECIAL_TOKENS.items()}
    text = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rms_norm_eps=1e-5,
        bos_token_id=token_id["<|begin_of_text|>"],
        eos_token_id=token_id["<|end_of_text|>"],
        tie_word_embeddings=True,  # as in Llama 3.2, although the heads are separate weights
        torch_dtype="bfloat16",
    )
    # Config of the audio tower, which is left out (skip_audio_tower).
    tower = HiggsAudioEncoderConfig(
        num_mel_bins=128,
        encoder_layers=32,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        d_model=1280,
        pad_token_id=token_id["<|end_of_text|>"],
    )
    return HiggsAudioConfig(
        architectures=["HiggsAudioModel"],
        hidden_size=sizes.hidden_size,
        text_config=text.to_dict(),
        audio_encoder_config=tower.to_dict(),
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(sizes.num_layers)),
        audio_ffn_hidden_size=sizes.hidden_size,
        audio_ffn_intermediate_size=sizes.ffn_size,
        encode_whisper_embed=False,
        encode_audio_in_tokens=True,
        use_delay_pattern=True,
        skip_audio_tower=True,
        use_audio_out_self_attention=0,
        audio_num_codebooks=8,
        audio_codebook_size=1024,
        audio_stream_bos_id=1024,
        audio_stream_eos_id=1025,
        audio_in_token_idx=token_id["<|AUDIO|>"],
        audio_out_token_idx=token_id["<|AUDIO_OUT|>"],
        audio_out_bos_token_id=token_id["<|audio_out_bos|>"],
        audio_eos_token_id=token_id["<|audio_eos|>"],
        pad_token_id=token_id["<|end_of_text|>"],
        torch_dtype="bfloat16",
    )


def write_tiny(output_dir: Path, *, seed: int = 0, hidden_size: int = 256, num_layers: int = 4, **sizes: int) -> int:
    """Writes a small random checkpoint; returns the number of parameters.

    `sizes` are those of `small_sizes`: another `vocab_size` or `ffn_size`.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape)  # norms
        std = HEAD_STD if "lm_head" in name else EMBEDDING_STD if "embed" in name else shape[1] ** -0.5
        return torch.empty(shape).normal_(0, std, generator=generator)

    def write(file: Path, tensors: list[Planned]) -> None:
        write_safetensors(file, tensors, lambda one: iter([draw(one.name, one.shape).to(one.dtype)]))

    count = _write_checkpoint(output_dir, small_sizes(hidden_size, num_layers, **sizes), write)
    (output_dir / "README.md").write_text(
        f"A random base checkpoint of {count:,} parameters (seed {seed}), for trying higgs_ds.\n"
    )
    return count


def write_zeros(output_dir: Path, sizes: ModelSizes = REAL_SIZES) -> int:
    """Writes a checkpoint whose weights are all zero; returns the number of parameters.

    The shards are sparse files: of the real 11.5 GB next to nothing is on the disk. Its losses are known: ln of the
    classes of each head, 11.762 for the text and 6.933 for every codebook at the real size.

    Raises:
        FileExistsError: the folder holds a checkpoint already.
    """
    return _write_checkpoint(output_dir, sizes, write_sparse)


def _write_checkpoint(output_dir: Path, sizes: ModelSizes, write: Callable[[Path, list[Planned]], None]) -> int:
    """Writes config, tokenizer and shards, each shard by `write`."""
    if (output_dir / "config.json").exists():
        raise FileExistsError(f"{output_dir} holds a checkpoint already; remove it or name another --output_dir")
    config = base_config(sizes)
    planned = [Planned(name, shape, torch.bfloat16) for name, shape in wanted_weights(config).items()]
    output_dir.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(sizes.vocab_size).save_pretrained(output_dir)
    GenerationConfig.from_model_config(config).save_pretrained(output_dir)

    write_shards(output_dir, _shards(planned), write)
    # Last: a folder with a config is complete.
    fields = without_private(config.to_diff_dict())
    (output_dir / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum(tensor.num_bytes for tensor in planned) // torch.bfloat16.itemsize


def _shards(planned: list[Planned]) -> list[list[Planned]]:
    """Splits tensors into `NUM_SHARDS` consecutive parts of about equal size."""
    total, before = sum(tensor.num_bytes for tensor in planned), 0
    shards: list[list[Planned]] = [[] for _ in range(NUM_SHARDS)]
    for tensor in planned:
        middle = before + tensor.num_bytes / 2
        shards[int(middle * NUM_SHARDS / total)].append(tensor)
        before += tensor.num_bytes
    assert all(shards), [len(tensors) for tensors in shards]
    return shards
