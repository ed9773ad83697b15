"""Which rows make up which optimizer step: drawn from (seed, epoch), the same global batches at every world size."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Row numbers of one forward on one rank; a filler repeats rows with nothing to learn, to keep ranks in step."""

    rows: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True)
class Window:
    """One optimizer step as one rank sees it; every rank has as many micro-batches."""

    step: int  # 1-based global step
    epoch: float  # epochs completed once this step is done
    micro_batches: tuple[MicroBatch, ...]


class Plan:
    """The order of the data: shuffled by epoch, every row once an epoch, the last global batch of an epoch smaller.

    A global batch is `batch_size × grad_accum × world_size` rows, cut into micro-batches in the same order at every
    world size: micro-batch i of the step goes to rank i mod world_size.
    """

    def __init__(self, num_rows: int, *, batch_size: int, grad_accum: int, world_size: int, seed: int):
        if num_rows < 1:
            raise ValueError("there are no rows to train on")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.grad_accum = grad_accum
        self.world_size = world_size
        self.seed = seed
        self.rows_per_step = batch_size * grad_accum * world_size
        self.steps_per_epoch = math.ceil(num_rows / self.rows_per_step)

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the whole run; a part of an epoch is rounded up to a step."""
        steps = math.ceil(epochs * self.steps_per_epoch - 1e-9)
        return min(steps, max_steps) if max_steps else steps

    def describe(self, total_steps: int) -> str:
        """The arithmetic of a step and of the run, as text."""
        return (
            f"global batch: {self.batch_size} rows × {self.grad_accum} accumulation × {self.world_size} ranks "
            f"= {self.rows_per_step} rows\n"
            f"run: {self.num_rows} rows = {self.steps_per_epoch} steps an epoch, {total_steps} steps "
            f"= {total_steps / self.steps_per_epoch:.2f} epochs"
        )

    def order(self, epoch: int) -> list[int]:
        """Row numbers of an epoch (0-based) in the order in which they are trained on."""
        digest = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        rows = list(range(self.num_rows))
        random.Random(int.from_bytes(digest[:8], "little")).shuffle(rows)
        return rows

    def global_batch(self, step: int) -> list[int]:
        """Rows of optimizer step `step` (1-based), over all ranks."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        first = place * self.rows_per_step
        return self.order(epoch)[first : first + self.rows_per_step]

    def windows(self, rank: int, first_step: int, last_step: int) -> Iterator[Window]:
        """This rank's windows of steps `first_step`…`last_step`, both included."""
        epoch_drawn, order = -1, []
        for step in range(first_step, last_step + 1):
            epoch, place = divmod(step - 1, self.steps_per_epoch)
            if epoch != epoch_drawn:
                epoch_drawn, order = epoch, self.order(epoch)
            first = place * self.rows_per_step
            rows = order[first : first + self.rows_per_step]
            done = epoch + min(1.0, (first + len(rows)) / self.num_rows)
            yield Window(step, done, split(rows, self.batch_size, rank, self.world_size))


def split(rows: list[int], batch_size: int, rank: int, world_size: int) -> tuple[MicroBatch, ...]:
    """One rank's share of rows, in micro-batches; as many on every rank, filled up with fillers."""
    chunks = [tuple(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    rounds = math.ceil(len(chunks) / world_size)
    mine = [chunks[i] if i < len(chunks) else None for i in range(rank, rounds * world_size, world_size)]
    return tuple(MicroBatch(chunk) if chunk else MicroBatch(tuple(rows[:1]), filler=True) for chunk in mine)


def evaluation_windows(num_rows: int, batch_size: int, rank: int, world_size: int) -> Iterator[Window]:
    """All rows once, in order, a micro-batch a window; as many windows on every rank."""
    for i, micro_batch in enumerate(split(list(range(num_rows)), batch_size, rank, world_size)):
        yield Window(i + 1, 0.0, (micro_batch,))
