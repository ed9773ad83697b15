"""`python -m higgs_ds merge` for Higgs TTS 3: base + scale · B·A under the published names, beside the codec as it was.

vllm-omni refuses unknown and missing names, sglang-omni speaks noise without a word: so what was written is read again
and compared. The tied copies, which neither server needs, are left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ...errors import ConfigError
from ...files import filling, writing
from ..base import DTYPES, BaseCheckpoint
from ..files.adapter_file import Adapter, merged_rows
from ..files.weight_files import (
    DTYPES_BY_NAME,
    Planned,
    Stored,
    differences,
    refuse,
    write_checkpoint_weights,
)
from .licence import NOTICE
from .load import CODEC, headers, open_base

# Copied as they are, where the base has them.
FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE*"),
    *("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
)


def merge(
    base: BaseCheckpoint,
    adapter: Adapter | None,
    output_dir: Path,
    layout: str,
    *,
    dtype: str | None,
    codec: str,
    texts: Mapping[str, str] | None = None,
) -> int:
    """Writes the merged checkpoint, whole or not at all, and reads it back; bytes of weights written.

    Args:
        adapter: None rewrites the base as it is, or in another dtype.
        layout, codec: of no effect; there is one layout, and the codec is in it.
        dtype: of the language model's weights ("bf16", "fp16", "fp32"); None leaves each as the base has it.
        texts: further files, by name.

    Raises:
        ConfigError: `output_dir` cannot be written, a weight would be NaN or infinite, or the files read back differ
            from what was computed.
    """
    found = headers(base.folder, base.flag)
    stored = base.stored | {name: one for name, one in found.items() if name.startswith(CODEC)}
    planned = [
        Planned(name, one.shape, DTYPES[dtype] if dtype and name in base.stored else DTYPES_BY_NAME[one.dtype])
        for name, one in stored.items()
    ]
    total = sum(tensor.num_bytes for tensor in planned)
    with writing(f"--output_dir: {output_dir}"), filling(output_dir) as beside:
        free = shutil.disk_usage(beside).free
        if free < total:
            raise ConfigError([f"--output_dir: {output_dir} needs {total:,} bytes, {free:,} are free there"])
        for file in (file for pattern in FILES for file in base.folder.glob(pattern)):
            shutil.copyfile(file, beside / file.name)
        (beside / "NOTICE").write_text(_notice(base.folder), encoding="utf-8")
        for name, text in (texts or {}).items():
            (beside / name).write_text(text, encoding="utf-8")
        write_checkpoint_weights(beside, planned, lambda one: _rows(stored[one.name], adapter, one))
        _prove(base, adapter, beside, stored, planned)
    return total


def _notice(folder: Path) -> str:
    """The base's NOTICE with this licence's line, once."""
    own = folder / "NOTICE"
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    return text if NOTICE in text else f"{text.rstrip()}\n{NOTICE}\n".lstrip()


def _rows(stored: Stored, adapter: Adapter | None, planned: Planned) -> Iterator[torch.Tensor]:
    """The tensor to write; a buffer of the codec may hold an infinity, and is passed on as it was."""
    is_codec = planned.name.startswith(CODEC)
    return merged_rows(stored, planned.name.removesuffix(".weight"), adapter, planned, may_be_infinite=is_codec)


def _prove(
    base: BaseCheckpoint, adapter: Adapter | None, folder: Path, stored: dict[str, Stored], planned: list[Planned]
) -> None:
    """Reads a written folder: every name, shape and value, and all that is asked of a base checkpoint.

    Raises:
        ConfigError: a difference, named.
    """
    where = f"--output_dir: {folder} failed verification (nothing is kept)"
    found = headers(folder, "--output_dir")
    problems = differences(found, {tensor.name: tensor.shape for tensor in planned})
    refuse(problems, where)
    for tensor in planned:
        pairs = zip(found[tensor.name].rows(), _rows(stored[tensor.name], adapter, tensor), strict=True)
        if not all(was.dtype == now.dtype and _same_bits(was, now) for now, was in pairs):
            problems.append(f"{tensor.name} is not the sum of base and adapter")
    refuse(problems, where)
    again = open_base(str(folder), None, "--output_dir", folder)
    if again.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ConfigError([f"{where}: its tokenizer differs from the base's"])


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
