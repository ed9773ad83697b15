"""vllm-omni cannot run here; the rules by which its loader (0.30.0) takes weights are written down and applied.

It drops one `model.` in front, joins q, k, v and gate, up into one weight each, says nothing about a name that it does
not know, and leaves random what it is not given.
"""

from __future__ import annotations

import pytest

from higgs_ds.model.higgs_v2.layouts import transformers_name
from higgs_ds.model.higgs_v2.load import wanted_weights
from tests.model.higgs_v2.test_layouts import translated

# Weights of the server's model that have another name than after `model.` is dropped.
ALIASES = {
    "embed_audio_tokens.embed_audio_tokens.weight": "audio_codebook_embeddings.weight",
    "text_lm_head.weight": "lm_head.weight",
}
JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "audio_mlp.gate_up_proj": ("audio_mlp.gate_proj", "audio_mlp.up_proj"),
}
ALONE = ["self_attn.o_proj", "mlp.down_proj", "audio_mlp.down_proj"]
ALONE += [f"{kind}{where}_layernorm" for kind in ("", "audio_") for where in ("input", "post_attention")]


def served(shapes: dict[str, tuple[int, ...]], config) -> tuple[set[str], list[str]]:
    """Weights that the server's model lacks after it was given these, and those of them that it left over."""
    text = config.text_config
    hidden, ffn, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    codes = config.audio_num_codebooks * (config.audio_codebook_size + 2)
    needs = dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), (text.vocab_size, hidden))
    needs |= dict.fromkeys(("audio_lm_head.weight", "audio_codebook_embeddings.weight"), (codes, hidden))
    needs["norm.weight"] = (hidden,)
    sizes = {"self_attn.qkv_proj": (heads + 2 * kv, hidden), "self_attn.o_proj": (hidden, heads)}
    for layer in range(text.num_hidden_layers):
        for part in (*JOINED, *ALONE):
            down, up = (hidden, ffn), (2 * ffn, hidden)
            shape = (hidden,) if "layernorm" in part else down if part.endswith("down_proj") else up
            needs[f"layers.{layer}.{part}.weight"] = sizes.get(part, shape)

    given, left = {}, []
    rows: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        short = name.removeprefix("model.")
        short = ALIASES.get(short, short)
        if needs.get(short) == shape:
            given[short] = shape
            continue
        parts = short.split(".")
        layer, tail = ".".join(parts[:2]), ".".join(parts[2:]).removesuffix(".weight")
        whole = next((whole for whole, some in JOINED.items() if tail in some), None)
        if parts[0] != "layers" or whole is None:
            left.append(name)
            continue
        rows.setdefault(f"{layer}.{whole}.weight", {})[tail] = shape
    for name, parts in rows.items():
        expected = JOINED[".".join(name.split(".")[2:-1])]
        if set(parts) == set(expected):
            given[name] = (sum(shape[0] for shape in parts.values()), next(iter(parts.values()))[1])
    lacks = {name for name, shape in needs.items() if given.get(name) != shape}
    return lacks, left


def renamed():
    return {transformers_name(name): shape for name, shape in wanted_weights(translated()).items()}


def test_every_merged_name_is_taken_and_none_that_is_needed_is_missing():
    assert len(renamed()) == 397
    assert served(renamed(), translated()) == (set(), [])


@pytest.mark.parametrize(
    ("lost", "lacks"),
    [
        ("model.layers.5.self_attn.k_proj.weight", "layers.5.self_attn.qkv_proj.weight"),
        ("model.layers.27.audio_mlp.up_proj.weight", "layers.27.audio_mlp.gate_up_proj.weight"),
        ("audio_lm_head.weight", "audio_lm_head.weight"),
        ("model.embed_audio_tokens.embed_audio_tokens.weight", "audio_codebook_embeddings.weight"),
    ],
)
def test_the_rules_find_what_the_server_would_not_say(lost, lacks):
    shapes = renamed()
    shape = shapes.pop(lost)
    assert served(shapes, translated()) == ({lacks}, [])
    assert served({**shapes, f"base_model.{lost}": shape}, translated())[1] == [f"base_model.{lost}"]
    assert served({**renamed(), lost: (3, 3)}, translated())[0] == {lacks}
