"""`python -m higgs_ds merge` for Higgs TTS 3: base + scale · B·A under the published names, with the codec unchanged.

With wrong or missing names vllm-omni fails, but sglang-omni produces noise without any error. So the files are read
back and compared. The tied copies are omitted; neither server needs them.
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

# Copied unchanged if the base has them.
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
    """Writes the merged checkpoint atomically and verifies it; returns the bytes of weights written.

    Args:
        adapter: None rewrites the base unchanged, or in another dtype.
        layout, codec: ignored; there is one layout, which includes the codec.
        dtype: data type of the language model's weights ("bf16", "fp16", "fp32"); None keeps that of the base.
        texts: additional text files, by name.

    Raises:
        ConfigError: `output_dir` is not writable, a weight would be NaN or infinite, or the files read back differ from
            the computed weights.
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
        _verify(base, adapter, beside, stored, planned)
    return total


def _notice(folder: Path) -> str:
    """Returns the base's NOTICE, with this licence's notice added if missing."""
    own = folder / "NOTICE"
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    return text if NOTICE in text else f"{text.rstrip()}\n{NOTICE}\n".lstrip()


def _rows(stored: Stored, adapter: Adapter | None, planned: Planned) -> Iterator[torch.Tensor]:
    """Yields the tensor to write; the codec's tensors are copied, even with infinities."""
    is_codec = planned.name.startswith(CODEC)
    return merged_rows(stored, planned.name.removesuffix(".weight"), adapter, planned, may_be_infinite=is_codec)


def _verify(
    base: BaseCheckpoint, adapter: Adapter | None, folder: Path, stored: dict[str, Stored], planned: list[Planned]
) -> None:
    """Verifies a written folder: every name, shape and value, and all checks of a base checkpoint.

    Raises:
        ConfigError: the differences.
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
