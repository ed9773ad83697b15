"""Rows into micro-batches of equal cost: sorted by length, cut under a token budget, dealt into steps.

numpy only, and no loop over rows: a million rows take seconds.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np

# Rows this much shorter than a cell's longest still belong to it; within a cell they are shuffled every epoch.
SPREAD = 0.02
# A row's length is blurred by up to this much before sorting, so that rows cross the borders of cells too.
BLUR = 0.02
# Micro-batches whose costs differ by less may swap places, and with them the steps they are in.
COST_BLUR = 0.002
# Smaller micro-batches may balance better; not smaller than this share of the budget.
LEAST_FILL = 0.75
CANDIDATES = 8


@dataclass(frozen=True)
class Packing:
    """The cut of an epoch's rows; the same for all epochs, so that each has as many steps.

    A cell is a run of rows of nearly one length in `order`; its micro-batches hold the same number of rows, each.
    `steps × micro_batches_per_step` may be more than there are micro-batches; fillers fill the last step.
    """

    tokens: np.ndarray  # int64 [rows], rounded up as the forward does
    order: np.ndarray  # int64 [rows], row numbers from long to short
    cell: np.ndarray  # int32 [rows], the cell of each row of `order`
    starts: np.ndarray  # int64 [micro-batches], where each begins in `order`
    steps: int
    micro_batches_per_step: int

    def most_expensive(self, *, padded: bool = False) -> tuple[int, ...]:
        """Row numbers of a micro-batch than which none costs more in any epoch, but for what `BLUR` moves about.

        `padded`: every row costs what the longest beside it does.
        """
        # Unshuffled, the first micro-batch of a cell holds the cell's longest rows.
        place = int(np.argmax(micro_batch_costs(self.tokens[self.order], self.starts, padded=padded)))
        stops = np.append(self.starts, len(self.order))
        return tuple(self.order[stops[place] : stops[place + 1]].tolist())

    def epoch(self, random: np.random.RandomState) -> Epoch:
        """One epoch's shuffle, drawn from `random`."""
        count = len(self.order)
        # The p-th row is never longer than (1 + BLUR) × the length that `pack` cut the p-th place for.
        blurred = self.tokens[self.order] * (1 + BLUR * random.random_sample(count))
        order = self.order[np.argsort(-blurred, kind="stable")]
        order = order[np.lexsort((random.random_sample(count), self.cell))]
        tokens = self.tokens[order]
        sizes = np.diff(np.append(self.starts, count))
        longest = np.maximum.reduceat(tokens, self.starts)
        cost = longest * sizes * (1 + COST_BLUR * random.random_sample(len(sizes)))
        by_cost = np.argsort(-cost, kind="stable")
        # Neighbours by cost make a step: equal work on all ranks, of several lengths.
        step_order = random.permutation(self.steps)
        return Epoch(order, self.starts[by_cost], sizes[by_cost], step_order, self.micro_batches_per_step)


@dataclass(frozen=True)
class Epoch:
    """The micro-batches of one epoch, and the order of its steps."""

    rows: np.ndarray  # int64 [rows], so that a micro-batch is a slice of it
    starts: np.ndarray  # int64 [micro-batches], by cost
    sizes: np.ndarray  # int64 [micro-batches], rows in each
    step_order: np.ndarray  # int64 [steps]
    micro_batches_per_step: int
    filler: tuple[int, ...] = ()  # rows of a filler; the first row of its step where there are none

    def step(self, place: int) -> list[tuple[int, ...]]:
        """The micro-batches of the epoch's step `place` (0-based), as row numbers; the most expensive first."""
        first = int(self.step_order[place]) * self.micro_batches_per_step
        places = slice(first, first + self.micro_batches_per_step)
        return [
            tuple(self.rows[start : start + size].tolist())
            for start, size in zip(self.starts[places].tolist(), self.sizes[places].tolist(), strict=True)
        ]

    def rows_done(self) -> np.ndarray:
        """int64 [steps]: rows of the epoch trained on after each step."""
        return _in_steps(self.sizes, self.micro_batches_per_step).sum(1)[self.step_order].cumsum()


def micro_batch_costs(tokens: np.ndarray, starts: np.ndarray, *, padded: bool = False) -> np.ndarray:
    """int64 [micro-batches]: tokens that each computes, of rows in a line; `padded` to its longest row, each row."""
    if padded:
        return np.maximum.reduceat(tokens, starts) * np.diff(np.append(starts, len(tokens)))
    return np.add.reduceat(tokens, starts)


