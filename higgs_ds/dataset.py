"""From manifests to micro-batches: rows checked and encoded before the first step, then built on demand."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .codes import CodeCache
from .collate import Batch, Collator, build_sample
from .config import ConfigError
from .manifest import Fault, Row, read_manifest
from .sampler import MicroBatch, Window

if TYPE_CHECKING:
    from .engine import Ranks


def load_rows(
    manifests: list[str],
    *,
    cache: CodeCache,
    num_codebooks: int,
    codebook_size: int,
    max_duration_sec: float,
    skip_bad_rows: bool,
    ranks: Ranks,
    warn: Callable[[str], None],
    moved: Callable[[], None] = lambda: None,
) -> tuple[list[Row], list[Row]]:
    """The usable rows of the training manifest, and of the validation manifest where there is one.

    Reads, checks and encodes every clip once; the ranks divide the clips among them.

    Raises:
        ConfigError: all faults of all manifests without `skip_bad_rows`, or a manifest without a usable row.
    """
    if cache.codec.num_codebooks < num_codebooks:
        raise ConfigError(
            [f"--codec: has {cache.codec.num_codebooks} codebooks, the model needs {num_codebooks}; use its own codec"]
        )
    if cache.codec.codebook_size > codebook_size:
        raise ConfigError(
            [f"--codec: has codes up to {cache.codec.codebook_size - 1}, the model knows 0 to {codebook_size - 1}"]
        )
    read = [read_manifest(manifest) for manifest in manifests]
    refs = list(dict.fromkeys(ref for rows, _ in read for row in rows for _, ref in row.audio_refs))
    with tqdm(desc="encoding clips", unit="clip", disable=not ranks.is_main, mininterval=1.0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            moved()

        problems = cache.ensure(
            refs,
            shard=ranks.rank,
            num_shards=ranks.world_size,
            max_duration_sec=max_duration_sec,
            progress=progress,
        )
    gathered = ranks.gather((problems, cache.known_hashes()))
    problems = {ref: problem for part, _ in gathered for ref, problem in part.items()}
    for _, hashes in gathered:
        cache.add_hashes(hashes)
    usable: list[list[Row]] = []
    faults: list[Fault] = []
    for rows, found in read:
        bad = [
            (row, Fault(row.file, row.line, where, problems[ref]))
            for row in rows
            for where, ref in row.audio_refs
            if ref in problems
        ]
        faults += sorted(found + [fault for _, fault in bad])
        left_out = {row.line for row, _ in bad}
        usable.append([row for row in rows if row.line not in left_out])
    count = len({(fault.file, fault.line) for fault in faults})
    bad_rows = f"{count} bad row{'s' * (count != 1)}"
    lines = [str(fault) for fault in faults]
    if faults and not skip_bad_rows:
        raise ConfigError([*lines, f"{bad_rows}; nothing was trained (--skip_bad_rows trains without them)"])
    for manifest, rows in zip(manifests, usable, strict=True):
        if not rows:
            raise ConfigError([*lines, f"{manifest}: no usable row is left"])
    if faults:
        warn("\n".join([f"--skip_bad_rows: training without {bad_rows}:", *lines]))
    return usable[0], usable[1] if len(usable) > 1 else []


class MicroBatches(Dataset):
    """`dataset[MicroBatch]` is the collated `Batch`."""

    def __init__(self, rows: list[Row], tokenizer, cache: CodeCache, collator: Collator):
        self.rows = rows
        self.tokenizer = tokenizer
        self.cache = cache
        self.collator = collator

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        samples = [build_sample(self.rows[i], self.tokenizer, self._codes) for i in micro_batch.rows]
        return self.collator(samples, filler=micro_batch.filler)

    def _codes(self, ref) -> torch.Tensor:
        return torch.from_numpy(self.cache.get(ref).astype("int64"))


def load_windows(
    dataset: MicroBatches, windows: list[Window], *, num_workers: int, pin_memory: bool = False
) -> Iterator[tuple[Window, list[Batch]]]:
    """Each window with its batches, built ahead by `num_workers` processes."""
    order = [micro_batch for window in windows for micro_batch in window.micro_batches]
    loader = DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_outlive_stop_signals,
        generator=torch.Generator(),  # its own: a loader draws from it, and dropout's must be the same after a resume
    )
    batches = iter(loader)
    for window in windows:
        yield window, [next(batches) for _ in window.micro_batches]


def _outlive_stop_signals(worker: int) -> None:
    """A queue's SIGTERM reaches every process; the rank still needs its workers to finish the step and save."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def describe_bad_batch(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch's tensors, for saving what a failed check saw."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value.contiguous() for name, value in values.items() if isinstance(value, torch.Tensor)}
