"""The model families that are trained, by the `model_type` of a checkpoint's config.json."""

from __future__ import annotations

from pathlib import Path

from .base import BaseCheckpoint, locate_checkpoint
from .family import Family
from .files.config_values import read_json
from .higgs_v2.family import HiggsV2
from .higgs_v3.family import HiggsV3

HIGGS_V2 = HiggsV2()
FAMILIES: dict[str, Family] = {
    "higgs_audio": HIGGS_V2,  # Boson's name
    "higgs_audio_v2": HIGGS_V2,  # and transformers'
    "higgs_multimodal_qwen3": HiggsV3(),
}


def open_base(name_or_path: str, revision: str | None = None, flag: str = "--base_ckpt") -> BaseCheckpoint:
    """Finds a checkpoint and has its family ask it everything that can be asked without loading it.

    Raises:
        ConfigError: not to be had, of no family, or what its family finds wrong with it.
    """
    folder = locate_checkpoint(name_or_path, revision, flag)
    return family_at(folder, flag).open_base(name_or_path, revision, flag, folder)


def family_at(folder: Path, flag: str = "--base_ckpt") -> Family:
    """The family of a checkpoint's folder; Higgs Audio v2 says what is wrong with one that is of none."""
    return FAMILIES.get(str(read_json(folder / "config.json", flag).get("model_type")), HIGGS_V2)


def family_of(base: BaseCheckpoint) -> Family:
    """The family of an opened checkpoint."""
    return FAMILIES[base.config.model_type]
