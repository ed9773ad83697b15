"""Supported model families, by the `model_type` of a checkpoint's config.json."""

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


def open_base(
    name_or_path: str, revision: str | None = None, flag: str = "--base_ckpt", *, weights: bool = True
) -> BaseCheckpoint:
    """Locates a checkpoint and has its family check everything but the weights' values.

    Without `weights`, the files of weights may be missing and are not downloaded.

    Raises:
        ConfigError: not found, of no known family, or invalid for its family.
    """
    folder = locate_checkpoint(name_or_path, revision, flag, weights=weights)
    return family_at(folder, flag).open_base(name_or_path, revision, flag, folder, weights=weights)


def family_at(folder: Path, flag: str = "--base_ckpt") -> Family:
    """The family of a checkpoint's folder; an unknown model_type goes to Higgs Audio v2, which refuses it."""
    return FAMILIES.get(str(read_json(folder / "config.json", flag).get("model_type")), HIGGS_V2)


def family_of(base: BaseCheckpoint) -> Family:
    """The family of an opened checkpoint."""
    return FAMILIES[base.config.model_type]
