"""The base checkpoint of any family: folder or hub id, config, tokenizer, spec, weight headers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..errors import ConfigError, reading
from ..options.sections import DEFAULT_CODEC, revision_of
from .files.weight_files import Stored
from .spec import ModelSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BaseCheckpoint:
    """A base checkpoint whose files have been checked; no weight is loaded yet."""

    name: str  # as the user gave it: a folder or a hub id
    revision: str | None
    folder: Path
    layout: str  # one of its family's `layouts`
    config: Any  # its family's config class
    tokenizer: PreTrainedTokenizerFast
    spec: ModelSpec
    notes: tuple[str, ...]  # lines to print once
    flag: str = "--base_ckpt"  # the flag that named it, for messages
    stored: dict[str, Stored] = field(default_factory=dict)  # by the model's names, in the model's order
    bundles_codec: bool = False  # if so, the default of --codec

    @property
    def codec(self) -> tuple[str, str | None]:
        """The default codec, and its revision."""
        if not self.bundles_codec:
            return DEFAULT_CODEC, None
        return self.name, None if Path(self.name).is_dir() else self.revision


def locate_checkpoint(
    name_or_path: str, revision: str | None = None, flag: str = "--base_ckpt", *, weights: bool = True
) -> Path:
    """The folder of a base checkpoint; a hub id is downloaded (safetensors, JSON, tokenizer and licence files only).

    Args:
        weights: also download the weights; without them it is a matter of megabytes.

    Raises:
        ConfigError: neither a folder nor a hub id that can be downloaded.
    """
    with reading(f"{flag}: {name_or_path!r}"):
        name_or_path.encode()  # it will be written to configs and cards
        folder = Path(name_or_path)
        if folder.is_dir():
            return folder
    if folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") != 1:
        raise ConfigError([f"{flag}: {name_or_path} is neither a folder nor a hub id (owner/name)"])
    from huggingface_hub import snapshot_download

    revision = revision_of(name_or_path, revision)
    patterns = "*.json tokenizer* *.txt *.jinja LICENSE* NOTICE*".split() + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        where = f"{flag}: {name_or_path} (revision {revision})"
        raise ConfigError([f"{where} cannot be downloaded from the hub: {error}"]) from error


def load_tokenizer(folder: Path, flag: str = "--base_ckpt") -> PreTrainedTokenizerFast:
    """Loads the checkpoint's tokenizer without running any code from the checkpoint."""
    from transformers import AutoTokenizer

    with reading(f"{flag}: {folder}: the tokenizer cannot be loaded"):
        if lacks := [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]:
            raise ValueError(f"it lacks {' and '.join(lacks)}")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
