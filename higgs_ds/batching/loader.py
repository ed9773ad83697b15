"""Micro-batches, built on demand from rows whose clips are encoded."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from ..data.code_cache import CodeCache
from ..data.manifest import AudioRef, Row
from ..distributed.stop import STOP_SIGNALS
from .batch_plan import MicroBatch, StepPlan
from .collate import Batch, Collator, build_sample
from .references import References

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFETCH = 4  # micro-batches that a data worker builds ahead
WORKERS_END_SEC = 5.0  # for what a worker has in hand


class MicroBatches(Dataset):
    """`dataset[MicroBatch]` is the collated `Batch`."""

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        cache: CodeCache,
        collator: Collator,
        references: References | None = None,
    ):
        self.rows = rows
        self.references = references
        self.tokenizer = tokenizer
        self.cache = cache
        self.collator = collator

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        references = self.references
        rows = [references.row(i, micro_batch.epoch) if references else self.rows[i] for i in micro_batch.rows]
        samples = [build_sample(row, self.tokenizer, self._codes, self.collator.spec.tokenize) for row in rows]
        return self.collator(samples, filler=micro_batch.filler)

    def _codes(self, ref: AudioRef) -> torch.Tensor:
        return torch.from_numpy(self.cache.get(ref).astype("int64"))


@contextlib.contextmanager
def load_steps(
    dataset: MicroBatches, plans: Iterable[StepPlan], *, num_workers: int, pin_memory: bool = False
) -> Iterator[Iterator[tuple[StepPlan, list[Batch]]]]:
    """Each step's plan with its batches, built ahead by `num_workers` processes, which end with the context.

    Plans are drawn as they are needed.
    """
    # A tokenizer that was used here would have every worker warn of its threads; without them nothing is slower.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plans, ahead = itertools.tee(plans)
    loader = DataLoader(
        dataset,
        sampler=(micro_batch for plan in ahead for micro_batch in plan.micro_batches),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_outlive_stop_signals,
        generator=torch.Generator(),  # its own: a loader draws from it, and dropout's must be the same after a resume
    )
    # A worker begins with them blocked, so that none ends it before it can ignore them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield ((plan, [next(batches) for _ in plan.micro_batches]) for plan in plans)
    finally:
        if num_workers:
            # Torch waits five seconds for each worker, and one may be stuck: that holds up neither the adapter nor the
            # end of the process, which kills what is left of them. It has no public name.
            ending = threading.Thread(target=batches._shutdown_workers, daemon=True)  # type: ignore[attr-defined]
            ending.start()
            ending.join(WORKERS_END_SEC)


def _outlive_stop_signals(worker: int) -> None:
    """A queue's SIGTERM reaches every process; the rank still needs its workers to finish the step and save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def describe_bad_batch(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch's tensors, for saving what a failed check saw."""
    return {name: value.contiguous() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
