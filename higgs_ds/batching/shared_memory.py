"""A check that /dev/shm has room for the batches of the data workers; without it they die of a bus error."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..errors import ConfigError
from .batch_plan import MicroBatch
from .collate import Batch
from .loader import PREFETCH, MicroBatches

SHARED_MEMORY = Path("/dev/shm")
LOOKED_AT = 8  # rows, from all over the manifest


def check_shared_memory(
    dataset: MicroBatches,
    *,
    num_workers: int,
    batch_size: int,
    max_tokens: int | None,
    kept: int,
    ranks_here: int,
    folder: Path = SHARED_MEMORY,
) -> None:
    """Raises ConfigError for data workers whose batches would not fit, by the largest of a few rows.

    Args:
        num_workers: of one rank, over all of its loaders; each builds `PREFETCH` micro-batches ahead.
        batch_size: rows a micro-batch, unless `max_tokens` bounds its tokens.
        kept: micro-batches that a rank holds on to in shared memory beside those.
        ranks_here: ranks on this machine.
    """
    if not num_workers or not folder.is_dir():
        return
    rows = {len(dataset) * i // LOOKED_AT for i in range(LOOKED_AT)}
    batches = [dataset[MicroBatch((row,))] for row in sorted(rows)]
    size: float = batch_size * max(map(_bytes_of, batches))
    if max_tokens is not None:
        size = max_tokens * max(_bytes_of(batch) / batch.num_tokens for batch in batches)
    needed, free = size * ranks_here * (num_workers * PREFETCH + kept), shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{folder} has {free / 1e6:,.0f} MB free, and the batches that the data workers of {ranks_here} ranks "
        sizes += f"build ahead take about {needed / 1e6:,.0f} MB of it"
        ways = "make it larger (docker: --ipc=host, or --shm-size), or give --num_workers 0"
        raise ConfigError([f"--num_workers: {sizes}; {ways}"])


def _bytes_of(batch: Batch) -> int:
    values = [*vars(batch).values(), *(vars(batch.index).values() if batch.index else ())]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
