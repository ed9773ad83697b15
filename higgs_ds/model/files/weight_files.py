"""Safetensors files, tensor by tensor: headers of a checkpoint, reading a tensor, writing shards and their index.

The library's writer needs all tensors of a file in memory, up to 5 GB; this one holds a single piece of a tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from safetensors import safe_open

from ...errors import ConfigError, first_of, reading

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the hub's usual limit
ROWS_AT_ONCE_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, as described by the file's header."""

    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "BF16"

    def rows(self, at_once_bytes: int = ROWS_AT_ONCE_BYTES) -> Iterator[torch.Tensor]:
        """Yields the tensor in pieces along its first dimension; dropping a piece frees its memory."""
        if not self.shape:
            yield self.read()
            return
        row_bytes = max(1, math.prod(self.shape[1:]) * 4)
        step = max(1, at_once_bytes // row_bytes)
        for start in range(0, self.shape[0], step):
            # Reopened for each piece: a mapped file counts towards this process's memory while it is open.
            with safe_open(self.file, framework="pt") as tensors:
                yield tensors.get_slice(self.key)[start : start + step].clone()

    def read(self) -> torch.Tensor:
        """The whole tensor, memory-mapped: its pages are shared with other processes."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.key)


class MappedWeights(dict[str, Any]):
    """Tensors by name for a loader that fills one module after the other: each is mapped only while it is used.

    Pages of a mapped file count towards the process's memory until the mapping ends.
    """

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).read()

    def copy(self) -> MappedWeights:
        """Itself: transformers' loader copies what it is given, which must not read everything."""
        return self


def all_finite(values: torch.Tensor) -> bool:
    """True if no value is NaN or infinite; one pass suffices, since aminmax propagates NaN."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def header_of(file: Path, where: str) -> dict[str, Stored]:
    """Tensors of a safetensors file by key, read from its header only.

    Raises:
        ConfigError: the file cannot be read; the line begins with `where`.
    """
    with reading(f"{where} cannot be read"), safe_open(file, framework="pt") as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - safe_open is not a mapping
        return {key: Stored(file, key, tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}


def weight_headers(
    folder: Path, name_of: Callable[[str], str | None] = lambda key: key, flag: str = "--base_ckpt"
) -> dict[str, Stored]:
    """Weights of a folder's safetensors files, read from their headers only.

    Args:
        name_of: maps a key of the files to the model's name; None for a weight that the model does not have.

    Returns:
        weights by the model's names; a weight without one by "foreign" and its key.

    Raises:
        ConfigError: files that are missing or unreadable; two weights of the same name.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(folder, f"{flag}: {folder}"):
        for key, stored in header_of(file, f"{flag}: {file}").items():
            name = name_of(key) or f"foreign {key}"
            if name in found:
                raise ConfigError([f"{flag}: {file}: {key} is in {found[name].file.name} too"])
            found[name] = stored
    return found


def _weight_files(folder: Path, where: str) -> list[Path]:
    """The files that transformers would load: a single file, or the shards of the index."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        if found := sorted(file.name for file in folder.glob("*.safetensors")):
            named = ", ".join(found[:3])
            raise ConfigError([f"{where}: holds {named} but neither {SINGLE} nor {INDEX}, which names the shards"])
        raise ConfigError([f"{where}: holds no .safetensors file (pickled checkpoints are not loaded: convert it)"])
    with reading(f"{where}: {INDEX} cannot be used"):
        names = sorted(set(from_json(index.read_bytes())["weight_map"].values()))
        if not names or not all(re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
            raise ValueError("its weight_map must name .safetensors files of the same folder")
        refuse([f"{name} is missing, the index names it" for name in names if not (folder / name).is_file()], where)
    return [folder / name for name in names]


def differences(
    stored: dict[str, Stored],
    wanted: dict[str, tuple[int, ...]],
    name_of: Callable[[str], str] = lambda name: name,
    needs: str = "the model needs",
) -> list[str]:
    """Lists missing, extra, misshapen and quantized weights, a line each.

    Args:
        stored: weights of the files, keyed like `wanted`.
        wanted: shapes by name.
        name_of: maps a missing weight's name to its key in the files.
        needs: subject of the message on a wrong shape.
    """
    floats = ", ".join(sorted(DTYPES_BY_NAME))
    problems = [f"missing weight {name_of(name)} {list(wanted[name])}" for name in wanted if name not in stored]
    for name, one in stored.items():
        if name not in wanted:
            problems.append(f"extra weight {repr(one.key)[1:-1]} {list(one.shape)}")
            continue
        if one.shape != wanted[name]:
            problems.append(f"weight {one.key} has shape {list(one.shape)}, {needs} {list(wanted[name])}")
        if one.dtype not in DTYPES_BY_NAME:
            problems.append(
                f"weight {one.key} is {one.dtype}, expected one of {floats}: quantized weights do not train"
            )
    return problems


def refuse(problems: list[str], where: str) -> None:
    """Raises ConfigError with the first lines of `problems`, if there are any."""
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in first_of(problems)])


@dataclass(frozen=True)
class Planned:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(planned: Iterable[Planned], limit: int = SHARD_BYTES) -> list[list[Planned]]:
    """Splits tensors into files of at most `limit` bytes, in the given order."""
    files: list[list[Planned]] = []
    size = 0
    for tensor in planned:
        if not files or size + tensor.num_bytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.num_bytes
    return files


def write_safetensors(file: Path, planned: list[Planned], pieces_of) -> None:
    """Writes a safetensors file and syncs it to disk.

    Args:
        planned: its tensors, in this order.
        pieces_of: yields the values of a `Planned`, a few rows at a time, in its dtype.

    Raises:
        ValueError: the pieces of a tensor do not add up to its size.
    """
    with file.open("wb") as out:
        out.write(_head(planned))
        for tensor in planned:
            written = 0
            for piece in pieces_of(tensor):
                if piece.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.name}: a piece is {piece.dtype}, expected {tensor.dtype}")
                written += out.write(memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()))
            if written != tensor.num_bytes:
                raise ValueError(f"{tensor.name}: {written} bytes written, expected {tensor.num_bytes}")
        out.flush()
        os.fsync(out.fileno())


def write_sparse(file: Path, planned: list[Planned]) -> None:
    """Writes a safetensors file of zeros as a sparse file: the header, and a hole for the values."""
    head = _head(planned)
    with file.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + sum(tensor.num_bytes for tensor in planned))


def _head(planned: list[Planned]) -> bytes:
    """The header of a safetensors file, preceded by its length."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in planned:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8
    return len(head).to_bytes(8, "little") + head


def write_checkpoint_weights(folder: Path, planned: list[Planned], pieces_of, *, limit: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or numbered shards with `model.safetensors.index.json`."""
    files = shards(planned, limit)
    if len(files) == 1:
        write_safetensors(folder / SINGLE, files[0], pieces_of)
    else:
        write_shards(folder, files, lambda file, tensors: write_safetensors(file, tensors, pieces_of))


def write_shards(folder: Path, files: list[list[Planned]], write) -> None:
    """Writes numbered files, each by `write(file, tensors)`, and `model.safetensors.index.json`."""
    named = {f"model-{number:05d}-of-{len(files):05d}.safetensors": tensors for number, tensors in enumerate(files, 1)}
    for name, tensors in named.items():
        write(folder / name, tensors)
    write_index(folder, named)


def write_index(folder: Path, files: dict[str, list[Planned]]) -> None:
    """Writes `model.safetensors.index.json` of tensors by their file."""
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    total = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
