"""The rows of every optimizer step: drawn from (seed, epoch), the same global batches at every world size."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .length_buckets import Epoch, micro_batch_costs, pack
from .mixture import Mixture

# Rows of which `Plan.most_expensive` draws the order: some seconds.
ROWS_LOOKED_AT = 10_000_000


@dataclass(frozen=True)
class MicroBatch:
    """Row numbers of one forward on one rank; a filler repeats rows with nothing to learn, to keep ranks in step."""

    rows: tuple[int, ...]
    filler: bool = False
    epoch: int | None = None  # 0-based, for rows that differ by epoch; None: as long as they may become


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step as one rank sees it; every rank has as many micro-batches."""

    step: int  # 1-based global step
    epoch: float  # epochs completed once this step is done
    micro_batches: tuple[MicroBatch, ...]
    # Of several manifests: the share of the step's rows, those of all ranks, that is of each.
    shares: dict[str, float] = field(default_factory=dict)


def total_steps(steps_per_epoch: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimizer steps of a run: the fewer of both, or one epoch where neither is given; part of a step is a step."""
    if epochs is None and max_steps is not None:
        return max_steps
    steps = math.ceil((1.0 if epochs is None else epochs) * steps_per_epoch - 1e-9)
    return steps if max_steps is None else min(steps, max_steps)


class Plan:
    """The order of the data: shuffled by epoch, every row once an epoch, the last global batch of an epoch smaller.

    With a `mixture` an epoch has its rows instead, of several manifests or some of them repeated.

    A global batch is `batch_size × grad_accum × world_size` rows, cut into micro-batches in the same order at every
    world size: micro-batch i of the step goes to rank i mod world_size.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        batch_size: int,
        grad_accum: int,
        world_size: int,
        seed: int,
        mixture: Mixture | None = None,
    ):
        if num_rows < 1:
            raise ValueError("there are no rows to train on")
        self._share_out(mixture or Mixture([num_rows]), grad_accum, world_size, seed)
        self.batch_size = batch_size
        self.rows_per_step = batch_size * self.micro_batches_per_step  # 0 where it is not fixed
        self.steps_per_epoch = math.ceil(self.num_rows / self.rows_per_step)

    def _share_out(self, mixture: Mixture, grad_accum: int, world_size: int, seed: int) -> None:
        self.mixture = mixture
        self.num_rows = len(mixture)  # of an epoch
        self.grad_accum = grad_accum
        self.world_size = world_size
        self.seed = seed
        self.micro_batches_per_step = grad_accum * world_size

    def total_steps(self, epochs: float | None, max_steps: int | None) -> int:
        """Optimizer steps of the whole run; see `total_steps`."""
        return total_steps(self.steps_per_epoch, epochs, max_steps)

    def describe(self, total_steps: int) -> str:
        """The arithmetic of a step and of the run, as text."""
        return (
            f"global batch: {self._micro_batch()} × {self.grad_accum} accumulation × {self.world_size} ranks = "
            f"{self.rows_per_step or self.micro_batches_per_step} {'rows' if self.rows_per_step else 'micro-batches'}\n"
            f"run: {self.num_rows} rows = {self.steps_per_epoch} steps an epoch, {total_steps} steps "
            f"= {total_steps / self.steps_per_epoch:.2f} epochs"
        )

    def _micro_batch(self) -> str:
        return f"{self.batch_size} rows"

    def mean_tokens(self, tokens: np.ndarray | None) -> float | None:
        """Tokens of a micro-batch on average, from those of the rows; None where these were not counted."""
        of_epoch = self.first_epoch(tokens)
        return None if of_epoch is None else float(of_epoch.sum()) / math.ceil(self.num_rows / self.batch_size)

    def first_epoch(self, values: np.ndarray | None) -> np.ndarray | None:
        """Values of each row, [rows], for the rows of the first epoch; None where they are not known."""
        return None if values is None else values[self.mixture.rows(0)]

    def most_expensive(
        self, tokens: np.ndarray, first_step: int, last_step: int, *, padded: bool = False
    ) -> tuple[int, ...]:
        """Row numbers of the micro-batch that costs most, of steps `first_step`…`last_step`; see `micro_batch_costs`.

        Of a very long run its beginning is looked at: as many epochs as hold `ROWS_LOOKED_AT` rows.
        """
        first_epoch, last_epoch = (first_step - 1) // self.steps_per_epoch, (last_step - 1) // self.steps_per_epoch
        found: list[tuple[int, tuple[int, ...]]] = []
        for epoch in range(first_epoch, min(last_epoch, first_epoch + ROWS_LOOKED_AT // self.num_rows) + 1):
            # The rows in the order of training, those before and behind the run's steps left out.
            first = max(0, first_step - 1 - epoch * self.steps_per_epoch) * self.rows_per_step
            behind = min(self.steps_per_epoch, last_step - epoch * self.steps_per_epoch) * self.rows_per_step
            rows = self.epoch(epoch).rows[first:behind]
            starts = np.arange(0, len(rows), self.batch_size)
            costs = micro_batch_costs(np.asarray(tokens, np.int64)[rows], starts, padded=padded)
            start = int(starts[costs.argmax()])
            found.append((int(costs.max()), tuple(rows[start : start + self.batch_size].tolist())))
        return max(found, key=lambda cost_and_rows: cost_and_rows[0])[1]

    def epoch(self, epoch: int) -> Epoch:
        """The micro-batches of an epoch (0-based)."""
        rows = self.mixture.rows(epoch).tolist()
        random.Random(_epoch_seed(self.seed, epoch)).shuffle(rows)
        starts = np.arange(0, len(rows), self.batch_size)
        return Epoch(
            rows=np.array(rows),
            starts=starts,
            sizes=np.diff(np.append(starts, len(rows))),
            step_order=np.arange(self.steps_per_epoch),
            micro_batches_per_step=self.micro_batches_per_step,
        )

    def steps(self, rank: int, first_step: int, last_step: int) -> Iterator[StepPlan]:
        """This rank's share of the steps `first_step`…`last_step`, both included."""
        epoch_drawn = -1
        for step in range(first_step, last_step + 1):
            epoch, place = divmod(step - 1, self.steps_per_epoch)
            if epoch != epoch_drawn:
                epoch_drawn, drawn = epoch, self.epoch(epoch)
                rows_done = drawn.rows_done()
            micro_batches = drawn.step(place)
            mine = spread(micro_batches, drawn.filler or micro_batches[0][:1], rank, self.world_size, epoch)
            shares = self.mixture.shares([row for rows in micro_batches for row in rows])
            yield StepPlan(step, epoch + rows_done[place].item() / self.num_rows, mine, shares)


class TokenPlan(Plan):
    """Micro-batches by token budget: rows of similar length, the same work on all ranks, every row once an epoch.

    A global batch is `grad_accum × world_size` micro-batches of nearly equal cost; which they are depends on their
    number alone, not on how they are spread over ranks. `steps_per_epoch` is the same for all epochs.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        max_tokens: int,
        grad_accum: int,
        world_size: int,
        seed: int,
        round_to: int = 1,
        mixture: Mixture | None = None,
    ):
        """`tokens` [rows], 1 to `max_tokens` each; `round_to`: 8 for a forward that pads rows to a multiple of 8.

        A `mixture` must have been given the same tokens. Raises ValueError for other tokens, and for no rows.
        """
        self._share_out(mixture or Mixture([len(tokens)]), grad_accum, world_size, seed)
        self.max_tokens = max_tokens
        self.rows_per_step = 0
        # Once for all epochs: the longest rows that each place of the mixture may hold.
        self._packing = pack(
            np.asarray(tokens)[self.mixture.longest],
            max_tokens=max_tokens,
            micro_batches_per_step=self.micro_batches_per_step,
            round_to=round_to,
        )
        self.steps_per_epoch = self._packing.steps

    def mean_tokens(self, tokens: np.ndarray | None = None) -> float:
        """Tokens of a micro-batch on average."""
        return self._packing.tokens.sum() / len(self._packing.starts)

    def most_expensive(
        self, tokens: np.ndarray, first_step: int, last_step: int, *, padded: bool = False
    ) -> tuple[int, ...]:
        """Row numbers of a micro-batch than which none of the plan costs more; see `Packing.most_expensive`."""
        return tuple(self.mixture.longest[list(self._packing.most_expensive(padded=padded))].tolist())

    def _micro_batch(self) -> str:
        return f"up to {self.max_tokens} tokens (on average {self.mean_tokens():.0f})"

    def epoch(self, epoch: int) -> Epoch:
        """The micro-batches of an epoch (0-based)."""
        rows = self.mixture.rows(epoch)
        # Not numpy's newer generators: what RandomState draws is the same in every version, and so after a resume.
        drawn = self._packing.epoch(np.random.RandomState(_epoch_seed(self.seed, epoch) & 0xFFFFFFFF))
        shortest = int(rows[self._packing.order[-1]])
        return dataclasses.replace(drawn, rows=rows[drawn.rows], filler=(shortest,))


def make_plan(
    num_rows: int,
    tokens: np.ndarray | None,
    *,
    batch_size: int,
    max_tokens: int | None,
    grad_accum: int,
    world_size: int,
    seed: int,
    round_to: int = 1,
    mixture: Mixture | None = None,
) -> Plan:
    """By token budget where there is one, else of `batch_size` rows a micro-batch."""
    shared: dict[str, Any] = dict(grad_accum=grad_accum, world_size=world_size, seed=seed, mixture=mixture)
    if max_tokens is None:
        return Plan(num_rows, batch_size=batch_size, **shared)
    assert tokens is not None, "a token budget needs the rows' tokens"
    return TokenPlan(tokens, max_tokens=max_tokens, round_to=round_to, **shared)


def _epoch_seed(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")


def spread(
    chunks: list[tuple[int, ...]], filler: tuple[int, ...], rank: int, world_size: int, epoch: int | None = None
) -> tuple[MicroBatch, ...]:
    """One rank's share of a step's micro-batches; as many on every rank, filled up with fillers."""
    # Chunk i goes to rank i mod world_size; in the last round some ranks have none, and compute a filler.
    filled = [*chunks, *[()] * (-len(chunks) % world_size)]
    return tuple(MicroBatch(chunk or filler, not chunk, epoch) for chunk in filled[rank::world_size])


def evaluation_plans(
    num_rows: int,
    batch_size: int,
    rank: int,
    world_size: int,
    *,
    tokens: np.ndarray | None = None,
    max_tokens: int | None = None,
    round_to: int = 1,
) -> Iterator[StepPlan]:
    """All rows once, one micro-batch a step; as many steps on every rank. With `tokens` [rows], by token budget."""
    if tokens is not None and max_tokens is not None:
        plan = TokenPlan(tokens, max_tokens=max_tokens, round_to=round_to, grad_accum=1, world_size=world_size, seed=0)
        yield from plan.steps(rank, 1, plan.steps_per_epoch)
        return
    rows = [tuple(range(first, min(first + batch_size, num_rows))) for first in range(0, num_rows, batch_size)]
    for step, micro_batch in enumerate(spread(rows, (0,), rank, world_size), start=1):
        yield StepPlan(step, 0.0, (micro_batch,))
