"""Files for transformers' `AutoProcessor`: processor, feature extractor, chat template.

The template builds the tokens of `prompt.tokenize`: Boson's ChatML with texts trimmed and a system turn first. A scene
is a separate message (role "scene") after the system turn.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ...codec.codec_layout import MODEL_TYPE, is_renamed
from ...errors import ConfigError
from ..files.config_values import read_json
from .config import DELAY_TOKEN, TOKENS
from .layouts import BOSON, TRANSFORMERS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SAMPLE_RATE = 24000
RAS_WINDOW, RAS_MAX_REPEATS = 7, 2  # Boson's repetition-aware resampling
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def generation_config(layout: str, config, written: dict) -> dict:
    """generation_config.json for a model without one in its layout.

    Args:
        layout: the model's layout.
        config: its `HiggsAudioConfig`.
        written: its config.json as written.
    """
    if layout == BOSON:
        ids = {key: getattr(config.text_config, key) for key in ("bos_token_id", "eos_token_id")}
        return {"_from_model_config": True, **ids, "pad_token_id": config.pad_token_id}
    ids = {key: written[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**ids, "ras_win_len": RAS_WINDOW, "ras_win_max_num_repeat": RAS_MAX_REPEATS, "use_text_head": True}


def write_processor(folder: Path, codec: str, config) -> None:
    """Writes processor_config.json, preprocessor_config.json and chat_template.jinja.

    Args:
        folder: folder of the model's other files.
        codec: hub id or folder of the codec in transformers' layout, for the processor to load.
        config: the model's `HiggsAudioConfig`.

    Raises:
        ConfigError: `codec` is a folder without such a codec.
    """
    extractor = {
        "feature_extractor_type": "DacFeatureExtractor",
        "feature_size": 1,
        "hop_length": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }
    processor = {
        "audio_bos_token": TOKENS["audio_out_bos"],
        "audio_delay_token": DELAY_TOKEN,
        "audio_eos_token": TOKENS["audio_eos"],
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "audio_token": TOKENS["audio_out"],
        "audio_tokenizer": {
            "audio_tokenizer_class": "HiggsAudioV2TokenizerModel",
            "audio_tokenizer_name_or_path": codec_reference(codec, TRANSFORMERS),
        },
        "feature_extractor": extractor,
        "processor_class": "HiggsAudioV2Processor",
    }
    for name, values in (("processor_config.json", processor), ("preprocessor_config.json", extractor)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(CHAT_TEMPLATE, folder / CHAT_TEMPLATE.name)


def codec_reference(codec: str, layout: str) -> str:
    """The codec's name in processor_config.json and on the card: a hub id unchanged, a folder as an absolute path.

    Raises:
        ConfigError: neither, or a folder without a codec in the model's layout, the only one that its stack loads.
    """
    folder = Path(codec)
    if not os.path.exists(codec):
        if folder.is_absolute() or codec.startswith(".") or codec.count("/") != 1:
            raise ConfigError([f"--codec: {codec} is neither a folder nor a hub id (owner/name)"])
        return codec
    raw = read_json(folder / "config.json", "--codec") if (folder / "config.json").is_file() else {}
    fits, files = is_renamed(raw), f"model_type {MODEL_TYPE!r}"
    if layout == BOSON:
        fits, files = bool(raw) and not fits and (folder / "model.pth").is_file(), "config.json and model.pth"
    if not fits:
        found = f"{codec} is no codec in {layout}'s layout ({files}), and what loads the model loads no other"
        raise ConfigError([f"--codec: {found}; give the hub id"])
    return str(folder.resolve())
