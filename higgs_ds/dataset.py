"""From manifests to micro-batches: rows checked and encoded before the first step, then built on demand."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .codes import CodeCache
from .collate import Batch, Collator, build_sample
from .config import ConfigError
from .lengths import LengthIndex
from .manifest import AudioRef, Fault, Row, read_manifest
from .sampler import MicroBatch, Window

if TYPE_CHECKING:
    from .engine import Ranks

# While clips are encoded, ranks tell each other how far they are: soon at first, then this often.
EXCHANGE_SEC = 16.0


@dataclass(frozen=True)
class RowSet:
    """The usable rows of a manifest; `tokens` int32 [rows] where they were asked for."""

    rows: list[Row]
    tokens: np.ndarray | None = None


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
    lengths: LengthIndex | None = None,
    max_tokens: int | None = None,
    outcome: str = "nothing was trained (--skip_bad_rows trains without them)",
) -> tuple[RowSet, RowSet]:
    """The usable rows of the training manifest, and of the validation manifest where there is one.

    Reads, checks and encodes every clip once; the ranks divide the clips among them.

    Args:
        lengths: counts the rows' tokens, where they are wanted.
        moved: told of each clip and row that is done, by this rank.
        max_tokens: with `lengths`, a row of more tokens is a fault.

    Raises:
        ConfigError: all faults of all manifests without `skip_bad_rows`, a manifest without a usable row, or a cache
            that cannot be written to.
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
    problems = _encode(cache, refs, max_duration_sec, ranks, moved)
    usable: list[RowSet] = []
    faults: list[Fault] = []
    for rows, found in read:
        bad = [
            (row, Fault(row.file, row.line, where, problems[ref]))
            for row in rows
            for where, ref in row.audio_refs
            if ref in problems
        ]
        found = found + [fault for _, fault in bad]
        left_out = {row.line for row, _ in bad}
        part = RowSet([row for row in rows if row.line not in left_out])
        if lengths is not None:
            part, too_long = _measured(part.rows, lengths, max_tokens, ranks, moved)
            found += too_long
        faults += sorted(found)
        usable.append(part)
    count = len({(fault.file, fault.line) for fault in faults})
    bad_rows = f"{count} bad row{'s' * (count != 1)}"
    lines = [str(fault) for fault in faults]
    if faults and not skip_bad_rows:
        raise ConfigError([*lines, f"{bad_rows}; {outcome}"])
    for manifest, part in zip(manifests, usable, strict=True):
        if not part.rows:
            raise ConfigError([*lines, f"{manifest}: no usable row is left"])
    if faults:
        warn("\n".join([f"--skip_bad_rows: training without {bad_rows}:", *lines]))
    return usable[0], usable[1] if len(usable) > 1 else RowSet([])


def _encode(
    cache: CodeCache, refs: list[AudioRef], max_duration_sec: float, ranks: Ranks, moved: Callable[[], None]
) -> dict[AudioRef, str]:
    """Encodes what is not cached, every rank its share; what is wrong with the bad clips, on every rank.

    Ranks meet every few seconds, so that none waits for long enough to be taken for dead, and the bar counts all.
    """
    shares = [refs[rank :: ranks.world_size] for rank in range(ranks.world_size)]
    work = cache.ensure_each(shares[ranks.rank], max_duration_sec)
    problems: dict[AudioRef, str] = {}
    done, pause = 0, 0.5

    def advance() -> bool:
        nonlocal done
        until = time.monotonic() + pause
        try:
            for ref, problem in work:
                done += 1
                moved()
                if problem is not None:
                    problems[ref] = problem
                if time.monotonic() > until:
                    return True
        except OSError as error:
            raise ConfigError([f"--codes_cache: {cache.folder} cannot be written to: {error.strerror}"]) from error
        return False

    with tqdm(total=len(refs), desc="encoding clips", unit="clip", disable=not ranks.is_main, mininterval=1.0) as bar:
        more = True
        while more:
            states = ranks.gather((ranks.each(advance), done))
            more = any(state[0] for state in states)
            bar.update(sum(state[1] for state in states) - bar.n)
            pause = min(2 * pause, EXCHANGE_SEC)
    gathered = ranks.gather((problems, cache.keys(shares[ranks.rank])))
    for share, (_, keys) in zip(shares, gathered, strict=True):
        cache.add_keys(share, keys)
    return {ref: problem for part, _ in gathered for ref, problem in part.items()}


def _measured(
    rows: list[Row], lengths: LengthIndex, max_tokens: int | None, ranks: Ranks, moved: Callable[[], None]
) -> tuple[RowSet, list[Fault]]:
    """The rows within the budget with their tokens, and a fault for each of the others."""
    with tqdm(desc="counting tokens", unit="row", disable=not ranks.is_main, mininterval=1.0, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            moved()

        tokens = lengths.count(rows, ranks, progress)
    if max_tokens is None:
        return RowSet(rows, tokens), []
    fits = tokens <= max_tokens
    faults = [
        Fault(rows[i].file, rows[i].line, "row", f"takes {tokens[i]} tokens, over --max_tokens_per_batch {max_tokens}")
        for i in np.flatnonzero(~fits).tolist()
    ]
    return RowSet([row for row, fit in zip(rows, fits.tolist(), strict=True) if fit], tokens[fits]), faults


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
    dataset: MicroBatches, windows: Iterable[Window], *, num_workers: int, pin_memory: bool = False
) -> Iterator[tuple[Window, list[Batch]]]:
    """Each window with its batches, built ahead by `num_workers` processes; windows are drawn as they are needed."""
    windows, ahead = itertools.tee(windows)
    loader = DataLoader(
        dataset,
        sampler=(micro_batch for window in ahead for micro_batch in window.micro_batches),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_outlive_stop_signals,
        generator=torch.Generator(),  # its own: a loader draws from it, and dropout's must be the same after a resume
    )
    others = multiprocessing.active_children()
    batches = iter(loader)
    end_workers = partial(_kill, [process for process in multiprocessing.active_children() if process not in others])
    # A rank that fails keeps the loader alive in its traceback, and would wait at exit for workers that mind no signal.
    atexit.register(end_workers)
    for window in windows:
        yield window, [next(batches) for _ in window.micro_batches]
    atexit.unregister(end_workers)


def _kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()


def _outlive_stop_signals(worker: int) -> None:
    """A queue's SIGTERM reaches every process; the rank still needs its workers to finish the step and save."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def describe_bad_batch(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch's tensors, for saving what a failed check saw."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value.contiguous() for name, value in values.items() if isinstance(value, torch.Tensor)}
