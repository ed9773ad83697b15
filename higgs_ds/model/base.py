"""The base checkpoint of any family: a folder or a hub id, a config, a tokenizer, spec, weights on the disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..errors import ConfigError, reading
from ..options.sections import revision_of
from .files.weight_files import Stored
from .spec import ModelSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BaseCheckpoint:
    """A base checkpoint whose every file was looked at, before any of its weights is loaded."""

    name: str  # as the user gave it: a folder or a hub id
    revision: str | None
    folder: Path
    layout: str  # of its files, one of its family's `layouts`
    config: Any  # of its family
    tokenizer: PreTrainedTokenizerFast
    spec: ModelSpec
    notes: tuple[str, ...]  # what the user should read once, a line each
    flag: str = "--base_ckpt"  # that named it
    stored: dict[str, Stored] = field(default_factory=dict)  # weights by the model's names, in its order


def locate_checkpoint(
    name_or_path: str, revision: str | None = None, flag: str = "--base_ckpt", *, weights: bool = True
) -> Path:
    """The folder of a base checkpoint; a hub id is downloaded (safetensors, JSON and tokenizer files only).

    Args:
        weights: whether they are needed too; without them it is a matter of megabytes.

    Raises:
        ConfigError: neither a folder nor a hub id that can be had.
    """
    with reading(f"{flag}: {name_or_path!r}"):
        name_or_path.encode()  # it is to stand in configs and cards
        folder = Path(name_or_path)
        if folder.is_dir():
            return folder
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") != 1:
        raise ConfigError([f"{flag}: {name_or_path} is neither a folder nor a hub id (owner/name)"])
    from huggingface_hub import snapshot_download

    revision = revision_of(name_or_path, revision)
    patterns = ["*.json", "tokenizer*", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        where = f"{flag}: {name_or_path} (revision {revision})"
        raise ConfigError([f"{where} cannot be had from the hub: {error}"]) from error


def load_tokenizer(folder: Path, flag: str = "--base_ckpt") -> PreTrainedTokenizerFast:
    """The checkpoint's own tokenizer; nothing in the checkpoint is run."""
    from transformers import AutoTokenizer

    with reading(f"{flag}: {folder}: the tokenizer cannot be loaded"):
        if lacks := [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]:
            raise ValueError(f"it lacks {' and '.join(lacks)}")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
