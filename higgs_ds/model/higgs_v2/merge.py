"""`python -m higgs_ds merge`: write base + scale · B·A as a checkpoint in either layout, tensor by tensor.

Servers do not report a missing weight; they speak noise. So the written files are read back and compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ...errors import ConfigError
from ...files import filling, writing
from ..base import DTYPES, BaseCheckpoint, load_tokenizer
from ..files.adapter_file import Adapter, merged_rows
from ..files.config_values import read_json
from ..files.weight_files import (
    DTYPES_BY_NAME,
    INDEX,
    Planned,
    differences,
    refuse,
    weight_headers,
    write_checkpoint_weights,
)
from .checkpoint import check_tokenizer
from .config import token_ids, transformers_config, without_private
from .layouts import BOSON, TRANSFORMERS, boson_names, name_in
from .processor_files import TOKENIZER_FILES, generation_config, write_processor

SAMPLED_TENSORS = 12  # of merged and of other tensors, read back and recomputed


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
    """Writes the merged checkpoint, whole or not at all, and reads it back.

    Args:
        base: the base checkpoint.
        adapter: None rewrites the base in another layout or dtype.
        output_dir: new or empty; it receives the files once all of them have been verified.
        layout: layout to write.
        dtype: dtype of the weights ("bf16", "fp16", "fp32"); None keeps each as in the base.
        codec: hub id or folder of the audio tokenizer that transformers' processor loads.
        texts: further files by name: README.md, the voice record.

    Returns:
        Bytes of weights written.

    Raises:
        ConfigError: `output_dir` is not writable, the model has no equivalent in `layout`, a weight would be NaN or
            infinite, or the files read back differ.
    """
    planned = _plan(base, layout, dtype)
    total = sum(tensor.num_bytes for tensor in planned.values())
    by_name = {tensor.name: name for name, tensor in planned.items()}

    def rows_of(tensor: Planned) -> Iterator[torch.Tensor]:
        name = by_name[tensor.name]
        return merged_rows(base.stored[name], name.removesuffix(".weight"), adapter, tensor)

    with writing(f"--output_dir: {output_dir}"), filling(output_dir) as beside:
        free = shutil.disk_usage(beside).free
        if free < total:
            raise ConfigError([f"--output_dir: {output_dir} needs {total:,} bytes, {free:,} are free there"])
        _write_files(base, beside, layout, dtype, codec)
        for name, text in (texts or {}).items():
            (beside / name).write_text(text, encoding="utf-8")
        write_checkpoint_weights(beside, list(planned.values()), rows_of)
        prove(base, adapter, beside, layout, planned)
        prove_tokenizer(base, beside)
    return total


def _plan(base: BaseCheckpoint, layout: str, dtype: str | None) -> dict[str, Planned]:
    """Tensors to write, in the model's order, by boson_multimodal's names."""
    return {
        name: Planned(name_in(layout, name), one.shape, DTYPES[dtype] if dtype else DTYPES_BY_NAME[one.dtype])
        for name, one in base.stored.items()
    }


def _write_files(base: BaseCheckpoint, folder: Path, layout: str, dtype: str | None, codec: str) -> None:
    """Writes tokenizer, configs and processor files."""
    for name in TOKENIZER_FILES:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    kinds = {one.dtype for one in base.stored.values()}
    torch_dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype or "") or (
        str(DTYPES_BY_NAME[kinds.pop()]).removeprefix("torch.") if len(kinds) == 1 else "float32"
    )
    same = layout == base.layout
    if same:
        config = read_json(base.folder / "config.json", "--base_ckpt")
        config["torch_dtype" if layout == BOSON or "torch_dtype" in config else "dtype"] = torch_dtype
    elif layout == BOSON:
        config = {**base.config.to_diff_dict(), "torch_dtype": torch_dtype}
    else:
        tokens = token_ids(base.folder)
        config = transformers_config(base.config, tokens, torch_dtype, f"--layout transformers: {base.folder}")
    _write_json(folder / "config.json", without_private(config))
    kept = base.folder / "generation_config.json"
    if same and kept.is_file():
        shutil.copyfile(kept, folder / kept.name)
    else:
        _write_json(folder / kept.name, generation_config(layout, base.config, config))
    if layout == TRANSFORMERS:
        write_processor(folder, codec, base.config)


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prove(
    base: BaseCheckpoint, adapter: Adapter | None, folder: Path, layout: str, planned: dict[str, Planned]
) -> tuple[int, int]:
    """Verifies a written folder: every name, shape and dtype, and the values of a sample of tensors.

    Returns:
        the numbers of merged and of other tensors whose values were compared.

    Raises:
        ConfigError: naming each difference.
    """
    where = f"--output_dir: {folder} failed verification (nothing is kept)"
    found = weight_headers(folder, boson_names(layout), "--output_dir")
    wanted = {name: tensor.shape for name, tensor in planned.items()}
    problems = differences(found, wanted, lambda name: name_in(layout, name))
    index = folder / INDEX
    if not problems and index.is_file():
        listed = read_json(index, "--output_dir")["weight_map"]
        if listed != {one.key: one.file.name for one in found.values()}:
            problems.append(f"{index.name} does not match the weights in the files")
    refuse(problems, where)
    touched = adapter.weights.keys() | adapter.whole.keys() if adapter else set()
    merged = {name for name in planned if name.removesuffix(".weight") in touched}
    changed, others = ([name for name in planned if (name in merged) is is_so] for is_so in (True, False))
    for name in _spread(changed) + _spread(others):
        module, tensor = name.removesuffix(".weight"), planned[name]
        source = adapter.whole[module] if adapter and module in adapter.whole else base.stored[name]
        start = 0
        for written, was in zip(found[name].rows(), source.rows(), strict=True):
            if adapter and module in adapter.weights:
                a, b = adapter.weights[module]
                update = torch.matmul(b[start : start + len(was)], a) * adapter.config.scale
                was = was.to(torch.float32) + update
            start += len(was)
            if written.dtype != tensor.dtype or not torch.equal(written, was.to(tensor.dtype)):
                problems.append(f"{tensor.name} is not the sum of base and adapter")
                break
    refuse(problems, where)
    return len(_spread(changed)), len(_spread(others))


def prove_tokenizer(base: BaseCheckpoint, folder: Path) -> None:
    """Loads the tokenizer of a written folder. Raises ConfigError if it differs from the base's in any token."""
    was, now = base.tokenizer, load_tokenizer(folder, "--output_dir")
    if was.get_vocab() != now.get_vocab() or was.special_tokens_map != now.special_tokens_map:
        why = f"its tokenizer differs from the base's; {base.folder} needs files that are not copied"
        raise ConfigError([f"--output_dir: {folder}: {why}"])
    check_tokenizer(folder, now, base.config, "--output_dir")


def _spread(names: list[str]) -> list[str]:
    """Picks up to `SAMPLED_TENSORS` names, evenly from first to last."""
    if len(names) <= SAMPLED_TENSORS:
        return names
    return [names[place * (len(names) - 1) // (SAMPLED_TENSORS - 1)] for place in range(SAMPLED_TENSORS)]
