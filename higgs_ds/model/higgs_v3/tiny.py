"""Checkpoints in Higgs TTS 3's layout at any size: a small random one for experiments, zeros at real size.

Names, config.json and the special tokens after the vocabulary are those of the published checkpoint; weights are bf16
in one file. The random table has a larger std than usual, so that LoRA alone can overfit: with a frozen table of std
0.02 logits stay small.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..files.weight_files import SINGLE, Planned, write_index, write_safetensors, write_sparse
from .config import MODEL_TYPE, config_from
from .load import COPIES, wanted_weights
from .prompt import CONTROL_TAGS

# Special tokens in order of their ids; the remaining rows of the vocabulary are unused.
_QWEN = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
_SPEECH = tuple(
    f"<|{name}|>"
    for name in (
        "asr streaming_asr tts streaming_tts audio_cont_txt audio audio_end text text_end eoc user assistant system "
        "await_audio ref_audio ref_text"
    ).split()
)
_EMOTIONS = tuple(tag for tag in CONTROL_TAGS if tag.startswith("<|emotion:"))
_OTHERS = CONTROL_TAGS[len(_EMOTIONS) :]
ADDED_TOKENS = (
    *(*_QWEN, *_SPEECH, *_EMOTIONS, "<|env:music|>", "<|env:noise|>"),
    *(*_OTHERS[:-2], "<|chatml|>", *_OTHERS[-2:]),
)
TABLE_STD, EMBEDDING_STD = 0.15, 0.5


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint; the defaults are those of the published one."""

    hidden_size: int = 2560
    num_layers: int = 36
    ffn_size: int = 9728
    num_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151_936
    num_words: int = 151_643  # before the special tokens


def small_sizes(hidden_size: int = 256, num_layers: int = 4) -> Sizes:
    """Returns small sizes: heads of 64, with a total width other than the hidden size, and a vocabulary of bytes."""
    heads = max(2, hidden_size // 32)
    return Sizes(hidden_size, num_layers, 4 * hidden_size, heads, heads // 2, 64, vocab_size=384, num_words=256)


def base_config(sizes: Sizes) -> dict:
    """Makes config.json with these sizes, in the form of transformers 5."""
    first = sizes.num_words
    text = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": first,
        "dtype": "bfloat16",
        "eos_token_id": first,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.ffn_size,
        "max_position_embeddings": 32768,
        "model_type": "qwen3",
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_key_value_heads,
        "pad_token_id": None,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": sizes.vocab_size,
    }
    audio = {
        "encoder_type": "discrete",
        "model_type": "higgs_audio_encoder",
        "num_codebooks": 8,
        "out_dim": sizes.hidden_size,
        "tie_word_embeddings": True,
        "use_delay_pattern": True,
        "vocab_size": 1026,
    }
    return {
        "architectures": ["HiggsMultimodalQwen3ForConditionalGeneration"],
        "audio_encoder_config": audio,
        "audio_token_id": -100,
        "ignore_index": -100,
        "model_type": MODEL_TYPE,
        "text_config": text,
        "transformers_version": "5.5.0",
    }


def byte_tokenizer(num_words: int = 256) -> Tokenizer:
    """Makes a tokenizer: one token per byte, unused words up to `num_words`, then the special tokens."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"<unused {i}>" for i in range(num_words - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ADDED_TOKENS])
    return tokenizer


def write_tiny(output_dir: Path, *, seed: int = 0, hidden_size: int = 256, num_layers: int = 4) -> int:
    """Writes a small random checkpoint without a codec; returns the number of parameters.

    Raises:
        FileExistsError: the folder already contains a checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(one: Planned) -> torch.Tensor:
        if len(one.shape) == 1:
            return torch.ones(one.shape)  # norms
        std = (
            EMBEDDING_STD if "text_embedding" in one.name else TABLE_STD if "tied" in one.name else one.shape[1] ** -0.5
        )
        return torch.empty(one.shape).normal_(0, std, generator=generator)

    def write(file: Path, tensors: list[Planned]) -> None:
        write_safetensors(file, tensors, lambda one: iter([draw(one).to(one.dtype)]))

    return _write_checkpoint(output_dir, small_sizes(hidden_size, num_layers), write, {})


def write_zeros(output_dir: Path) -> int:
    """Writes a full-size checkpoint of zeros to a sparse file, with codec and tied copies; its loss is ln 1026."""
    from ...codec.boson_tokenizer import bundled_shapes

    def write(file: Path, tensors: list[Planned]) -> None:
        heads = {"text_embedding.weight": "text_head", "modality_embeddings.0.embedding.weight": "modality_heads.0"}
        of = {one.name.removeprefix("tied.embedding."): one for one in tensors}
        copies = [replace(of[name], name=f"{COPIES}{head}.weight") for name, head in heads.items()]
        write_sparse(file, [*tensors, *copies])

    return _write_checkpoint(output_dir, Sizes(), write, bundled_shapes())


def _write_checkpoint(
    output_dir: Path, sizes: Sizes, write: Callable[[Path, list[Planned]], None], codec: dict[str, tuple[int, ...]]
) -> int:
    if (output_dir / "config.json").exists():
        raise FileExistsError(f"{output_dir} holds a checkpoint already; remove it or name another --output_dir")
    config = base_config(sizes)
    wanted = wanted_weights(config_from(config, str(output_dir))) | codec
    planned = [Planned(name, shape, torch.bfloat16) for name, shape in wanted.items()]
    output_dir.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(sizes.num_words).save(str(output_dir / "tokenizer.json"))
    _write_json(output_dir / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072})
    total = sum(tensor.num_bytes for tensor in planned)
    write(output_dir / SINGLE, planned)
    write_index(output_dir, {SINGLE: planned})
    _write_json(output_dir / "config.json", config)  # last: marks the folder as complete
    return total // torch.bfloat16.itemsize


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
