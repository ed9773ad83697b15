"""Names of Boson's modules in options and adapters: targets of LoRA, modules trained in full. Needs no torch."""

from __future__ import annotations

from ..family import ModuleNames

DEFAULT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Names for groups of decoder layers; any other target is a layer's name or the end of its path.
LORA_TARGET_GROUPS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "text_mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "audio_mlp": ("audio_mlp.gate_proj", "audio_mlp.up_proj", "audio_mlp.down_proj"),
    "all": DEFAULT_LORA_TARGETS,
}
HEADS = ("text_lm_head", "audio_lm_head")
# Modules that can be trained in full beside LoRA: by the end of their path, and by their full path.
EMBEDDINGS = "audio_codebook_embeddings"
TRAINED_HEADS = {"none": (), "audio": ("audio_lm_head",), "text": ("text_lm_head",), "both": HEADS}
SAVABLE_MODULES = (EMBEDDINGS, *(f"audio_decoder_proj.{head}" for head in HEADS))

MODULES = ModuleNames(DEFAULT_LORA_TARGETS, LORA_TARGET_GROUPS, EMBEDDINGS, TRAINED_HEADS)
