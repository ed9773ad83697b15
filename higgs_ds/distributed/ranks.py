"""The ranks of a run, and the host values that they exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..process import say
from .rendezvous import named

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others, and the device that it computes on; by default there are no others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    hosts: tuple[str, ...] = ()  # every rank's; empty where nobody asked

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def table(self, values: list[float]) -> list[list[float]]:
        """Every rank's values, float64: [world_size][len(values)]."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).tolist()

    def gather(self, value: object) -> list:
        """Every rank's Python object, on every rank."""
        if self.world_size == 1:
            return [value]
        out: list = [None] * self.world_size
        dist.all_gather_object(out, value)
        return out

    def each(self, function: Callable[[], T]) -> T:
        """`function()` on every rank; a ConfigError on any rank becomes one on all of them, so that none waits."""
        # Whatever else is raised ends this rank at once; the watch then ends the others.
        value, problems = cast(T, None), []
        try:
            value = function()
        except ConfigError as error:
            problems = error.problems
        found = dict.fromkeys(problem for part in self.gather(problems) for problem in part)
        if found:
            raise ConfigError(list(found))
        return value

    def on_main(self, function: Callable[[], T]) -> T | None:
        """`function()` on rank 0, None on the others; a ConfigError is raised on all of them."""
        return self.each(lambda: function() if self.is_main else None)

    def named(self, ranks: list[int]) -> str:
        """`ranks 2, 3`; where the run is on several hosts, `ranks 2, 3 on node02`."""
        return named(ranks, self.hosts)

    def host_of(self, rank: int) -> str:
        """The host of a rank, in a run on several; empty otherwise."""
        return self.hosts[rank] if len(set(self.hosts)) > 1 else ""

    def seed(self, seed: int) -> None:
        """Seeds torch for dropout, differently on every rank; LoRA's start and the data have their own generators."""
        torch.manual_seed(seed + self.rank)

    def say(self, text: str) -> None:
        """A line to the console, from rank 0 only."""
        if self.is_main:
            say(text)

    def barrier(self) -> None:
        """Waits for every rank."""
        dist.barrier()


class NoWatch:
    """`rank_watch.Watch` where nobody looks: told of every move, does nothing."""

    def at(self, step: int, doing: str) -> None:
        """This rank moved on."""

    def untimed(self, doing: str) -> None:
        """This rank moved on to something that takes as long as it takes."""

    def progressed(self) -> None:
        """This rank goes on with what it is doing."""
