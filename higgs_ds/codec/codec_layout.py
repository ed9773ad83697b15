"""Boson's codec in transformers' layout (model type `higgs_audio_v2_tokenizer`), read as boson_multimodal's.

The network is the same. transformers has other names, and has multiplied out the weight norm of the convolutions:
boson_multimodal keeps length g and direction v of a weight g · v / ‖v‖, transformers the weight itself. Higgs TTS 3's
checkpoints bundle the codec in this layout, each name behind `BUNDLED`, without its config, which is `BUNDLED_CONFIG`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import shown

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "higgs_audio_v2_tokenizer"
WEIGHTS = "model.safetensors"
BUNDLED, BUNDLED_IN = "tied.embedding.modality_embeddings.0.model.", "higgs_multimodal_qwen3"  # of this model type
_INNER = ("snake1", "conv1", "snake2", "conv2")

# What upstream's network computes and neither its config.json nor the shapes of its weights say.
_FIXED: dict[str, dict[str, object]] = {
    "": {"strides": [1, 1], "block_dilations": [1, 1], "semantic_sample_rate": 16000, "downsample_factor": 320},
    "acoustic_model_config.": {"model_type": "dac"},
    "semantic_model_config.": {
        "model_type": "hubert",
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "conv_bias": False,
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "do_stable_layer_norm": False,
        "feat_extract_norm": "group",
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "conv_pos_batch_norm": False,
    },
}
_DEFAULTS = {"sample_rate": 24000, "codebook_size": 1024, "codebook_dim": 64, "target_bandwidths": [0.5, 1, 1.5, 2, 4]}


_RATIOS = [8, 5, 4, 2, 3]
BUNDLED_CONFIG: dict = {
    "model_type": MODEL_TYPE,
    "target_bandwidths": [0.5, 1, 1.5, 2],
    "acoustic_model_config": {"hidden_size": 256, "downsampling_ratios": _RATIOS, "upsampling_ratios": _RATIOS},
    "semantic_model_config": {},
}


def is_renamed(raw: dict) -> bool:
    """True where a config.json is of transformers' layout."""
    return raw.get("model_type") == MODEL_TYPE


def old_config(raw: dict) -> dict:
    """Arguments for upstream's constructor, from config.json in transformers' layout.

    Raises:
        ValueError: it is of another network than upstream's; names the key. What is malformed fails as it does.
    """
    acoustic, semantic = raw["acoustic_model_config"], raw["semantic_model_config"]
    for (part, fixed), given in zip(_FIXED.items(), (raw, acoustic, semantic), strict=True):
        for key, value in fixed.items():
            if given.get(key, value) != value:
                raise ValueError(f"{part}{key} is {shown(given[key])}, Boson's codec has {value!r}")
    ratios = acoustic.get("downsampling_ratios")
    if ratios != acoustic.get("upsampling_ratios"):
        raise ValueError("acoustic_model_config: downsampling_ratios and upsampling_ratios differ")
    values = {key: raw.get(key, default) for key, default in _DEFAULTS.items()}
    return {
        "D": acoustic.get("hidden_size"),
        "bins": values["codebook_size"],
        "codebook_dim": values["codebook_dim"],
        "n_q": _num_codebooks(values, ratios),
        "ratios": ratios,
        "sample_rate": values["sample_rate"],
        "semantic_techer": "hubert_base_general",
        "target_bandwidths": values["target_bandwidths"],
    }


def _num_codebooks(values: dict, ratios) -> int:
    """As transformers counts them: the largest bandwidth, in kbit/s, over the bits that a codebook takes."""
    frame_rate = math.ceil(values["sample_rate"] / math.prod(ratios))
    bits = math.ceil(math.log2(values["codebook_size"]))
    return int(1000 * values["target_bandwidths"][-1] // (frame_rate * bits))


def new_name(old: str) -> str:
    """The name in transformers' layout of a weight of upstream's; both halves of a weight norm have the same."""
    name = re.sub(r"\.weight_[gv]$", ".weight", old)
    for pattern, new in _RULES:
        if found := re.match(pattern, name):
            # Upstream counts blocks from 1, and the units of its decoder's from 2, in place of 0 and 1.
            numbers = {key: int(value) for key, value in found.groupdict().items()}
            block, unit, part = (numbers.get(key, 0) for key in ("block", "unit", "part"))
            unit += 1 if name.startswith("encoder") else -1
            return new.format(block=block - 1, unit=unit, part=_INNER[part], layer=block) + name[found.end() :]
    if name.startswith(("encoder_semantic.", "decoder_semantic.")):
        return re.sub(r"\.(conv[12]?)\.conv\.", r".\1.", name)
    return name


_ENCODER, _DECODER = r"encoder\.block\.(?P<block>\d+)", r"decoder_2\.model\.(?P<block>\d+)"
_UNIT = r"\.block\.(?P<part>[0-3])\."
_RULES = (
    (_ENCODER + r"\.block\.(?P<unit>[0-2])" + _UNIT, "acoustic_encoder.block.{block}.res_unit{unit}.{part}."),
    (_DECODER + r"\.block\.(?P<unit>[2-4])" + _UNIT, "acoustic_decoder.block.{block}.res_unit{unit}.{part}."),
    (_ENCODER + r"\.block\.3\.", "acoustic_encoder.block.{block}.snake1."),
    (_ENCODER + r"\.block\.4\.", "acoustic_encoder.block.{block}.conv1."),
    (_DECODER + r"\.block\.0\.", "acoustic_decoder.block.{block}.snake1."),
    (_DECODER + r"\.block\.1\.", "acoustic_decoder.block.{block}.conv_t1."),
    (r"encoder\.block\.0\.", "acoustic_encoder.conv1."),
    (r"decoder_2\.model\.0\.", "acoustic_decoder.conv1."),
    (_ENCODER + r"\.(?=alpha)", "acoustic_encoder.snake1."),
    (_DECODER + r"\.(?=alpha)", "acoustic_decoder.snake1."),
    (_ENCODER + r"\.(?=(weight|bias)$)", "acoustic_encoder.conv2."),
    (_DECODER + r"\.(?=(weight|bias)$)", "acoustic_decoder.conv2."),
    (r"quantizer\.vq\.layers\.(?P<block>\d+)\._codebook\.", "quantizer.quantizers.{layer}.codebook."),
    (r"quantizer\.vq\.layers\.", "quantizer.quantizers."),
    (r"fc_prior\.", "fc."),
    (r"fc_post1\.", "fc1."),
    (r"fc_post2\.", "fc2."),
)


def drop_weight_norm(model: torch.nn.Module) -> None:
    """Makes each weight of upstream's network one that stands alone, as it does in transformers' files.

    Splitting the files' weights into length and direction instead would round each of them a second time.
    """
    from torch.nn.utils import remove_weight_norm

    for module in model.modules():
        if "weight_g" in module._parameters:
            remove_weight_norm(module)


def renamed(weights: dict[str, torch.Tensor], places: Iterable[str]) -> dict[str, torch.Tensor]:
    """Weights of transformers' layout under upstream's names.

    Args:
        weights: by the file's names.
        places: the names that upstream's network has, after `drop_weight_norm`.

    Returns:
        What `places` asks for, as far as it is there, and whatever is left over under its own name.
    """
    found = {old: weights[new_name(old)] for old in places if new_name(old) in weights}
    used = {new_name(old) for old in found}
    return found | {name: value for name, value in weights.items() if name not in used}