def pack(tokens: np.ndarray, *, max_tokens: int, micro_batches_per_step: int, round_to: int = 1) -> Packing:
    """The cut that computes least over all steps, counting the slowest micro-batch of each for all of them.

    Rows × longest row is at most `max_tokens` in every micro-batch, and so is the sum of its tokens.

    Args:
        tokens: [rows], 1 to `max_tokens` each.
        round_to: what the forward rounds the longest row of a micro-batch up to.

    Raises:
        ValueError: no rows, or one that is empty or longer than the budget.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    if len(tokens) == 0:
        raise ValueError("there are no rows to train on")
    if tokens.min() < 1 or tokens.max() > max_tokens:
        raise ValueError(f"rows must have 1 to {max_tokens} tokens, found {tokens.min()} to {tokens.max()}")
    tokens = np.minimum(-(-tokens // round_to) * round_to, max_tokens)
    order = np.argsort(-tokens, kind="stable")
    longest_first = tokens[order]
    limit = max(1, int(max_tokens / (1 + BLUR)))
    fewest = -(-_count(longest_first, limit) // micro_batches_per_step)
    least, best = math.inf, limit
    for steps in range(fewest, fewest + CANDIDATES):
        budget = _smallest_budget(longest_first, limit, steps * micro_batches_per_step)
        if least < math.inf and budget < LEAST_FILL * limit:
            break
        waste = _waste(longest_first, budget, micro_batches_per_step)
        if waste < least:
            least, best = waste, budget
    cells = _cells(longest_first, best)
    starts = _starts(cells)
    lengths = np.array([stop - first for first, _, stop in cells])
    return Packing(
        tokens=tokens,
        order=order,
        cell=np.repeat(np.arange(len(cells), dtype=np.int32), lengths),
        starts=starts,
        steps=-(-len(starts) // micro_batches_per_step),
        micro_batches_per_step=micro_batches_per_step,
    )


def _cells(longest_first: np.ndarray, budget: int) -> list[tuple[int, int, int]]:
    """(first row, rows a micro-batch, row after the last) of each cell, as places from long to short."""
    negative, count = -longest_first, len(longest_first)
    cells, at = [], 0
    while at < count:
        longest = int(longest_first[at])
        rows = max(1, budget // longest)
        # A whole number: for a fraction numpy would make floats of a million lengths at each call.
        shortest = np.int64(math.ceil(longest * (1 - SPREAD)))
        similar = int(np.searchsorted(negative, -shortest, side="right")) - at
        stop = min(count, at + max(1, similar // rows) * rows)
        cells.append((at, rows, stop))
        at = stop
    return cells


def _starts(cells: list[tuple[int, int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(first, stop, rows) for first, rows, stop in cells])


def _count(longest_first: np.ndarray, budget: int) -> int:
    """Micro-batches of an epoch."""
    return sum(-(-(stop - first) // rows) for first, rows, stop in _cells(longest_first, budget))


def _smallest_budget(longest_first: np.ndarray, limit: int, most: int) -> int:
    """The smallest budget with at most `most` micro-batches; `limit` is known to be one."""
    return 1 + bisect.bisect_left(range(1, limit), True, key=lambda budget: _count(longest_first, budget) <= most)


def _waste(longest_first: np.ndarray, budget: int, per_step: int) -> float:
    """Computed ÷ real tokens with and without the padding of rows in it, added up."""
    starts = _starts(_cells(longest_first, budget))
    costs = [micro_batch_costs(longest_first, starts, padded=padded) for padded in (True, False)]
    by_cost = np.argsort(-costs[0], kind="stable")
    return sum(slowest(cost[by_cost], per_step).sum() * per_step / longest_first.sum() for cost in costs)


def slowest(costs: np.ndarray, together: int) -> np.ndarray:
    """The largest cost of every `together` micro-batches that run at a time."""
    return _in_steps(costs, together).max(axis=1)


def _in_steps(values: np.ndarray, together: int) -> np.ndarray:
    """[steps, together]: values of micro-batches, 0 for the fillers of the last step."""
    return np.pad(values, (0, -len(values) % together)).reshape(-1, together)
